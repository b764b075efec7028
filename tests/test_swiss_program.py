"""swiss_roll.py as a program, and in a notebook: what it prints, refuses, leaves
behind, and how it ends."""
import io
import math
import os
import re
import signal
import sys
from functools import partial

import pytest
import torch
from torch.distributions import Normal, kl_divergence

import program
import swiss_roll
from ddpm_min import GaussianDiffusion
from swiss_roll import SwissRoll, T, f_mu_f_sigma, schedule
from test_ddpm_min import seeded
from test_swiss_roll import close, fine_roll, randn


def exact_posterior(x0, x_t, beta, bar, t):
    """q(x^{t-1} | x^t, x^0) by Bayes: the product of the densities q(x^{t-1} | x^0) and
    q(x^t | x^{t-1}) of x^{t-1}. Precisions add, means are weighted by them."""
    prior = 1 / (1 - bar[t - 1])
    likelihood = (1 - beta[t]) / beta[t]
    precision = prior + likelihood
    mean = prior * bar[t - 1].sqrt() * x0 + likelihood * x_t / (1 - beta[t]).sqrt()
    return Normal(mean / precision, precision**-0.5)


def own_K(x0, beta, reverse):
    """K of points x0 (n, 2), bits (n,), by Eq. 14; beta_0 = 0."""
    bar = torch.cumprod(1 - beta, dim=0)
    h_q_T = 2 * Normal(0, (1 - bar[T]).sqrt()).entropy()
    h_q_1 = 2 * Normal(0, beta[1].sqrt()).entropy()
    h_p_T = 2 * Normal(0, 1.0).entropy()
    K = (h_q_T - h_q_1 - h_p_T).repeat(len(x0))
    for t in range(2, T + 1):
        eps = randn(*x0.shape, n=100 + t)
        x_t = bar[t].sqrt() * x0 + (1 - bar[t]).sqrt() * eps
        q = exact_posterior(x0, x_t, beta, bar, t)
        f_mu, f_sigma = reverse(x_t[None].float(), torch.tensor([t]))
        p = Normal(f_mu[0].double(), f_sigma[0].double().sqrt())
        K -= kl_divergence(q, p).sum(1)
    return K / math.log(2)


@pytest.fixture
def short_run(tmp_path, monkeypatch, capsys):
    """What a run of a few steps prints, its diffusion and reverse, K of its points."""
    seen = []
    train, report = swiss_roll.train, swiss_roll.report

    def spy_train(net, *rest):
        diffusion = train(net, *rest)
        seen.extend([diffusion, partial(f_mu_f_sigma, net, diffusion)])
        return diffusion

    def spy_report(bits, *rest):
        seen.append(bits)
        report(bits, *rest)

    monkeypatch.setattr(swiss_roll, "train", spy_train)
    monkeypatch.setattr(swiss_roll, "report", spy_report)
    swiss_roll.main(["--net", "rbf", "--steps", "40", "--out", str(tmp_path)])
    return capsys.readouterr().out, *seen


def test_what_is_printed(short_run):
    """K, its standard error, L_null, the ceiling and their differences, in bits, and
    the share of samples near the curve, computed again."""
    out, diffusion, reverse, its_bits = short_run
    K, null, gain, ceiling, gap = map(float, re.findall(r"=(-?\d\.\d{3})", out))
    error = float(re.search(r"to \+- (\S+);", out)[1])
    share = float(re.search(r"samples: (\S+)%", out)[1]) / 100

    n = 4000
    roll = SwissRoll(0.02)
    bits = own_K(roll.sample(n, seeded(20)).double(), diffusion.beta.double(), reverse)
    deviation = bits.std().item()
    *_, samples = swiss_roll.sample(reverse, diffusion, n, seeded(21))
    curve, sigma = fine_roll(20000, 0.02)
    near = torch.cdist(samples.double(), curve).amin(dim=1) < 0.1
    own_share = near.double().mean().item()
    speed = 20000 * curve.diff(dim=0).norm(dim=1)
    entropy = speed.log().mean() + Normal(0, sigma).entropy()

    assert 0.01 < share < 0.99                      # or the next line shows little
    close(share, own_share, atol=5 * 0.5 * math.sqrt(1 / n + 1 / 10000))
    close(K, its_bits.double().mean().item(), atol=6e-4)
    close(K, bits.mean().item(), atol=5 * deviation / math.sqrt(n))
    close(error, deviation / math.sqrt(100000), atol=0.0015)
    close(null, -math.log2(2 * math.pi * math.e), atol=6e-4)
    close(ceiling, -entropy.item() / math.log(2), atol=6e-4)
    close(gain, K - null, atol=1.1e-3)
    close(gap, ceiling - K, atol=1.1e-3)


