"""Denoising diffusion probabilistic models (Ho, Jain, Abbeel 2020, arXiv 2006.11239).

Tensors in, tensors out. Equation numbers are that paper's unless another is named, and
docs/derivations.md says why each holds. t runs from 1 to T, and index 0 is the data:
beta_0 = 0, alpha_bar_0 = 1. Arguments come in this order: the model; x0, x_t; their t;
what else is given. One that does not fit is a ValueError that names it.

    diffusion = GaussianDiffusion(linear_schedule())
    model = UNet(channels=1)                 # unet.py, or any model(x_t, t) -> eps
    loss = diffusion.loss(model, x0)         # Algorithm 1, x0 (B, 1, 28, 28) in [-1, 1]
    for x in diffusion.sample(model, (16, 1, 28, 28)):      # Algorithm 2: x_T, ..., x_0
        pass                                 # data outside [-1, 1] want clip=False
"""
import math
from functools import partial
from itertools import pairwise
from numbers import Integral, Real

import torch
import torch.nn.functional as F
from torch import nn


def linear_schedule(T=1000, beta_1=1e-4, beta_T=0.02):
    """beta_1..beta_T, float64 (T,), evenly spaced (Sec. 4); T >= 1, both ends in 0..1.
    The ends suit T = 1000. For another T above 20 scale both by 1000 / T: else
    alpha_bar_T stays far from 0 or, from T = 10,277 on, is 0 in float32."""
    _check_numbers(Integral, 1, math.inf, T=T)
    _check_numbers(Real, 0, 1, beta_1=beta_1, beta_T=beta_T)
    return torch.linspace(beta_1, beta_T, T, dtype=torch.float64)


def cosine_schedule(T=1000, s=0.008):
    """beta_1..beta_T, float64 (T,) (Nichol & Dhariwal 2021, Eq. 17).
    T >= 1, s in 0..1."""
    _check_numbers(Integral, 1, math.inf, T=T)
    _check_numbers(Real, 0, 1, s=s)
    u = torch.arange(T + 1, dtype=torch.float64) / T
    f = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2
    return _betas(f / f[0])


def laplace_schedule(T=1000, mu=-1.5, b=1.0):
    """beta_1..beta_T, float64 (T,): log(alpha_bar / (1 - alpha_bar)) ~ Laplace(mu, b)
    (Hang et al. 2024: mu = 0, b = 0.5; this project's defaults suit small digits).
    T >= 1, mu in -10..10, b in 0.01..2."""
    _check_numbers(Integral, 1, math.inf, T=T)
    _check_numbers(Real, -10, 10, mu=mu)
    _check_numbers(Real, 0.01, 2, b=b)
    u = torch.arange(T + 1, dtype=torch.float64) / (T + 1)      # < 1: alpha_bar_T > 0
    law = torch.distributions.Laplace(torch.tensor(mu, dtype=u.dtype), float(b))
    return _betas(torch.sigmoid(law.icdf(1 - u)))


def _betas(alpha_bar):
    """beta_1..beta_T, at most 0.999 (Nichol & Dhariwal 2021, Sec. 3.2)."""
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


