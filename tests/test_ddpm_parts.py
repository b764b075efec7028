"""Proofs of what ddpm_min.py has beside the identities in test_ddpm_min.py: schedules,
whole chains, the decoder's tails, the estimate of the bound, guidance, and that
all stays on one device."""
import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.distributions import Normal

from ddpm_min import (GaussianDiffusion, classifier_free, cosine_schedule,
                      discretised_log_likelihood, laplace_schedule, linear_schedule)
from test_ddpm_min import HALF, exact_eps, seeded, some_model
from unet import UNet

assert_close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
randn = partial(torch.randn, dtype=torch.float64)
draws_of = partial(seeded, device="cpu")


def same(x, t):
    """A model that takes x_t for eps."""
    return x


def test_linear_schedule():
    """beta_t rises evenly from 1e-4 to 0.02, for T = 1000."""
    ours = linear_schedule()

    t = torch.arange(1, 1001).double()
    assert_close(ours, 1e-4 + (t - 1) / 999 * (0.02 - 1e-4))


@pytest.mark.parametrize("options, T, s", [((), 1000, 0.008), ((20, 0.1), 20, 0.1)])
def test_cosine_schedule(options, T, s):
    """alpha_bar_t = f(t) / f(0), but that no beta is above 0.999."""
    ours = cosine_schedule(*options)

    u = np.arange(T) / T                                # not t = T, where beta is cut
    f = np.cos((u + s) / (1 + s) * np.pi / 2) ** 2
    alpha_bar = np.cumprod(1 - ours.numpy())
    np.testing.assert_allclose(alpha_bar[:-1], f[1:] / f[0], rtol=1e-10)
    assert ours[-1] == 0.999


@pytest.mark.parametrize("options, mu, b", [((), -1.5, 1), ((1000, 1, 0.5), 1, 0.5)])
def test_laplace_schedule(options, mu, b):
    """P(log SNR < log SNR_t) = 1 - t / (T + 1) by the CDF of Laplace(mu, b)."""
    betas = laplace_schedule(*options)

    alpha_bar = torch.cumprod(1 - betas, 0)
    z = (torch.log(alpha_bar / (1 - alpha_bar)) - mu) / b
    tail = torch.exp(-z.abs()) / 2
    cdf = torch.where(z < 0, tail, 1 - tail)
    t = torch.arange(1, 1001).double()
    assert_close(cdf, 1 - t / 1001)


def test_gradient_of_betas():
    """Gradients reach betas: d log alpha_bar_T / d beta_t = -1 / (1 - beta_t)."""
    betas = torch.tensor([0.1, 0.2, 0.5], dtype=torch.float64, requires_grad=True)

    GaussianDiffusion(betas, torch.float64).alpha_bar[3].log().backward()

    assert_close(betas.grad, -1 / (1 - betas.detach()))


def test_gradients_of_a_step():
    """p_sample has none; predict_x0 and q_posterior have, for the same mean."""
    diffusion = GaussianDiffusion(linear_schedule(50, 0.002, 0.3))
    scale = torch.ones(3, requires_grad=True)
    x, t = torch.full((2, 3), 0.3), torch.tensor([2, 2])

    step = diffusion.p_sample(lambda x, t: scale * x, x, 2)
    x0 = diffusion.predict_x0(x, t, scale * x)
    mean, _ = diffusion.q_posterior(x0, x, t)

    assert not step.requires_grad
    assert mean.requires_grad


@pytest.mark.parametrize("method, options", [
    ("loss", {}), ("bits_per_dim", {}), ("sample", {"steps": 9})])
def test_generator(method, options):
    """A generator settles all that is drawn."""
    diffusion = GaussianDiffusion(linear_schedule())
    x0 = (9, 3) if method == "sample" else torch.zeros(9, 3)

    def run(n):
        drawn = getattr(diffusion, method)(same, x0, generator=draws_of(n), **options)
        return str(list(drawn) if method == "sample" else drawn)

    assert run(5) == run(5) != run(6)


@pytest.mark.parametrize("mean, std", [(0.1, 0.005), (-0.99, 0.06), (1.3, 0.2), (0, 2)])
def test_decoder(mean, std):
    """Eq. 13: the density's integral over x0 +- 1/255, and as the bins at the ends are
    open, all bins sum to 1."""
    levels = torch.arange(256).double() / 127.5 - 1
    std = torch.full_like(levels, std)

    ours = discretised_log_likelihood(levels, mean, std**2)

    rule = np.polynomial.legendre.leggauss(400)
    node, weight = torch.tensor(np.stack(rule))[..., None]
    density = Normal(mean * torch.ones_like(std), std)
    log_p = density.log_prob(levels + HALF * node)
    oracle = torch.logsumexp(log_p + (HALF * weight).log(), dim=0)
    assert_close(ours[1:-1], oracle[1:-1])
    assert_close(ours.exp().sum().item(), 1.0)


def test_decoder_ends():
    """Far from the mean the open bins keep their digits: Mills' ratio, log of the tail
    beyond z standard deviations between -z^2/2 - log(z sqrt(2 pi)) and 1/z^2 below."""
    ends = torch.tensor([-1.0, 1.0], dtype=torch.float64)

    ours = discretised_log_likelihood(ends, 0, torch.full_like(ends, 0.005**2))

    z = (1 - HALF) / 0.005
    above = -(z**2) / 2 - math.log(z * math.sqrt(2 * math.pi))
    assert_close(ours, torch.full_like(ends, above), rtol=0, atol=1 / z**2)


