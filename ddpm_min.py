"""Denoising diffusion probabilistic models (Ho, Jain, Abbeel 2020, arXiv 2006.11239), to read and to copy.

Tensors in, tensors out: no files, no printing. Equation numbers are that paper's unless another is named.
Index rule: t runs from 1 to T and index 0 is the data, so beta_0 = 0 and alpha_bar_0 = 1.

    diffusion = GaussianDiffusion(linear_schedule()).float()    # .to(device), as model, x0 and generator
    model = UNet(channels=1)                            # or any callable model(x_t, t) -> eps, of x_t's shape
    loss = diffusion.loss(model, x0)                    # Algorithm 1, x0 (B, 1, 28, 28) in [-1, 1]
    *_, x0 = diffusion.sample(model, (16, 1, 28, 28))   # Algorithm 2; all 1001 states in turn, x_0 the last
"""
import copy
import itertools
import math
import struct
import zlib

import torch
import torch.nn.functional as F
from torch import nn


def linear_schedule(T=1000, beta_1=1e-4, beta_T=0.02):
    """beta_1..beta_T, float64 (T,), evenly spaced (Sec. 4). For other T > 20 scale both by 1000 / T."""
    return torch.linspace(beta_1, beta_T, T, dtype=torch.float64)


def cosine_schedule(T=1000, s=0.008):
    """beta_1..beta_T, float64 (T,), of alpha_bar = f(t)/f(0), capped (Nichol & Dhariwal 2021, Eq. 17)."""
    u = torch.arange(T + 1, dtype=torch.float64) / T
    f = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


def laplace_schedule(T=1000, mu=-1.5, b=1.0):
    """beta_1..beta_T, float64 (T,): log SNR ~ Laplace(mu, b > 0) at uniform t, capped (Hang et al. 2024)."""
    v = 2 * torch.arange(T + 1, dtype=torch.float64) / T - 1                            # -1 to 1
    alpha_bar = torch.sigmoid(mu + b * v.sign() * torch.log1p(-v.abs()))                # sigmoid of log SNR
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


def gaussian_kl(mean_q, var_q, mean_p, var_p):
    """KL(N(mean_q, var_q) || N(mean_p, var_p)) in nats, elementwise; the tensors broadcast, variances > 0."""
    return 0.5 * (torch.log(var_p / var_q) + (var_q + (mean_q - mean_p) ** 2) / var_p - 1)


def discretised_log_likelihood(x0, mean, var):
    """log of the N(mean, var) mass in x0 +- 1/255, the edge bins to infinity (Eq. 13); nats, elementwise.
    x0: 8-bit data scaled to [-1, 1]; mean and var > 0 are tensors that broadcast with it."""
    upper = torch.where(x0 > 0.999, math.inf, (x0 + 1 / 255 - mean) / var.sqrt())
    lower = torch.where(x0 < -0.999, -math.inf, (x0 - 1 / 255 - mean) / var.sqrt())
    # Phi(upper) - Phi(lower), mirrored into the left tail, where Phi keeps its relative precision
    right = lower + upper > 0
    upper, lower = torch.where(right, -lower, upper), torch.where(right, -upper, lower)
    log_upper, log_lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    return log_upper + torch.log(-torch.expm1(log_lower - log_upper))


