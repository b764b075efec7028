"""Every Python block of docs/recipes.md is run, and does what its text says; here those
that draw. Oracles are Gaussian data, whose eps is known exactly."""
import re
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributions import Normal
from torch.testing import assert_close

import test_ddpm_min
from ddpm_min import GaussianDiffusion, linear_schedule
from test_readme import ROOT, blocks, seed

RECIPES = ROOT / "docs" / "recipes.md"
EXACT = GaussianDiffusion(linear_schedule(), torch.float64)
MEAN, STD = -0.2, 0.1           # of Gaussian data, whose eps is known exactly
CODE = blocks(RECIPES)
TESTS = "".join(path.read_text() for path in ROOT.glob("tests/*.py"))
SET_UP = {}
for chapter in ("Set-up", "Noise levels", "One training loop"):
    exec("\n".join(CODE[chapter]), SET_UP)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Each test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)


def run(heading, **replaced):
    """All names after the set-up, with some replaced, and then the recipe."""
    names = {**SET_UP, **replaced}
    exec("\n".join(CODE[heading]), names)
    return SimpleNamespace(**names)


class EveryT(GaussianDiffusion):
    """Its chains have no strides, however many steps are asked for."""
    def times(self, steps):
        return super().times(self.T)


class TenStrides(GaussianDiffusion):
    """Its chains have long ones."""
    def times(self, steps):
        return super().times(10)


def ignore(name, *rows):
    """In place of `save_picture`: what the exact tests draw is no image."""


def marginal(mean, t, x_t):
    """Mean and standard deviation of x_t at t (B,) for data N(mean, STD^2)."""
    alpha_bar = EXACT.alpha_bar[t].reshape(-1, *[1] * (x_t.dim() - 1))
    return alpha_bar.sqrt() * mean, (1 - alpha_bar + alpha_bar * STD**2).sqrt()


def exact_eps(mean, x_t, t):
    """E[eps | x_t] for data N(mean, STD^2)."""
    alpha_bar = EXACT.alpha_bar[t].reshape(-1, *[1] * (x_t.dim() - 1))
    return test_ddpm_min.exact_eps(x_t, alpha_bar, mean, STD**2)


def mean_of_label(y):
    return (y - 4.5) / 30


def labelled_eps(x_t, t, y=None):
    """For data N(mean_of_label(y), STD^2); N(MEAN, STD^2) without label, and for -1."""
    y = torch.full_like(t, -1) if y is None else y
    mean = torch.where(y < 0, MEAN, mean_of_label(y)).double()
    return exact_eps(mean.reshape(-1, *[1] * (x_t.dim() - 1)), x_t, t)


exact = {"diffusion": EXACT, "model": labelled_eps, "save_picture": ignore}
EVERY_T = EveryT(linear_schedule(), torch.float64)
run_exact = partial(run, **{**exact, "diffusion": EVERY_T})


def assert_normal(x, mean, std, bias=0.0):
    """Within 5 standard errors; a bias of std where the recipe itself has one."""
    assert abs(x.mean() - mean) < 5 * std / x.numel() ** 0.5 + bias
    assert abs(x.std() - std) < 5 * std / (2 * x.numel()) ** 0.5 + bias


@pytest.mark.parametrize("heading", CODE)
def test_recipe_is_short_and_tested(heading):
    assert f'"{heading}"' in TESTS
    for code in CODE[heading]:
        lines = [line for line in code.splitlines() if line]
        assert len(lines) <= 12
        assert max(map(len, lines)) <= 88 + len(str(ROOT))


def test_pictures_stand_beside_the_blocks_that_make_them():
    page = RECIPES.read_text()
    made = re.findall(r'save_picture\("(\w+)"', page)
    pictures = [ROOT / "assets" / f"{name}.png" for name in made]
    assert len(pictures) > 8
    for picture in pictures:
        assert f"](../assets/{picture.name})" in page
    assert sum(picture.stat().st_size for picture in pictures) < 1e6


