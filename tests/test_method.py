"""The method in ddpm_min.py, but for the identities that test_ddpm_min.py proves."""
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.distributions import Normal

from ddpm_min import (GaussianDiffusion, UNet, cosine_schedule, encode_png, guide,
                      discretised_log_likelihood, laplace_schedule, linear_schedule)
from test_ddpm_min import HALF, assert_close, exact_eps, seeded, some_model

randn = partial(torch.randn, dtype=torch.float64)
draws_of = partial(seeded, device="cpu")
SCHEDULES = [linear_schedule, cosine_schedule, laplace_schedule]
BETAS = [schedule(T) for schedule in SCHEDULES for T in (1, 2, 1000)]
LEVELS = torch.arange(256, dtype=torch.float64)[:, None] / 127.5 - 1
CHAIN = GaussianDiffusion(linear_schedule(6, 0.002, 0.032), torch.float64)
D = GaussianDiffusion(torch.full((50,), 0.1))
X, COLUMN = torch.ones(2, 3), torch.ones(2, 1)
ONES = torch.tensor([1, 1])                             # as t, and as y


def same(x, t):
    """A model that takes x_t for eps, and answers in float64."""
    return x.double()


def test_linear_schedule():
    """beta_t rises evenly from 1e-4 to 0.02, for T = 1000."""
    t = torch.arange(1, 1001).double()
    assert_close(linear_schedule(), 1e-4 + (t - 1) / 999 * 0.0199)


@pytest.mark.parametrize("T, s", [(1000, 0.008), (20, 0.1)])
def test_cosine_schedule(T, s):
    """alpha_bar_t = f(t) / f(0), but that no beta is above 0.999."""
    ours = cosine_schedule(T, s)
    u = np.arange(T) / T                                # not t = T, where beta is cut
    f = np.cos((u + s) / (1 + s) * np.pi / 2) ** 2
    alpha_bar = np.cumprod(1 - ours.numpy())
    np.testing.assert_allclose(alpha_bar[:-1], f[1:] / f[0], rtol=1e-10)
    assert ours[-1] == 0.999


@pytest.mark.parametrize("options, mu, b", [((), -1.5, 1), ((1000, 1, 0.5), 1, 0.5)])
def test_laplace_schedule(options, mu, b):
    """P(log SNR < log SNR_t) = 1 - t / (T + 1) by the CDF of Laplace(mu, b)."""
    alpha_bar = torch.cumprod(1 - laplace_schedule(*options), 0)
    z = (torch.logit(alpha_bar) - mu) / b
    cdf = 0.5 - z.sign() * torch.expm1(-z.abs()) / 2
    assert_close(cdf, 1 - torch.arange(1, 1001).double() / 1001)


