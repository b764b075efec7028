"""docs/derivations.md: the names on the page exist, each proof of ddpm_min.py stands
there, and what no other test proves is computed here, in float64."""
import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from pytest import approx
from torch.distributions import MultivariateNormal, Normal, kl_divergence

import ddpm_min
from ddpm_min import GaussianDiffusion, linear_schedule
from swiss_roll import SwissRoll, bound, schedule

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "derivations.md").read_text()
PROSE = " ".join(PAGE.split())                              # lines joined
DIFFUSION = GaussianDiffusion(linear_schedule(), torch.float64)
ROLL = SwissRoll(0.02)                                      # the program's default
ROLL_DIFFUSION = GaussianDiffusion(schedule(ROLL.sigma), torch.float64)
close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
zeros = partial(torch.zeros, dtype=torch.float64)


def defined(*names):
    """The functions, methods and classes that these files define."""
    found = set()
    for name in names:
        text = (ROOT / name).read_text()
        found.update(re.findall(r"^ *(?:def|class) (\w+)", text, re.M))
    return found


def named_tests():
    """The tests that the page names, as `test_...`."""
    return set(re.findall(r"`(test_\w+)`", PAGE))


def told(pattern):
    """The numbers that the page gives where the pattern matches it."""
    match = re.search(pattern, PROSE)
    assert match, f"the page does not say {pattern}"
    return [float(number) for number in match.groups()]


def test_code_on_the_page_exists():
    names = set(re.findall(r"`([a-zA-Z]\w*)`", PAGE)) - named_tests()
    assert len(names) > 20
    assert names <= defined("ddpm_min.py", "swiss_roll.py")


def test_tests_on_the_page_exist():
    assert named_tests() <= defined("test_ddpm_min.py", *ROOT.glob("tests/*.py"))


def test_page_names_each_proof():
    proofs = {name for name in defined("test_ddpm_min.py") if name.startswith("test_")}
    assert proofs <= named_tests()


def test_sums_of_beta():
    """Section 1: the sum of all beta, alpha_bar_T and L_T of the linear schedule, and
    of one of 100 steps."""
    total, end, most = told(r"Σβ = ([\d.]+), ᾱ_T = (\S+) and L_T below (\S+) bits")
    short_total, short_end = told(r"T = 100 .*? Σβ = ([\d.]+), .*? ᾱ_T = ([\d.]+)")

    beta, short_beta = linear_schedule(), linear_schedule(100)
    white = 1 + zeros(1, 1)
    bits = DIFFUSION.prior_kl(white).item() / math.log(2)

    assert total == approx(beta.sum().item(), abs=5e-3)
    assert end == approx((1 - beta).prod().item(), abs=5e-7)
    assert 0.9 * most < bits < most
    assert short_total == approx(short_beta.sum().item(), abs=5e-4)
    assert short_end == approx((1 - short_beta).prod().item(), abs=5e-3)


def test_weights():
    """Section 4: Eq. 12's factor with beta~_t is (SNR_{t-1} / SNR_t - 1) / 2, and the
    page's three figures."""
    beta = linear_schedule()
    alpha = 1 - beta
    bar = torch.cumprod(alpha, 0)
    beta_tilde = (1 - bar[:-1]) / (1 - bar[1:]) * beta[1:]
    factor = beta[1:] ** 2 / (2 * beta_tilde * alpha[1:] * (1 - bar[1:]))   # t = 2..T

    snr = bar / (1 - bar)
    close((snr[:-1] / snr[1:] - 1) / 2, factor)
    numbers = told(r"([\d.]+) at t = 2, ([\d.]+) at t = 100, ([\d.]+) at t = 500")
    assert numbers == approx(factor[[0, 98, 498]].tolist(), rel=0.03)


@pytest.mark.parametrize("t, t_prev", [(1000, 999), (700, 300), (20, 0)])
def test_eta_0_is_euler(t, t_prev):
    """Section 7: in y = x / sqrt(alpha_bar), over n = sqrt(1 / alpha_bar - 1), a step
    with eta = 0 is Euler's for dy / dn = eps."""
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]

    ours = DIFFUSION.p_sample(lambda x_t, t: x_t.sin(), x, t, t_prev, eta=0, clip=False)

    bar = torch.cumprod(1 - linear_schedule(), 0)
    bar = torch.cat([bar.new_ones(1), bar])
    n = (1 / bar - 1).sqrt()
    y = x / bar[t].sqrt() + (n[t_prev] - n[t]) * x.sin()
    close(ours / bar[t_prev].sqrt(), y)


@pytest.mark.parametrize("name", ["linear", "cosine", "laplace"])
def test_table_of_schedules(name):
    """Section 9: log SNR at five times, and the share of t where it is within +-2."""
    row = re.search(rf"`{name}_schedule` \|(.+)%", PAGE)[1]
    *levels, share = map(float, row.replace("−", "-").split("|"))

    betas = getattr(ddpm_min, f"{name}_schedule")()
    alpha_bar = torch.cumprod(1 - betas, 0)
    log_snr = torch.logit(alpha_bar)
    near = log_snr.abs() < 2

    assert levels == approx(log_snr[[0, 249, 499, 749, 999]].tolist(), abs=5.1e-3)
    assert share == approx(near.sum().item() / 10, abs=0.051)


def test_equal_factors():
    """Section 10: log r is a 39th of log(v_T / v_1); what the picture makes of it."""
    r, bits = told(r"39 steps of r = ([\d.]+) .* which are ([\d.]+) bits")

    v_0 = ROLL.sigma**2
    log_r = math.log((0.01 * v_0 + 0.99) / (1.001 * v_0)) / 39

    assert r == approx(math.exp(log_r), abs=5e-4)
    assert bits == approx(39 * log_r**2 / 16 / math.log(2), abs=5e-4)


