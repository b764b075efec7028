"""Proofs of swiss_roll.py. Equations are those of Sohl-Dickstein et al. 2015. Oracles
are independent and float64; Monte Carlo estimates have 5 standard errors."""
import io
import math
import os
import re
import runpy
import signal
import subprocess
import sys
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
    first, last = math.log(1.001 * v_0), math.log(0.01 * v_0 + 0.99)
    close(v.log(), torch.linspace(first, last, 40, dtype=torch.float64), atol=1e-7)


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
    x0, eps = node[grid].split(d, dim=1)
    K = bound(v.sqrt() * x0, DIFFUSION, exact, eps.expand(4, -1, d))
    weights = weight[grid].prod(1)
    ours = weights @ K / weights.sum()

    gain = (1 - BETA[0]).sqrt() * (v / c[1] - 1)
    variance = v * BETA[0] / c[1]
    true = Normal(gain * c[1].sqrt(), variance.sqrt())
    edge = kl_divergence(true, Normal(0, BETA[0].sqrt())).sum()
    prior = kl_divergence(Normal(0, c[5].sqrt()), Normal(0, 1)).sum()
    entropy = Normal(0, v.sqrt()).entropy().sum()
    close(ours, -entropy - edge - prior)


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
    """160 times the units exp(-|x - c|^2 / 2 w^2) over their sum, and the readout of t."""
    net = RBF(SwissRoll(0.02)).double().requires_grad_(False)
    net.width.uniform_(0.2, 0.4, generator=seeded(6))
    net.readout.normal_(generator=seeded(7))
    x, t = randn(1, 4, 2, n=8), 7

    ours = net(x, torch.tensor([t]))

    distance = torch.cdist(x[0], net.centre)
    unit = torch.exp(-0.5 * (distance / net.width) ** 2)
    share = unit / unit.sum(1, keepdim=True)
    close(ours[0], 160 * share @ net.readout[t])


def test_rbf_starts_beside_the_roll():
    """Eight centres lie inside of the curve's middles, nearer to 0, and eight outside."""
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
    beta = schedule(roll.sigma).float()
    moved = (diffusion.beta[1:] / beta - 1).abs()
    assert -2.5 < K.mean() < roll.ceiling() + 5 * error
    assert (moved.max() > 1e-3) == learn and moved[0] < 1e-5
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


def run(*argv):
    """main, by the smallest network, with 500 held-out points."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(swiss_roll, "HELD_OUT", 500)
        swiss_roll.main(["--net", "rbf", "--steps", "1", *map(str, argv)])


def own_bits(x0, beta, reverse):
    """K of points x0 (n, 2), bits (n,), by Bayes: q(x^{t-1} | x^t, x^0) is the product
    of q(x^{t-1} | x^0) and q(x^t | x^{t-1}), whose precisions add."""
    bar = torch.cumprod(1 - beta, dim=0)                        # bar[t]; beta[0] is 0
    entropies = Normal(0, (1 - bar[-1]).sqrt()).entropy()
    entropies -= Normal(0, beta[1].sqrt()).entropy() + Normal(0, 1.0).entropy()
    K = 2 * entropies * torch.ones(len(x0), dtype=torch.float64)
    for t in range(2, T + 1):
        x_t = bar[t].sqrt() * x0 + (1 - bar[t]).sqrt() * randn(*x0.shape, n=100 + t)
        prior = 1 / (1 - bar[t - 1])
        seen = (1 - beta[t]) / beta[t]
        mean = prior * bar[t - 1].sqrt() * x0 + seen * x_t / (1 - beta[t]).sqrt()
        q = Normal(mean / (prior + seen), (prior + seen) ** -0.5)
        f_mu, f_sigma = reverse(x_t[None].float(), torch.tensor([t]))
        K -= kl_divergence(q, Normal(f_mu[0].double(), f_sigma[0].double().sqrt())).sum(1)
    return K / math.log(2)


def test_what_is_printed(tmp_path, monkeypatch, capsys):
    """Of a run of a few steps: K, its standard error, L_null, the ceiling and their
    differences in bits, and the share of samples near the curve, computed again."""
    train, trained = swiss_roll.train, []

    def spy(net, *rest):
        trained.append(partial(f_mu_f_sigma, net, train(net, *rest)))
        return trained[0].args[1]

    monkeypatch.setattr(swiss_roll, "train", spy)
    swiss_roll.main(["--net", "rbf", "--steps", "40", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    printed = dict(re.findall(r"(\S+)=(-?[\d.]+)", out.splitlines()[-1]))
    printed = {name: float(value) for name, value in printed.items()}
    error = float(re.search(r"held out, to \+- ([\d.]+);", out)[1])
    share = float(re.search(r"samples: ([\d.]+)% within 0.1", out)[1]) / 100

    x0 = SwissRoll(0.02).sample(4000, seeded(20)).double()
    bits = own_bits(x0, trained[0].args[1].beta.double(), trained[0])
    *_, samples = swiss_roll.sample(trained[0], trained[0].args[1], 4000, seeded(21))
    curve, sigma = fine_roll(20000, 0.02)
    near = torch.cdist(samples.double(), curve).amin(dim=1) < 0.1
    near = near.double()
    entropy = (20000 * curve.diff(dim=0).norm(dim=1)).log().mean()
    ceiling = -(entropy + Normal(0, sigma).entropy()) / math.log(2)
    null = 2 * Normal(0, 1.0).log_prob(torch.tensor(1.0)).item() / math.log(2)

    close(printed["K"], bits.mean().item(), atol=5 * bits.std().item() / math.sqrt(4000))
    close(error, bits.std().item() / math.sqrt(100000), atol=0.0015)
    close(share, near.mean().item(), atol=5 * near.std().item() * math.sqrt(1.4 / 4000))
    close(printed["L_null"], null, atol=6e-4)
    close(printed["K-L_null"], printed["K"] - null, atol=1.1e-3)
    close(printed["ceiling"], ceiling.item(), atol=6e-4)
    close(printed["gap"], ceiling.item() - printed["K"], atol=1.1e-3)
    assert 0.003 < error < 0.03 and 0.01 < share < 0.99


@pytest.mark.parametrize("option, value, says", [
    ("--steps", "0", "--steps above 0"), ("--steps", "1.5", "invalid int"),
    ("--noise", "nan", "0.001..10"), ("--noise", "11", "0.001..10"),
    ("--seed", "-1", "0..2^63"), ("--net", "cnn", "rbf"), ("--device", "tpu", "cpu")])
def test_bad_values_get_one_line_and_code_2(option, value, says, capsys):
    """The line names what would do."""
    with pytest.raises(SystemExit, match="2"):
        swiss_roll.main([option, value])

    error = capsys.readouterr().err
    assert error.count("\n") == 1 and says in error


@pytest.mark.parametrize("why", ["a folder of its name", "no room"])
def test_a_picture_is_refused_before_the_training(why, tmp_path, monkeypatch, capsys):
    """With one line that names the place, and code 2."""
    if why == "no room":
        (tmp_path / "swiss_roll.trial.tmp").symlink_to("/dev/full")
    else:
        (tmp_path / "swiss_roll.png").mkdir()
    monkeypatch.setattr(swiss_roll, "train", None)

    with pytest.raises(SystemExit, match="2"):
        swiss_roll.main(["--out", str(tmp_path)])

    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(tmp_path) in error
    assert not list(tmp_path.glob("*.t*"))


def test_a_bad_folder_is_refused_before_the_training(tmp_path, monkeypatch):
    """A file where the folder should be."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(swiss_roll, "train", None)

    with pytest.raises(OSError, match="file"):
        swiss_roll.main(["--out", str(tmp_path / "file" / "folder")])


