"""Proofs of ddpm_min.py: the identities of Ho et al. 2020 (arXiv 2006.11239). Each test
compares one with the paper's formula or a first principle, in float64: closed forms to
1e-10, estimates to five standard errors.

identity                                       where                    test_...
index 0 is the data; float32 keeps 1 - abar    Sec. 2                   buffers
q(x_t | x0) composes q(x_t | x_{t-1})          Eqs. 2, 4                q_sample
q(x_{t-1} | x_t, x0) by Bayes' rule            Eqs. 6, 7                posterior
its mean, from x_t and eps                     Eq. 10                   posterior_mean
x0 and eps from each other                     Eq. 15                   predict
E[eps | x_t] gives the gradient of log q(x_t)  Sec. 3.2                 score
the loss; t uniform on 1..T, eps ~ N(0, I)     Eq. 14, Algorithm 1      loss, loss_draws
L_{t-1}, a weighted error of eps               Eqs. 8, 12               L_t, kl
L_0, the decoder's                             Eq. 13                   L_0, decoder
L_T, the KL to N(0, I)                         Eq. 5                    L_T
their sum without bias, its error true         Eq. 5                    bits_per_dim
one reverse step                               Algorithm 2              algorithm_2
one step with strides, eta, clipping           Song 2021, Eqs. 12, 16   ddim
the chain from T to 0, its spacing             Algorithm 2              sample, times
Gaussian data and fine grain come out          first principles         gaussian, grain
"""
import math
import os
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

from ddpm_min import (GaussianDiffusion, cosine_schedule, discretised_log_likelihood,
                      gaussian_kl, laplace_schedule, linear_schedule)

T = 50
HALF = 1 / 255                  # of the distance between the levels of 8-bit data
NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
assert_close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


def seeded(n, device="cpu"):
    """The generator of the n-th draw; SEED_OFFSET=1 (2, 3, ...) draws all anew."""
    offset = int(os.environ.get("SEED_OFFSET", "0"))
    return torch.Generator(device).manual_seed(n + offset)


@pytest.fixture(autouse=True, params=["cpu", pytest.param("cuda", marks=NO_CUDA)])
def symbols(request):
    """Make every test's symbols anew, on each device. beta[t], alpha[t], alpha_bar[t],
    signal[t] and noise[t] are columns, index 0 the data; t is all of 1, ..., T, with a
    row of x0, of eps and of x_t for each. The generator draws will draw eps again."""
    global device, randn, draws, diffusion, t, x0, eps, x_t
    global beta, alpha, alpha_bar, signal, noise
    device = request.param
    randn = partial(torch.randn, dtype=torch.float64, device=device)
    draws = seeded(1, device)
    betas = torch.linspace(0.002, 0.3, T, dtype=torch.float64, device=device)
    diffusion = GaussianDiffusion(betas, torch.float64)
    beta = F.pad(betas, (1, 0))[:, None]
    alpha = 1 - beta
    alpha_bar = torch.cumprod(alpha, 0)
    signal = alpha_bar.sqrt()
    noise = (1 - alpha_bar).sqrt()
    t = torch.arange(1, T + 1, device=device)
    x0 = randn(T, 3, generator=seeded(0, device)).tanh()
    eps = randn(T, 3, generator=seeded(1, device))
    x_t = signal[t] * x0 + noise[t] * eps


def some_model(x_t, t, y=0):
    """Some eps that depends on x_t, t and y; few identities ask for a good one."""
    return 0.3 * x_t + (t + y)[:, None].double() / T


def q(t, x0):
    """q(x_t | x0), Eq. 4."""
    return Normal(signal[t] * x0, noise[t])


def beta_tilde(t):
    """The variance of q(x_{t-1} | x_t, x0), Eq. 7."""
    return (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]) * beta[t]


def implied(x_t, t, eps, clip=False):
    """The x0 that eps implies (Eq. 15), clipped or not, and the eps of that x0."""
    x0 = (x_t - noise[t] * eps) / signal[t]
    x0 = x0.clamp(-1, 1) if clip else x0
    return x0, (x_t - signal[t] * x0) / noise[t]


