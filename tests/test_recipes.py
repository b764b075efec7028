"""Every Python block of docs/recipes.md is run, and does what its text says."""
import gzip
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributions import Normal
from torch.testing import assert_close

from ddpm_min import GaussianDiffusion, linear_schedule
from mnist_ddpm import load_data
from test_ddpm_min import exact_eps
from test_pages import ROOT, blocks

PAGE = ROOT / "docs" / "recipes.md"
TEXT, CODE = " ".join(PAGE.read_text().split()), blocks(PAGE)
SET_UP, chapters = {}, ("Set-up", "Noise levels", "One training loop")
exec("\n".join(sum([CODE[chapter] for chapter in chapters], [])), SET_UP)
MEANS, STD = torch.linspace(-0.15, 0.25, 11).double(), 0.1      # of label 0..9, none


def run(heading, **replaced):
    """The set-up's names, some replaced, then the recipe, but for long trainings."""
    names, code = {**SET_UP, **replaced}, "\n".join(CODE[heading])
    code = code.replace("width=32", "width=8")
    exec(re.sub(r"(steps=\d000)", r"\1 // 60", code), names)
    return SimpleNamespace(**names)


def answer(value, *asked):
    """The value, whatever is asked."""
    return value


def marginal(mean, t):
    """Mean and standard deviation of x_t for data N(mean, STD^2); t is one for all."""
    bar = EXACT.alpha_bar[t[0]]
    return bar.sqrt() * mean, (1 - bar + bar * STD**2).sqrt()


def labelled_eps(x_t, t, y=torch.tensor([-1]), means=MEANS, std=STD):
    """E[eps | x_t] for data N(mean, std^2), the mean that of label y."""
    mean = means[y].reshape(-1, *[1] * (x_t.dim() - 1))
    return exact_eps(x_t, EXACT.alpha_bar[t[0]], mean, std**2)


EXACT, EVERY_T, TWO_STEPS = [
    GaussianDiffusion(linear_schedule(), torch.float64) for _ in range(3)]
EVERY_T.times = partial(answer, range(1000, -1, -1))
TWO_STEPS.times = partial(answer, [1000, 500, 0])
exact = {"diffusion": EXACT, "model": labelled_eps, "save_picture": print}
every_t = exact | {"diffusion": EVERY_T}


@pytest.fixture(autouse=True)
def seeded_folder(tmp_path, monkeypatch):
    """Each test runs in a folder of its own, on the same random numbers."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def test_every_recipe_is_run():
    """But that which wants Jupyter."""
    for heading in CODE.keys() - {"In a notebook"}:
        assert f'"{heading}"' in Path(__file__).read_text()


def test_labels_and_guidance_reach_the_drawing():
    """Guided, a Gaussian's mean is that without label plus s times the difference."""
    ours = run("Labels", **exact, x0=torch.zeros(16, 50))
    told, none = MEANS[torch.arange(16) % 10], MEANS[[-1] * 16]
    expected = torch.stack([none, told, none + 3 * (told - none)]).clamp(-1, 1)
    assert_close(torch.stack(ours.rows).mean(2).double(), expected, atol=0.1, rtol=0)


def test_autoguidance_goes_from_weak_past_strong():
    """By a quarter of the way; and so many of 10,000 are of a cluster as its share."""
    runs, means = {}, torch.tensor([-0.4, 0.4]).double()
    for path, scale in (("clusters/model.pt", 1), ("weak/model.pt", 0.5)):
        network = SimpleNamespace(module=partial(labelled_eps, means=scale * means))
        runs[path] = SimpleNamespace(
            average=network, diffusion=TWO_STEPS, config={"shares": [0.2, 0.8]})
    ours = run("Autoguidance", mnist_ddpm=SimpleNamespace(load_run=runs.get))
    strong, guided = [row.mean((1, 2, 3)) for row in ours.rows]
    many = np.load("out/guided.npz")["x"].mean((1, 2)) / 127.5 - 1
    assert_close(guided, 1.125 * strong, atol=0.02, rtol=0)
    assert abs(abs(many) - 0.45).max() < 0.03
    assert abs((many > 0).mean() - 0.8) < 0.02


def test_img2img_of_a_gaussian():
    """The mean given a guide is Bayes' rule's; paths start where the text says."""
    guide, x0 = 40, torch.full((2000, 1), 40.0).double()        # noise leaves little
    ours, q = run("img2img", **every_t, x0=x0, y=9), SET_UP["diffusion"]
    zero = 2 * MEANS[0] - MEANS[-1]             # the next of 9; guided by s = 2
    for x, level, mean in ((ours.x, 1.6, MEANS[-1]), (ours.x_next, 2.7, zero)):
        posterior = (guide / level**2 + mean / STD**2) / (level**-2 + STD**-2)
        assert abs(x.mean() - posterior) < 0.2 * STD
        assert abs(x.std() - STD) < 0.2 * STD
        start = max(t for t in q.times(100) if t <= SET_UP["t_of_noise"](q, level))
        assert f"{level}) # its path starts at t = {start} " in TEXT


