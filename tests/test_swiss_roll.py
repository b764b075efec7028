"""Proofs of swiss_roll.py. Equations are those of Sohl-Dickstein et al. 2015. Oracles
are independent and float64; Monte Carlo estimates have 5 standard errors."""
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

import swiss_roll
from ddpm_min import GaussianDiffusion
from swiss_roll import MLP, RBF, SwissRoll, T, bound, draw, f_mu_f_sigma, schedule
from test_ddpm_min import seeded

BETA = torch.tensor([0.07, 0.2, 0.4, 0.55, 0.3], dtype=torch.float64)
BAR = torch.tensor([1, 0.93, 0.744, 0.4464, 0.20088, 0.140616], dtype=torch.float64)
DIFFUSION = GaussianDiffusion(BETA, torch.float64)
close = partial(assert_close, rtol=0, atol=1e-9)


def randn(*shape, n):
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(n))


def middles(n):
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def fine_roll(n, noise):
    """n points of the centred, scaled curve, (n, 2), and the noise's deviation."""
    theta = math.pi * (1.5 + 3 * middles(n))
    x = torch.polar(theta, theta)
    x = torch.view_as_real(x - x.mean())
    unit = torch.sqrt(x.square().mean() + noise**2)
    return x / unit, noise / unit


def window_density():
    """p of the roll of noise 1 in 160 x 160 cells of +-4, each 1/20 wide."""
    axis = 8 * middles(160) - 4
    x = torch.cartesian_prod(axis, axis)
    return SwissRoll(1.0).log_density(x).exp()


def test_curve():
    """The spiral of radius theta, theta in 1.5 pi..4.5 pi; its mean is 0 and, with the
    noise, the mean variance of its coordinates 1 (Table 1)."""
    ours = SwissRoll(1.0).curve(middles(20000))

    curve, _ = fine_roll(20000, 1.0)
    close(ours, curve, atol=1e-6)


@pytest.mark.parametrize("place, off, atol", [(130000, 2.0, 1e-7), (0, 0.0, 1e-2)])
def test_log_density(place, off, atol):
    """p(x) is the mean over the curve of N(x; curve, sigma^2 I): some noise widths off
    it, and at its end, where the midpoint rule is coarse."""
    curve, sigma = fine_roll(200000, 0.02)
    x = curve[place] + off * sigma

    ours = SwissRoll(0.02).log_density(x[None])

    log_p = Normal(curve, sigma).log_prob(x).sum(1)
    close(ours, log_p.exp().mean().log()[None], atol=atol)


def test_density_integrates_to_1():
    """The integral of p over a window of +-4."""
    total = 8**2 * window_density().mean()

    close(total.item(), 1.0)


def test_samples_have_the_density():
    """The counts of 200,000 samples in 16 x 16 cells are those that p gives."""
    x = SwissRoll(1.0).sample(200000, seeded(2)).double()

    count, _ = torch.histogramdd(x, [16, 16], range=[-4.0, 4.0, -4.0, 4.0])

    cells = window_density().reshape(16, 10, 16, 10).sum((1, 3))
    expected = 200000 / 400 * cells
    assert ((count - expected).abs() <= 5 * expected.sqrt() + 5).all()


def test_ceiling_is_the_negative_entropy():
    """-H is the integral of p log p."""
    p = window_density()

    ours = SwissRoll(1.0).ceiling()

    integral = 8**2 * (p * p.log()).mean()
    close(ours, integral.item(), atol=2e-3)


def test_ceiling_of_a_thin_roll():
    """H is E log |dx/du| for the place on the curve, plus H of the noise across it."""
    curve, sigma = fine_roll(200000, 0.02)

    ours = SwissRoll(0.02).ceiling()

    speed = 200000 * curve.diff(dim=0).norm(dim=1)
    entropy = speed.log().mean() + Normal(0, sigma).entropy()
    close(ours, -entropy.item(), atol=1e-5)


@pytest.mark.parametrize("noise", [0.02, 1.0, 10.0])
def test_schedule(noise):
    """v_t = alpha_bar_t v_0 + 1 - alpha_bar_t grows by one factor from t = 2 on; v_1 is
    1.001 v_0, and alpha_bar_T 0.01."""
    v_0 = SwissRoll(noise).sigma ** 2

    beta = schedule(math.sqrt(v_0))

    bar = torch.cumprod(1 - beta, dim=0)
    v = bar * v_0 + 1 - bar
    factor = v[1:] / v[:-1]
    close(v[0] / v_0, torch.tensor(1.001).double(), atol=1e-7)
    close(factor, factor[0].expand(39), atol=1e-7)
    close(bar[-1].item(), 0.01, atol=1e-7)


