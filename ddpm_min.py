"""Denoising diffusion probabilistic models (Ho, Jain, Abbeel 2020, arXiv 2006.11239).

Equation numbers are that paper's unless another is named; docs/derivations.md says why
each holds. t runs from 1 to T, and index 0 is the data: beta_0 = 0, alpha_bar_0 = 1.

    diffusion = GaussianDiffusion(linear_schedule())
    model = UNet((1, 28, 28))                       # or any model(x_t, t) -> eps
    loss = diffusion.loss(model, x0)                # Algorithm 1, x0 (B, 1, 28, 28)
    for x in diffusion.sample(model, (16, 1, 28, 28)):      # Algorithm 2: x_T, ..., x_0
        pass                                # data beyond [-1, 1] want a larger clip

Copyright (c) 2026 The ddpm_min authors, MIT licence."""
import math
import struct
import warnings
import zlib
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn


def linear_schedule(T=1000, beta_1=1e-4, beta_T=0.02):
    """beta_1..beta_T, float64 (T,), evenly spaced (Sec. 4). The ends suit T = 1000; for
    a smaller T, above 20, scale both by 1000 / T, or alpha_bar_T is not near 0."""
    return torch.linspace(beta_1, beta_T, T, dtype=torch.float64)


def cosine_schedule(T=1000, s=0.008):
    """beta_1..beta_T, float64 (T,) (Nichol & Dhariwal 2021, Eq. 17)."""
    u = torch.arange(T + 1, dtype=torch.float64) / T
    f = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2
    return _betas(f)                                    # f(0) cancels in beta


def laplace_schedule(T=1000, mu=-1.5, b=1.0):
    """beta_1..beta_T, float64 (T,): log(alpha_bar / (1 - alpha_bar)) ~ Laplace(mu, b)
    (Hang et al. 2024: mu = 0, b = 0.5; these defaults suit small digits)."""
    u = torch.arange(T + 1, dtype=torch.float64) / (T + 1)      # < 1: alpha_bar_T > 0
    law = torch.distributions.Laplace(torch.tensor(mu, dtype=u.dtype), float(b))
    return _betas(torch.sigmoid(law.icdf(1 - u)))


def _betas(alpha_bar):
    """beta_1..beta_T, at most 0.999 (Nichol & Dhariwal 2021, Sec. 3.2)."""
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