def exact_eps(x_t, bar, mean, var):
    """E[eps | x_t] of data x0 ~ N(mean, var): the linear regression of eps on x_t. Here
    bar = alpha_bar_t; the covariance of eps and x_t is sqrt(1 - bar)."""
    var_t = bar * var + 1 - bar
    return (1 - bar).sqrt() / var_t * (x_t - bar.sqrt() * mean)


def log_Phi(z):
    """The log of the normal CDF, by a scaled erfc that does not underflow."""
    scaled = torch.special.erfcx(-z / math.sqrt(2)) / 2
    return scaled.log() - z**2 / 2


def test_buffers():
    """beta_0 = 0, alpha_bar_0 = 1; 1 - alpha_bar_1 = 1e-4 keeps its float32 digits."""
    betas = linear_schedule()

    ours = list(GaussianDiffusion(betas).buffers())

    beta = F.pad(betas, (1, 0))
    bar = torch.cumprod(1 - beta, 0)
    oracle = torch.stack([beta, 1 - beta, bar, 1 - bar])
    assert_close(ours, list(oracle.float()), rtol=1e-5, atol=0)


def test_q_sample():
    """q(x_t | x0) composes the steps q(x_t | x_{t-1}) of Eq. 2."""
    ours = diffusion.q_sample(x0, t, eps)

    scale, var, oracle = 1, 0, []
    for i in range(T):
        scale = alpha[i + 1].sqrt() * scale             # x_{i+1} ~ N(scale x0, var)
        var = alpha[i + 1] * var + beta[i + 1]
        oracle.append(scale * x0[i] + var.sqrt() * eps[i])
    assert_close(ours, torch.stack(oracle))


def test_posterior():
    """Bayes: q(x_{t-1} | x_t, x0) = q(x_t | x_{t-1}) q(x_{t-1} | x0) / q(x_t | x0)."""
    s, x_0, x_s = t[1:], x0[1:], x_t[1:]                # at t = 1 there is no density
    x_prev = eps[1:]                                    # any points will do

    mean, var = diffusion.q_posterior(x_0, x_s, s)
    ours = Normal(mean, var.sqrt()).log_prob(x_prev)

    step = Normal(alpha[s].sqrt() * x_prev, beta[s].sqrt())     # Eq. 2
    likelihood = step.log_prob(x_s)
    prior = q(s - 1, x_0).log_prob(x_prev)
    evidence = q(s, x_0).log_prob(x_s)
    assert_close(ours, likelihood + prior - evidence)


def test_posterior_mean():
    """The posterior's mean from x_t and the true eps, Eq. 10; at t = 1 it is x0."""
    ours, _ = diffusion.q_posterior(x0, x_t, t)
    step = beta[t] / noise[t] * eps
    assert_close(ours, (x_t - step) / alpha[t].sqrt())


def test_predict():
    """x_t and the true eps give x0 back, x_t and x0 give eps back, Eq. 15."""
    ours_x0 = diffusion.predict_x0(x_t, t, eps)
    ours_eps = diffusion.predict_eps(x_t, t, x0)
    assert_close([ours_x0, ours_eps], [x0, eps])


def test_score():
    """-E[eps | x_t] / sqrt(1 - alpha_bar_t) is the gradient of log q(x_t)."""
    def model(x_t, t):
        return exact_eps(x_t, alpha_bar[t], 0.4, 0.09)

    ours = diffusion.score(model, x_t, t)

    x_t.requires_grad_()
    var = alpha_bar[t] * 0.09 + noise[t] ** 2
    log_q = Normal(signal[t] * 0.4, var.sqrt()).log_prob(x_t)
    log_q.sum().backward()
    assert_close(ours, x_t.grad)


def test_loss():
    """A model that knows eps and errs by y, here 1, ..., T, has the loss mean y^2."""
    def model(x_t, t, y):
        eps = (x_t - signal[t] * x0) / noise[t]
        return eps + y[:, None]

    ours = diffusion.loss(model, x0, t, generator=draws)
    assert_close(ours, t.double().square().mean())


