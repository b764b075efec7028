"""docs/derivations.md: the names on the page exist, each proof of ddpm_min.py stands
there, and what no other test proves is computed here, in float64."""
import ast
import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence

import ddpm_min
import mnist_ddpm
import swiss_roll
from ddpm_min import GaussianDiffusion, linear_schedule
from swiss_roll import SwissRoll, bound, schedule

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "derivations.md").read_text()
PROSE = " ".join(PAGE.split())                              # lines joined
PROOFS = ROOT / "test_ddpm_min.py"
DIFFUSION = GaussianDiffusion(linear_schedule(), torch.float64)
ROLL = SwissRoll(0.02)                                      # the program's default
close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)


def names_of_tests(path):
    """The names of the tests in one file."""
    return set(re.findall(r"^def (test_\w+)", path.read_text(), re.M))


def told(pattern):
    """The numbers that the page gives where the pattern matches it."""
    match = re.search(pattern, PROSE)
    assert match, f"the page does not say {pattern}"
    return [float(number) for number in match.groups()]


def test_code_on_the_page_exists():
    """Each `name` of code is one of the three modules, of a class or of an argument."""
    known = set(dir(torch))
    for module in (ddpm_min, mnist_ddpm, swiss_roll):
        for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                known.add(node.name)
            if isinstance(node, ast.arg):
                known.add(node.arg)

    names = re.findall(r"`(?!test_)([A-Za-z]\w*)`", PAGE)

    assert len(names) > 20
    assert set(names) <= known


def test_tests_on_the_page_exist():
    known = names_of_tests(PROOFS).union(*map(names_of_tests, ROOT.glob("tests/*.py")))
    assert set(re.findall(r"`(test_\w+)`", PAGE)) <= known


def test_page_names_each_proof():
    assert names_of_tests(PROOFS) <= set(re.findall(r"`(test_\w+)`", PAGE))


def test_sums_of_beta():
    """Section 1: the sum of all beta, and alpha_bar_T, of two linear schedules."""
    numbers = told(
        r"Σβ = ([\d.]+), ᾱ_T = ([\de.-]+) and L_T below ([\de.-]+) bits [^;]+; "
        r"[^;]+ Σβ = ([\d.]+), [^;]+ ᾱ_T = ([\d.]+)")

    short = linear_schedule(100)
    ends = torch.ones(1, 1, dtype=torch.float64)
    bits = DIFFUSION.prior_kl(ends).item() / math.log(2)
    alpha_bar = [torch.prod(1 - beta).item() for beta in (linear_schedule(), short)]
    assert numbers[0] == pytest.approx(linear_schedule().sum().item(), abs=5e-3)
    assert numbers[1] == pytest.approx(alpha_bar[0], abs=5e-7)
    assert 0.9 * numbers[2] < bits < numbers[2]
    assert numbers[3] == pytest.approx(short.sum().item(), abs=5e-4)
    assert numbers[4] == pytest.approx(alpha_bar[1], abs=5e-3)


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
    for number, t in zip(numbers, (2, 100, 500)):
        assert number == pytest.approx(factor[t - 2].item(), rel=0.03)


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
    row = re.search(rf"^\| `{name}_schedule` \|(.+) \|$", PAGE, re.M)[1]
    *levels, share = row.replace("−", "-").replace("%", "").split("|")

    alpha_bar = torch.cumprod(1 - getattr(ddpm_min, f"{name}_schedule")(), 0)

    log_snr = (alpha_bar / (1 - alpha_bar)).log()
    for level, t in zip(levels, (1, 250, 500, 750, 1000), strict=True):
        assert float(level) == pytest.approx(log_snr[t - 1].item(), abs=5.1e-3)
    near = (log_snr.abs() < 2).double().mean().item()
    assert float(share) == pytest.approx(100 * near, abs=0.051)


def test_price_of_a_diagonal():
    """Section 10: the KL from N(0, Sigma), of variances 1 and 1 / r, turned by phi, to
    the diagonal Gaussian of its variances; that none is nearer; the mean over phi."""
    r = 1.348
    phi = 2 * math.pi * torch.arange(64, dtype=torch.float64) / 64
    axes = torch.stack([phi.cos(), phi.sin(), -phi.sin(), phi.cos()], 1).reshape(-1, 2, 2)
    variances = torch.tensor([1, 1 / r], dtype=torch.float64)
    sigma = axes.mT @ variances.diag() @ axes
    centred = partial(MultivariateNormal, torch.zeros(2, dtype=torch.float64))

    def price(diagonal):
        return kl_divergence(centred(sigma), centred(torch.diag_embed(diagonal)))

    nearest = sigma.diagonal(dim1=1, dim2=2)
    formula = torch.log1p((r - 1) ** 2 / (4 * r) * torch.sin(2 * phi) ** 2) / 2
    close(price(nearest), formula)
    for factor in ([1.01, 1], [0.99, 1], [1, 1.01], [1, 0.99]):
        assert (price(nearest * torch.tensor(factor).double()) > price(nearest)).all()
    assert formula.mean().item() == pytest.approx(math.log(r) ** 2 / 16, rel=0.01)


