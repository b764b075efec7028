"""Proofs of swiss_roll.py. Equations are those of Sohl-Dickstein et al. 2015. Oracles
are independent and float64; Monte Carlo estimates have 5 standard errors."""
import math
import re
from functools import partial

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

import swiss_roll
from ddpm_min import GaussianDiffusion
from swiss_roll import MLP, RBF, SwissRoll, T, bound, draw, f_mu_f_sigma, schedule
from test_ddpm_min import seeded

BETA = torch.tensor([0.0, 0.07, 0.2, 0.4, 0.55, 0.3], dtype=torch.float64)
DIFFUSION = GaussianDiffusion(BETA[1:], torch.float64)
close = partial(assert_close, rtol=0, atol=1e-9)


def fine_roll(n, noise):
    """n points of the roll, (n, 2), centred and scaled (Table 1); noise's deviation."""
    u = (torch.arange(n).double() + 0.5) / n
    theta = math.pi * (1.5 + 3 * u)
    direction = torch.stack([theta.cos(), theta.sin()], dim=1)
    curve = theta[:, None] * direction
    curve -= curve.mean(0)
    unit = torch.sqrt(curve.square().mean() + noise**2)
    return curve / unit, noise / unit


def test_log_density():
    """p(x) is the mean over the curve of N(x; curve, sigma^2 I), here near it."""
    curve, sigma = fine_roll(200000, 0.02)
    x = curve[130000] + 2 * sigma
    density = Normal(curve, sigma).log_prob(x).sum(1).exp()
    ours = SwissRoll(0.02).log_density(x[None])
    close(ours[0], density.mean().log(), atol=1e-7)


def test_ceiling_is_the_negative_entropy():
    """H is E log |dx/du| for the place on the curve, plus H of the noise across it."""
    curve, sigma = fine_roll(200000, 0.05)
    speed = 200000 * curve.diff(dim=0).norm(dim=1)
    entropy = speed.log().mean() + Normal(0, sigma).entropy()
    close(SwissRoll(0.05).ceiling(), -entropy.item(), atol=1e-4)


def test_points_of_the_roll():
    """Places on the curve are uniform, distances from it normal; nearest gives both."""
    roll = SwissRoll(0.2)
    distance, u = roll.nearest(roll.sample(4000, seeded(2)))
    z_square = (distance / roll.sigma).square()
    gap = u.sort().values - torch.linspace(0, 1, 4000)
    assert abs(z_square.mean() - 1) < 0.11              # 5 sqrt(2 / 4000)
    assert gap.abs().max() < 0.04                       # 5 * 0.5 / sqrt(4000)


def test_schedule():
    """v_t = alpha_bar_t v_0 + 1 - alpha_bar_t grows by one factor from t = 2 on; v_1 is
    1.001 v_0, and alpha_bar_T 0.01."""
    sigma = SwissRoll(0.3).sigma
    bar = torch.cumprod(1 - schedule(sigma), dim=0)
    v = bar * sigma**2 + 1 - bar
    close(v[0].item(), 1.001 * sigma**2)
    factor = v[1:] / v[:-1]
    close(factor, factor[0].expand(39), atol=1e-7)
    close(bar[-1].item(), 0.01, atol=1e-7)


def test_K_of_normal_data():
    """For N(0, diag v) and q's exact reverse K is -H less two KLs: of q(x^0 | x^1) from
    the fixed edge step, and of x^T from N(0, I)."""
    v = torch.tensor([1.7, 0.3, 1.0], dtype=torch.float64)
    bar = torch.cumprod(1 - BETA, dim=0)[:, None]
    c = bar * v + 1 - bar                               # Var x^t

    def exact(x, t):
        beta = BETA[t, None, None]
        ratio = (c[t - 1] / c[t])[:, None]
        return (1 - beta).sqrt() * ratio * x, beta * ratio
    x0 = v.sqrt() * torch.randn(100000, 3, generator=seeded(5))
    eps = torch.randn(4, 100000, 3, generator=seeded(6))
    K = bound(x0, DIFFUSION, exact, eps)
    beta = BETA[1]
    gain = (1 - beta).sqrt() * (v / c[1] - 1)
    true = Normal(gain * c[1].sqrt(), (v * beta / c[1]).sqrt())
    edge = kl_divergence(true, Normal(0, beta.sqrt()))
    prior = kl_divergence(Normal(0, c[5].sqrt()), Normal(0, 1))
    entropy = Normal(0, v.sqrt()).entropy()
    gap = K.mean() + (entropy + edge + prior).sum()
    assert gap.abs() < 5 * K.std() / math.sqrt(100000)


def test_f_mu_and_f_sigma():
    """f_mu = sqrt(1 - beta) x + sqrt(beta) z_mu; exp(z_Sigma) scales f_Sigma's odds."""
    x, z_mu, z_sigma = torch.randn(3, 1, 5, 2, generator=seeded(0)).double()

    def net(x, t):
        return torch.cat([z_mu, z_sigma], dim=2)
    f_mu, f_sigma = f_mu_f_sigma(net, DIFFUSION, x, torch.tensor([2]))
    close(f_mu, math.sqrt(0.8) * x + math.sqrt(0.2) * z_mu)
    close(f_sigma / (1 - f_sigma), 0.2 / 0.8 * z_sigma.exp())