def run(*argv):
    """main, by the smallest network, with 500 held-out points."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(swiss_roll, "HELD_OUT", 500)
        swiss_roll.main(["--net", "rbf", "--steps", "1", *map(str, argv)])


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
        monkeypatch.setattr(program.os, "fsync", raise_full)
    else:
        (tmp_path / "swiss_roll_reverse.png").mkdir()
    monkeypatch.setattr(swiss_roll, "train", None)

    with pytest.raises(SystemExit, match="2"):
        swiss_roll.main(["--out", str(tmp_path)])

    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(tmp_path) in error
    assert [path for path in tmp_path.iterdir() if not path.is_dir()] == []


def raise_full(*_):
    raise OSError(28, "No space left on device")


def test_a_bad_folder_is_refused_before_the_training(tmp_path, monkeypatch, capsys):
    """A file where the folder should be."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(swiss_roll, "train", None)

    with pytest.raises(SystemExit, match="2"):
        swiss_roll.main(["--out", str(tmp_path / "file" / "folder")])

    assert "file" in capsys.readouterr().err


def test_a_picture_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    """Here a folder takes its place while the network trains: K is printed, the other
    picture written, one line names this one, and the code is 2."""
    def train(net, roll, *rest):
        (tmp_path / "swiss_roll.png").mkdir()
        return GaussianDiffusion(schedule(roll.sigma))

    monkeypatch.setattr(swiss_roll, "train", train)
    with pytest.raises(SystemExit, match="2"):
        run("--out", tmp_path)

    out, error = capsys.readouterr()
    assert "K=" in out
    assert error.count("\n") == 1 and str(tmp_path / "swiss_roll.png") in error
    assert sorted(os.listdir(tmp_path)) == ["swiss_roll.png", "swiss_roll_reverse.png"]
    assert (tmp_path / "swiss_roll_reverse.png").is_file()


def test_main_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    """It computes in float32 whatever the default dtype, which stays as it is; so do
    threads, standard output and the signals' handlers."""
    run("--out", tmp_path / "float32")
    expected = capsys.readouterr().out
    before = sys.stdout, signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(torch, "set_num_threads", None)         # nobody calls it
    torch.set_default_dtype(torch.bfloat16)
    try:
        run("--out", tmp_path / "other")
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)

    assert (sys.stdout, signal.getsignal(signal.SIGINT)) == before
    assert without_times(capsys.readouterr().out) == without_times(expected)


def without_times(text):
    return re.sub(r"\d+ s\n", "", text)


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt, "130"), (OSError, "2")])
def test_an_interrupted_main_leaves_nothing_behind(error, code, tmp_path, monkeypatch):
    """No file, and a standard output that works."""
    def train(*args):
        raise error

    monkeypatch.setattr(swiss_roll, "train", train)
    before = sys.stdout
    with pytest.raises(SystemExit, match=code):
        run("--out", tmp_path)

    assert sys.stdout is before
    assert os.listdir(tmp_path) == []


class FullStream(io.StringIO):
    """A standard output on a full disk."""
    def write(self, text):
        raise OSError(28, "No space left on device")


def test_a_full_standard_output_ends_nothing(tmp_path, monkeypatch):
    """In a notebook: the run goes on to its pictures, and the stream stays."""
    stream = FullStream()
    monkeypatch.setattr(sys, "stdout", stream)

    run("--out", tmp_path)

    assert sys.stdout is stream
    assert sorted(os.listdir(tmp_path)) == ["swiss_roll.png", "swiss_roll_reverse.png"]