def test_loss_draws():
    """t is uniform on 1, ..., T, and eps ~ N(0, I), so that its CDF is uniform too."""
    seen = []

    def model(x_t, t):
        seen.extend([t, x_t / noise[t]])                # this is eps, as x0 = 0
        return x_t

    diffusion.loss(model, 0 * x0.repeat(1000, 1), generator=draws)

    t, eps = seen
    bins = T * Normal(0, 1).cdf(eps[:, 0])
    counts = torch.stack([t.bincount()[1:], bins.long().bincount()])
    z = (counts - 1000) / math.sqrt(1000)
    assert z.abs().max() < 5


@pytest.mark.parametrize("options", [{}, {"clip": True}])
def test_L_t(options):
    """L_{t-1} is Eq. 12's weighted error of eps, with sigma_t^2 = beta~_t; t > 1."""
    ours = diffusion.vlb(some_model, x0, t, y=t, generator=draws, **options)

    var = beta_tilde(t)
    weight = beta[t] ** 2 / (2 * var * alpha[t] * noise[t] ** 2)
    _, eps_model = implied(x_t, t, some_model(x_t, t, t), **options)
    oracle = weight * (eps - eps_model) ** 2
    assert_close(ours[1:], oracle[1:].sum(1))


def test_L_0():
    """L_0 = -log of the mass in x0 +- 1/255, Eq. 13, with sigma_1^2 = beta~_2."""
    ours = diffusion.vlb(some_model, x0, t, generator=draws)

    mean, _ = implied(x_t, t, some_model(x_t, t))
    p = Normal(mean[0], beta_tilde(2).sqrt())
    mass = p.cdf(x0[0] + HALF) - p.cdf(x0[0] - HALF)
    assert_close(ours[0], -mass.log().sum())


def test_L_T():
    """L_T = KL(q(x_T | x0) || N(0, I)), summed over all dimensions."""
    ours = diffusion.prior_kl(x0.reshape(T, 3, 1))
    kl = kl_divergence(q(T, x0), Normal(0 * x0, 1))
    assert_close(ours, kl.sum(1))


def test_kl():
    """The KL of two Gaussians is torch's."""
    a, b = Normal(x0, 0.2 + eps**2), Normal(x_t, noise[t])

    ours = gaussian_kl(a.mean, a.variance, b.mean, b.variance)
    assert_close(ours, kl_divergence(a, b))


@pytest.mark.parametrize("mean, std", [(0.1, 0.005), (-0.99, 0.06), (1.3, 0.2), (0, 2)])
def test_decoder(mean, std):
    """Eq. 13: the mass in x0 +- 1/255, at the ends all beyond; they sum to 1."""
    x0 = torch.arange(256, device=device).double() / 127.5 - 1

    ours = discretised_log_likelihood(x0, mean, torch.full_like(x0, std**2))

    d = (x0 - mean).abs()                               # Phi(-z) = 1 - Phi(z)
    near = log_Phi((HALF - d) / std)
    far = log_Phi((-HALF - d) / std)
    oracle = near + torch.log1p(-torch.exp(far - near))
    oracle[0] = log_Phi((x0[0] + HALF - mean) / std)
    oracle[255] = log_Phi((mean - x0[255] + HALF) / std)
    assert_close(ours, oracle)
    assert_close(ours.exp().sum().item(), 1.0)


def test_bits_per_dim():
    """Over 200 data sets, (estimate - Eq. 5) / its error has mean 0 and deviation 1."""
    chain = GaussianDiffusion(beta[1:7, 0], torch.float64)
    levels = 127.5 + 40 * randn(200, 400, 2, generator=draws)
    data = levels.round().clamp(0, 255) / 127.5 - 1
    labels = (data[..., 0] > 0) * 20

    estimate = partial(chain.bits_per_dim, some_model, batch_size=300, generator=draws)
    ours = [estimate(x0, y) for x0, y in zip(data, labels)]

    x0, y = data.flatten(0, 1), labels.flatten()
    nats = chain.prior_kl(x0)
    for t in range(1, 7):
        t = torch.full_like(y, t)
        nats += chain.vlb(some_model, x0, t, y, generator=draws)
    truth = nats.mean().item() / (2 * math.log(2))
    bits, error = torch.tensor(ours).T
    z = (bits - truth) / error
    moments = [z.mean().item(), z.std().item()]
    assert_close(moments, [0.0, 1.0], rtol=0, atol=0.4)    # 5 / sqrt(200), skew