class GaussianDiffusion(nn.Module):
    """The processes q and p for x of any shape (B, ...), from betas (T,) inside (0, 1),
    to which gradients pass. Buffers (T+1,) in dtype, float32 or float64: beta, alpha,
    alpha_bar and one_minus_alpha_bar. t: int64 (B,) in 1..T. A model: any callable
    (x_t, t), or (x_t, t, y) with labels y, that returns eps of x_t's shape; where only
    (x_t, t) is called, labels are bound: partial(model, y=y), or classifier_free.

    On a GPU nobody looks whether t is in 1..T, as the CPU would have to wait for the
    answer: t = 0 is taken for the data and, in q_posterior, t - 1 = -1 for T."""

    def __init__(self, betas, dtype=torch.float32):
        super().__init__()
        _check_floats(betas=betas)
        if betas.dim() != 1 or not 0 < betas.min() <= betas.max() < 1:
            ends = f"{betas.min():.3g}..{betas.max():.3g}"
            raise ValueError(f"want betas (T,) inside (0, 1): {_told(betas)}, {ends}")
        self.T = len(betas)
        beta = F.pad(betas.double(), (1, 0))            # beta_0 = 0
        log_alpha_bar = torch.log1p(-beta).cumsum(0)    # alpha_bar_0 = 1
        self.register_buffer("beta", beta)
        self.register_buffer("alpha", 1 - beta)
        self.register_buffer("alpha_bar", log_alpha_bar.exp())
        # Not computed later: 1 - alpha_bar_1 in float32 has three correct digits.
        self.register_buffer("one_minus_alpha_bar", -torch.expm1(log_alpha_bar))
        self.to(dtype)
        self._check_dtype()
        if self.beta[1:].min() < torch.finfo(dtype).tiny or self.alpha_bar[-1] == 0:
            raise ValueError(f"betas: a beta, or alpha_bar_T, is 0 in {dtype}")

    def _check_dtype(self):
        """ValueError where a parent module's .half() has reached the buffers."""
        if self.beta.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"schedule in {self.beta.dtype}: make it anew, in float32")

    def _check(self, t, **tensors):
        """ValueError unless the tensors are of one shape (B, ...), and t fits them."""
        self._check_dtype()
        shape = _check_floats(**tensors)
        if not torch.is_tensor(t) or t.dtype != torch.int64 or t.shape != shape[:1]:
            raise ValueError(f"want t int64 ({shape[0]},), got {_told(t)}")
        look = t.is_cpu and not torch.compiler.is_compiling()
        if look and (t.min() < 1 or t.max() > self.T):
            raise ValueError(f"want t in 1..{self.T}, got {t.min()}..{t.max()}")

    def signal_noise(self, t, x):
        """sqrt(alpha_bar_t), sqrt(1 - alpha_bar_t), (B, 1, ...), x's dtype (Eq. 4)."""
        self._check(t, x=x)
        # Roots first: alpha_bar_T in float16 can be 0.
        signal = self.alpha_bar[t].sqrt()
        noise = self.one_minus_alpha_bar[t].sqrt()
        return _broadcast(signal, x), _broadcast(noise, x)

    def q_sample(self, x0, t, eps):
        """x_t ~ q(x_t | x0), (B, ...), for eps ~ N(0, I) of x0's shape (Eq. 4)."""
        self._check(t, x0=x0, eps=eps)
        signal, noise = self.signal_noise(t, x0)
        return signal * x0 + noise * eps

    def q_posterior(self, x0, x_t, t):
        """Mean (B, ...), variance (B, 1, ...) of q(x_{t-1} | x_t, x0) (Eqs. 6, 7)."""
        self._check(t, x_t=x_t, x0=x0)
        alpha_bar_prev = self.alpha_bar[t - 1]
        one_minus_alpha_bar_prev = self.one_minus_alpha_bar[t - 1]
        one_minus_alpha_bar = self.one_minus_alpha_bar[t]
        weight_0 = alpha_bar_prev.sqrt() * self.beta[t] / one_minus_alpha_bar
        weight_t = self.alpha[t].sqrt() * one_minus_alpha_bar_prev / one_minus_alpha_bar
        beta_tilde = one_minus_alpha_bar_prev / one_minus_alpha_bar * self.beta[t]
        mean = _broadcast(weight_0, x0) * x0 + _broadcast(weight_t, x_t) * x_t
        return mean, _broadcast(beta_tilde, x_t)

    def predict_x0(self, x_t, t, eps):
        """The x0 (B, ...) that eps implies at x_t (Eq. 15)."""
        self._check(t, x_t=x_t, eps=eps)
        signal, noise = self.signal_noise(t, x_t)
        return (x_t - noise * eps) / signal

    def predict_eps(self, x_t, t, x0):
        """The eps (B, ...) that x0 implies at x_t: predict_x0 inverted (Eq. 15)."""
        self._check(t, x_t=x_t, x0=x0)
        signal, noise = self.signal_noise(t, x_t)
        return (x_t - signal * x0) / noise

    def score(self, model, x_t, t):
        """The model's grad log q(x_t), (B, ...) (Dhariwal & Nichol 2021, Eq. 11)."""
        self._check(t, x_t=x_t)
        _, noise = self.signal_noise(t, x_t)
        return -_eps_theta(model, x_t, t) / noise

    def loss(self, model, x0, y=None, generator=None):
        """L_simple by Algorithm 1, a scalar: Eq. 14 over the size of one x0.
        For classifier_free some of y (B,), say a tenth, must be -1, the null label."""
        _check_floats(x0=x0)
        shape, device = x0.shape[:1], x0.device
        t = torch.randint(1, self.T + 1, shape, generator=generator, device=device)
        eps = torch.empty_like(x0).normal_(generator=generator)
        x_t = self.q_sample(x0, t, eps)
        return F.mse_loss(_eps_theta(model, x_t, t, y), eps)

    def _x0_theta(self, model, x_t, t, y, clip):
        """The x0 that the model's eps implies, brought into [-1, 1] if clip."""
        x0 = self.predict_x0(x_t, t, _eps_theta(model, x_t, t, y))
        return x0.clamp(-1, 1) if clip else x0

    def vlb(self, model, x0, t, y=None, clip=True, generator=None):
        """Eq. 5's term for t, nats (B,), at one x_t: L_{t-1}, or for t = 1 the L_0 of
        8-bit x0, float32 or float64. p's variance is beta~_t, for t = 1 beta~_2 (the
        authors' code), so T >= 2. clip: as in p_sample."""
        _check_floats(x0=x0)
        _check_numbers(Integral, 2, math.inf, T=self.T)
        if x0.dtype.itemsize < 4:
            raise ValueError(f"want x0 in float32 or float64, got {_told(x0)}")
        eps = torch.empty_like(x0).normal_(generator=generator)
        x_t = self.q_sample(x0, t, eps)
        x0_theta = self._x0_theta(model, x_t, t, y, clip)
        mean_p, _ = self.q_posterior(x0_theta, x_t, t)
        mean_q, _ = self.q_posterior(x0, x_t, t)
        _, variance = self.q_posterior(x0, x_t, t.clamp(min=2))
        kl = (mean_q - mean_p) ** 2 / (2 * variance)                    # Eq. 8, t > 1
        nll = -discretised_log_likelihood(x0, mean_p, variance)         # Eq. 13, t = 1
        nats = torch.where(_broadcast(t, x0) == 1, nll, kl)
        return nats.reshape(len(x0), -1).sum(1)

    def prior_kl(self, x0):
        """L_T = KL(q(x_T | x0) || N(0, I)), nats (B,) (Eq. 5)."""
        self._check_dtype()
        _check_floats(x0=x0)
        mean = self.alpha_bar[-1].sqrt() * x0.to(self.beta.dtype)
        kl = gaussian_kl(mean, self.one_minus_alpha_bar[-1], 0, 1)
        return kl.reshape(len(x0), -1).sum(1)

    @torch.no_grad()
    def bits_per_dim(self, model, x0, y=None, clip=True, batch_size=500,
                     generator=None):
        """Eq. 5 in bits/dim on 8-bit x0 (N, ...) scaled to [-1, 1], N, T >= 2: estimate
        and standard error. Importance sampling: each x0 has one t, and its term is over
        that t's probability. No bias; but t near T are rare: errors there want clip."""
        _check_floats(x0=x0)
        _check_numbers(Integral, 2, math.inf, N=len(x0), T=self.T)
        _check_numbers(Integral, 1, math.inf, batch_size=batch_size)
        if y is not None and not (torch.is_tensor(y) and len(y) == len(x0)):
            raise ValueError(f"want y ({len(x0)}, ...), got {_told(y)}")
        # In proportion to L_{t-1} of N(0, I) data (docs/derivations.md), for t = 2..T.
        weight = self.alpha_bar[1:-1] * self.beta[2:] / self.one_minus_alpha_bar[1:-1]
        weight = torch.cat([weight[:1], weight])        # t = 1 as often as t = 2
        prob = weight / weight.sum()                    # (T,), of t = 1..T
        t = 1 + torch.multinomial(prob, len(x0), replacement=True, generator=generator)
        nats = []
        for i in torch.arange(len(x0)).split(int(batch_size)):
            y_i = None if y is None else y[i]
            term = self.vlb(model, x0[i], t[i], y_i, clip, generator)
            nats.append(term / prob[t[i] - 1] + self.prior_kl(x0[i]))
        bits = torch.cat(nats) / (x0[0].numel() * math.log(2))
        return bits.mean().item(), bits.std().item() / math.sqrt(len(x0))

    @torch.no_grad()
    def p_sample(self, model, x_t, t, t_prev=None, eta=1.0, clip=True, generator=None):
        """One reverse step, x_t (B, ...) to x_{t_prev}; ints t_prev < t, default t - 1.
        The step is DDIM's (Song et al. 2021, Eqs. 12, 16, their alpha our alpha_bar):
        eta=0 adds no noise; eta=1, t_prev = t - 1, clip=False is Algorithm 2 with
        sigma_t^2 = beta~_t (Sec. 3.2's other choice, beta_t, is not offered).
        clip: bring the model's x0 into [-1, 1] (the authors' code).
        No gradients; for these (eta=1) compose predict_x0 and q_posterior."""
        _check_numbers(Integral, 1, self.T, t=t)
        t_prev = t - 1 if t_prev is None else t_prev
        _check_numbers(Integral, 0, t - 1, t_prev=t_prev)
        _check_numbers(Real, 0, 1, eta=eta)
        _check_floats(x_t=x_t)
        t_batch = torch.full(x_t.shape[:1], t, device=x_t.device)
        x0 = self._x0_theta(model, x_t, t_batch, None, clip)
        eps = self.predict_eps(x_t, t_batch, x0)                # of the clipped x0

        # eta = 1 and t_prev = t - 1: the mean is that of q_posterior(x0, x_t, t), the
        # variance beta~_t. So it is line 4 of Algorithm 2, but for clipping (Eq. 11).
        alpha_bar_prev = self.alpha_bar[t_prev]
        one_minus_alpha_bar_prev = self.one_minus_alpha_bar[t_prev]
        alpha_step = self.alpha_bar[t] / alpha_bar_prev         # alpha_t, if one step
        variance = eta**2 * (1 - alpha_step) * one_minus_alpha_bar_prev
        variance = variance / self.one_minus_alpha_bar[t]       # Song's Eq. 16, squared
        direction = (one_minus_alpha_bar_prev - variance).clamp(min=0).sqrt() * eps
        mean = alpha_bar_prev.sqrt() * x0 + direction
        # At t_prev = 0 the variance is 0: no noise enters x_0.
        z = torch.empty_like(x_t).normal_(generator=generator)
        return mean + variance.sqrt() * z

    def times(self, steps=None):
        """The t of a chain of so many steps (None: T), a list of ints from T to 0:
        T (i / steps)^1.5, rounded and at least i, so that all differ. 1.5 is between
        even steps, which keep the shape of digits best, and the squares of Song et al.
        2021, App. D.2, which keep texture best (docs/derivations.md)."""
        steps = self.T if steps is None else steps
        _check_numbers(Integral, 1, self.T, steps=steps)
        i = torch.arange(steps, -1, -1)
        t = self.T * (i.double() / steps) ** 1.5
        return torch.maximum(t.round().long(), i).tolist()

    def sample(self, model, shape, steps=None, eta=1.0, clip=True, generator=None):
        """Yield x_T ~ N(0, I), ..., x_0, (B, ...), each a copy, in the schedule's dtype
        (Algorithm 2). steps: see times; eta, clip: see p_sample."""
        times = self.times(steps)
        x = self.beta.new_empty(shape).normal_(generator=generator)
        if not x.dim() or not x.numel():
            raise ValueError(f"want shape (B, ...), no side 0, got {tuple(shape)}")
        yield x.clone()
        for t, t_prev in pairwise(times):
            x = self.p_sample(model, x, t, t_prev, eta, clip, generator)
            yield x.clone()