class GaussianDiffusion(nn.Module):
    """The processes q and p for x of any shape (B, ...), their variational bound and their sampler.
    betas: floating (T,), inside (0, 1); gradients flow through. The buffers beta, alpha, alpha_bar and
    one_minus_alpha_bar, (T+1,), and samples have the module's dtype, all else that of x. t: int64 (B,) in
    1..T. Other shapes, dtypes, t raise ValueError (t on the CPU only: elsewhere a look waits for the device).
    A model is any callable model(x_t, t), or model(x_t, t, y) if labels y, int64 (B,), are given, -> eps."""
    def __init__(self, betas):
        super().__init__()
        if betas.dim() != 1 or not len(betas) or not ((betas > 0) & (betas < 1)).all():
            raise ValueError(f"want betas (T,), inside (0, 1), got {tuple(betas.shape)}: {betas.tolist()}")
        self.T = len(betas)
        beta = F.pad(betas.double(), (1, 0))                                            # beta_0 = 0
        log_alpha_bar = torch.log1p(-beta).cumsum(0)                                    # alpha_bar_0 = 1
        self.register_buffer("beta", beta.to(betas.dtype))
        self.register_buffer("alpha", (1 - beta).to(betas.dtype))
        self.register_buffer("alpha_bar", log_alpha_bar.exp().to(betas.dtype))
        # stored: taken from a float32 alpha_bar, 1 - alpha_bar_1 would have three good digits
        self.register_buffer("one_minus_alpha_bar", torch.expm1(log_alpha_bar).abs().to(betas.dtype))

    def _check(self, t, x, *others):
        """Raise ValueError unless x is floating (B, ...), t int64 (B,) in 1..T, and the others are like x."""
        if not x.is_floating_point() or t.dtype != torch.int64 or t.dim() != 1 or t.shape != x.shape[:1]:
            raise ValueError("want x floating (B, ...) and t torch.int64 (B,), "
                             f"got {x.dtype} {tuple(x.shape)} and {t.dtype} {tuple(t.shape)}")
        if t.device.type == "cpu" and ((t < 1) | (t > self.T)).any():
            raise ValueError(f"t must lie in 1..{self.T}, got {t.tolist()}")
        if any(z.shape != x.shape or z.dtype != x.dtype for z in others):
            raise ValueError(f"want {x.dtype} {tuple(x.shape)}, got {[(z.dtype, *z.shape) for z in others]}")

    def _at(self, values, t, x):
        """values[t] as (B, 1, ...) in x's dtype, to broadcast over x."""
        return values[t].to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))

    def _roots(self, t, x, *others):
        """sqrt(alpha_bar_t), sqrt(1 - alpha_bar_t) as (B, 1, ...), for tensors that pass _check (Eq. 4)."""
        self._check(t, x, *others)
        return self._at(self.alpha_bar, t, x).sqrt(), self._at(self.one_minus_alpha_bar, t, x).sqrt()

    def _eps(self, model, x_t, t, y=None):
        """The model's eps, in x_t's dtype also where the model computes in a lower one."""
        self._check(t, x_t)
        eps = (model(x_t, t) if y is None else model(x_t, t, y)).to(x_t.dtype)
        self._check(t, x_t, eps)
        return eps

    def _x0_and_eps(self, model, x_t, t, y, clip):
        """The model's estimates of x0 and eps; with clip x0 is brought into [-1, 1] and eps follows it."""
        x0 = self.predict_x0(x_t, t, self._eps(model, x_t, t, y))
        x0 = x0.clamp(-1, 1) if clip else x0
        return x0, self.predict_eps(x_t, t, x0)

    def q_sample(self, x0, t, eps):
        """x_t ~ q(x_t | x0) of x0's shape, given eps ~ N(0, I) of that shape (Eq. 4)."""
        signal, noise = self._roots(t, x0, eps)
        return signal * x0 + noise * eps

    def q_posterior(self, x0, x_t, t):
        """Mean (B, ...) and variance (B, 1, ...) of q(x_{t-1} | x_t, x0) (Eqs. 6, 7); at t = 1: x0 and 0."""
        self._check(t, x_t, x0)
        alpha, beta, rest = (self._at(v, t, x_t) for v in (self.alpha, self.beta, self.one_minus_alpha_bar))
        bar_prev, rest_prev = (self._at(v, t - 1, x_t) for v in (self.alpha_bar, self.one_minus_alpha_bar))
        mean = bar_prev.sqrt() * beta / rest * x0 + alpha.sqrt() * rest_prev / rest * x_t           # Eq. 7
        return mean, rest_prev / rest * beta                                                        # Eq. 7

    def predict_x0(self, x_t, t, eps):
        """The x0 (B, ...) that eps implies at x_t (Eq. 15)."""
        signal, noise = self._roots(t, x_t, eps)
        return (x_t - noise * eps) / signal

    def predict_eps(self, x_t, t, x0):
        """The eps (B, ...) that x0 implies at x_t, the inverse of predict_x0 (Eq. 15)."""
        signal, noise = self._roots(t, x_t, x0)
        return (x_t - signal * x0) / noise

    def score(self, model, x_t, t):
        """The model's gradient of log q(x_t), (B, ...): -eps / sqrt(1 - alpha_bar_t) (Sec. 3.2)."""
        return -self._eps(model, x_t, t) / self._roots(t, x_t)[1]

    def loss(self, model, x0, y=None, generator=None):
        """L_simple (Eq. 14), a scalar: the mean squared error of eps at one t per example.
        Each t is uniform on 1..T; a batch shares one offset and covers 1..T evenly (Kingma et al. 2021)."""
        B, device = len(x0), x0.device
        offset = torch.randint(self.T, (1,), device=device, generator=generator)
        t = 1 + (offset + torch.arange(B, device=device) * self.T // B) % self.T        # (B,)
        eps = torch.randn(x0.shape, dtype=x0.dtype, device=device, generator=generator)
        return F.mse_loss(self._eps(model, self.q_sample(x0, t, eps), t, y), eps)

    def vlb(self, model, x0, t, y=None, clip=False, generator=None):
        """The term of Eq. 5 at t in nats (B,), at one draw of x_t: L_{t-1}, or L_0 (8-bit data) at t = 1.
        p has the posterior's variance, at t = 1 that of t = 2, so T >= 2. clip as in sample."""
        self._check(t, x0)
        eps = torch.randn(x0.shape, dtype=x0.dtype, device=x0.device, generator=generator)
        x_t = self.q_sample(x0, t, eps)
        x0_model, _ = self._x0_and_eps(model, x_t, t, y, clip)
        mean_q, mean_p = self.q_posterior(x0, x_t, t)[0], self.q_posterior(x0_model, x_t, t)[0]
        _, var = self.q_posterior(x0, x_t, t.clamp(min=2))
        kl, decoder = gaussian_kl(mean_q, var, mean_p, var), -discretised_log_likelihood(x0, mean_p, var)
        return torch.where((t == 1).reshape(var.shape), decoder, kl).reshape(len(x0), -1).sum(1)

    def prior_kl(self, x0):
        """L_T = KL(q(x_T | x0) || N(0, I)) in nats (B,) (Eq. 5)."""
        t = torch.full((len(x0),), self.T, device=x0.device)
        signal, noise = self._roots(t, x0)
        kl = gaussian_kl(signal * x0, noise**2, torch.zeros_like(x0), torch.ones_like(x0))
        return kl.reshape(len(x0), -1).sum(1)

    @torch.no_grad()
    def bits_per_dim(self, model, x0, y=None, clip=False, batch_size=500, generator=None):
        """An unbiased estimate of the whole bound (Eq. 5) on x0 (N, ...), N, T >= 2: mean, standard error.
        One t per example, drawn in proportion to (SNR_{t-1} - SNR_t) / (1 + SNR_t) (t = 1 as 2), and divided
        out again; SNR = alpha_bar / (1 - alpha_bar): the first steps carry most of the bound."""
        weight = self.alpha_bar.roll(1) * self.beta / self.one_minus_alpha_bar.roll(1)  # (T+1,), for t >= 2
        prob = F.normalize(torch.cat([weight[2:3], weight[2:]]), p=1, dim=0)            # (T,)
        t = 1 + torch.multinomial(prob, len(x0), replacement=True, generator=generator)
        nats = [self.vlb(model, x0[i], t[i], None if y is None else y[i], clip, generator) / prob[t[i] - 1]
                + self.prior_kl(x0[i]) for i in torch.arange(len(x0)).split(batch_size)]
        bits = torch.cat(nats) / (x0[0].numel() * math.log(2))                          # (N,)
        return bits.mean().item(), bits.std().item() / len(x0) ** 0.5

    def sample(self, model, shape, steps=None, eta=1.0, clip=True, generator=None):
        """A generator of steps + 1 states of the given shape, x_T ~ N(0, I) first, x_0 last, under no_grad.
        steps=None, eta=1: Algorithm 2, sigma_t^2 = beta~_t; eta=0: DDIM (Song et al. 2021). steps=S: S of T
        steps, evenly. clip: x0 estimates come into [-1, 1], like the data. Bad steps or eta: ValueError."""
        steps = self.T if steps is None else steps
        if not (1 <= steps <= self.T and 0 <= eta <= 1):
            raise ValueError(f"need 1 <= steps <= {self.T} and 0 <= eta <= 1, got steps={steps}, eta={eta}")
        times = torch.linspace(self.T, 0, steps + 1).round().int().tolist()             # T first, 0 last
        alpha_bar, rest = self.alpha_bar.tolist(), self.one_minus_alpha_bar.tolist()
        like = {"dtype": self.beta.dtype, "device": self.beta.device, "generator": generator}
        @torch.no_grad()
        def states():
            x = torch.randn(shape, **like)
            yield x
            for t, s in itertools.pairwise(times):
                x0, eps = self._x0_and_eps(model, x, torch.full(shape[:1], t, device=x.device), None, clip)
                var = eta**2 * rest[s] / rest[t] * (1 - alpha_bar[t] / alpha_bar[s])    # Song et al., Eq. 16
                x = alpha_bar[s] ** 0.5 * x0 + max(rest[s] - var, 0) ** 0.5 * eps       # Song et al., Eq. 12
                if s > 0:                                                               # no noise enters x_0
                    x = x + var**0.5 * torch.randn(shape, **like)
                yield x
        return states()


def classifier_free(model, y, s):
    """The callable (x_t, t) -> eps(null) + s (eps(y) - eps(null)) of model(x_t, t, y); y int64 (B,), null -1.
    s = 0 ignores y, s = 1 is the conditional model (Ho & Salimans 2022, Eq. 6 with w = s - 1)."""
    def eps(x_t, t):
        eps_y = model(x_t, t, y)
        eps_null = eps_y if s == 1 else model(x_t, t, torch.full_like(y, -1))           # s = 1 needs no null
        return eps_null + s * (eps_y - eps_null)
    return eps


def classifier_guided(diffusion, model, log_prob, s):
    """The callable (x_t, t) -> eps - s sqrt(1 - alpha_bar_t) grad log_prob (Dhariwal & Nichol 2021, Alg. 2).
    log_prob(x_t, t) -> (B,), log p(y | x_t) say, is differentiable in x_t, each row from its own x_t."""
    def eps(x_t, t):
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            gradient, = torch.autograd.grad(log_prob(x, t).sum(), x)
        return model(x_t, t) - s * diffusion._roots(t, x_t)[1] * gradient
    return eps


class ResBlock(nn.Module):
    """Residual block (B, c_in, H, W) -> (B, c_out, H, W), scaled and shifted by an embedding (B, c_emb)."""
    def __init__(self, c_in, c_out, c_emb):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.emb = nn.Linear(c_emb, 2 * c_out)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        scale, shift = self.emb(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(self.conv1(F.silu(self.norm1(x)))) * (1 + scale) + shift
        return self.shortcut(x) + self.conv2(F.silu(h))


class UNet(nn.Module):
    """eps for images x (B, channels, H, W), H and W divisible by 4, else ValueError: App. B's U-Net, compact.
    Space-to-depth replaces the finest level: `width` channels (a multiple of 8) at H/2, twice as many at H/4,
    with attention. With classes, labels y, int64 (B,), lie below classes; -1 or None: the learned null."""
    def __init__(self, channels=1, width=48, classes=0):
        super().__init__()
        if width < 8 or width % 8:
            raise ValueError(f"width must be a positive multiple of 8, got {width}")
        w, c_emb, self.channels, self.classes = width, 4 * width, channels, classes
        self.emb = nn.Sequential(nn.Linear(64, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb))
        self.label = nn.Embedding(classes + 1, c_emb)                               # row 0: the null label
        self.stem = nn.Conv2d(4 * channels, w, 3, padding=1)
        self.down1, self.down = ResBlock(w, w, c_emb), nn.Conv2d(w, 2 * w, 3, stride=2, padding=1)
        self.down2, self.middle = ResBlock(2 * w, 2 * w, c_emb), ResBlock(2 * w, 2 * w, c_emb)
        self.norm2, self.norm1 = nn.GroupNorm(8, 2 * w), nn.GroupNorm(8, w)
        self.attention = nn.MultiheadAttention(2 * w, w // 8, batch_first=True)
        self.up2, self.up = ResBlock(4 * w, 2 * w, c_emb), nn.Conv2d(2 * w, 4 * w, 1)
        self.up1, self.up0 = ResBlock(2 * w, w, c_emb), ResBlock(2 * w, w, c_emb)
        self.out, self.gate = nn.Conv2d(w, 4 * channels, 3, padding=1), nn.Linear(c_emb, 2)
        for name, parameter in self.named_parameters():
            if "conv2" in name or "out" in name or "gate" in name:              # branches start as nothing
                nn.init.zeros_(parameter)

    def forward(self, x, t, y=None):
        """eps of x's shape and dtype, for x (B, channels, H, W), t and y int64 (B,)."""
        if x.dim() != 4 or x.shape[1] != self.channels or x.shape[2] % 4 or x.shape[3] % 4:
            raise ValueError(f"want x (B, {self.channels}, H, W), sides divisible by 4, got {tuple(x.shape)}")
        if y is not None and (not self.classes or y.dtype != torch.int64 or y.shape != t.shape):
            raise ValueError(f"want y int64 {tuple(t.shape)} and classes > 0, got {y.dtype} {tuple(y.shape)}")
        angle = t[:, None] * 10000 ** (-torch.arange(32, device=t.device) / 32)         # (B, 32)
        emb = self.emb(torch.cat([angle.sin(), angle.cos()], 1).to(self.gate.weight.dtype))
        emb = F.silu(emb + self.label(torch.zeros_like(t) if y is None else y + 1))     # (B, c_emb)
        h0 = self.stem(F.pixel_unshuffle(x.to(emb.dtype), 2))                           # (B, w, H/2, W/2)
        h1 = self.down1(h0, emb)
        h2 = self.down2(self.down(h1), emb)                                             # (B, 2w, H/4, W/4)
        tokens = self.norm2(h2).flatten(2).transpose(1, 2)                              # (B, H/4 * W/4, 2w)
        tokens, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        h = self.middle(h2 + tokens.transpose(1, 2).reshape(h2.shape), emb)
        h = self.up(self.up2(torch.cat([h, h2], 1), emb))
        h = self.up1(torch.cat([F.pixel_shuffle(h, 2), h1], 1), emb)                    # (B, w, H/2, W/2)
        h = self.up0(torch.cat([h, h0], 1), emb)
        h = F.pixel_shuffle(self.out(F.silu(self.norm1(h))), 2)                         # (B, channels, H, W)
        # at large t eps is nearly x_t itself: a share of it, learned for each t, bypasses the layers
        share, scale = self.gate(emb)[:, :, None, None, None].unbind(1)
        return (share * x + (1 + scale) * h).to(x.dtype)


class EMA:
    """Exponential moving average of a model's parameters, in self.model, an eval copy; buffers are copied.
    The n-th decay is min(decay, (1 + n) / (10 + n)), so that the random start is soon forgotten."""
    def __init__(self, model, decay=0.9999):
        self.model, self.decay, self.n = copy.deepcopy(model).eval().requires_grad_(False), decay, 0

    @torch.no_grad()
    def update(self, model):
        """average <- d average + (1 - d) parameter, for the parameters of `model`."""
        d = min(self.decay, (1 + self.n) / (10 + self.n))
        self.n += 1
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - d)
        for average, buffer in zip(self.model.buffers(), model.buffers()):
            average.copy_(buffer)


def encode_png(frames, fps=20):
    """PNG bytes of a list of one uint8 frame (H, W) or (H, W, 3); of several frames, an endless animated PNG.
    frames: tensors or arrays of one shape, else ValueError; fps: int, 1..65535 (W3C PNG, 2025)."""
    frames = [torch.as_tensor(frame).cpu() for frame in frames]
    shape = frames[0].shape if frames else ()
    if len(shape) not in (2, 3) or shape[2:] not in ((), (3,)) or 0 in shape \
            or any(frame.dtype != torch.uint8 or frame.shape != shape for frame in frames):
        raise ValueError(f"want uint8 (H, W) or (H, W, 3), got {[(f.dtype, *f.shape) for f in frames[:2]]}")
    chunks, sequence = [b"\x89PNG\r\n\x1a\n"], itertools.count()
    def chunk(kind, data):
        chunks.append(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))
    chunk(b"IHDR", struct.pack(">IIBBBBB", shape[1], shape[0], 8, 2 if len(shape) == 3 else 0, 0, 0, 0))
    if len(frames) > 1:
        chunk(b"acTL", struct.pack(">II", len(frames), 0))                              # 0: loop for ever
    for i, frame in enumerate(frames):
        data = zlib.compress(F.pad(frame.reshape(shape[0], -1), (1, 0)).numpy().tobytes())     # filter 0, row
        if len(frames) > 1:
            chunk(b"fcTL", struct.pack(">IIIIIHHBB", next(sequence), shape[1], shape[0], 0, 0, 1, fps, 0, 0))
        chunk(b"fdAT" if i else b"IDAT", struct.pack(">I", next(sequence)) + data if i else data)
    chunk(b"IEND", b"")
    return b"".join(chunks)
