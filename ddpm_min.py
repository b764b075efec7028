"""Denoising diffusion probabilistic models (Ho, Jain, Abbeel 2020, arXiv 2006.11239).

Tensors in, tensors out, no files; at the end, a PNG encoder. Equation numbers are that
paper's unless another is named. Index rule: t runs from 1 to T and index 0 is the data,
so beta_0 = 0 and alpha_bar_0 = 1.

    diffusion = GaussianDiffusion(linear_schedule())
    model = UNet(channels=1)                 # or any callable model(x_t, t) -> eps
    loss = diffusion.loss(model, x0)         # Algorithm 1, x0 (B, 1, 28, 28) in [-1, 1]
    for x in diffusion.sample(model, (16, 1, 28, 28)):      # Algorithm 2: x_T, ..., x_0
        pass                                 # data outside [-1, 1] want clip=False
"""
import math
import struct
import zlib
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def linear_schedule(T=1000, beta_1=1e-4, beta_T=0.02):
    """beta_1..beta_T, float64 (T,), evenly spaced (Sec. 4).
    For T < 1000 scale both ends by 1000 / T, or alpha_bar_T stays far from 0."""
    return torch.linspace(beta_1, beta_T, T, dtype=torch.float64)


def cosine_schedule(T=1000, s=0.008):
    """beta_1..beta_T, float64 (T,) (Nichol & Dhariwal 2021, Eq. 17)."""
    u = torch.arange(T + 1, dtype=torch.float64) / T
    f = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2
    return _betas(f / f[0])


def laplace_schedule(T=1000, mu=-1.5, b=1.0):
    """beta_1..beta_T, float64 (T,): log(alpha_bar / (1 - alpha_bar)) ~ Laplace(mu, b)
    (Hang et al. 2024: mu = 0, b = 0.5; this project's defaults suit small digits)."""
    u = torch.arange(T + 1, dtype=torch.float64) / (T + 1)      # < 1: alpha_bar_T > 0
    law = torch.distributions.Laplace(torch.tensor(mu, dtype=u.dtype), b)
    return _betas(torch.sigmoid(law.icdf(1 - u)))


def _betas(alpha_bar):
    """beta_1..beta_T, at most 0.999 (Nichol & Dhariwal 2021, Sec. 3.2)."""
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