class GaussianDiffusion(nn.Module):
    """The processes q and p for x of any shape (B, ...), data scaled to [-1, 1], from
    betas (T,) inside (0, 1), the variances of Eq. 2. Buffers (T+1,), float32 at first:
    beta, beta_tilde, alpha_bar, signal = sqrt(alpha_bar), noise = sqrt(1 - alpha_bar).
    t: int64 (B,) in 1..T. A model: any callable (x_t, t) -> eps of x_t's shape; bind
    labels by functools.partial. ValueError: x of two shapes, on a CPU t < 1."""

    def __init__(self, betas, dtype=torch.float32):
        super().__init__()
        self.T = len(betas)
        beta = F.pad(betas.double(), (1, 0))            # beta_0 = 0
        log_alpha_bar = torch.log1p(-beta).cumsum(0)    # alpha_bar_0 = 1
        var = -torch.expm1(log_alpha_bar)               # 1 - alpha_bar, in all digits
        beta_tilde = F.pad(var[:-1] / var[1:], (1, 0)) * beta       # Eq. 7
        self.register_buffer("beta", beta.to(dtype))
        self.register_buffer("alpha_bar", log_alpha_bar.exp().to(dtype))
        self.register_buffer("signal", (log_alpha_bar / 2).exp().to(dtype))
        self.register_buffer("noise", var.sqrt().to(dtype))
        self.register_buffer("beta_tilde", beta_tilde.to(dtype))
        if not betas.min() > 0 or not self.signal[-1] > 0:
            raise ValueError(f"want less, positive betas: {betas.min()}..{betas.max()}")

    def q_sample(self, x0, t, eps):
        """x_t ~ q(x_t | x0), (B, ...), for eps ~ N(0, I) of x0's shape (Eq. 4)."""
        self._check(t, x0, eps)
        return _at(self.signal, t, eps) * x0 + _at(self.noise, t, eps) * eps

    def q_posterior(self, x0, x_t, t):
        """Mean (B, ...), variance (B, 1, ...) of q(x_{t-1} | x_t, x0) (Eqs. 6, 7)."""
        self._check(t, x0, x_t)
        beta = _at(self.beta, t, x_t)
        var = _at(self.noise, t, x_t) ** 2              # 1 - alpha_bar_t
        var_prev = _at(self.noise, t - 1, x_t) ** 2
        weight_0 = _at(self.signal, t - 1, x_t) * beta / var
        weight_t = (1 - beta).sqrt() * var_prev / var
        mean = weight_0 * x0 + weight_t * x_t
        return mean, _at(self.beta_tilde, t, x_t)

    def predict_x0(self, x_t, t, eps):
        """The x0 (B, ...) that eps implies at x_t (Eq. 15)."""
        self._check(t, x_t, eps)
        return (x_t - _at(self.noise, t, x_t) * eps) / _at(self.signal, t, x_t)

    def loss(self, model, x0, generator=None):
        """L_simple by Algorithm 1, a scalar: Eq. 14, as a mean over all elements."""
        size, device = x0.shape[:1], x0.device
        t = torch.randint(1, self.T + 1, size, generator=generator, device=device)
        eps = _randn_like(x0, generator)
        x_t = self.q_sample(x0, t, eps)
        return F.mse_loss(_eps_theta(model, x_t, t), eps)

    def x0_theta(self, model, x_t, t, clip=1.0):
        """x0-hat (B, ...), which the model's eps implies at x_t, put in [-clip, clip]
        as in the authors' code. clip=None does not: near t = T it may be far off."""
        if clip is not None and not clip > 0:
            raise ValueError(f"want clip None or a number above 0, got {clip}")
        x0 = self.predict_x0(x_t, t, _eps_theta(model, x_t, t))
        return x0 if clip is None else x0.clamp(-clip, clip)

    @torch.no_grad()
    def p_sample(self, model, x_t, t, clip=1.0, generator=None):
        """x_{t-1} (B, ...) of x_t, int t: line 4 of Algorithm 2, sigma_t^2 = beta~_t,
        one of Sec. 3.2's two. The mean is Eq. 7's at x0-hat: Eq. 11, if not clipped."""
        t_all = torch.full(x_t.shape[:1], t, device=x_t.device)
        x0 = self.x0_theta(model, x_t, t_all, clip)
        mean, variance = self.q_posterior(x0, x_t, t_all)
        z = _randn_like(x_t, generator)
        return mean + variance.sqrt() * z               # at t = 1 the variance is 0

    @torch.no_grad()
    def ddim_sample(self, model, x_t, t, t_prev, eta=1.0, clip=1.0, generator=None):
        """x_{t_prev} (B, ...) of x_t, ints t_prev < t (Song et al. 2021, Eqs. 12, 16).
        eta = 0, their DDIM, adds no noise; eta = 1 to t_prev = t - 1 is p_sample."""
        if not 0 <= t_prev < t <= self.T or not 0 <= eta <= 1:
            raise ValueError(f"want t_prev < t in 0..T, eta in 0..1: {t_prev, t, eta}")
        t_all = torch.full(x_t.shape[:1], t, device=x_t.device)
        x0 = self.x0_theta(model, x_t, t_all, clip)
        signal, signal_prev = self.signal[t], self.signal[t_prev]
        noise, noise_prev = self.noise[t], self.noise[t_prev]
        eps = (x_t - signal * x0) / noise                       # of the clipped x0
        alpha = (signal / signal_prev) ** 2                     # alpha_t, if one step
        sigma = eta * noise_prev / noise * (1 - alpha).sqrt()       # Song's Eq. 16
        rest = (noise_prev**2 - sigma**2).clamp(min=0)          # negative by rounding
        z = _randn_like(x_t, generator)
        return signal_prev * x0 + rest.sqrt() * eps + sigma * z     # Song's Eq. 12

    def sample(self, model, shape, steps=None, eta=1.0, clip=1.0, generator=None):
        """Yield x_T ~ N(0, I), ..., x_0, (B, ...), each a copy: Algorithm 2 (there clip
        is None), or with steps or eta ddim_sample at times(steps). clip: max |x0|."""
        if self.alpha_bar[-1] > 0.01:
            warnings.warn("alpha_bar_T > 0.01: want larger betas, or T", stacklevel=2)
        if clip is None and self.signal[-1] < 1e-3:
            warnings.warn("x_T is divided by nearly 0: clip at max |x0|", stacklevel=2)
        times = self.times(self.T if steps is None else steps)
        x = _randn_like(self.beta.new_empty(shape), generator)
        yield x.clone()
        for t, t_prev in pairwise(times):
            if steps is None and eta == 1:
                x = self.p_sample(model, x, t, clip, generator)
            else:
                x = self.ddim_sample(model, x, t, t_prev, eta, clip, generator)
            yield x.clone()

    def times(self, steps):
        """The times T, ..., 0, a list of steps + 1 ints: every t, if steps = T."""
        if not 1 <= steps <= self.T:
            raise ValueError(f"want steps in 1..{self.T}, got {steps}")
        i = torch.arange(steps, -1, -1)
        t = self.T * (i.double() / steps) ** 1.5        # why 1.5: docs/derivations.md
        return torch.maximum(t.round().long(), i).tolist()      # >= i: no time twice

    def vlb_term(self, model, x0, t, clip=1.0, generator=None):
        """Eq. 5's L_{t-1} at one x_t, nats (B,); for t = 1 L_0, of 8-bit x0. sigma_t^2
        is beta~_t, but sigma_1^2 is beta~_2, as in the authors' code, so T >= 2."""
        x_t = self.q_sample(x0, t, _randn_like(x0, generator))
        x0_model = self.x0_theta(model, x_t, t, clip)
        mean_q, _ = self.q_posterior(x0, x_t, t)
        mean_p, _ = self.q_posterior(x0_model, x_t, t)
        variance = _at(self.beta_tilde, t.clamp(min=2), x0)
        kl = (mean_q - mean_p) ** 2 / (2 * variance)            # Eq. 8, C = 0, t > 1
        log_p = discretised_log_likelihood(x0, mean_p, variance)        # Eq. 13, t = 1
        nats = torch.where(t.reshape(variance.shape) == 1, -log_p, kl)
        return nats.reshape(len(x0), -1).sum(1)

    def prior_kl(self, x0):
        """L_T = KL(q(x_T | x0) || N(0, I)), nats (B,) (Eq. 5)."""
        bar = self.alpha_bar[-1]
        kl = (bar * x0**2 - bar - torch.log1p(-bar)) / 2
        return kl.reshape(len(x0), -1).sum(1)

    @torch.no_grad()
    def bits_per_dim(self, model, x0, clip=1.0, generator=None):
        """Eq. 5 in bits/dim, (B,), an unbiased estimate for each x0 of 8 bits: its term
        for one t, drawn with probability rho_t, over rho_t. Average over many x0."""
        level = (x0 + 1) * 127.5
        if not torch.allclose(level, level.round().clamp(0, 255), rtol=0, atol=0.01):
            raise ValueError(f"want float32 x0 = k / 127.5 - 1: {x0.min()}..{x0.max()}")
        # As L_{t-1} of N(0, I) data (docs/derivations.md); t = 1 as often as t = 2.
        t = torch.arange(1, self.T + 1, device=x0.device).clamp(min=2)
        weight = self.beta[t] * (self.signal[t - 1] / self.noise[t - 1]) ** 2
        rho = weight / weight.sum()
        i = torch.multinomial(rho, len(x0), replacement=True, generator=generator)
        term = self.vlb_term(model, x0, i + 1, clip, generator) / rho[i]
        nats = term + self.prior_kl(x0)
        return nats / (x0[0].numel() * math.log(2))

    def _check(self, t, x, other):
        """ValueError where broadcasting, or indexing on a CPU, goes wrong silently."""
        if x.shape != other.shape:
            raise ValueError(f"want two of one shape, got {x.shape}, {other.shape}")
        if t.is_cpu and not torch.compiler.is_compiling() and t.min() < 1:
            raise ValueError(f"want t in 1..{self.T}, got {t.min()}")