def test_shipped_model_knows_digits():
    """It sees digits of the test set in noise, and draws what it is asked for."""
    seed(0)
    ours = SimpleNamespace(**SET_UP)
    assert ours.trained.config["labels"] == list(range(10))
    t = torch.full((16,), 500)
    eps = torch.randn_like(ours.x0)
    x_t = ours.diffusion.q_sample(ours.x0, t, eps)
    with torch.no_grad():
        guess = ours.diffusion.predict_x0(x_t, t, ours.model(x_t, t, ours.y))
    assert (guess - ours.x0).pow(2).mean() < 0.3 * ours.x0.var()


def test_picture_holds_the_rows(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    rows = torch.linspace(-2, 2, 6).reshape(2, 3, 1, 1, 1).expand(2, 3, 1, 4, 4)
    SET_UP["save_picture"]("rows", *rows)
    pixels = np.asarray(Image.open(tmp_path / "out" / "rows.png"))
    assert pixels.shape == (2 * 2 * 6, 2 * 3 * 6)
    greys = pixels[4::12, 4::12]
    assert greys.tolist() == [[0, 0, 76], [178, 255, 255]]


def test_noise_levels_are_those_of_the_table(capsys):
    """In numpy, from the betas alone."""
    row = r"^\| (?:t|laplace, [^|]*|linear) \| ([\d. |]+) \|$"
    t, *rows = re.findall(row, RECIPES.read_text(), re.M)
    t = [int(cell) for cell in t.split(" | ")]
    ours = run("Noise levels")
    printed = [float(cell) for cell in re.findall(r"[\d.]+", capsys.readouterr().out)]
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[np.array(t) - 1]
    linear = np.sqrt((1 - alpha_bar) / alpha_bar)
    for row, ratio in zip(rows, (printed, linear), strict=True):
        told = [float(cell) for cell in row.split(" | ")]
        assert_close(told, list(ratio), rtol=0.05, atol=0.005)
    assert ours.t_of_noise(ours.diffusion, 1.6) in range(285, 301)
    assert ours.t_of_noise(EXACT, linear[3] - 1e-6) == 500


def test_labels_and_guidance_reach_the_drawing():
    """Guided, a Gaussian's mean is that without label plus s times the difference."""
    seed(1)
    rows = []
    run("Labels", **{**exact, "x0": torch.zeros(16, 50), "diffusion": EXACT,
                     "save_picture": lambda name, *drawn: rows.extend(drawn)})
    means = mean_of_label(torch.arange(16) % 10)
    expected = [torch.full((16,), MEAN), means, MEAN + 3 * (means - MEAN)]
    for x, mean in zip(rows, expected, strict=True):
        assert abs(x.mean(1) - mean.clamp(-1, 1)).max() < 0.1


def test_img2img_of_a_gaussian():
    """The mean given a guide: Bayes' rule at x_t = signal times guide + noise."""
    seed(2)
    guide = 40                          # far away, as noise leaves little of it
    x0 = torch.full((2000, 1), guide).double()
    ours = run_exact("img2img", x0=x0, y=torch.full((2000,), 9))
    for x, level, mean in ((ours.x, 1.6, MEAN), (ours.x_next, 2.7, None)):
        if mean is None:
            mean = MEAN + 2 * (mean_of_label(torch.tensor(0)) - MEAN)   # 9, then 0
        posterior = (guide / level**2 + mean / STD**2) / (level**-2 + STD**-2)
        assert_normal(x, posterior, STD, bias=0.1 * STD)


def test_inpainting_keeps_the_known_and_fits_the_new_to_it():
    """The model knows images of one grey value: the new half takes that of the old."""
    seed(3)
    diffusion = EveryT(linear_schedule(50, 0.002, 0.4), torch.float64)

    def model(x_t, t, y):
        grey = x_t.mean(-1, keepdim=True) / diffusion.alpha_bar[t[0]].sqrt()
        return diffusion.predict_eps(x_t, t, grey.expand_as(x_t))

    greys = torch.linspace(-0.5, 0.5, 100).double().reshape(100, 1, 1, 1)
    x0 = greys.expand(100, 1, 1, 28)
    world = {"diffusion": diffusion, "model": model, "x0": x0, "save_picture": ignore}
    x = run("Inpainting", **world).x
    assert_close(x[..., :14], x0[..., :14])
    assert (x - x0)[..., 14:].std() < 0.02


def test_inpainting_goes_back_by_the_whole_stride():
    """Each time that the model is asked, the new pixels have the noise of its t; after
    one step of the forward process for a stride of many they have a fifth of it."""
    seed(4)
    shares = []

    def model(x_t, t, y):
        _, std = marginal(MEAN, t[:1], x_t)
        shares.append(x_t[..., 14:].std() / std)
        return exact_eps(MEAN, x_t, t)

    x0 = MEAN + STD * torch.randn(200, 1, 1, 28).double()
    world = {"model": model, "diffusion": TenStrides(linear_schedule(), torch.float64)}
    run("Inpainting", x0=x0, **{**exact, **world})
    assert len(shares) == 50
    assert min(shares) > 0.7
    assert max(shares) < 1.2


def test_ode_maps_noise_to_the_exact_image():
    """A Gaussian keeps its quantiles along the ODE, down and up."""
    seed(4)
    y = torch.arange(500) % 10
    mean = mean_of_label(y)[:, None]
    x_T = torch.randn(500, 1).double()
    law_T = Normal(*marginal(mean, torch.full((500,), 1000), x_T))
    exact_x = mean + STD * (x_T - law_T.mean) / law_T.stddev
    ours = run("Probability-flow ODE", **exact)
    x = ours.follow_ode(partial(labelled_eps, y=y), x_T, EXACT.times())
    assert_close(x, exact_x, atol=0.1 * STD, rtol=0)
    ours = run_exact("Inversion", x0=exact_x, y=y, follow_ode=ours.follow_ode)
    assert_close(ours.x_T, x_T, atol=0.1, rtol=0)
    assert_close(ours.back, exact_x, atol=0.1 * STD, rtol=0)


def test_slerp_keeps_the_length_that_noise_has():
    seed(5)
    ours = run("Probability-flow ODE", **exact)
    assert_close(ours.slerp(ours.a, ours.b, 0), ours.a)
    assert_close(ours.slerp(ours.a, ours.b, 1), ours.b)
    lengths = ours.circle.flatten(1).norm(dim=1)
    assert lengths.min() > 0.99 * min(ours.a.norm(), ours.b.norm())
    assert lengths.max() < 1.01 * max(ours.a.norm(), ours.b.norm())


def test_langevin_leaves_mean_and_variance_in_place_and_draws_the_data():
    """And what it draws has, before its end, the noise of the last level on it."""
    seed(6)
    x0 = MEAN + STD * torch.randn(20000, 1).double()
    ours = run_exact("Langevin correction", x0=x0)
    mean, std = marginal(MEAN, ours.t[:1], x0)
    assert_normal(ours.x_t, mean.item(), std.item())

    x0 = torch.zeros(1000, 1).double()
    ours = run("Annealed Langevin sampling", x0=x0, **exact)
    assert_normal(ours.x, MEAN, STD, bias=0.1 * STD)
    assert ours.x.std() < 0.95 * ours.noisy.std()
    # The strides' scale, on data far from 0.
    far = {**exact, "model": partial(exact_eps, 100.0)}
    ours = run("Annealed Langevin sampling", x0=x0, **far)
    assert abs(ours.noisy.mean() - 100 * EXACT.alpha_bar[ours.path[-1]].sqrt()) < 0.02


def test_notebook_shows_the_chain(monkeypatch):
    """T and 50 steps are 51 frames."""
    shown = []
    display = SimpleNamespace(Image=shown.append)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(display=display))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    run("In a notebook")
    (png,) = shown
    assert int.from_bytes(png[41:45], "big") == 51
    assert png[16:24] == bytes([0, 0, 0, 4 * 28, 0, 0, 0, 4 * 28])