class GaussianDiffusion(nn.Module):
    """The processes q and p for x of any shape (B, ...), from betas (T,) inside (0, 1).
    Buffers (T+1,): beta, alpha, alpha_bar, one_minus_alpha_bar. t: int64 (B,) in 1..T.
    A model: any callable (x_t, t), or (x_t, t, y) with labels y, that returns eps of
    x_t's shape. ValueError for shapes, dtypes, t that do not fit."""
    def __init__(self, betas, dtype=torch.float32):
        super().__init__()
        if betas.dim() != 1 or not len(betas) or not 0 < betas.min() <= betas.max() < 1:
            raise ValueError(f"want betas (T,) inside (0, 1), got {betas.tolist()}")
        self.T = len(betas)
        beta = F.pad(betas.double(), (1, 0))            # beta_0 = 0
        log_alpha_bar = torch.log1p(-beta).cumsum(0)    # alpha_bar_0 = 1
        self.register_buffer("beta", beta)
        self.register_buffer("alpha", 1 - beta)
        self.register_buffer("alpha_bar", log_alpha_bar.exp())
        # Not computed later: 1 - alpha_bar_1 in float32 has three correct digits.
        self.register_buffer("one_minus_alpha_bar", -torch.expm1(log_alpha_bar))
        self.to(dtype)

    def _check(self, x, t, other=None):
        """ValueError unless t fits x (B, ...), and so does a tensor beside it."""
        if not x.is_floating_point() or self.beta.dtype.itemsize < 4:
            raise ValueError(f"want float x and schedule: {x.dtype}, {self.beta.dtype}")
        if t.dtype != torch.int64 or t.shape != x.shape[:1]:
            raise ValueError(f"want t int64 ({len(x)},), got {t}")
        if t.is_cpu and (t.min() < 1 or t.max() > self.T):      # a GPU would wait here
            raise ValueError(f"want t in 1..{self.T}, got {t}")
        if other is not None and other.shape != x.shape:
            raise ValueError(f"want {x.shape}, got {other.shape}")

    def _at(self, values, t, x):
        """values[t] as (B, 1, ...), in x's dtype, to broadcast over x (B, ...)."""
        return values[t].to(x.dtype).reshape([-1] + [1] * (x.dim() - 1))

    def _signal_noise(self, x, t, other=None):
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t) of Eq. 4, each (B, 1, ...)."""
        self._check(x, t, other)
        return self.signal_noise(t, x)

    def signal_noise(self, t, x):
        """sqrt(alpha_bar_t), sqrt(1 - alpha_bar_t) of Eq. 4, (B, 1, ...), in x's dtype."""
        signal = self._at(self.alpha_bar.sqrt(), t, x)
        noise = self._at(self.one_minus_alpha_bar.sqrt(), t, x)
        return signal, noise

    def q_sample(self, x0, t, eps):
        """x_t ~ q(x_t | x0), (B, ...), for eps ~ N(0, I) of x0's shape (Eq. 4)."""
        signal, noise = self._signal_noise(x0, t, eps)
        return signal * x0 + noise * eps

    def q_posterior(self, x0, x_t, t):
        """Mean (B, ...), variance (B, 1, ...) of q(x_{t-1} | x_t, x0) (Eqs. 6, 7)."""
        self._check(x_t, t, x0)
        alpha = self._at(self.alpha, t, x_t)
        beta = self._at(self.beta, t, x_t)
        rest = self._at(self.one_minus_alpha_bar, t, x_t)
        rest_prev = self._at(self.one_minus_alpha_bar, t - 1, x_t)
        alpha_bar_prev = self._at(self.alpha_bar, t - 1, x_t)
        weight_0 = alpha_bar_prev.sqrt() * beta / rest
        weight_t = alpha.sqrt() * rest_prev / rest
        return weight_0 * x0 + weight_t * x_t, rest_prev / rest * beta

    def predict_x0(self, x_t, t, eps):
        """The x0 (B, ...) that eps implies at x_t (Eq. 15)."""
        signal, noise = self._signal_noise(x_t, t, eps)
        return (x_t - noise * eps) / signal

    def predict_eps(self, x_t, t, x0):
        """The eps (B, ...) that x0 implies at x_t: predict_x0 inverted (Eq. 15)."""
        signal, noise = self._signal_noise(x_t, t, x0)
        return (x_t - signal * x0) / noise

    def score(self, model, x_t, t):
        """The model's grad log q(x_t), (B, ...) (Dhariwal & Nichol 2021, Eq. 11)."""
        _, noise = self._signal_noise(x_t, t)
        return -self._model_eps(model, x_t, t) / noise

    def _model_eps(self, model, x_t, t, y=None):
        """The model's eps, in x_t's dtype whichever the network computes in."""
        eps = model(x_t, t) if y is None else model(x_t, t, y)
        if not isinstance(eps, torch.Tensor) or eps.shape != x_t.shape:
            raise ValueError(f"the model must return {x_t.shape}, got {eps}")
        return eps.to(x_t.dtype)

    def _model_x0(self, model, x_t, t, y, clip):
        """The x0 that the model's eps implies, brought into [-1, 1] if clip."""
        x0 = self.predict_x0(x_t, t, self._model_eps(model, x_t, t, y))
        return x0.clamp(-1, 1) if clip else x0

    def loss(self, model, x0, y=None, generator=None):
        """L_simple by Algorithm 1, a scalar: Eq. 14 divided by x0's dimensions.
        For classifier_free some of y (B,), say a tenth, must be -1, the null label."""
        shape, device = x0.shape[:1], x0.device
        t = torch.randint(1, self.T + 1, shape, generator=generator, device=device)
        self._check(x0, t)
        eps = torch.empty_like(x0).normal_(generator=generator)
        x_t = self.q_sample(x0, t, eps)
        return F.mse_loss(self._model_eps(model, x_t, t, y), eps)

    def vlb(self, model, x0, t, y=None, clip=False, generator=None):
        """Eq. 5's term for t, nats (B,), at one x_t: L_{t-1}, or for t = 1 the L_0 of
        8-bit x0. p's variance is beta~_t, for t = 1 beta~_2 (the authors' code)."""
        eps = torch.empty_like(x0).normal_(generator=generator)
        x_t = self.q_sample(x0, t, eps)
        mean_p, _ = self.q_posterior(self._model_x0(model, x_t, t, y, clip), x_t, t)
        mean_q, variance = self.q_posterior(x0, x_t, t.clamp(min=2))
        kl = gaussian_kl(mean_q, variance, mean_p, variance)
        nll = -discretised_log_likelihood(x0, mean_p, variance)
        nats = torch.where((t == 1).reshape(variance.shape), nll, kl)   # kl: t > 1
        return nats.reshape(len(x0), -1).sum(1)

    def prior_kl(self, x0):
        """L_T = KL(q(x_T | x0) || N(0, I)), nats (B,) (Eq. 5)."""
        signal, rest = self.alpha_bar[-1].sqrt(), self.one_minus_alpha_bar[-1]
        kl = gaussian_kl(signal * x0, rest, 0, 1)
        return kl.reshape(len(x0), -1).sum(1)

    @torch.no_grad()
    def bits_per_dim(self, model, x0, y=None, clip=False, batch_size=500, generator=None):
        """Eq. 5 in bits/dim on x0 (N, ...), N, T >= 2: estimate and standard error.
        No bias: each x0's t is random, and its term is divided by t's probability."""
        # Like L_{t-1} of N(0, I) data: alpha_bar_{t-1} beta_t / (1 - alpha_bar_{t-1}).
        size = self.alpha_bar[1:-1] * self.beta[2:] / self.one_minus_alpha_bar[1:-1]
        size = torch.cat([size[:1], size])              # t = 1 as often as t = 2
        prob = size / size.sum()                        # (T,), of t = 1..T
        t = 1 + torch.multinomial(prob, len(x0), replacement=True, generator=generator)
        nats = []
        for i in torch.arange(len(x0)).split(batch_size):
            y_i = None if y is None else y[i]
            term = self.vlb(model, x0[i], t[i], y_i, clip, generator)
            nats.append(term / prob[t[i] - 1] + self.prior_kl(x0[i]))
        bits = torch.cat(nats) / (x0[0].numel() * math.log(2))
        return bits.mean().item(), bits.std().item() / math.sqrt(len(x0))

    @torch.no_grad()
    def p_sample(self, model, x_t, t, t_prev=None, eta=1.0, clip=True, generator=None):
        """One reverse step, x_t (B, ...) to x_{t_prev}; ints t_prev < t, default t - 1.
        clip: bring the model's x0 into [-1, 1] (the authors' code). eta=1, clip=False,
        t_prev = t - 1: Algorithm 2 with sigma_t^2 = beta~_t (Sec. 3.2). eta=0: DDIM, no
        noise (Song et al. 2021, Eqs. 12, 16; their alpha is our alpha_bar)."""
        t_prev = t - 1 if t_prev is None else t_prev
        if not (0 <= t_prev < t <= self.T and 0 <= eta <= 1):
            raise ValueError(f"want 0 <= {t_prev} < {t} <= {self.T}, {eta} in 0..1")
        t_batch = torch.full(x_t.shape[:1], t, device=x_t.device)
        x0 = self._model_x0(model, x_t, t_batch, None, clip)
        eps = self.predict_eps(x_t, t_batch, x0)        # of the clipped x0
        alpha_bar_prev = self.alpha_bar[t_prev]
        rest_prev = self.one_minus_alpha_bar[t_prev]
        beta = 1 - self.alpha_bar[t] / alpha_bar_prev   # of the whole step
        variance = eta**2 * beta * rest_prev / self.one_minus_alpha_bar[t]  # (Eq. 16)^2
        eps_share = (rest_prev - variance).clamp(min=0).sqrt()
        # At t_prev = 0 the variance is 0: no noise enters x_0.
        z = torch.empty_like(x_t).normal_(generator=generator)
        return alpha_bar_prev.sqrt() * x0 + eps_share * eps + variance.sqrt() * z

    def sample(self, model, shape, steps=None, eta=1.0, clip=True, generator=None):
        """Yield x_T ~ N(0, I), ..., x_0, (B, ...); data outside [-1, 1]: clip=False.
        Each is a copy. Labels: model = partial(model, y=y), or classifier_free.
        steps=None: every t. steps=S: t = T (i/S)^1.5 for i = S, ..., 0, denser near the
        data, for fine texture (Song et al. 2021, App. D.2: squared)."""
        steps = self.T if steps is None else steps
        if steps not in range(1, self.T + 1):
            raise ValueError(f"want whole steps in 1..{self.T}, got {steps}")
        i = torch.arange(steps, -1, -1)
        spaced = self.T * (i.double() / steps) ** 1.5
        times = torch.maximum(spaced.round().long(), i).tolist()    # distinct, T to 0
        x = self.beta.new_empty(shape).normal_(generator=generator)
        yield x.clone()
        for t, t_prev in zip(times, times[1:]):
            x = self.p_sample(model, x, t, t_prev, eta, clip, generator)
            yield x.clone()