@pytest.mark.parametrize("strides, repeats", [(100, 1), (100, 5), (250, 10)])
def test_inpainting_is_as_near_as_the_text_says(strides, repeats, monkeypatch):
    """The pixel beside the edge: its mean, and about its deviation of 0.12."""
    q, place = SET_UP["diffusion"], torch.arange(28)
    covariance = 0.3**2 * 0.92 ** (place[:, None] - place).abs()
    def model(x_t, t, y):
        assert abs(x_t[..., :14].std() / q.noise[t[0]] - 1) < 0.1       # of their t
        variance = q.alpha_bar[t[0]] * covariance + q.noise[t[0]] ** 2 * torch.eye(28)
        return q.noise[t[0]] * torch.linalg.solve(variance, x_t, left=False)
    code = CODE["Inpainting"][0].replace("100, 5", f"{strides}, {repeats}")
    monkeypatch.setitem(CODE, "Inpainting", [code])
    x = run("Inpainting", model=model, x0=torch.full((1, 1, 300, 28), 0.5)).x
    (mean,) = re.findall(rf"(0\.\d+) \({strides}, {repeats}\)", TEXT)
    assert abs(x[..., 14].mean() - float(mean)) < 0.025
    assert 0.08 < x[..., 14].std() < 0.15
    assert (x[..., :14] == 0.5).all()


def test_ode_maps_noise_to_the_exact_image():
    """A Gaussian keeps its quantiles, down and up; the great circle noise's length."""
    y, x_T = torch.arange(500) % 10, torch.randn(500, 1).double()
    mean_T, std_T = marginal(MEANS[y][:, None], [1000])
    exact_x = MEANS[y][:, None] + STD * (x_T - mean_T) / std_T
    ours = run("Probability-flow ODE", **exact)
    x = ours.follow_ode(partial(labelled_eps, y=y), x_T, EXACT.times(1000))
    assert_close(x, exact_x, atol=0.1 * STD, rtol=0)
    assert_close(ours.circle.std((1, 2, 3)), torch.ones(16), atol=0.1, rtol=0)
    for end in (x_T, x_T + 1):
        assert_close(ours.slerp(x_T, end, 1.0), end)
    ours = run("Inversion", **every_t, x0=exact_x, y=y, follow_ode=ours.follow_ode)
    assert_close(ours.x_T, x_T, atol=0.1, rtol=0)
    assert_close(ours.back, exact_x, atol=0.1 * STD, rtol=0)


def test_langevin_leaves_mean_and_variance_in_place():
    """Those of q(x_t), to five standard errors."""
    x0 = MEANS[-1] + STD * torch.randn(20000, 1).double()
    ours = run("Langevin correction", **exact, x0=x0)
    mean, std = marginal(MEANS[-1], ours.t)
    assert abs(ours.x_t.mean() - mean) < 5 * std / 20000**0.5
    assert abs(ours.x_t.std() - std) < 5 * std / 40000**0.5


def test_film_begins_with_its_end():
    """Ten greys, a row each, guided; they stand for a second, then comes noise."""
    images = pytest.importorskip("PIL.Image")
    model = partial(labelled_eps, means=torch.linspace(-1, 1, 10).double(), std=0)
    run("A film", diffusion=EXACT, model=model)
    film = images.open("out/film.gif")
    assert film.n_frames == 41 and film.info["loop"] == 0
    for n, stands, low, high in ((0, 1000, 0, 1), (1, 70, 80, 127), (40, 70, 0, 20)):
        film.seek(n)
        rows = np.asarray(film.convert("L")).reshape(10, -1).astype(float)
        assert film.info["duration"] == stands
        assert low <= rows.std(1).min() <= rows.std(1).max() <= high
    assert_close(rows.mean(1), np.linspace(-252, 252, 10).clip(0), atol=36, rtol=0)


@pytest.mark.parametrize("beta, weight", [(0.9, 1), (0.01, 5 / 99)])
def test_own_loss_has_weights_and_a_mask(beta, weight):
    """Of a network that errs by 2 where the mask is 1, and by 9 elsewhere."""
    q, x0 = GaussianDiffusion(torch.tensor([beta])), torch.zeros(16, 1, 28, 28)
    def network(x_t, t):
        return x_t / q.noise[1] + 9 - 7 * torch.eye(28)     # x_t / noise is eps
    ours = run("A loss of your own", diffusion=q, x0=x0)
    assert abs(ours.own_loss(network, x0, torch.eye(28)) / weight - 4) < 1e-3
    assert ours.network.out.bias.any() and ours.network.out.bias.grad is None