def _at(values, t, x):
    """values (T+1,) at t (B,) as (B, 1, ...), to broadcast over x (B, ...)."""
    ones = [1] * (x.dim() - 1)
    return values[t].to(x.dtype).reshape(len(x), *ones)


def _randn_like(x, generator):
    """Draws from N(0, 1), of x's shape, dtype and device."""
    return torch.empty_like(x).normal_(generator=generator)


def _eps_theta(model, x_t, t):
    """The model's eps, in x_t's dtype whichever the network computes in."""
    eps = model(x_t.clone(), t.clone())         # a network may work in place
    if eps.shape != x_t.shape:
        raise ValueError(f"want {tuple(x_t.shape)} from the model, got {eps.shape}")
    return eps.to(x_t.dtype)


def discretised_log_likelihood(x0, mean, var):
    """log of N(mean, var)'s mass in x0 +- 1/255, nats, elementwise (Eq. 13), for 8-bit
    x0 in [-1, 1]; at both ends the bin reaches to infinity."""
    a = (x0 - 1 / 255 - mean) / var.sqrt()
    b = (x0 + 1 / 255 - mean) / var.sqrt()
    # For infinity, so that gradients are finite: 40 deviations beyond mean and bin.
    a = torch.where(x0 < -0.999, -40 - b.abs(), a)
    b = torch.where(x0 > 0.999, 40 + a.abs(), b)
    # Phi(b) - Phi(a) = Phi(-a) - Phi(-b): in the left tail Phi keeps its digits.
    mirror = a + b > 0
    log_left = torch.special.log_ndtr(torch.where(mirror, -b, a))
    log_right = torch.special.log_ndtr(torch.where(mirror, -a, b))
    return log_right + torch.log(-torch.expm1(log_left - log_right))


