"""docs/derivations.md: the names on the page exist, each proof of ddpm_min.py stands
there, and what no other test proves is computed here, in float64."""
import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from torch.nn.functional import pad

import ddpm_min
from swiss_roll import SwissRoll, schedule

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "derivations.md").read_text()
PROSE = " ".join(re.sub(r"\$`|`\$", "", PAGE).split())      # lines joined, no $`..`$
ROLL = SwissRoll(0.02)                                      # the program's default
close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)
near = partial(torch.testing.assert_close, rtol=0)
origin = torch.zeros(2, dtype=torch.float64)

# The linear schedule; row t belongs to t, row 0 to the data.
beta = pad(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), (1, 0))
alpha = 1 - beta
bar = torch.cumprod(alpha, 0)
snr = bar / (1 - bar)
diffusion = ddpm_min.GaussianDiffusion(beta[1:], torch.float64)
t = torch.arange(2, 1001)
beta_tilde = (1 - bar[t - 1]) / (1 - bar[t]) * beta[t]      # from t = 2 on


def names_in(*paths):
    """The functions and classes that these files define, and arguments of theirs."""
    found = set()
    for path in paths:
        for line in (ROOT / path).read_text().splitlines():
            if line.lstrip().startswith(("def ", "class ")):
                found.update(re.findall(r"\w+", line))
    return found


def told(pattern):
    """The numbers on the page where the pattern matches it, float64."""
    match = re.search(pattern, PROSE)
    assert match, f"the page does not say {pattern}"
    return torch.tensor([float(number) for number in match.groups()]).double()


def test_names_on_the_page_exist():
    """`test_name` is a test, none of the proofs is left out; `name` is in the code."""
    names = set(re.findall(r"(?<!\$)`([a-zA-Z]\w*)`", PAGE))
    tests = {name for name in names if name.startswith("test_")}
    proofs = {name for name in names_in("test_ddpm_min.py") if "test_" in name}

    assert proofs <= tests <= names_in("test_ddpm_min.py", *ROOT.glob("tests/*.py"))
    code = names_in("ddpm_min.py", "swiss_roll.py")
    assert names - tests - code <= set(diffusion.state_dict())


def test_sums_of_beta():
    """The bounds on -log alpha_bar_T, alpha_bar_T, L_T (section 1), SNR_T (3)."""
    low, high = told(r"two sums are ([\d.]+) and ([\d.]+),")
    end, most = told(r"_T is (\S+), and L_T below (\S+) bits")
    short_figures = told(r"same ends the sum is ([\d.]+), .*? = ([\d.]+) of")
    (growth,) = told(r"times as much, (\d+) at the linear")

    near(low, beta.sum(), atol=5e-3)
    near(high, (beta / alpha).sum(), atol=5e-3)
    assert low < -bar[-1].log() < high
    near(end, bar[-1], atol=5e-7)
    nats = diffusion.prior_kl(origin[:, None] + 1)
    assert 0.9 * most < nats[0] / math.log(2) < most
    short = torch.linspace(1e-4, 0.02, 100, dtype=torch.float64)
    near(short_figures, torch.stack([short.sum(), (1 - short).prod()]), atol=5e-3)
    near(growth, snr[-1] ** -0.5, atol=0.5)


def test_weights():
    """Section 4: Eq. 12's factor is (SNR_{t-1} / SNR_t - 1) / 2; its four figures."""
    factor = beta[t] ** 2 / (2 * beta_tilde * alpha[t] * (1 - bar[t]))

    close((snr[t - 1] / snr[t] - 1) / 2, factor)
    near(told(r"are ([\d.]+) at t = 2, ")[0], factor[0], atol=5e-3)
    near(told(r" ([\d.]+) at 100, least ")[0], factor[98], atol=5e-5)
    near(told(r" ([\d.]+) at 1,000")[0], factor[998], atol=5e-5)
    least, where = told(r"least with ([\d.]+) at t = (\d+)")
    near(least, factor.min(), atol=5e-6)
    assert where == t[factor.argmin()]


