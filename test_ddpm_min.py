"""Proofs of ddpm_min.py: the identities of Ho et al. 2020 (arXiv 2006.11239). Each test
compares one with the paper's formula or a first principle; closed forms agree to 1e-10
in float64 (the buffers' float32 to 1e-5), estimates to five standard errors, and
docs/derivations.md says why each holds. Schedules, guidance, bits, edges: tests/. On a
GPU, with other draws: DEVICE=cuda SEED_OFFSET=1 pytest test_ddpm_min.py
"""
import math
import os
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

from ddpm_min import GaussianDiffusion, linear_schedule

DEVICE = os.environ.get("DEVICE", "cpu")
HALF = 1 / 255                          # half the distance of 8-bit levels
assert_close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
randn = partial(torch.randn, dtype=torch.float64, device=DEVICE)


def seeded(n, device=DEVICE):
    """The generator of the n-th draw; SEED_OFFSET=1 (2, 3, ...) draws all anew."""
    offset = int(os.environ.get("SEED_OFFSET", "0"))
    return torch.Generator(device).manual_seed(n + 1000 * offset)


def eps_again():
    """A generator whose first draw is eps, below: so what a function draws is known."""
    return seeded(1)


# The paper's symbols, and signal and noise for sqrt(alpha_bar) and sqrt(1 - alpha_bar):
# row t belongs to t, row 0 to the data. t is 1, ..., T, with a row of x0, eps and x_t
# for each, images of 2 x 2 pixels.
T = 50
betas = torch.linspace(0.002, 0.3, T, dtype=torch.float64, device=DEVICE)
beta = F.pad(betas, (1, 0)).reshape(T + 1, 1, 1, 1)
alpha = 1 - beta
alpha_bar = torch.cumprod(alpha, 0)
signal = alpha_bar.sqrt()
noise = (1 - alpha_bar).sqrt()
t = torch.arange(1, T + 1, device=DEVICE)
x0 = randn(T, 1, 2, 2, generator=seeded(0)).tanh()
eps = randn(T, 1, 2, 2, generator=eps_again())
x_t = signal[t] * x0 + noise[t] * eps
diffusion = GaussianDiffusion(betas, torch.float64)


def some_model(x, n):
    """Some eps of x at t = n; few identities ask for a good one."""
    shift = torch.as_tensor(n).double() / T
    return 0.3 * x + shift.reshape(-1, *[1] * (x.dim() - 1))


def q(n, x):
    """q(x_n | x0 = x), Eq. 4."""
    return Normal(signal[n] * x, noise[n])


def q_step(n, x):
    """q(x_n | x_{n-1} = x), Eq. 2."""
    return Normal(alpha[n].sqrt() * x, beta[n].sqrt())


def mean_by_eps(n, x, model_eps):
    """The mean of x_{n-1} given x_n = x and its eps, Eqs. 10, 11."""
    step = beta[n] / noise[n] * model_eps
    return (x - step) / alpha[n].sqrt()


def beta_tilde(n):
    """The variance of q(x_{n-1} | x_n, x0), Eq. 7."""
    return (1 - alpha_bar[n - 1]) / (1 - alpha_bar[n]) * beta[n]


def implied(x, n, model_eps, clip=1.0):
    """The x0 that eps implies at x (Eq. 15), clipped or not, and the eps of that x0."""
    x0_model = (x - noise[n] * model_eps) / signal[n]
    x0_model = x0_model if clip is None else x0_model.clamp(-clip, clip)
    return x0_model, (x - signal[n] * x0_model) / noise[n]


def exact_eps(x, bar, mean, var):
    """E[eps | x_t = x] of data x0 ~ N(mean, var): the linear regression of eps on x_t.
    Here bar = alpha_bar_t; the covariance of eps and x_t is sqrt(1 - bar)."""
    var_t = bar * var + 1 - bar
    slope = (1 - bar).sqrt() / var_t
    return slope * (x - bar.sqrt() * mean)


def test_buffers():
    """beta_0 = 0, alpha_bar_0 = 1; noise_1 = sqrt(1e-4) keeps its float32 digits."""
    b = F.pad(linear_schedule(), (1, 0))

    ours = dict(GaussianDiffusion(b[1:]).named_buffers())

    bar = torch.cumprod(1 - b, 0)
    oracle = {"beta": b, "alpha_bar": bar, "signal": bar.sqrt()}
    oracle["noise"] = (1 - bar).sqrt()
    oracle["beta_tilde"] = F.pad((1 - bar[:-1]) / (1 - bar[1:]), (1, 0)) * b    # Eq. 7
    assert_close(ours, oracle, rtol=1e-5, atol=0, check_dtype=False)


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
    n, x, x_n = t[1:], x0[1:], x_t[1:]                  # at t = 1 there is no density
    x_prev = eps[1:]                                    # any points will do

    mean, var = diffusion.q_posterior(x, x_n, n)
    ours = Normal(mean, var.sqrt()).log_prob(x_prev)

    likelihood = q_step(n, x_prev).log_prob(x_n)
    prior = q(n - 1, x).log_prob(x_prev)
    evidence = q(n, x).log_prob(x_n)
    assert_close(ours, likelihood + prior - evidence)