def test_price_of_a_diagonal():
    """Section 10: the KL from N(0, Sigma), of variances 1 and 1 / r, turned by phi, to
    the diagonal Gaussian of its variances; that none is nearer; the mean over phi."""
    r = 1.348
    phi = 2 * math.pi * torch.arange(64, dtype=torch.float64) / 64
    axes = torch.stack([phi.cos(), phi.sin(), -phi.sin(), phi.cos()], dim=1)
    axes = axes.reshape(64, 2, 2)
    variances = torch.tensor([1, 1 / r], dtype=torch.float64)
    turned = MultivariateNormal(zeros(2), axes.mT @ variances.diag() @ axes)

    def price(diagonal):
        p = MultivariateNormal(zeros(2), torch.diag_embed(diagonal))
        return kl_divergence(turned, p)

    nearest = price(turned.variance)
    formula = torch.log1p((r - 1) ** 2 / (4 * r) * torch.sin(2 * phi) ** 2) / 2
    close(nearest, formula)
    for factor in ([1.01, 1], [0.99, 1], [1, 1.01], [1, 0.99]):
        other = turned.variance * torch.tensor(factor)
        assert (price(other) > nearest).all()
    assert formula.mean().item() == approx(math.log(r) ** 2 / 16, rel=0.01)


def reverse_moments(x, t):
    """Means and variances (n, 2), and covariances (n,), of q(x^(t-1) | x^(t)) at x
    (n, 2). From one place of the curve all is Gaussian, as in section 2, and the places
    mix by q(place | x^(t))."""
    alpha_bar = ROLL_DIFFUSION.alpha_bar
    beta = ROLL_DIFFUSION.beta[t]
    v = alpha_bar * ROLL.sigma**2 + 1 - alpha_bar           # about a place of the curve
    width = (v[t] / alpha_bar[t]).sqrt().item()
    n = max(500, math.ceil(20 / width))                     # nodes one width apart
    curve = ROLL.curve((torch.arange(n, dtype=torch.float64) + 0.5) / n)

    distance = torch.cdist(x, alpha_bar[t].sqrt() * curve)
    share = torch.softmax(-0.5 * distance**2 / v[t], dim=1)
    mean = share @ curve
    variance = share @ curve**2 - mean**2
    covariance = share @ curve.prod(1) - mean.prod(1)

    # Eq. 7, with v for 1 - alpha_bar.
    weight_0 = alpha_bar[t - 1].sqrt() * beta / v[t]
    weight_t = (1 - beta).sqrt() * v[t - 1] / v[t]
    mean = weight_0 * mean + weight_t * x
    variance = beta * v[t - 1] / v[t] + weight_0**2 * variance
    return mean, variance, weight_0**2 * covariance


def best_K(n, seed):
    """The K, bits, of the best reverse of the default roll that is Gaussian with any
    covariance, and with a diagonal one: as its moments are q's, E KL is the mean of
    log(det / beta~_t^2) / 2. From n points of a scrambled Sobol sequence."""
    engine = torch.quasirandom.SobolEngine(3, scramble=True, seed=seed)
    points = engine.draw(n).double().clamp(1e-9, 1 - 1e-9)
    x0 = ROLL.curve(points[:, 0])
    noise = Normal(0, 1).icdf(points[:, 1:])

    alpha_bar, beta = ROLL_DIFFUSION.alpha_bar, ROLL_DIFFUSION.beta
    kl = zeros(2)
    for t in range(2, ROLL_DIFFUSION.T + 1):
        v = alpha_bar[t] * ROLL.sigma**2 + 1 - alpha_bar[t]
        x = alpha_bar[t].sqrt() * x0 + v.sqrt() * noise
        _, variance, covariance = reverse_moments(x, t)
        beta_tilde = (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]) * beta[t]
        diagonal = variance.prod(1) / beta_tilde**2
        full = diagonal - (covariance / beta_tilde) ** 2
        kl += torch.stack([full, diagonal]).log().mean(1) / 2

    entropies = torch.log((1 - alpha_bar[-1]) / beta[1] / (2 * math.pi * math.e))
    return (entropies - kl) / math.log(2)


def test_best_K():
    """Section 10's table: no f_Sigma passes these K. By 512 points the error of each is
    0.01 and that of their difference 0.001."""
    full, diagonal, learned, most = told(
        r"\| K \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) ± [\d.]+ \| ([\d.]+) \|")
    (price,) = told(r"the price is ([\d.]+)\.")

    ours_full, ours_diagonal = best_K(512, seed=0).tolist()

    assert ours_full == approx(full, abs=0.05)
    assert ours_diagonal == approx(diagonal, abs=0.05)
    assert ours_full - ours_diagonal == approx(price, abs=0.005)
    assert price == approx(full - diagonal, abs=1e-9)
    assert learned < diagonal < full < most
    assert most == approx(ROLL.ceiling() / math.log(2), abs=5e-4)


def test_bound_agrees_with_best_K():
    """The same moments as f_mu and f_Sigma, through swiss_roll's bound."""
    generator = torch.Generator().manual_seed(0)
    x0 = ROLL.sample(500, generator).double()
    eps = torch.randn(39, 500, 2, generator=generator).double()

    def reverse(x_t, t):
        moments = map(reverse_moments, x_t, t)
        means, variances, _ = zip(*moments)
        return torch.stack(means), torch.stack(variances)

    bits = bound(x0, ROLL_DIFFUSION, reverse, eps) / math.log(2)

    _, diagonal = best_K(512, seed=0)
    error = bits.std().item() / math.sqrt(500)
    assert bits.mean().item() == approx(diagonal.item(), abs=5 * error)
