"""Proofs of swiss_roll.py. Equations are those of Sohl-Dickstein et al. 2015. Oracles
are independent and float64; Monte Carlo estimates have 5 standard errors."""
import math
import re
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

BETA = torch.tensor([0.0, 0.07, 0.2, 0.4, 0.55, 0.3], dtype=torch.float64)
BAR = torch.tensor([1, 0.93, 0.744, 0.4464, 0.20088, 0.140616], dtype=torch.float64)
DIFFUSION = GaussianDiffusion(BETA[1:], torch.float64)
close = partial(assert_close, rtol=0, atol=1e-9)


def randn(*shape, n):
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(n))


def fine_roll(n, noise):
    """n points of the spiral of radius theta in 1.5 pi..4.5 pi, (n, 2), centred and
    scaled (Table 1), and the noise's deviation."""
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    theta = math.pi * (1.5 + 3 * u)
    x = theta * torch.cos(theta)
    y = theta * torch.sin(theta)
    curve = torch.stack([x, y], dim=1)
    curve = curve - curve.mean(0)
    unit = torch.sqrt(curve.square().mean() + noise**2)
    return curve / unit, noise / unit


def test_log_density():
    """p(x) is the mean over the curve of N(x; curve, sigma^2 I), here near it."""
    curve, sigma = fine_roll(200000, 0.02)
    x = curve[130000] + 2 * sigma

    log_p = Normal(curve, sigma).log_prob(x).sum(1)
    density = log_p.exp().mean()
    close(SwissRoll(0.02).log_density(x[None])[0], density.log(), atol=1e-7)


def test_ceiling_is_the_negative_entropy():
    """H is E log |dx/du| for the place on the curve, plus H of the noise across it."""
    curve, sigma = fine_roll(200000, 0.05)

    ours = SwissRoll(0.05).ceiling()

    speed = 200000 * curve.diff(dim=0).norm(dim=1)
    along = speed.log().mean()
    across = Normal(0, sigma).entropy()
    close(ours, -(along + across).item(), atol=1e-4)


def test_points_of_the_roll():
    """Places on the curve are uniform, distances from it normal; nearest gives both."""
    roll = SwissRoll(0.02)

    x = roll.sample(4000, seeded(2))

    distance, u = roll.nearest(x)

    z_square = (distance / roll.sigma).square()
    uniform = torch.linspace(0, 1, 4000)
    gap = (u.sort().values - uniform).abs().max()
    assert abs(z_square.mean() - 1) < 5 * math.sqrt(2 / 4000)
    assert gap < 5 * 0.5 / math.sqrt(4000)


@pytest.mark.parametrize("noise", [0.02, 1.0, 10.0])
def test_schedule(noise):
    """v_t = alpha_bar_t v_0 + 1 - alpha_bar_t grows by one factor from t = 2 on; v_1 is
    1.001 v_0, and alpha_bar_T 0.01."""
    v_0 = SwissRoll(noise).sigma ** 2

    beta = schedule(math.sqrt(v_0))

    bar = torch.cumprod(1 - beta, dim=0)
    v = bar * v_0 + 1 - bar
    factor = v[1:] / v[:-1]
    close((v[0] / v_0).item(), 1.001, atol=1e-7)
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
        beta = BETA[t, None, None]
        ratio = (c[t - 1] / c[t])[:, None]
        return (1 - beta).sqrt() * ratio * x, beta * ratio

    # Three nodes in each of x^0's and eps's d dimensions are exact for squares.
    node, weight = np.polynomial.hermite_e.hermegauss(3)
    grid = torch.cartesian_prod(*torch.arange(3).expand(2 * d, 3))
    z, eps = torch.tensor(node)[grid].split(d, dim=1)
    weights = torch.tensor(weight)[grid].prod(1)
    x0 = v.sqrt() * z
    K = bound(x0, DIFFUSION, exact, eps.expand(4, -1, d))
    ours = weights @ K / weights.sum()

    gain = (1 - BETA[1]).sqrt() * (v / c[1] - 1)
    variance = v * BETA[1] / c[1]
    true = Normal(gain * c[1].sqrt(), variance.sqrt())
    fixed = Normal(0, BETA[1].sqrt())
    edge = kl_divergence(true, fixed)
    prior = kl_divergence(Normal(0, c[5].sqrt()), Normal(0, 1))
    entropy = Normal(0, v.sqrt()).entropy()
    close(ours, -(entropy + edge + prior).sum())