def test_posterior_mean():
    """The posterior's mean from x_t and the true eps, Eq. 10; no variance at t = 1."""
    mean, var = diffusion.q_posterior(x0, x_t, t)

    assert_close(mean, mean_by_eps(t, x_t, eps))
    assert var[0] == 0


def test_predict():
    """x_t and the true eps give x0 back, Eq. 15."""
    assert_close(diffusion.predict_x0(x_t, t, eps), x0)


def test_loss():
    """A model that knows eps and errs by i on image i has the loss mean of i^2."""
    error = t.double().reshape(T, 1, 1, 1)

    def model(x, n):
        true = (x - signal[n] * x0) / noise[n]
        return true + error

    ours = diffusion.loss(model, x0, seeded(2))

    assert_close(ours, error.square().mean())


def test_loss_draws():
    """t is uniform on 1..T, each pixel of eps N(0, 1); t, eps, eps^2 are uncorrelated
    in an image, t and eps also with those of the next, and half a batch away."""
    seen, N = [], 1000 * T

    def model(x, n):
        seen.extend([n, x / noise[n]])                  # this is eps, as x0 = 0
        return x

    diffusion.loss(model, 0 * x0.repeat(1000, 1, 1, 1), generator=seeded(2))

    times, pixels = seen[0], seen[1].flatten(1)         # (N,), (N, 4)
    places = (T * Normal(0, 1).cdf(pixels)).long()      # of 50, all equally likely
    for draws in [times - 1, *places.T]:
        z = (draws.bincount(minlength=T) - 1000) / math.sqrt(1000)
        assert z.abs().max() < 5 and 0.5 < z.std() < 1.5
    image = torch.cat([times[:, None], pixels], dim=1)
    table = [image, pixels**2, image.roll(1, dims=0), image.roll(N // 2, dims=0)]
    correlation = torch.cat(table, dim=1).T.corrcoef().triu(1)
    correlation[1:5, 5:9].fill_diagonal_(0)             # an eps and its own square
    assert correlation.abs().max() < 5 / math.sqrt(N)


def test_bound():
    """E[-log p(x_T) - sum_t log p(x_{t-1} | x_t) / q(x_t | x_{t-1})], Eq. 3, is Eq. 5's
    sum: on the chain's first four steps, from one x0, by 100,000 paths."""
    chain = GaussianDiffusion(betas[:4], torch.float64)
    x = torch.full((100000, 1, 1, 1), 51 / 255, dtype=torch.float64, device=DEVICE)

    eq_5 = chain.prior_kl(x)
    for n in range(1, 5):
        times = torch.full((100000,), n, device=DEVICE)
        eq_5 += chain.vlb_term(some_model, x, times, None, seeded(n))

    x_prev, eq_3, draws = x, 0, seeded(5)
    for n in range(1, 5):
        step = q_step(n, x_prev)
        x_n = step.mean + step.stddev * randn(x.shape, generator=draws)
        mean = mean_by_eps(n, x_n, some_model(x_n, n))
        p = Normal(mean, beta_tilde(max(n, 2)).sqrt())
        mass = p.cdf(x + HALF) - p.cdf(x - HALF)
        log_p = mass.log() if n == 1 else p.log_prob(x_prev)
        eq_3 += step.log_prob(x_n) - log_p
        x_prev = x_n
    eq_3 -= Normal(0, 1).log_prob(x_prev)

    error = math.sqrt((eq_5.var() + eq_3.var()) / 100000)
    assert_close(eq_5.mean(), eq_3.mean(), rtol=0, atol=5 * error)
    assert error < 0.02


@pytest.mark.parametrize("clip", [1.0, 0.3, None])
def test_L_t(clip):
    """L_{t-1} is Eq. 12's weighted error of eps, with sigma_t^2 = beta~_t; t > 1."""
    ours = diffusion.vlb_term(some_model, x0, t, clip, eps_again())

    weight = beta[t] ** 2 / (2 * beta_tilde(t) * alpha[t] * (1 - alpha_bar[t]))
    _, model_eps = implied(x_t, t, some_model(x_t, t), clip)
    oracle = weight * (eps - model_eps) ** 2
    assert_close(ours[1:], oracle[1:].sum((1, 2, 3)))


def test_L_0():
    """L_0 = -log of the mass in x0 +- 1/255, Eq. 13 between its ends, with sigma_1^2 =
    beta~_2."""
    ours = diffusion.vlb_term(some_model, x0, t, generator=eps_again())

    mean, _ = implied(x_t, t, some_model(x_t, t))
    p = Normal(mean[0], beta_tilde(2).sqrt())
    mass = p.cdf(x0[0] + HALF) - p.cdf(x0[0] - HALF)
    assert_close(ours[0], -mass.log().sum())


def test_L_T():
    """L_T = KL(q(x_T | x0) || N(0, I)), summed over all dimensions."""
    ours = diffusion.prior_kl(x0)

    kl = kl_divergence(q(T, x0), Normal(0 * x0, 1))
    assert_close(ours, kl.sum((1, 2, 3)))


@pytest.mark.parametrize("clip", [None, 1.0, 0.3])
@pytest.mark.parametrize("n", [1, 2, 25, T])
def test_algorithm_2(n, clip):
    """Line 4 of Algorithm 2, with sigma_t^2 = beta~_t; where x0 is clipped, with the
    eps that the clipped x0 implies."""
    x = 3 * x_t                                         # any will do

    ours = diffusion.p_sample(some_model, x, n, clip, eps_again())

    _, model_eps = implied(x, n, some_model(x, n), clip)
    mean = mean_by_eps(n, x, model_eps)
    assert_close(ours, mean + beta_tilde(n).sqrt() * eps)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("eta", [0, 0.5, 1])
@pytest.mark.parametrize("n, n_prev", [(T, T - 1), (T, 0), (30, 7), (1, 0)])
def test_ddim(n, n_prev, eta, clip):
    """ddim_sample is Eq. 12 of Song et al., with the eps of the x0 that was clipped."""
    x = 3 * x_t

    ours = diffusion.ddim_sample(some_model, x, n, n_prev, eta, clip, eps_again())

    ratio = alpha_bar[n] / alpha_bar[n_prev]
    sigma = eta * noise[n_prev] / noise[n] * (1 - ratio).sqrt()     # their Eq. 16
    x0_model, model_eps = implied(x, n, some_model(x, n), clip)
    direction = (noise[n_prev] ** 2 - sigma**2).sqrt() * model_eps
    assert_close(ours, signal[n_prev] * x0_model + direction + sigma * eps)


@pytest.mark.parametrize("n", [1, 2, 25, T])
def test_ddim_is_algorithm_2(n):
    """With eta = 1, one step at a time, ddim_sample is p_sample."""
    ours = diffusion.ddim_sample(some_model, x_t, n, n - 1, generator=eps_again())

    algorithm_2 = diffusion.p_sample(some_model, x_t, n, generator=eps_again())
    assert_close(ours, algorithm_2)


@pytest.mark.parametrize("eta", [0, 0.5, 1])
def test_marginals(eta):
    """By the eps of data that are one point x_t ~ q(x_t | x0) goes to x_s ~ q(x_s | x0)
    for every eta (Song et al. 2021, Lemma 1); over two strides."""
    def model(x, n):
        return (x - signal[n] * 0.7) / noise[n]

    draws = seeded(3)
    z = randn(40000, 1, 1, 1, generator=draws)
    x = signal[40] * 0.7 + noise[40] * z
    for n, n_prev in [(40, 21), (21, 5)]:
        x = diffusion.ddim_sample(model, x, n, n_prev, eta, None, draws)

    mean_error = noise[5] / math.sqrt(40000)
    std_error = noise[5] / math.sqrt(2 * 40000)
    assert (x.mean() - signal[5] * 0.7).abs() < 5 * mean_error
    assert (x.std() - noise[5]).abs() < 5 * std_error


@pytest.mark.parametrize("steps, times, eta", [
    (None, range(T, -1, -1), 1), (None, [50, 49, 48], 0.5),
    (7, [50, 40, 30, 22, 14, 8, 3, 0], 1)])
def test_sample(steps, times, eta):
    """The steps above from x_T ~ N(0, I) on: Algorithm 2's, or with eta or steps DDIM's
    at t = T (i/S)^1.5, though the caller overwrites x."""
    ours = []
    for x in diffusion.sample(some_model, x0.shape, steps, eta, 0.3, eps_again()):
        ours.append(x.clone())
        x.fill_(9)

    draws = seeded(1)
    oracle = [randn(x0.shape, generator=draws)]
    for n, n_prev in pairwise(times):
        step = partial(diffusion.ddim_sample, some_model, oracle[-1], n, n_prev, eta)
        if steps is None and eta == 1:
            step = partial(diffusion.p_sample, some_model, oracle[-1], n)
        oracle.append(step(0.3, draws))
    assert_close(ours[:len(oracle)], oracle)
    assert len(ours) == (T if steps is None else steps) + 1