def _eps_theta(model, x_t, t, y=None):
    """The model's eps, in x_t's dtype whichever the network computes in."""
    eps = model(x_t, t) if y is None else model(x_t, t, y)
    if not torch.is_tensor(eps) or eps.shape != x_t.shape:
        raise ValueError(f"want {tuple(x_t.shape)} from the model, got {_told(eps)}")
    return eps.to(x_t.dtype)


def _broadcast(values, x):
    """values (B,) as (B, 1, ...), in x's dtype, to broadcast over x (B, ...)."""
    return values.to(x.dtype).reshape([len(x)] + [1] * (x.dim() - 1))


def gaussian_kl(mean_q, var_q, mean_p, var_p):
    """KL of N(mean_q, var_q > 0) to N(mean_p, var_p > 0), nats, elementwise (Eq. 8 is
    the case var_q = var_p). var_q is a tensor; the others can be numbers."""
    log_ratio = torch.log(var_p / var_q)
    square = (mean_q - mean_p) ** 2
    # In this order small squares keep their digits.
    return 0.5 * (log_ratio + (var_q / var_p - 1) + square / var_p)


def discretised_log_likelihood(x0, mean, var):
    """log of N(mean, var)'s mass in x0 +- 1/255, nats, elementwise (Eq. 13). x0: 8-bit
    data scaled to [-1, 1], whose ends' bins reach to infinity. A tensor, as is var > 0,
    float32 or float64; mean can be a number."""
    upper = torch.where(x0 > 0.999, math.inf, x0 + 1 / 255 - mean)
    lower = torch.where(x0 < -0.999, -math.inf, x0 - 1 / 255 - mean)
    # Phi(upper) - Phi(lower), mirrored into the left tail, where Phi keeps its digits.
    mirror = lower + upper > 0
    left = torch.where(mirror, -upper, lower)
    right = torch.where(mirror, -lower, upper)
    log_left = torch.special.log_ndtr(left / var.sqrt())
    log_right = torch.special.log_ndtr(right / var.sqrt())
    return log_right + torch.log(-torch.expm1(log_left - log_right))