def test_f_mu_and_f_sigma():
    """f_mu is sqrt(1 - beta) x + sqrt(beta) z_mu; the odds of f_Sigma are those of beta
    times exp(z_Sigma)."""
    x, z_mu, z_sigma = randn(3, 3, 5, 2, n=0)
    t = torch.tensor([2, 4, 5])
    beta = BETA[t, None, None]

    def net(x, t):
        return torch.cat([z_mu, z_sigma], dim=2)

    f_mu, f_sigma = f_mu_f_sigma(net, DIFFUSION, x, t)

    mean = (1 - beta).sqrt() * x
    odds = beta / (1 - beta) * z_sigma.exp()
    close(f_mu, mean + beta.sqrt() * z_mu)
    close(f_sigma, odds / (1 + odds))


@pytest.mark.parametrize("net", [MLP(seeded(4)), RBF(SwissRoll(0.02))])
def test_new_networks_are_0(net):
    """So that f_mu and f_Sigma start as the reverse of q for data from N(0, I)."""
    x = randn(4, 3, 2, n=3).float()

    close(net(x, torch.arange(2, 6)), torch.zeros(4, 3, 4))


def test_rbf():
    """160 times the units exp(-|x - c|^2 / 2 w^2) over their sum; t's readout. Centres
    start inside and outside the roll."""
    net = RBF(SwissRoll(0.02)).double().requires_grad_(False)
    net.width.uniform_(0.2, 0.4, generator=seeded(6))
    net.readout.normal_(generator=seeded(7))
    x, t = randn(1, 4, 2, n=8), 7

    ours = net(x, torch.tensor([t]))

    curve, _ = fine_roll(80000, 0.02)
    middle = curve[5000::10000]
    distance = torch.cdist(x[0], net.centre)
    unit = torch.exp(-0.5 * (distance / net.width) ** 2)
    total = unit.sum(1, keepdim=True)
    close(ours[0], 160 * (unit / total) @ net.readout[t])
    close(net.centre, torch.cat([0.9 * middle, 1.1 * middle]), atol=1e-3)


def test_mlp():
    """A layer of sines with t's phases, two of SiLU, and t's readout, at one point."""
    net = MLP().double().requires_grad_(False)
    for i, parameter in enumerate(net.parameters()):
        parameter.normal_(std=0.3, generator=seeded(30 + i))
    x = randn(2, n=9)
    t = 7

    h = torch.sin(net.frequency @ x + net.phase[t, 0])
    for weight, bias in zip(net.inner, net.inner_bias):
        z = weight @ h + bias
        h = z / (1 + torch.exp(-z))
    z = h @ net.readout[t] + net.readout_bias[t, 0]
    ours = net(x[None, None], torch.tensor([t]))
    close(ours[0, 0], z)


@pytest.mark.parametrize("learn", [False, True])
def test_training(learn):
    """K of the same points rises; beta_2..beta_T move if learned, beta_1 never."""
    roll = SwissRoll(0.3)
    net = MLP(seeded(7))
    x0 = roll.sample(500, seeded(9))
    eps = torch.randn(T - 1, 500, 2, generator=seeded(10))
    beta = schedule(roll.sigma).float()
    first = GaussianDiffusion(beta)
    before = bound(x0, first, partial(f_mu_f_sigma, net, first), eps).mean()

    diffusion = swiss_roll.train(net, roll, 60, 0.01, learn, seeded(8))

    after = bound(x0, diffusion, partial(f_mu_f_sigma, net, diffusion), eps).mean()
    moved = (diffusion.beta[1:] / beta - 1).abs()
    assert after > before + 0.3
    assert moved[0] < 1e-5
    assert (moved.max() > 1e-3) == learn


def test_training_stops_where_K_is_not_finite():
    """With one line that names the step."""
    net = MLP(seeded(7))
    net.inner.data[:] = math.nan

    with pytest.raises(SystemExit, match="^K is nan at step 1: stopped$"):
        swiss_roll.train(net, SwissRoll(0.1), 5, 0.01, False, seeded(8))