def test_a_picture_that_cannot_be_written_costs_only_itself(tmp_path, monkeypatch, capsys):
    """Here a folder takes its place while the network trains: K is printed, one line
    names the picture, the code is 2, and nothing half-written stays."""
    def train(net, roll, *rest):
        (tmp_path / "swiss_roll.png").mkdir()
        return GaussianDiffusion(schedule(roll.sigma))

    monkeypatch.setattr(swiss_roll, "train", train)
    with pytest.raises(SystemExit, match="2"):
        run("--out", tmp_path)

    out, error = capsys.readouterr()
    assert "K=" in out
    assert error.count("\n") == 1 and str(tmp_path / "swiss_roll.png") in error
    assert os.listdir(tmp_path) == ["swiss_roll.png"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_main_leaves_nothing_behind(dtype, tmp_path, monkeypatch, capsys):
    """It computes in float32 whatever the default dtype, which stays; so do the threads,
    standard output and the signals' handlers."""
    run("--out", tmp_path / "float32")
    expected = capsys.readouterr().out
    before = sys.stdout, signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(torch, "set_num_threads", None)         # nobody calls it
    torch.set_default_dtype(dtype)
    try:
        run("--out", tmp_path / "other")
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)

    assert (sys.stdout, signal.getsignal(signal.SIGINT)) == before
    assert without_times(capsys.readouterr().out) == without_times(expected)


def without_times(text):
    return re.sub(r"\d+ s\n", "", text)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_main_leaves_nothing_behind(error, tmp_path, monkeypatch):
    """A notebook gets the exception, and keeps its standard output."""
    def train(*args):
        raise error

    monkeypatch.setattr(swiss_roll, "train", train)
    before = sys.stdout
    with pytest.raises(error):
        run("--out", tmp_path)

    assert sys.stdout is before
    assert os.listdir(tmp_path) == []


class FullStream(io.StringIO):
    """A standard output on a full disk."""
    def write(self, text):
        raise OSError(28, "No space left on device")


def test_run_in_a_notebook_keeps_its_standard_output(tmp_path, monkeypatch, capsys):
    """Also where the whole file is run in the process (%run), and printing fails."""
    stream = FullStream()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "argv", ["swiss_roll.py", "--steps", "1", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(swiss_roll.__file__, run_name="__main__")

    assert sys.stdout is stream
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("stop, code", [("interrupt", 130), ("closed pipe", 2)])
def test_stopped_with_one_line(stop, code, tmp_path):
    """Ctrl-C, and a reader of standard output that has gone: no traceback."""
    command = [sys.executable, swiss_roll.__file__, "--steps", "900", "--out"]
    popen = partial(subprocess.Popen, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    program = popen([*command, tmp_path], text=True)
    program.stdout.readline()
    if stop == "interrupt":
        program.send_signal(signal.SIGINT)
    program.stdout.close()

    error = program.stderr.read()
    assert program.wait() == code
    assert error.count("\n") == 1 and "Traceback" not in error
    assert os.listdir(tmp_path) == []