def test_bits_draw_t():
    """bits_per_dim meets t > 1 as often as (SNR_{t-1} - SNR_t) / (1 + SNR_t) says."""
    diffusion, seen = GaussianDiffusion(linear_schedule(6, 0.1, 0.5)), []

    def model(x_t, t):
        seen.append(t)
        return x_t

    diffusion.bits_per_dim(model, torch.zeros(20000, 1), generator=draws_of(6))

    counts = torch.cat(seen).bincount()[2:]
    snr = diffusion.alpha_bar[1:] / (1 - diffusion.alpha_bar[1:])
    size = (snr[:-1] - snr[1:]) / (1 + snr[1:])
    expected = counts.sum() * size / size.sum()
    z = (counts - expected) / expected.sqrt()
    assert z.abs().max() < 5


@pytest.mark.parametrize("options", [{}, {"clip": False, "batch_size": 300}])
def test_bits_per_dim(options):
    """Over 200 data sets, (estimate - Eq. 5) / its error has mean 0 and deviation 1."""
    chain = GaussianDiffusion(linear_schedule(6, 0.002, 0.032), torch.float64)
    draws = draws_of(1)
    levels = 127.5 + 40 * randn(200, 600, 2, generator=draws)
    data = levels.round().clamp(0, 255) / 127.5 - 1
    labels = (data[..., 0] > 0) * 20

    estimate = partial(chain.bits_per_dim, some_model, generator=draws, **options)
    ours = [estimate(x, y) for x, y in zip(data, labels)]

    x, y = data.flatten(0, 1), labels.flatten()
    clip = options.get("clip", True)
    nats = chain.prior_kl(x)
    for t in range(1, 7):
        t = torch.full_like(y, t)
        nats += chain.vlb(some_model, x, t, y, clip, draws)
    truth = nats.mean().item() / (2 * math.log(2))
    bits, error = torch.tensor(ours).T
    z = (bits - truth) / error
    moments = [z.mean().item(), z.std().item()]
    assert_close(moments, [0.0, 1.0], rtol=0, atol=0.4)    # 5 / sqrt(200), skew


@pytest.mark.parametrize("steps", range(1, 51))
def test_times(steps):
    """From T to 0 in so many steps, each of at least 1."""
    times = GaussianDiffusion(linear_schedule(50)).times(steps)

    assert (times[0], times[-1], len(times)) == (50, 0, steps + 1)
    assert all(after < before for before, after in pairwise(times))


def sampled(schedule, mean, std, **options):
    """4,000 samples by the exact model of data x0 ~ N(mean, std^2)."""
    chain = GaussianDiffusion(schedule, torch.float64)

    def model(x, t):
        return exact_eps(x, chain.alpha_bar[t[0]], mean, std**2)

    options = {"clip": False, "generator": draws_of(1), **options}
    return list(chain.sample(model, (4000, 1), **options))[-1]


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


@pytest.mark.parametrize("s", [0, 1, 2.5, "one each"])
def test_guidance(s):
    """The guided score is the gradient of log q(x_t) + s log q(y | x_t)."""
    diffusion = GaussianDiffusion(linear_schedule(50, 0.002, 0.3), torch.float64)
    s = torch.linspace(0, 3, 50, dtype=torch.float64) if s == "one each" else s
    t = torch.arange(1, 51)
    y = t % 2
    bar = diffusion.alpha_bar[t, None]
    means = torch.tensor([-0.5, 0.5]).double()          # x0 ~ N(means[y], 0.04)
    var = 0.04 * bar + 1 - bar
    q = Normal(bar.sqrt() * means, var.sqrt())          # q(x_t | y), columns y = 0, 1

    def model(x_t, t, y):
        """E[eps | x_t, y] by linear regression, its mean over q(y | x_t) for y = -1."""
        eps = (1 - bar).sqrt() / var * (x_t - q.mean)
        q_y = q.log_prob(x_t).softmax(1)
        null = (q_y * eps).sum(1)
        return torch.where(y < 0, null, eps[t - 1, y])[:, None]

    x_t = randn(50, 1, generator=draws_of(0)).requires_grad_()
    ours = diffusion.score(classifier_free(model, y, s), x_t, t)

    log_q = q.log_prob(x_t)
    log_q_x = log_q.logsumexp(1)
    log_q_y = log_q[t - 1, y] - log_q_x                 # Bayes' rule
    (log_q_x + s * log_q_y).sum().backward()
    assert_close(ours, x_t.grad)


def test_everything_on_one_device():
    """Nothing is made on the CPU where x and the schedule are elsewhere."""
    diffusion = GaussianDiffusion(linear_schedule(4)).to("meta")
    model = UNet(1, 8).to("meta")
    x0 = torch.ones(2, 1, 8, 8, device="meta")
    t = torch.ones(2, dtype=torch.int64, device="meta")

    ours = [diffusion.loss(model, x0), diffusion.vlb(model, x0, t)]
    ours += [diffusion.prior_kl(x0), *diffusion.sample(model, x0.shape)]

    assert all(value.is_meta for value in ours)
    assert [value.shape for value in ours[:4]] == [(), (2,), (2,), (2, 1, 8, 8)]