@pytest.mark.parametrize("t", [1, 2, 25, T])
def test_algorithm_2(t):
    """p_sample(clip=False) is Algorithm 2's step, with sigma_t^2 = beta~_t."""
    state = 3 * x_t                                     # any will do
    ours = diffusion.p_sample(some_model, state, t, clip=False, generator=draws)

    eps_model = 0.3 * state + t / T
    mean = (state - beta[t] / noise[t] * eps_model) / alpha[t].sqrt()
    z = eps if t > 1 else 0
    assert_close(ours, mean + beta_tilde(t).sqrt() * z)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0, 0.5, 1])
@pytest.mark.parametrize("t, t_prev", [(T, T - 1), (T, 0), (30, 7), (1, 0)])
def test_ddim(t, t_prev, eta, clip):
    """p_sample is Eq. 12 of Song et al., with the eps of the x0 that was clipped."""
    state = 3 * x_t                                     # any will do
    ours = diffusion.p_sample(some_model, state, t, t_prev, eta, clip, draws)

    ratio = alpha_bar[t] / alpha_bar[t_prev]
    sigma = eta * noise[t_prev] / noise[t] * (1 - ratio).sqrt()     # their Eq. 16
    x0, eps_model = implied(state, t, 0.3 * state + t / T, clip)
    direction = (noise[t_prev] ** 2 - sigma**2).sqrt()
    mean = signal[t_prev] * x0 + direction * eps_model
    assert_close(ours, mean + sigma * eps)


@pytest.mark.parametrize("steps, times, options", [
    (None, range(T, -1, -1), {}),
    (7, [50, 40, 30, 22, 14, 8, 3, 0], {"eta": 0.5, "clip": False})])
def test_sample(steps, times, options):
    """p_sample from x_T ~ N(0, I) on, at t = T (i/S)^1.5, whatever is done to x."""
    ours = []
    for x in diffusion.sample(some_model, (T, 3), steps, generator=draws, **options):
        ours.append(x.clone())
        x.fill_(9)

    again = seeded(1, device)
    oracle = [randn(T, 3, generator=again)]
    step = partial(diffusion.p_sample, some_model, generator=again, **options)
    for t, t_prev in pairwise(times):
        oracle.append(step(oracle[-1], t, t_prev))
    assert_close(ours, oracle)


@pytest.mark.parametrize("S", range(1, T + 1))
def test_times(S):
    """S steps have S times, as p_sample refuses a step from t to t; S = T takes all."""
    states = list(diffusion.sample(some_model, (1, 3), S))
    assert len(states) == S + 1


def sampled(betas, mean, std, **options):
    """4,000 samples by the exact model of data x0 ~ N(mean, std^2)."""
    chain = GaussianDiffusion(betas, torch.float64).to(device)

    def model(x_t, t):
        return exact_eps(x_t, chain.alpha_bar[t[0]], mean, std**2)

    states = chain.sample(model, (4000, 1), clip=False, generator=draws, **options)
    return list(states)[-1]


@pytest.mark.parametrize("eta", [0, 1])
def test_gaussian(eta):
    """With the exact eps Gaussian data come out; steps cost 1 % of the deviation."""
    x = sampled(cosine_schedule(), 0.4, 0.3, eta=eta)
    moments = [x.mean().item(), x.std().item()]
    assert_close(moments, [0.4, 0.3], rtol=0, atol=0.024)  # 5 * 0.3 / sqrt(4000)


def test_grain():
    """50 steps of 1000 keep over half of fine texture (evenly spaced, a third)."""
    x = sampled(laplace_schedule(), 0, 20 / 127.5, steps=50)
    assert x.std() > 0.55 * 20 / 127.5
