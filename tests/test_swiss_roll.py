"""Proofs of swiss_roll.py; its equations are those of Sohl-Dickstein et al. 2015."""
import math
import re
from functools import partial

import pytest
import torch
from torch.distributions import Normal, kl_divergence

import swiss_roll
from ddpm_min import GaussianDiffusion
from swiss_roll import MLP, RBF, SwissRoll, T, bound, draw, f_mu_f_sigma, schedule
from test_ddpm_min import seeded

BETA = torch.tensor([0.0, 0.07, 0.2, 0.4, 0.55, 0.3], dtype=torch.float64)
DIFFUSION = GaussianDiffusion(BETA[1:], torch.float64)
close = partial(torch.testing.assert_close, rtol=0, atol=1e-9)


def test_ceiling_is_the_negative_entropy():
    """H is E log |dx/du| for the place on the curve, plus H of the noise across it."""
    u = (torch.arange(200000).double() + 0.5) / 200000
    theta = math.pi * (1.5 + 3 * u)
    direction = torch.stack([theta.cos(), theta.sin()], dim=1)
    curve = theta[:, None] * direction
    curve -= curve.mean(0)
    unit = torch.sqrt(curve.square().mean() + 0.05**2)  # of all coordinates, Table 1
    speed = 200000 * (curve / unit).diff(dim=0).norm(dim=1)
    entropy = speed.log().mean() + Normal(0, 0.05 / unit).entropy()
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
    true_std = (v * beta / c[1]).sqrt()
    true = Normal(gain * c[1].sqrt(), true_std)
    edge = kl_divergence(true, Normal(0, beta.sqrt()))
    prior = kl_divergence(Normal(0, c[5].sqrt()), Normal(0, 1))
    entropy = Normal(0, v.sqrt()).entropy()
    gap = K.mean() + (entropy + edge + prior).sum()
    assert gap.abs() < 5 * K.std() / math.sqrt(100000)


def test_f_mu_and_f_sigma():
    """f_mu = sqrt(1 - beta) x + sqrt(beta) z_mu; exp(z_Sigma) scales f_Sigma's odds."""
    draws = torch.randn(3, 1, 5, 2, generator=seeded(0))
    x, z_mu, z_sigma = draws.double()

    def net(x, t):
        return torch.cat([z_mu, z_sigma], dim=2)
    f_mu, f_sigma = f_mu_f_sigma(net, DIFFUSION, x, torch.tensor([2]))
    close(f_mu, math.sqrt(0.8) * x + math.sqrt(0.2) * z_mu)
    close(f_sigma / (1 - f_sigma), 0.2 / 0.8 * z_sigma.exp())


@pytest.mark.parametrize("net", [MLP(seeded(7)), RBF(SwissRoll(0.3))])
def test_training(net, monkeypatch):
    """A new network is 0; K rises from -2.95, by points in pairs, with eps and -eps."""
    def bound_of_pairs(x0, diffusion, reverse, eps):
        close(x0[32:], x0[:32])
        close(eps[:, 32:], -eps[:, :32])
        return bound(x0, diffusion, reverse, eps)
    monkeypatch.setattr(swiss_roll, "bound", bound_of_pairs)
    roll = SwissRoll(0.3)
    x0 = roll.sample(500, seeded(9))
    eps = torch.randn(T - 1, 500, 2, generator=seeded(10))
    diffusion = GaussianDiffusion(schedule(roll.sigma))
    close(net(eps, torch.arange(2, T + 1)), torch.zeros(T - 1, 500, 4))
    swiss_roll.train(net, roll, diffusion, 60, 0.01, seeded(8))
    K = bound(x0, diffusion, partial(f_mu_f_sigma, net, diffusion), eps)
    assert K.mean() > -2.6


def test_training_stops_where_K_is_not_finite():
    """With one line that names the step."""
    roll, diffusion = SwissRoll(0.1), GaussianDiffusion(schedule(0.1))
    with pytest.raises(SystemExit, match="^K is nan at step 2: stopped$"):
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


def test_draw():
    """A point is a dot, 56 pixels a unit, x to the right and y up."""
    page = draw(torch.tensor([[2.0, 1.0]]), torch.zeros(1))
    dots = (page < 250).any(2).nonzero()                # row, column
    middle = torch.tensor([168 - 56, 168 + 112])
    close(dots.double().mean(0), middle.double(), atol=1)


def test_a_short_run(tmp_path, monkeypatch, capsys):
    """K in bits is near the ceiling of so normal data; seeds change it and Figure 1."""
    monkeypatch.setattr(swiss_roll, "HELD_OUT", 2000)
    picture = tmp_path / "pictures" / "swiss_roll.png"
    options = ["--net=rbf", "--steps=40", "--noise=10", f"--out={picture.parent}"]
    lines, pages = [], []
    for seed in (0, 0, 1):
        swiss_roll.main([*options, f"--seed={seed}"])
        lines.append(re.search("K=(.*) .- .*", capsys.readouterr().out))
        pages.append(picture.read_bytes())
    ceiling = SwissRoll(10).ceiling() / math.log(2)
    assert f"ceiling={ceiling:.3f} " in lines[0][0]
    assert ceiling - 0.5 < float(lines[0][1]) < ceiling
    assert lines[0][0] == lines[1][0] != lines[2][0]
    assert pages[0] == pages[1] != pages[2]


@pytest.mark.parametrize("option, says", [
    ("--steps=0", "^want --steps 1.., .*, got 0, 0.02, 0$"),
    ("--noise=nan", "^want .*--noise 0.001..10, .*, got 15000, nan, 0$"),
    ("--seed=-1", "^want .*--seed 0.., got 15000, 0.02, -1$"),
    (f"--out={__file__}/out", "Not a directory")])
def test_bad_options_end_it_before_the_work(option, says, monkeypatch):
    """In one line that says what was found and what is wanted, with exit code 1."""
    monkeypatch.setattr(swiss_roll, "train", None)
    with pytest.raises((SystemExit, OSError), match=says):
        swiss_roll.main([option])