def gaussian_kl(mean_q, var_q, mean_p, var_p):
    """KL of N(mean_q, var_q > 0) to N(mean_p, var_p > 0), nats, elementwise (Eq. 8)."""
    return 0.5 * ((var_p / var_q).log() + (var_q + (mean_q - mean_p) ** 2) / var_p - 1)


def discretised_log_likelihood(x0, mean, var):
    """log of N(mean, var)'s mass in x0 +- 1/255, nats, elementwise (Eq. 13); var > 0.
    x0: 8-bit data scaled to [-1, 1]; the bins at -1 and 1 reach to infinity."""
    upper = torch.where(x0 > 0.999, math.inf, x0 + 1 / 255 - mean)
    lower = torch.where(x0 < -0.999, -math.inf, x0 - 1 / 255 - mean)
    # Phi(upper) - Phi(lower), mirrored into the left tail, where Phi keeps its digits.
    mirror = lower + upper > 0
    log_upper = torch.special.log_ndtr(torch.where(mirror, -lower, upper) / var.sqrt())
    log_lower = torch.special.log_ndtr(torch.where(mirror, -upper, lower) / var.sqrt())
    return log_upper + torch.log(-torch.expm1(log_lower - log_upper))


def classifier_free(model, y, s):
    """The callable (x_t, t) -> eps_null + s (eps_y - eps_null) of a model(x_t, t, y)
    trained with some y = -1, the null label (Ho & Salimans 2022, Eq. 6, w = s - 1)."""
    return partial(_guided_eps, model, y, s)