@pytest.mark.parametrize("v", [[1.0, 1.0], [1.7, 0.3, 1.0]])
def test_K_of_normal_data(v):
    """For N(0, diag v) and q's exact reverse K is -H less two KLs, both 0 for v = 1:
    q(x^0 | x^1) from the fixed edge step, and x^T from N(0, I)."""
    v = torch.tensor(v, dtype=torch.float64)
    d = len(v)
    c = BAR[:, None] * v + 1 - BAR[:, None]             # Var x^t

    def exact(x, t):
        beta = BETA[t - 1, None, None]
        ratio = (c[t - 1] / c[t])[:, None]
        return (1 - beta).sqrt() * ratio * x, beta * ratio

    # Three nodes in each of x^0's and eps's d dimensions are exact for squares.
    node, weight = map(torch.tensor, np.polynomial.hermite_e.hermegauss(3))
    grid = torch.cartesian_prod(*torch.arange(3).expand(2 * d, 3))
    z, eps = node[grid].split(d, dim=1)
    x0 = v.sqrt() * z
    K = bound(x0, DIFFUSION, exact, eps.expand(4, -1, d))
    weights = weight[grid].prod(1)
    ours = weights @ K / weights.sum()

    gain = (1 - BETA[0]).sqrt() * (v / c[1] - 1)
    variance = v * BETA[0] / c[1]
    true = Normal(gain * c[1].sqrt(), variance.sqrt())
    fixed = Normal(0, BETA[0].sqrt())
    edge = kl_divergence(true, fixed)
    x_T = Normal(0, c[5].sqrt())
    prior = kl_divergence(x_T, Normal(0, 1))
    entropy = Normal(0, v.sqrt()).entropy()
    close(ours, -(entropy + edge + prior).sum())


def test_bound_checks_shapes():
    """eps is (T-1, n, d)."""
    x0 = torch.ones(3, 2)
    with pytest.raises(ValueError):
        bound(x0, DIFFUSION, None, x0)


def test_f_mu_and_f_sigma():
    """f_mu is sqrt(1 - beta) x + sqrt(beta) z_mu; the odds of f_Sigma are those of beta
    times exp(z_Sigma)."""
    x = randn(3, 5, 2, n=0)
    z_mu, z_sigma = randn(2, 3, 5, 2, n=1)
    t = torch.tensor([2, 4, 5])
    beta = BETA[t - 1, None, None]

    def net(x, t):
        return torch.cat([z_mu, z_sigma], dim=2)

    f_mu, f_sigma = f_mu_f_sigma(net, DIFFUSION, x, t)

    odds = beta / (1 - beta) * z_sigma.exp()
    close(f_mu, (1 - beta).sqrt() * x + beta.sqrt() * z_mu)
    close(f_sigma, odds / (1 + odds))


@pytest.mark.parametrize("net", [MLP(seeded(4)), RBF(SwissRoll(0.02))])
def test_new_networks_reverse_q_for_standard_normal_data(net):
    """x^{t-1} and x^t are N(0, I), with covariance c = sqrt(1 - beta_t); conditioned on
    x^t the mean is c x^t and the variance 1 - c^2."""
    x = randn(5, 3, 2, n=3)
    t = torch.arange(1, 6)

    mean, variance = f_mu_f_sigma(net.double(), DIFFUSION, x, t)

    c = (1 - BETA).sqrt()[:, None, None]
    close(mean, c * x)
    close(variance, (1 - c**2).expand(5, 3, 2))


def test_rbf():
    """160 times the units exp(-|x - c|^2 / 2 w^2) over their sum; t's readout."""
    net = RBF(SwissRoll(0.02)).double().requires_grad_(False)
    net.width.uniform_(0.2, 0.4, generator=seeded(6))
    net.readout.normal_(generator=seeded(7))
    x, t = randn(1, 4, 2, n=8), 7

    ours = net(x, torch.tensor([t]))

    distance = torch.cdist(x[0], net.centre)
    unit = torch.exp(-0.5 * (distance / net.width) ** 2)
    total = unit.sum(1, keepdim=True)
    close(ours[0], 160 * (unit / total) @ net.readout[t])


