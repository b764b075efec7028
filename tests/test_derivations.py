"""docs/derivations.md: the names on the page exist, each proof of ddpm_min.py stands
there, and its figures are those computed here, in float64."""
import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.distributions import Normal
from torch.nn.functional import pad

import ddpm_min
from swiss_roll import SwissRoll, schedule

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "derivations.md").read_text()
PROSE = " ".join(re.sub(r"\$`|`\$", "", PAGE).split())      # lines joined, no $`..`$
ROLL = SwissRoll(0.02)                                      # the program's default
close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)

# The linear schedule; row t belongs to t, row 0 to the data.
beta = pad(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), (1, 0))
alpha = 1 - beta
bar = torch.cumprod(alpha, 0)
snr = bar / (1 - bar)
t = torch.arange(2, 1001)
beta_tilde = (1 - bar[t - 1]) / (1 - bar[t]) * beta[t]      # from t = 2 on


def test_names_on_the_page_exist():
    """`name` is in the code or a test, and no proof of ddpm_min.py is left out."""
    names = set(re.findall(r"(?<!\$)`([a-zA-Z]\w*)`", PAGE))
    proofs = (ROOT / "test_ddpm_min.py").read_text()
    files = [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]
    code = "\n".join(path.read_text() for path in files)
    defined = re.findall(r"^ *(?:def|class|self.register_buffer).+", code, re.M)
    assert set(re.findall(r"def (test_\w+)", proofs)) <= names
    assert names <= set(re.findall(r"\w+", " ".join(defined)))


def test_forward_process():
    """Section 1: alpha_bar_T and bounds; E[x_{t-1} | x_t = 0.4] for data -1 or 1."""
    low, high = beta.sum(), (beta / alpha).sum()
    assert low < -bar[-1].log() < high
    assert "the two sums are %.2f and %.2f," % (low, high) in PROSE
    assert "_T is %.1fe-5" % (1e5 * bar[-1]) in PROSE
    x = torch.linspace(-2, 2, 10001).double()
    before = torch.cosh(10 * 0.9**0.5 * x).log() - 5 * x**2     # log q(x_{t-1}) + c
    step = -((0.4 - 0.998**0.5 * x) ** 2) / (2 * 0.002)
    mean = ((before + step).softmax(0) * x).sum()
    slope = torch.gradient(before, spacing=0.0004)[0][6000]     # at x = 0.4
    formula = 0.4 / 0.998**0.5 + 0.002 / 0.998 * slope
    assert "mean %.4f (by the formula %.4f)" % (mean, formula) in PROSE


def test_weights():
    """Section 4: Eq. 12's factor is (SNR_{t-1} / SNR_t - 1) / 2; its figures."""
    factor = beta[t] ** 2 / (2 * beta_tilde * alpha[t] * (1 - bar[t]))
    close((snr[t - 1] / snr[t] - 1) / 2, factor)
    i = factor.argmin()
    assert "%.2f at t = 2, %.4f at 100, least" % (factor[0], factor[98]) in PROSE
    assert "with %.5f at t = %d, and %.4f" % (factor[i], t[i], factor[-1]) in PROSE


def test_score():
    """Section 6: the score of data N(0.4, 0.09) is -E[eps | x_t] over the noise."""
    x = torch.linspace(-2, 2, 9).double().requires_grad_()
    signal, noise = bar[300].sqrt(), (1 - bar[300]).sqrt()
    q = Normal(0.4 * signal, torch.hypot(0.3 * signal, noise))
    q.log_prob(x).sum().backward()
    eps = noise / q.variance * (x - q.mean)
    close(-eps / noise, x.grad)


def test_two_variances():
    """Section 7: Var(x_{t-1} | x_t) of data N(0, var), from their covariance."""
    for var, ours in ((0, beta_tilde), (1, beta[t])):
        c = bar * var + 1 - bar                                 # Var(x_t)
        close(ours, c[t - 1] - alpha[t] * c[t - 1] ** 2 / c[t])
    ratio = beta_tilde / beta[t]
    assert "is %.2f at t = 2 and %.2f at 100 for" % (ratio[0], ratio[98]) in PROSE


def test_guided_score_is_of_no_noised_density():
    """Section 8: data N(0, 1), N(0, 1/2) given y: precisions agree at s = 0, 1 only."""
    s = torch.arange(4).double()
    precision = 1 - s + s / (1 - bar[300] / 2)
    noised = 1 / (bar[300] / (1 + s) + 1 - bar[300])
    same = (precision - noised).abs() < 1e-9
    assert same.tolist() == [True, True, False, False]


@pytest.mark.parametrize("name", ["linear", "cosine", "laplace"])
def test_table_of_schedules(name):
    """Section 9: log SNR at five times, noise over signal at one, the share of t."""
    betas = getattr(ddpm_min, f"{name}_schedule")()
    log_snr = torch.logit(torch.cumprod(1 - betas, 0))
    levels = log_snr[[0, 249, 499, 749, 999]]
    ratio = torch.exp(-log_snr[19] / 2)
    share = 100 * (log_snr.abs() < 2).double().mean()
    cells = " | ".join(["%.2f"] * 6 + ["%.1f %%"])
    row = (cells % (*levels, ratio, share)).replace("-", "−")
    assert f"`{name}_schedule` | {row} |" in PAGE