def _guided_eps(model, y, s, x_t, t):
    eps = model(x_t, t, y)
    eps_null = model(x_t, t, torch.full_like(y, -1))
    return eps_null + s * (eps - eps_null)


class ResBlock(nn.Module):
    """(B, c_in, H, W) -> (B, c_out, H, W), scaled and shifted by emb (B, c_emb)."""
    def __init__(self, c_in, c_out, c_emb):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(c_emb, 2 * c_out)
        self.norm2 = nn.GroupNorm(8, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x, emb):
        scale, shift = self.emb(emb)[:, :, None, None].chunk(2, 1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.norm2(h) * (1 + scale) + shift
        return self.shortcut(x) + self.conv2(F.silu(h))


class UNet(nn.Module):
    """eps for images x (B, channels, H, W), H and W divisible by 4: a small U-Net after
    App. B. Space-to-depth, then `width` channels (a multiple of 8) at H/2, twice that
    at H/4. y: int64 (B,) below classes; -1, or no y, is the null label."""
    def __init__(self, channels=1, width=48, classes=0):
        super().__init__()
        self.classes = classes
        w, c_emb = width, 4 * width
        self.time1 = nn.Linear(64, c_emb)
        self.time2 = nn.Linear(c_emb, c_emb)
        self.label = nn.Embedding(classes + 1, c_emb)                   # row 0: null
        self.stem = nn.Conv2d(4 * channels, w, 3, padding=1)
        self.down1 = ResBlock(w, w, c_emb)
        self.down = nn.Conv2d(w, 2 * w, 3, stride=2, padding=1)
        self.down2 = ResBlock(2 * w, 2 * w, c_emb)
        self.attention_norm = nn.GroupNorm(8, 2 * w)
        self.attention = nn.MultiheadAttention(2 * w, w // 8, batch_first=True)
        self.middle = ResBlock(2 * w, 2 * w, c_emb)
        self.up2 = ResBlock(4 * w, 2 * w, c_emb)
        self.up = nn.Conv2d(2 * w, 4 * w, 1)
        self.up1 = ResBlock(2 * w, w, c_emb)
        self.up0 = ResBlock(2 * w, w, c_emb)
        self.norm_out = nn.GroupNorm(8, w)
        self.out = nn.Conv2d(w, 4 * channels, 3, padding=1)
        nn.init.zeros_(self.attention.out_proj.weight)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x, t, y=None):
        if x.dim() != 4 or x.shape[2] % 4 or x.shape[3] % 4:
            raise ValueError(f"want x (B, C, H, W), sides divisible by 4: {x.shape}")
        y = torch.full_like(t, -1) if y is None else y
        if y.shape != t.shape:
            raise ValueError(f"want y {t.shape}, got {y.shape}")
        if y.is_cpu and not -1 <= y.min() <= y.max() < self.classes:
            raise ValueError(f"want y in -1..{self.classes - 1}, got {y}")
        # Sines and cosines of t (Vaswani et al. 2017, Sec. 3.5)
        angle = t[:, None] / 10000 ** (torch.arange(32, device=t.device) / 32)
        waves = torch.cat([angle.sin(), angle.cos()], 1).to(self.out.weight.dtype)
        emb = self.time2(F.silu(self.time1(waves)))               # from (B, 64)
        emb = F.silu(emb + self.label(y + 1))
        h0 = self.stem(F.pixel_unshuffle(x.to(emb.dtype), 2))     # (B, w, H/2, W/2)
        h1 = self.down1(h0, emb)
        h2 = self.down2(self.down(h1), emb)                       # (B, 2w, H/4, W/4)
        tokens = self.attention_norm(h2).flatten(2).transpose(1, 2)     # (B, HW/16, 2w)
        tokens, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        h = h2 + tokens.transpose(1, 2).reshape(h2.shape)
        h = self.middle(h, emb)
        h = self.up2(torch.cat([h, h2], 1), emb)
        h = F.pixel_shuffle(self.up(h), 2)                        # (B, w, H/2, W/2)
        h = self.up1(torch.cat([h, h1], 1), emb)
        h = self.up0(torch.cat([h, h0], 1), emb)
        h = self.out(F.silu(self.norm_out(h)))                    # (B, 4C, H/2, W/2)
        return F.pixel_shuffle(h, 2).to(x.dtype)                  # (B, C, H, W)


def encode_png(frames, fps=20):
    """PNG bytes of a list of frames on the CPU, uint8 (H, W) or (H, W, 3); several make
    an endless animation, fps an int (W3C PNG, 2025). ValueError for other frames."""
    frames = np.stack(frames)
    if frames.dtype != np.uint8 or frames.shape[3:] not in ((), (3,)):
        raise ValueError(f"want uint8 (H, W[, 3]): {frames.dtype} {frames.shape[1:]}")
    count, height, width = frames.shape[:3]
    size = struct.pack(">II", width, height)
    kind = bytes([8, 2 if frames.ndim == 4 else 0, 0, 0, 0])      # 8 bits; RGB or grey
    png = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", size + kind)
    png += _chunk(b"acTL", struct.pack(">II", count, 0))
    for i, frame in enumerate(frames):
        # fcTL and fdAT chunks share one count: 0, then 1 and 2, then 3 and 4, ...
        number = struct.pack(">I", max(0, 2 * i - 1))
        png += _chunk(b"fcTL", number + size + struct.pack(">QHHH", 0, 1, fps, 0))
        rows = np.pad(frame.reshape(height, -1), [(0, 0), (1, 0)])  # filter 0, pixels
        data = zlib.compress(rows.tobytes())
        if i == 0:
            png += _chunk(b"IDAT", data)
        else:
            png += _chunk(b"fdAT", struct.pack(">I", 2 * i) + data)
    return png + _chunk(b"IEND", b"")


def _chunk(kind, data):
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)