@pytest.mark.parametrize("betas", [*BETAS, linear_schedule(2, 2e-6, 0.998)])
def test_any_T(betas):
    """No step is infinite, or NaN as the last's root of -2e-13; x keeps its dtype."""
    diffusion, x, T = GaussianDiffusion(betas), X.half(), len(betas)
    for step in (diffusion.p_sample(same, x, T), diffusion.ddim_sample(same, x, T, 0),
                 diffusion.ddim_sample(same, x, T, T // 2)):
        assert step.isfinite().all() and step.dtype == torch.float16


@pytest.mark.parametrize("wrong, says, options", [
    (partial(linear_schedule, 100), "alpha_bar_T > 0.01: want larger betas, or T", {}),
    (cosine_schedule, "x_T is divided by nearly 0: clip at max |x0|", {"clip": None})])
def test_sample_warns(wrong, says, options):
    """Once, of an x_T that is not N(0, I), or is divided by 5e-5; else of nothing."""
    with pytest.warns(UserWarning) as seen:
        for schedule in [linear_schedule, laplace_schedule, wrong]:
            list(GaussianDiffusion(schedule()).sample(same, (1, 1), 5, **options))
    assert [str(warning.message) for warning in seen] == [says]


def test_gradients():
    """The bound has finite ones, at pixels of -1 too; a step and the bits have none."""
    x = torch.full((2, 3), -1.0, requires_grad=True)
    D.vlb_term(same, x, ONES).sum().backward()
    assert x.grad.isfinite().all()
    assert not D.p_sample(same, x, 2).requires_grad
    assert not D.bits_per_dim(same, x).requires_grad


@pytest.mark.parametrize("mean, std, open_ends", [(0.1, 0.005, 0), (0.4, 1, 1)])
def test_decoder(mean, std, open_ends):
    """Eq. 13: the density's integral over x0 +- 1/255; with open ends all sum to 1."""
    std = torch.full_like(LEVELS, std)
    ours = discretised_log_likelihood(LEVELS, mean, std**2)
    node, weight = map(torch.tensor, np.polynomial.legendre.leggauss(400))
    log_p = Normal(mean, std).log_prob(LEVELS + HALF * node)
    oracle = torch.logsumexp(log_p + (HALF * weight).log(), dim=1, keepdim=True)
    closed = slice(open_ends, 256 - open_ends)      # all, if the ends are far out
    assert_close(ours[closed], oracle[closed])
    assert_close(ours.exp().sum().item(), 1.0)


def test_bits_draw_t():
    """t > 1 come in proportion to (SNR_{t-1} - SNR_t) / (1 + SNR_t), t = 1 as t = 2."""
    diffusion, seen = GaussianDiffusion(linear_schedule(6, 0.1, 0.5)), []

    def model(x_t, t):
        seen.append(t)
        return x_t
    diffusion.bits_per_dim(model, torch.ones(20000, 1), generator=draws_of(6))
    snr = diffusion.alpha_bar[1:] / (1 - diffusion.alpha_bar[1:])
    size = (snr[:-1] - snr[1:]) / (1 + snr[1:])
    size = torch.cat([size[:1], size])
    expected = 20000 * size / size.sum()
    z = (seen[0].bincount()[1:] - expected) / expected.sqrt()
    assert z.abs().max() < 5


@pytest.mark.parametrize("clip", [1.0, 0.3, None])
def test_bits_per_dim(clip):
    """Estimates less Eq. 5 have mean 0, many x0 at an end; each is of its own x0."""
    draws = draws_of(1)
    levels = 127.5 + 100 * randn(120000, 2, generator=draws)
    x0 = levels.round().clamp(0, 255) / 127.5 - 1
    ours = CHAIN.bits_per_dim(some_model, x0, clip, draws_of(2))
    nats = CHAIN.prior_kl(x0)
    for t in range(1, 7):
        t = torch.full((120000,), t)
        nats += CHAIN.vlb_term(some_model, x0, t, clip, draws)
    error = ours - nats / math.log(4)
    assert error.mean().abs() < 5 * error.std() / 120000**0.5
    x0[1:] = 1
    others = CHAIN.bits_per_dim(some_model, x0, clip, draws_of(2))
    assert_close(others[0], ours[0])


@pytest.mark.parametrize("steps", range(1, 51))
def test_times(steps):
    """From T to 0 in so many steps, each of at least 1."""
    times = D.times(steps)
    assert times == sorted(set(times), reverse=True)
    assert (times[0], times[-1], len(times)) == (50, 0, steps + 1)


def sampled(schedule, mean, std, factor=1, **options):
    """4,000 samples by the exact eps of data N(mean, std^2), times a factor."""
    chain = GaussianDiffusion(schedule, torch.float64)

    def model(x, t):
        return factor * exact_eps(x, chain.alpha_bar[t[0]], mean, std**2)
    *_, x = chain.sample(model, (4000, 1), generator=draws_of(1), **options)
    return x


@pytest.mark.parametrize("steps, eta, error", [(50, 0, 0.2), (None, 1, 0.05)])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_clip_bounds_the_error(schedule, steps, eta, error):
    """An eps 2 % too small draws N(0, 1) with a deviation near 1, and not of 21."""
    x = sampled(schedule(), 0, 1, 0.98, steps=steps, eta=eta, clip=3.0)
    assert abs(x.std() - 1) < error


@pytest.mark.parametrize("eta", [0, 1])
def test_gaussian(eta):
    """With the exact eps Gaussian data come out; steps cost 1 % of the deviation."""
    x = sampled(linear_schedule(), 0.4, 0.3, eta=eta, clip=None)
    assert (x.mean() - 0.4).abs() < 0.0237              # 5 standard errors
    assert (x.std() - 0.3).abs() < 0.0168 + 0.003       # the same, and that 1 %


def test_grain():
    """50 steps of 1000 keep over half of fine texture (evenly spaced, a third)."""
    x = sampled(laplace_schedule(), 0, 0.16, steps=50, clip=None)
    assert x.std() > 0.55 * 0.16


@pytest.mark.parametrize("s", [2.5, torch.arange(6).double()[:, None]])
def test_guidance(s):
    """Beside the model without label as weak, the guided score -eps / noise is the
    gradient of log q(x_t) + s log q(y | x_t)."""
    t, y = torch.full((6,), 3), torch.arange(6)[:, None] % 2
    bar, noise = CHAIN.alpha_bar[3], CHAIN.noise[3]
    means = torch.tensor([-0.5, 0.5]).double()          # x0 ~ N(means[y], 0.04)
    q = Normal(bar.sqrt() * means, (0.04 * bar + noise**2).sqrt())  # column y: given y

    def strong(x_t, t):
        return exact_eps(x_t, bar, means[y], 0.04)

    def weak(x_t, t):
        """E[eps | x_t], the mean over q(y | x_t)."""
        eps = exact_eps(x_t, bar, means, 0.04)
        return (q.log_prob(x_t).softmax(1) * eps).sum(1, keepdim=True)
    x_t = randn(6, 1, generator=draws_of(0)).requires_grad_()
    ours = -guide(strong, weak, s)(x_t, t) / noise
    log_q_x = q.log_prob(x_t).logsumexp(1, keepdim=True)
    log_q_y = q.log_prob(x_t).gather(1, y) - log_q_x    # Bayes' rule
    (log_q_x + s * log_q_y).sum().backward()
    assert_close(ours, x_t.grad)


def test_networks_that_keep_their_memory():
    """Guided ones may work in their input, and return one buffer, as CUDA graphs do."""
    x, buffer = X.clone(), torch.empty_like(X)

    def network(shift, x, t):
        return buffer.copy_(x.mul_(0.5)).add_(shift)
    model = guide(partial(network, 3), partial(network, 1), 2.5)
    ours = D.x0_theta(model, x, ONES, clip=None)
    eps = 6.5                                           # 1.5 + 2.5 * (3.5 - 1.5)
    oracle = (X - D.noise[1] * eps) / D.signal[1]
    assert_close([ours, x], [oracle, X], rtol=1e-5, atol=0)


def test_everything_on_one_device():
    """Nothing is made on the CPU where x and the schedule are elsewhere."""
    diffusion = GaussianDiffusion(torch.full((4,), 0.9)).to("meta")
    diffusion.alpha_bar = D.alpha_bar                   # sample asks for its last value
    model = UNet((1, 8, 8), 8).to("meta")
    x0 = torch.ones(2, 1, 8, 8, device="meta")
    for value in (diffusion.loss(model, x0), *diffusion.sample(model, x0.shape)):
        assert value.is_meta


@pytest.mark.parametrize("case", [
    ("betas", GaussianDiffusion, 0 * X[0]),
    ("betas", GaussianDiffusion, X[0]),
    ("t in 1..50", D.q_sample, X, 0 * ONES, X),
    ("one shape", D.q_posterior, COLUMN, X, ONES),
    ("one shape", D.q_sample, X, ONES, COLUMN),
    ("one shape", D.predict_x0, X, ONES, COLUMN),
    ("from the model", D.loss, torch.add, COLUMN),                # eps (2, 2)
    ("from the model", guide(torch.add, same, 2), COLUMN, ONES),
    ("from the model", guide(same, torch.add, 2), COLUMN, ONES),
    ("clip None or a", D.ddim_sample, same, X, 2, 1, 1, math.nan),
    ("t_prev < t", D.ddim_sample, same, X, 2, 2),
    ("t_prev < t", D.ddim_sample, same, X, 2, -1),
    ("eta in 0..1", D.ddim_sample, same, X, 2, 1, 1.1),
    ("steps in 1..50", D.times, 0),
    ("H and W", UNet, (1, 30, 30)),
    ("1, 28, 28.*2, 3", UNet(), X, ONES),
    ("x0", D.bits_per_dim, same, LEVELS + 2 / 255),
    ("x0", D.bits_per_dim, same, LEVELS * 0.9995),                  # dequantised
    ("uint8", encode_png, X),
    ("uint8", encode_png, X[..., None, None].byte())])
def test_refuses(case):
    """A ValueError of one line that says what is wanted."""
    wanted, call, *arguments = case
    with pytest.raises(ValueError, match=f"want .*{wanted}"):
        call(*arguments)