def classifier_free(model, y, s):
    """The callable (x_t, t) -> eps_null + s (eps_y - eps_null) of a model(x_t, t, y)
    trained with some y = -1, the null label (Ho & Salimans 2022, Eq. 6, w = s - 1).
    y (B, ...), int64 or floats; s a number, or (B,), one for each of x_t."""
    y = torch.as_tensor(y)
    if not y.dtype.is_signed:
        raise ValueError(f"want y int64 or floats, for -1, got {_told(y)}")
    return partial(_guided_eps, model, y, s)


def _guided_eps(model, y, s, x_t, t):
    s = torch.as_tensor(s, dtype=x_t.dtype, device=x_t.device)
    if s.shape not in ((), x_t.shape[:1]):
        raise ValueError(f"want s a number or ({len(x_t)},), got {_told(s)}")
    eps = model(x_t, t, y)
    eps_null = model(x_t, t, torch.full_like(y, -1))
    return eps_null + _broadcast(s.expand(len(x_t)), x_t) * (eps - eps_null)


def _told(value):
    """What a message says of a value: a tensor's dtype and shape, else its text."""
    if torch.is_tensor(value):
        return f"{value.dtype} {tuple(value.shape)}"
    return f"{value!r:.40}"


def _check_numbers(kind, low, high, **values):
    """ValueError unless all values are of that kind, Integral or Real, in low..high."""
    for name, value in values.items():
        fits = isinstance(value, kind) and not isinstance(value, bool)
        if not fits or not low <= value <= high:
            want = f"{name} {kind.__name__} in {low}..{high}"
            raise ValueError(f"want {want}, got {_told(value)}")


def _check_floats(**tensors):
    """The one shape (B, ...) of these tensors of floats; ValueError if they differ."""
    shape = None
    for name, x in tensors.items():
        floats = torch.is_tensor(x) and x.is_floating_point()
        if not floats or not x.dim() or not x.numel():
            raise ValueError(f"want {name} a tensor of floats, got {_told(x)}")
        shape = shape or x.shape
        if x.shape != shape:
            raise ValueError(f"want {name} {tuple(shape)}, got {_told(x)}")
    return shape