def reverse_moments(diffusion, x, t):
    """Means and variances (n, 2), and covariances (n,), of q(x^(t-1) | x^(t)) at x
    (n, 2). From one place u of the curve all is Gaussian, as in section 2; q(u | x^(t))
    mixes the places."""
    alpha_bar = diffusion.alpha_bar
    v = alpha_bar * ROLL.sigma**2 + 1 - alpha_bar           # about a place of the curve
    width = (v[t] / alpha_bar[t]).sqrt().item()
    n = max(500, math.ceil(20 / width))                     # nodes one width apart
    curve = ROLL.curve((torch.arange(n, dtype=torch.float64) + 0.5) / n)

    distance = torch.cdist(x, alpha_bar[t].sqrt() * curve)
    share = torch.softmax(-0.5 * distance**2 / v[t], dim=1)             # q(u | x^(t))
    mean = share @ curve
    square = share @ curve**2 - mean**2
    product = share @ curve.prod(1) - mean.prod(1)

    gain = alpha_bar[t - 1].sqrt() * diffusion.beta[t] / v[t]           # Eq. 7, v for
    keep = diffusion.alpha[t].sqrt() * v[t - 1] / v[t]                  # 1 - alpha_bar
    variance = diffusion.beta[t] * v[t - 1] / v[t] + gain**2 * square
    return keep * x + gain * mean, variance, gain**2 * product


def best_K(n, seed):
    """The K, bits, of the best reverse of the default roll that is Gaussian with any
    covariance, and with a diagonal one: as its moments are q's, E KL is the mean of
    log(det / beta~_t^2) / 2. From n points of a scrambled Sobol sequence."""
    diffusion = GaussianDiffusion(schedule(ROLL.sigma), torch.float64)
    engine = torch.quasirandom.SobolEngine(3, scramble=True, seed=seed)
    u, *z = engine.draw(n).double().clamp(1e-9, 1 - 1e-9).T
    noise = Normal(0, 1).icdf(torch.stack(z, dim=1))
    x0 = ROLL.curve(u)
    rest = diffusion.one_minus_alpha_bar
    kl = torch.zeros(2, dtype=torch.float64)
    for t in range(2, diffusion.T + 1):
        alpha_bar = diffusion.alpha_bar[t]
        spread = (alpha_bar * ROLL.sigma**2 + rest[t]).sqrt()
        x = alpha_bar.sqrt() * x0 + spread * noise
        _, variance, covariance = reverse_moments(diffusion, x, t)
        diagonal = variance.prod(1)
        beta_tilde = rest[t - 1] / rest[t] * diffusion.beta[t]
        determinants = torch.stack([diagonal - covariance**2, diagonal])
        kl += torch.log(determinants / beta_tilde**2).mean(1) / 2
    two_pi_e = 2 * math.pi * math.e
    return (torch.log(rest[-1] / diffusion.beta[1] / two_pi_e) - kl) / math.log(2)


def test_best_K():
    """Section 10's table: no f_Sigma passes these K. By 512 points the error of each is
    0.01 and that of their difference 0.001."""
    *best, learned, _, ceiling = told(
        r"\| K \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) ± ([\d.]+) \| ([\d.]+) \|")

    ours = best_K(512, seed=0)

    price = ours[0] - ours[1]
    assert ours.tolist() == pytest.approx(best, abs=0.05)
    assert price.item() == pytest.approx(best[0] - best[1], abs=0.005)
    assert learned < best[1] < best[0] < ceiling
    assert ceiling == pytest.approx(ROLL.ceiling() / math.log(2), abs=5e-4)
    v_1, v_T = 1.001 * ROLL.sigma**2, 0.01 * ROLL.sigma**2 + 0.99
    log_r = math.log(v_T / v_1) / 39
    r, bits = told(r"39 steps of r = ([\d.]+) .* which are ([\d.]+) bits")
    assert r == pytest.approx(math.exp(log_r), abs=5e-4)
    assert bits == pytest.approx(39 * log_r**2 / 16 / math.log(2), abs=5e-4)


def test_bound_agrees_with_best_K():
    """The same moments as f_mu and f_Sigma, through swiss_roll's bound."""
    diffusion = GaussianDiffusion(schedule(ROLL.sigma), torch.float64)
    generator = torch.Generator().manual_seed(0)
    x0 = ROLL.sample(500, generator).double()
    eps = torch.randn(39, 500, 2, generator=generator).double()

    def reverse(x_t, t):
        moments = [reverse_moments(diffusion, x, int(i)) for x, i in zip(x_t, t)]
        means, variances, _ = zip(*moments)
        return torch.stack(means), torch.stack(variances)

    bits = bound(x0, diffusion, reverse, eps) / math.log(2)

    error = bits.std().item() / math.sqrt(500)
    assert bits.mean().item() == pytest.approx(best_K(512, seed=0)[1].item(), abs=5 * error)