@pytest.mark.parametrize("net", [MLP(seeded(4)), RBF(SwissRoll(0.02))])
def test_new_networks_are_0(net):
    """So that f_mu and f_Sigma start as the reverse of q for data from N(0, I)."""
    x = torch.randn(4, 3, 2, generator=seeded(3))
    close(net(x, torch.arange(2, 6)), torch.zeros(4, 3, 4))


@pytest.mark.parametrize("net", ["mlp", "rbf"])
def test_training(net):
    """K rises (a new network has -2.95)."""
    roll = SwissRoll(0.3)
    net = RBF(roll) if net == "rbf" else MLP(seeded(7))
    diffusion = GaussianDiffusion(schedule(roll.sigma))
    swiss_roll.train(net, roll, diffusion, 60, 0.01, seeded(8))
    x0 = roll.sample(500, seeded(9))
    eps = torch.randn(T - 1, 500, 2, generator=seeded(10))
    K = bound(x0, diffusion, partial(f_mu_f_sigma, net, diffusion), eps)
    assert K.mean() > -2.6


def test_training_stops_where_K_is_not_finite():
    """With one line that names the step."""
    with pytest.raises(SystemExit, match="^K is nan at step 2: stopped$"):
        diffusion = GaussianDiffusion(schedule(0.1))
        roll = SwissRoll(0.1)
        swiss_roll.train(MLP(seeded(7)), roll, diffusion, 5, math.inf, seeded(8))


def test_sample():
    """x^T = z; x^{t-1} = f_mu + sqrt(f_Sigma) z for t > 1; the edge step (Eq. 44)."""
    def reverse(x, t):
        return 0.3 * x + t, torch.full_like(x, 0.04)
    x = list(swiss_roll.sample(DIFFUSION, reverse, 3, seeded(11)))
    draws = seeded(11)
    z = [torch.randn(3, 2, generator=draws) for _ in x]
    close(x[0], z[0])
    for i, t in enumerate([5, 4, 3, 2]):
        close(x[i + 1], 0.3 * x[i] + t + 0.2 * z[i + 1], atol=1e-5)
    edge = math.sqrt(0.93) * x[4] + math.sqrt(0.07) * z[5]
    close(x[5].float(), edge, atol=1e-5)


def test_figure_1():
    """Rows q, p, drift; columns t = 0, T/2, T. A drift of (1, 1) from the middle gets
    strokes of 0.35, at 56 pixels a unit: 14 to the right and 14 up."""
    roll = SwissRoll(0.02)
    diffusion = GaussianDiffusion(schedule(roll.sigma))
    x0 = roll.sample(700, seeded(13))
    states = [x0] * (T + 1)
    states[0] = 0.5 * x0
    states[T // 2] = torch.zeros(700, 2)

    def reverse(x, t):
        return x + 1.0, None
    page = swiss_roll.figure_1(x0, states, diffusion, reverse, roll, seeded(14))
    _, u = roll.nearest(x0)
    close(page[:336, :336], draw(x0, u), atol=0)
    close(page[336:672, 672:], draw(states[0], u), atol=0)
    ink = (page[672:, 336:672] < 250).any(2).nonzero()
    assert 12 < ink[:, 1].max() - 168 < 16
    assert 12 < 168 - ink[:, 0].min() < 16


def test_a_short_run(tmp_path, monkeypatch, capsys):
    """main prints K in bits, near the ceiling as data of such noise are nearly normal.
    Another seed changes K and Figure 1, but a rerun neither."""
    monkeypatch.setattr(swiss_roll, "HELD_OUT", 2000)
    picture = tmp_path / "pictures" / "swiss_roll.png"
    options = ["--net=rbf", "--steps=40", "--noise=10", f"--out={picture.parent}"]
    lines, pages = [], []
    for seed in (0, 0, 1):
        swiss_roll.main([*options, f"--seed={seed}"])
        lines.append(re.search("K=.*", capsys.readouterr().out)[0])
        pages.append(picture.read_bytes())
    K = float(re.match(r"K=(\S+)", lines[0])[1])
    ceiling = SwissRoll(10).ceiling() / math.log(2)
    assert f"ceiling={ceiling:.3f} " in lines[0]
    assert ceiling - 0.5 < K < ceiling
    assert lines[0] == lines[1] != lines[2]
    assert pages[0] == pages[1] != pages[2]


def test_a_folder_that_cannot_be_made_fails_before_the_work(tmp_path, monkeypatch):
    """And not with the work done."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(swiss_roll, "train", None)
    with pytest.raises(OSError, match="file"):
        swiss_roll.main([f"--out={tmp_path / 'file' / 'out'}"])


@pytest.mark.parametrize("option, says", [
    ("--steps=0", "^want --steps from 1, .*, got 0, 0.02$"),
    ("--noise=nan", "^want .*--noise in 0.001..10, got 15000, nan$"),
    ("--net=cnn", "^argument --net: invalid choice: 'cnn'.*$")])
def test_bad_options_get_one_line(option, says):
    """It says what was found and what is wanted; the exit code is 1."""
    with pytest.raises(SystemExit, match=says):
        swiss_roll.main([option])