def test_few_steps():
    """Sections 1, 4, 7, 9: figures of the default, the end of cosine, Euler's steps."""
    q = ddpm_min.GaussianDiffusion(ddpm_min.laplace_schedule(), torch.float64)
    first, second, *_, last, _ = q.times(50)
    ratio = q.noise / q.signal
    assert "has %.2f for" % (1 - q.alpha_bar[first] / q.alpha_bar[second]) in PROSE
    assert "_{%d} = %.3f" % (second, q.alpha_bar[second]) in PROSE
    assert "at t = %d, noise %.2f of the signal" % (last, ratio[last]) in PROSE
    factor = ((ratio[[2, 1000]] / ratio[[1, 999]]) ** 2 - 1) / 2
    close(factor[0], factor[1])
    assert "are %.2f at t = 2 and at 1,000" % factor[0] in PROSE
    alpha = 1 - ddpm_min.cosine_schedule()
    assert "for cosine at T by %.1fe-5" % (1e5 * alpha.prod().sqrt()) in PROSE
    x = 0.5                                         # / signal, of data -1 or 1
    for n in (3, 2.4, 1.8, 1.2, 0.6):
        x -= 0.6 * (x - math.tanh(x / n**2)) / n
    assert "five Euler steps at %.2f" % x in PROSE


def test_price_of_a_diagonal():
    """Section 10: log(C_11 C_22 / det C) / 2 for variances 1, 1 / r turned by psi."""
    beta = schedule(ROLL.sigma)
    bar = torch.cumprod(1 - beta, 0)
    v = bar * ROLL.sigma**2 + 1 - bar
    r = v[1] / v[0]
    psi = 2 * math.pi * torch.arange(64).double() / 64
    cos, sin = psi.cos() ** 2, psi.sin() ** 2
    loss = torch.log((cos + sin / r) * (sin + cos / r) * r) / 2
    price = r.log() ** 2 / 16
    close(loss.mean(), price, rtol=0.01)
    assert "are %.2f, %.2f, %.2f)" % tuple(beta[-3:]) in PROSE
    assert "39 steps of r = %.3f cost" % r in PROSE
    assert "V_0 = %.1fe-6 in each" % (1e6 * ROLL.sigma**2) in PROSE
    assert "which are %.3f bits" % (39 * price / math.log(2)) in PROSE


def best_K(n, seed):
    """The K, bits, of the best reverse of the default roll that is Gaussian with any
    covariance, and with a diagonal one: its moments are those of q(x_{t-1} | x_t), so
    E KL is the mean of log(det / beta~_t^2) / 2. From n points of a Sobol sequence."""
    engine = torch.quasirandom.SobolEngine(3, scramble=True, seed=seed)
    points = engine.draw(n).double().clamp(1e-9, 1 - 1e-9)
    x0 = ROLL.curve(points[:, 0])
    noise = Normal(0, 1).icdf(points[:, 1:])
    beta = pad(schedule(ROLL.sigma), (1, 0))
    bar = torch.cumprod(1 - beta, 0)
    v = bar * ROLL.sigma**2 + 1 - bar                   # about a place of the curve
    K = torch.log((1 - bar[-1]) / (beta[1] * 2 * math.pi * math.e)).repeat(2)
    for t in range(2, 41):
        width = (v[t] / bar[t]).sqrt()
        nodes = max(500, math.ceil(20 / width))         # one width apart
        curve = ROLL.curve((torch.arange(nodes).double() + 0.5) / nodes)
        distance = torch.cdist(x0 + width * noise, curve) / width
        share = torch.softmax(-0.5 * distance**2, dim=1)
        mean = share @ curve
        variance = share @ curve**2 - mean**2
        covariance = share @ curve.prod(1) - mean.prod(1)
        # From one place of the curve all is Gaussian: Eq. 7, with v for 1 - alpha_bar.
        square = bar[t - 1] * (beta[t] / v[t]) ** 2     # of the factor of x_0
        variance = beta[t] * v[t - 1] / v[t] + square * variance
        determinant = variance.prod(1)
        full = determinant - (square * covariance) ** 2
        beta_tilde = (1 - bar[t - 1]) / (1 - bar[t]) * beta[t]
        ratio = torch.stack([full, determinant]) / beta_tilde**2
        K -= ratio.log().mean(1) / 2
    return K / math.log(2)


def test_best_K():
    """Section 10's table. By 512 points K is known to 0.01, the price to 0.001."""
    full, diagonal = best_K(512, seed=0)
    row = re.search(r"\| K \| (\S+) \| (\S+) \|", PAGE)
    best, best_diagonal = map(float, row.groups())
    price = best - best_diagonal
    assert abs(diagonal - best_diagonal) < 0.05
    assert abs(full - diagonal - price) < 0.005
    assert "the price is %.3f" % price in PROSE
    assert "| %.3f |" % (ROLL.ceiling() / math.log(2)) in PROSE