def test_sample():
    """x^T ~ N(0, I); x^{t-1} = f_mu(x^t, t) + sqrt(f_Sigma) z for t = T..2; then the
    edge step, N(sqrt(1 - beta_1) x^1, beta_1 I) (Eq. 44)."""
    def reverse(x, t):
        variance = 0.04 * t[:, None, None].double()
        return 0.3 * x + t, variance

    x = torch.stack(list(swiss_roll.sample(DIFFUSION, reverse, 3, seeded(11))))

    draws = seeded(11)
    x = x.double()
    z = [torch.randn(3, 2, generator=draws).double() for _ in x]
    close(x[0], z[0])
    for i, t in enumerate([5, 4, 3, 2]):
        mean = 0.3 * x[i] + t
        close(x[i + 1], mean + math.sqrt(0.04 * t) * z[i + 1], atol=1e-5)
    mean = math.sqrt(0.93) * x[4]
    close(x[5], mean + math.sqrt(0.07) * z[5], atol=1e-5)
    assert len(x) == 6


def test_figure_1():
    """Rows q, p, drift; columns t = 0, T/2, T. Up is up, right is right: the strokes of
    a drift end 0.35 to the right of and 0.35 above the points, 56 pixels a unit."""
    roll = SwissRoll(0.02)
    diffusion = GaussianDiffusion(schedule(roll.sigma))
    x0 = roll.sample(700, seeded(13))
    states = list(torch.linspace(0.4, 0, T + 1)[:, None, None] + x0)

    def reverse(x, t):
        return x + 1.0, None

    page = swiss_roll.figure_1(x0, states, diffusion, reverse, roll, seeded(14))

    _, u = roll.nearest(x0)
    half = states[T // 2]
    row, column = (page[672:, 336:672] < 250).any(2).nonzero().T
    right, top = half.amax(dim=0) + 0.35 / math.sqrt(2)
    assert page.shape == (1008, 1008, 3)
    close(page[:336, :336], draw(x0, u), atol=0)
    close(page[336:672, 672:], draw(states[0], u), atol=0)
    close(column.max() / 56, 3 + right, atol=0.05)
    close(row.min() / 56, 3 - top, atol=0.05)


def test_a_short_run(tmp_path, monkeypatch, capsys):
    """main prints K, its standard error, gain and gap in bits, of the held-out points,
    and writes Figure 1; a seed gives its digits again, another seed others."""
    nats, printed = [], []

    def spy(*args):
        nats.append(bound(*args))
        return nats[-1]

    monkeypatch.setattr(swiss_roll, "bound", spy)
    monkeypatch.setattr(swiss_roll, "HELD_OUT", 1000)
    options = ["--net=rbf", "--steps=5", "--noise=0.1", f"--out={tmp_path}/pictures"]
    for seed in ["3", "3", "4"]:
        swiss_roll.main([*options, "--seed", seed])
        out = capsys.readouterr().out
        printed.append(re.sub(r"\d+ s\n", "", out))

    line = re.search("K=.*", printed[2])[0]
    K, error, gain, ceiling, gap = map(float, re.findall(r"-?\d\.\d+", line))
    bits = torch.cat(nats[-2:]).double() / math.log(2)
    assert printed[0] == printed[1] != printed[2]
    assert bits.shape == (1000,)
    close(K, bits.mean().item(), atol=6e-4)
    close(error, bits.std().item() / math.sqrt(1000), atol=6e-4)
    close(gain, K + math.log2(2 * math.pi * math.e), atol=1.1e-3)
    close(ceiling, SwissRoll(0.1).ceiling() / math.log(2), atol=6e-4)
    close(gap, ceiling - K, atol=1.1e-3)
    assert (tmp_path / "pictures" / "swiss_roll.png").is_file()


@pytest.mark.parametrize("option, value, says", [
    ("--steps", "0", "at least 1, got 0"), ("--steps", "1.5", "invalid int"),
    ("--noise", "nan", "0.001..10, got nan"), ("--net", "cnn", "rbf")])
def test_bad_options_get_one_line(option, value, says):
    """It says what was found or is wanted; the exit code is 1."""
    with pytest.raises(SystemExit, match=says) as exit_:
        swiss_roll.main([option, value])

    assert "\n" not in exit_.value.code