def test_classifier_guidance_is_bayes_rule():
    """Two classes: eps of the mixture, guided with s = 1, is eps of the class alone."""
    means = torch.tensor([-0.3, 0.3]).double()
    def classifier(x_t, t):
        return Normal(*marginal(means, t)).log_prob(x_t.flatten(1))
    def mixture(x_t, t):
        eps = exact_eps(x_t.flatten(1), EXACT.alpha_bar[t[0]], means, STD**2)
        share = classifier(x_t, t).softmax(1)
        return (share * eps).sum(1).reshape(x_t.shape)
    linear = GaussianDiffusion(linear_schedule())
    ours = run("Classifier guidance", **exact | {"diffusion": linear})
    x_t, (y, t) = torch.randn(3, 1, 1, 1).double(), torch.tensor([[1] * 3, [400] * 3])
    eps = ours.guided_eps(mixture, classifier, y, 1.0, x_t, t)
    assert_close(eps, labelled_eps(x_t, t, y, means), rtol=1e-3, atol=1e-4)
    assert ours.classifier_loss(SET_UP["x0"], SET_UP["y"]) < 2      # of log 10 = 2.3


def test_vector_reaches_the_network_and_latents_the_digits():
    """Told ten things it finds ten eps. Encoded, each number has variance 1."""
    ours = run("A vector or text embedding")
    eps = ours.network(torch.ones(10, 1, 28, 28), torch.full((10,), 500), torch.eye(10))
    assert torch.pdist(eps.flatten(1)).min() > 1e-6
    ours = run("Latent diffusion")
    x0 = SET_UP["x_train"][:2000] / 127.5 - 1
    z = ours.encode(x0)
    assert (ours.decode(z) - x0).pow(2).mean() < 0.5 * x0.var(0).mean()
    assert (z.var(0) - 1).abs().max() < 0.3
    assert 0.3 < ours.z.var() < 4


def test_wrapped_networks_give_the_exact_eps():
    """Of networks that know x_0, and v."""
    (x0, eps), t = torch.randn(2, 3, 1, 4, 4), torch.tensor([10, 500, 900])
    ours = run("A network that predicts x_0 or v")
    alpha_bar = ours.diffusion.alpha_bar[t].reshape(3, 1, 1, 1)
    x_t = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps
    v = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x0
    assert_close(ours.eps_from_x0(partial(answer, x0), x_t, t), eps, atol=1e-3, rtol=0)
    assert_close(ours.eps_from_v(partial(answer, v), x_t, t), eps, atol=1e-3, rtol=0)


def loaded(path, split):
    """x and the labels that --data finds in a file."""
    config = {"data": path, "conditional": True, "clusters": None, "seed": 0}
    x, y = load_data(config, split)
    return x, [config["labels"][i] for i in y]


def test_fashion_mnist():
    """Its idx files become what --data takes."""
    x = np.arange(3 * 28 * 28).reshape(3, 28, 28).astype(np.uint8)
    images = bytes([0, 0, 8, 3, 0, 0, 0, 3, 0, 0, 0, 28, 0, 0, 0, 28]) + x.tobytes()
    labels = bytes([0, 0, 8, 1, 0, 0, 0, 3, 9, 0, 5])
    for split in ("train", "t10k"):
        Path(f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        Path(f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    run("Fashion-MNIST, CIFAR-10")
    for split in ("train", "test"):
        images, y = loaded("fashion.npz", split)
        assert (images[:, 0].numpy() == x).all() and y == [9, 0, 5]


def test_photographs_are_upright_and_the_broken_named():
    """Red on top, held sideways, is red on the right; transparent is white."""
    images = pytest.importorskip("PIL.Image")
    with pytest.raises(ValueError, match="want photos/"):
        run("A folder of photographs")
    photo, sideways = images.new("RGB", (80, 64)), images.Exif()
    photo.paste("red", (0, 0, 80, 32))
    sideways[274] = 6
    Path("photos/0").mkdir(parents=True)
    Path("photos/1").mkdir()
    for i in range(10):
        photo.save(f"photos/0/{i}.png", exif=sideways)
        images.new("RGBA", (64, 80)).save(f"photos/1/{i}.png")
    run("A folder of photographs")
    for x, y in zip(*loaded("photos.npz", "train")):
        left, right = x[:, 9, 9].tolist(), x[:, 9, 50].tolist()
        assert left == [255 * y] * 3 and right == [255, 255 * y, 255 * y]
    Path("photos/1/broken.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match="cannot read photos/1/broken.jpg: "):
        run("A folder of photographs")


def test_grain_is_kept_as_the_table_says(capsys):
    """What the block prints is the table."""
    run("When to say `--schedule cosine`")
    printed = np.array(re.findall(r" ([\d.]+)$", capsys.readouterr().out, re.M), float)
    table = np.array(re.findall(r"\| `\w+` \| ([\d.]+) \| ([\d.]+)", TEXT), float)
    assert_close(printed, table.ravel(), atol=0.7, rtol=0)


def test_pictures_of_the_derivations():
    """They are those in assets/, to a fifth of a pixel."""
    run("The pictures of the derivations")
    for path in (ROOT / "assets").glob("*.svg"):
        texts = [file.read_text("utf-8") for file in (path, Path("out", path.name))]
        theirs, ours = [re.findall(r"\d+\.?\d*", text) for text in texts]
        assert_close(np.array(ours, float), np.array(theirs, float), atol=0.2, rtol=0)