def guide(strong, weak, s):
    """The callable (x_t, t) -> eps_weak + s (eps_strong - eps_weak), s a number or a
    (B, 1, ...). Classifier-free guidance, if weak is strong without its label (Ho &
    Salimans 2022, Eq. 6, s = 1 + w); autoguidance, if trained less (Karras 2024)."""
    def guided(x_t, t):
        eps_weak = _eps_theta(weak, x_t, t).clone()         # strong may overwrite it
        return eps_weak + s * (_eps_theta(strong, x_t, t) - eps_weak)
    return guided


class ResBlock(nn.Module):
    """x (B, c_in, H, W), emb (B, c_emb) -> (B, c_out, H, W); c_in, c_out % 8 == 0.
    emb scales and shifts: AdaGN (Dhariwal & Nichol 2021, Sec. 3.1)."""

    def __init__(self, c_in, c_out, c_emb):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.scale_shift = nn.Linear(c_emb, 2 * c_out)
        self.norm2 = nn.GroupNorm(8, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x, emb):
        scale, shift = self.scale_shift(emb)[:, :, None, None].chunk(2, 1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.norm2(h) * (1 + scale) + shift
        return self.shortcut(x) + self.conv2(F.silu(h))


class UNet(nn.Module):
    """eps (B, C, H, W) of x (B, C, H, W) at t, int64 (B,), for one small shape, H and W
    divisible by 4. y: int64 (B,), labels below classes; -1, or no y, is the null label.
    width: channels at H/2, a multiple of 8. App. B's, with space-to-depth for the level
    H, and for attention two linear layers, whose weights grow with H W: 25 million at
    64 x 64 and width 96, 100 million at 256 x 256 and width 24."""

    def __init__(self, shape=(1, 28, 28), width=48, classes=0):
        super().__init__()
        C, H, W = self.shape = tuple(shape)
        if H % 4 or W % 4:
            raise ValueError(f"want H and W divisible by 4, got {self.shape}")
        w, c_emb = width, 4 * width
        values = 2 * w * (H // 4) * (W // 4)
        self.time = nn.Sequential(
            nn.Linear(64, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb))
        self.label = nn.Embedding(classes + 1, c_emb)           # row 0: null
        self.stem = nn.Conv2d(4 * C, w, 3, padding=1)
        self.encode_fine = ResBlock(w, w, c_emb)                # at H/2
        self.down = nn.Conv2d(w, 2 * w, 3, stride=2, padding=1)
        self.encode_coarse = ResBlock(2 * w, 2 * w, c_emb)      # at H/4
        self.mlp_in = nn.Sequential(
            nn.GroupNorm(8, 2 * w), nn.Flatten(), nn.Linear(values, 256))
        self.mlp_emb = nn.Linear(c_emb, 256)
        self.mlp_out = nn.Linear(256, values)
        self.decode_coarse = ResBlock(4 * w, 2 * w, c_emb)
        self.up = nn.Conv2d(2 * w, 4 * w, 1)
        self.decode_fine = ResBlock(2 * w, w, c_emb)
        self.decode_stem = ResBlock(2 * w, w, c_emb)
        self.norm = nn.GroupNorm(8, w)
        self.out = nn.Conv2d(w, 4 * C, 3, padding=1)
        for weight in [*self.mlp_out.parameters(), *self.out.parameters()]:
            nn.init.zeros_(weight)

    def forward(self, x, t, y=None):
        if x.shape[1:] != self.shape:
            raise ValueError(f"want x (B, *{self.shape}), got {tuple(x.shape)}")
        # Vaswani et al. 2017, Sec. 3.5; bfloat16 could not tell t = 999 from 1000.
        exponent = torch.arange(32, dtype=torch.float32, device=t.device) / 32
        angle = t[:, None] / 10000**exponent
        waves = torch.cat([angle.sin(), angle.cos()], 1)        # (B, 64)
        row = torch.zeros_like(t) if y is None else y + 1       # 0: the null label
        emb = F.silu(self.time(waves.to(self.out.weight.dtype)) + self.label(row))
        stem = self.stem(F.pixel_unshuffle(x.to(emb.dtype), 2)) # (B, w, H/2, W/2)
        fine = self.encode_fine(stem, emb)                      # (B, w, H/2, W/2)
        coarse = self.encode_coarse(self.down(fine), emb)       # (B, 2w, H/4, W/4)
        h = F.silu(self.mlp_in(coarse) + self.mlp_emb(emb))     # (B, 256)
        h = coarse + self.mlp_out(h).reshape(coarse.shape)      # (B, 2w, H/4, W/4)
        h = self.decode_coarse(torch.cat([h, coarse], 1), emb)  # (B, 2w, H/4, W/4)
        h = F.pixel_shuffle(self.up(h), 2)                      # (B, w, H/2, W/2)
        h = self.decode_fine(torch.cat([h, fine], 1), emb)      # (B, w, H/2, W/2)
        h = self.decode_stem(torch.cat([h, stem], 1), emb)      # (B, w, H/2, W/2)
        h = self.out(F.silu(self.norm(h)))                      # (B, 4C, H/2, W/2)
        return F.pixel_shuffle(h, 2).to(x.dtype)                # (B, C, H, W)


def encode_png(image):
    """The bytes of a PNG file (W3C, Third Edition) of uint8 (H, W) or (H, W, 3)."""
    image = torch.as_tensor(image).cpu()
    if image.dtype != torch.uint8 or image.shape[2:] not in [(), (3,)]:
        raise ValueError(f"want uint8 (H, W[, 3]), got {image.dtype} {image.shape}")
    height, width = image.shape[:2]
    colour = 2 if image.ndim == 3 else 0
    header = struct.pack(">II5B", width, height, 8, colour, 0, 0, 0)
    rows = F.pad(image.reshape(height, -1), (1, 0))                     # 0: no filter
    data = zlib.compress(rows.numpy().tobytes())
    png = b"\x89PNG\r\n\x1a\n"
    for kind, content in [(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        png += struct.pack(">I", len(content)) + kind + content + checksum
    return png