@pytest.mark.parametrize("var", [0, 0.25, 1])
def test_two_variances(var):
    """Section 7: Var(x_{t-1} | x_t) of data N(0, var), from their covariance; for
    var = 1 it is beta_t. The page's two ratios."""
    c = bar * var + 1 - bar                                     # Var(x_t)
    oracle = c[t - 1] - alpha[t] * c[t - 1] ** 2 / c[t]

    weight_0 = bar[t - 1].sqrt() * beta[t] / (1 - bar[t])       # Eq. 7
    var_0 = var * (1 - bar[t]) / c[t]                           # Var(x_0 | x_t)
    close(beta_tilde + weight_0**2 * var_0, oracle)
    if var == 1:
        close(oracle, beta[t])
    figures = told(r"is ([\d.]+) at t = 2 and ([\d.]+) at 100 for the linear")
    near(figures, (beta_tilde / beta[t])[[0, 98]], atol=5e-3)


@pytest.mark.parametrize("s", [0, 1, 2, 3])
def test_guided_score_is_of_no_noised_density(s):
    """Section 8: for data N(0, 1), and of variance 1/2 given y, q(x_t) q(y | x_t)^s has
    the precision of that of t = 0, noised, for s = 0 and 1 only."""
    precision = 1 - s + s / (1 - bar[300] / 2)
    noised = 1 / (bar[300] / (1 + s) + 1 - bar[300])
    assert ((precision - noised).abs() < 1e-9) == (s in (0, 1))


@pytest.mark.parametrize("name", ["linear", "cosine", "laplace"])
def test_table_of_schedules(name):
    """Section 9: log SNR at five times, noise over signal at one, the share of t."""
    row = re.search(rf"`{name}_schedule` \|(.+)%", PAGE)[1]
    figures = [float(cell) for cell in row.replace("−", "-").split("|")]
    *levels, ratio, share = torch.tensor(figures).double()

    betas = getattr(ddpm_min, f"{name}_schedule")()
    log_snr = torch.logit(torch.cumprod(1 - betas, 0))
    near(torch.stack(levels), log_snr[[0, 249, 499, 749, 999]], atol=5.1e-3)
    near(ratio, torch.exp(-log_snr[19] / 2), atol=5e-3)
    middle = log_snr.abs() < 2
    near(share, 100 * middle.double().mean(), atol=0.051)


def test_price_of_a_diagonal():
    """Section 10: the KL from N(0, C), of variances 1 and 1 / r, turned by psi, to the
    diagonal Gaussian of its variances, and its mean over psi; r and the bits of it."""
    r, bits = told(r"39 steps of r = ([\d.]+) .* which are ([\d.]+) bits")
    psi = 2 * math.pi * torch.arange(64).double() / 64
    axis = torch.stack([psi.cos(), psi.sin()], dim=1)           # across the curve
    narrow = (1 - 1 / r) * axis[:, :, None] * axis[:, None]
    turned = MultivariateNormal(origin, torch.eye(2) - narrow)
    diagonal = MultivariateNormal(origin, torch.diag_embed(turned.variance))

    square = torch.sin(2 * psi) ** 2
    formula = torch.log1p((r - 1) ** 2 / (4 * r) * square) / 2
    close(kl_divergence(turned, diagonal), formula)
    assert (formula.mean() / (r.log() ** 2 / 16) - 1).abs() < 0.01
    v_0 = origin[0] + ROLL.sigma**2
    v_T = 0.01 * v_0 + 0.99
    log_r = torch.log(v_T / (1.001 * v_0)) / 39
    near(r, log_r.exp(), atol=5e-4)
    near(bits, 39 * log_r**2 / 16 / math.log(2), atol=5e-4)


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

    two_pi_e = 2 * math.pi * math.e
    K = torch.log((1 - bar[-1]) / beta[1] / two_pi_e).repeat(2)
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
    full, diagonal, learned, most = told(
        r"\| K \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) ± [\d.]+ \| ([\d.]+) \|")
    (price,) = told(r"the price is ([\d.]+\d)")

    best_full, best_diagonal = best_K(512, seed=0)
    near(full, best_full, atol=0.05)
    near(diagonal, best_diagonal, atol=0.05)
    near(price, best_full - best_diagonal, atol=0.005)
    assert learned < diagonal < full < most
    near(most * math.log(2), ROLL.ceiling() + origin[0], atol=5e-4)