def test_rbf_starts_beside_the_roll():
    """Eight centres lie nearer to 0 than the curve's middles, and eight farther."""
    inside, outside = RBF(SwissRoll(0.02)).centre.detach().double().split(8)

    curve, _ = fine_roll(80000, 0.02)
    middle = curve[5000::10000]
    close(inside, 0.9 * middle, atol=1e-3)
    close(outside, 1.1 * middle, atol=1e-3)


@pytest.mark.parametrize("learn", [False, True])
def test_training(learn):
    """K rises, but not past the ceiling; beta_2..beta_T move if they are to be learned,
    beta_1 never; t = 1 stays the edge step, N(sqrt(1 - beta_1) x^1, beta_1)."""
    roll = SwissRoll(0.3)
    net = MLP(seeded(7))
    diffusion = swiss_roll.train(net, roll, 60, learn, seeded(8))

    reverse = partial(f_mu_f_sigma, net.requires_grad_(False), diffusion)
    x0 = roll.sample(2000, seeded(9))
    eps = torch.randn(T - 1, 2000, 2, generator=seeded(10))
    K = bound(x0, diffusion, reverse, eps)
    mean, variance = reverse(x0[None], torch.tensor([1]))

    error = K.std() / math.sqrt(2000)
    assert -2.5 < K.mean()
    assert K.mean() < roll.ceiling() + 5 * error
    beta = schedule(roll.sigma).float()
    moved = (diffusion.beta[1:] / beta - 1).abs()
    assert moved[0] < 1e-5
    assert (moved.max() > 1e-3) == learn
    close(mean[0], (1 - beta[0]).sqrt() * x0, atol=1e-4)
    close(variance / beta[0], torch.ones(1, 2000, 2), atol=1e-4)


def test_training_stops_where_K_is_not_finite():
    """The exit code is 1."""
    net = MLP(seeded(7))
    net.inner.data[:] = math.nan

    with pytest.raises(SystemExit, match="1"):
        swiss_roll.train(net, SwissRoll(0.1), 5, False, seeded(8))


def test_sample():
    """x^T ~ N(0, I), then x^{t-1} = f_mu(x^t, t) + sqrt(f_Sigma) z for t = T..1."""
    def reverse(x, t):
        return 0.3 * x + t, 0.04 * t.double()[:, None, None]

    x = list(swiss_roll.sample(reverse, DIFFUSION, 3, seeded(11)))

    draws = seeded(11)
    expected = [torch.randn(3, 2, generator=draws).double()]
    for before, t in zip(x, [5, 4, 3, 2, 1]):
        z = torch.randn(3, 2, generator=draws).double()
        expected.append(0.3 * before + t + math.sqrt(0.04 * t) * z)
    close(x, expected, atol=1e-6)


def test_nearest():
    """The least distance, among 100,000 points of the curve, and the place of it."""
    roll = SwissRoll(0.02)
    x = randn(50, 2, n=12)

    distance, u = roll.nearest(x)

    curve, _ = fine_roll(100000, 0.02)
    least = torch.cdist(x, curve).amin(dim=1)
    close(distance, least, atol=1e-3)
    close((roll.curve(u) - x).norm(dim=1), least, atol=1e-3)


def test_draw():
    """Up is up, right is right, a dot has 3 x 3 pixels, and none is drawn outside."""
    x = torch.tensor([[1.55, 2.05], [3.5, 0]])
    image = draw(x, torch.zeros(2), size=60)

    row, column = (image < 255).any(2).nonzero().T
    assert row.unique().tolist() == [8, 9, 10]          # about 10 (3 - 2.05)
    assert column.unique().tolist() == [44, 45, 46]     # about 10 (3 + 1.55)


def test_figure_1():
    """Rows q, p, drift; columns t = 0, T/2, T. The strokes of a drift to the right end
    0.35 to the right of the points, 56 pixels a unit."""
    roll = SwissRoll(0.02)
    diffusion = GaussianDiffusion(schedule(roll.sigma))
    x0 = roll.sample(700, seeded(13))
    states = list(torch.linspace(0.4, 0, T + 1)[:, None, None] + x0)

    def reverse(x, t):
        return x + torch.tensor([1.0, 0.0]), None

    page = swiss_roll.figure_1(x0, states, diffusion, reverse, roll, seeded(14))

    _, u = roll.nearest(x0)
    half = states[T // 2]
    _, column = (page[672:, 336:672] < 250).any(2).nonzero().T
    right = half[:, 0].max() + 0.35
    close(page[:336, :336], draw(x0, u), atol=0)
    close(page[336:672, 336:672], draw(half, u), atol=0)
    close(column.max() / 56, 3 + right, atol=0.05)
