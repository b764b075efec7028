"""Every Python block of docs/recipes.md is run, and does what its text says."""
import gzip
import pickle
import re
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributions import Normal
from torch.testing import assert_close

import test_ddpm_min
from ddpm_min import GaussianDiffusion, UNet, linear_schedule
from mnist_ddpm import load_images
from test_pages import ROOT, blocks

RECIPES = ROOT / "docs" / "recipes.md"
CODE = blocks(RECIPES)
SET_UP = {}
for chapter in ("Set-up", "Noise levels", "One training loop"):
    exec("\n".join(CODE[chapter]), SET_UP)
MEANS, STD = torch.linspace(-0.15, 0.25, 11).double(), 0.1      # of label 0..9, none


def run(heading, **replaced):
    """All names after the set-up, with some replaced, and then the recipe."""
    names = {**SET_UP, **replaced}
    exec("\n".join(CODE[heading]), names)
    return SimpleNamespace(**names)


def marginal(mean, t):
    """Mean and standard deviation of x_t for data N(mean, STD^2); t is one for all."""
    bar = EXACT.alpha_bar[t[0]]
    variance = 1 - bar + bar * STD**2
    return bar.sqrt() * mean, variance.sqrt()


def exact_eps(mean, x_t, t):
    """E[eps | x_t] for data N(mean, STD^2)."""
    return test_ddpm_min.exact_eps(x_t, EXACT.alpha_bar[t[0]], mean, STD**2)


def labelled_eps(x_t, t, y=torch.tensor([-1])):
    """That for the data with these labels."""
    return exact_eps(MEANS[y].reshape(-1, *[1] * (x_t.dim() - 1)), x_t, t)


LINEAR = GaussianDiffusion(linear_schedule())
EXACT = GaussianDiffusion(linear_schedule(), torch.float64)
EVERY_T = GaussianDiffusion(linear_schedule(), torch.float64)
EVERY_T.times = lambda steps: range(1000, -1, -1)           # whatever is asked for
exact = {"diffusion": EXACT, "model": labelled_eps}
exact["save_picture"] = lambda name, *rows: None            # what is drawn is no image
every_t = {**exact, "diffusion": EVERY_T}


def assert_normal(x, mean, std, bias=0.0):
    """Within 5 standard errors; a bias of std where the recipe itself has one."""
    error = std / x.numel() ** 0.5
    assert abs(x.mean() - mean) < 5 * error + bias
    assert abs(x.std() - std) < 5 * error / 2**0.5 + bias


@pytest.fixture(autouse=True)
def seeded_folder(tmp_path, monkeypatch):
    """Each test runs in a folder of its own, on the same random numbers."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def test_every_recipe_is_run():
    """But those that want packages which are not installed here."""
    theirs = {"A network of diffusers", "A folder of photographs", "In a notebook"}
    for heading in CODE.keys() - theirs - {"Saving"}:
        assert f'"{heading}"' in Path(__file__).read_text()


def test_labels_and_guidance_reach_the_drawing():
    """Guided, a Gaussian's mean is that without label plus s times the difference."""
    ours = run("Labels", **exact, x0=torch.zeros(16, 50))
    told, none = MEANS[torch.arange(16) % 10], MEANS[[-1] * 16]
    expected = torch.stack([none, told, none + 3 * (told - none)]).clamp(-1, 1)
    assert_close(torch.stack(ours.rows).mean(2).double(), expected, atol=0.1, rtol=0)


def test_img2img_of_a_gaussian():
    """The mean given a guide: Bayes' rule at x_t = signal times guide + noise."""
    guide = 40                          # far away, as noise leaves little of it
    x0, y = torch.full((2000, 1), guide).double(), torch.full((2000,), 9)
    ours = run("img2img", **every_t, x0=x0, y=y)
    zero = 2 * MEANS[0] - MEANS[-1]             # the next of 9; guided by s = 2
    for x, level, mean in ((ours.x, 1.6, MEANS[-1]), (ours.x_next, 2.7, zero)):
        posterior = (guide / level**2 + mean / STD**2) / (level**-2 + STD**-2)
        assert_normal(x, posterior, STD, bias=0.1 * STD)


def test_inpainting_fits_the_new_to_the_known():
    """In the grey of images of one grey, and each time in the noise of its t."""
    shares = []

    def model(x_t, t, y):
        shares.append(x_t[..., 14:].std(-1).mean() / EXACT.noise[t[0]])
        grey = x_t.mean(-1, keepdim=True) / EXACT.signal[t[0]]
        return EXACT.predict_eps(x_t, t, grey.expand_as(x_t))

    x0 = torch.linspace(-0.5, 0.5, 100).reshape(100, 1, 1, 1).expand(100, 1, 1, 28)
    ours = run("Inpainting", **{**exact, "model": model}, x0=x0)
    assert_close(ours.x[..., :14], x0[..., :14])
    assert (ours.x - x0)[..., 14:].std() < 0.02
    assert 0.8 < min(shares) < max(shares) < 1.2


def test_ode_maps_noise_to_the_exact_image():
    """A Gaussian keeps its quantiles, down and up; the great circle noise's length."""
    y, x_T = torch.arange(500) % 10, torch.randn(500, 1).double()
    mean = MEANS[y][:, None]
    mean_T, std_T = marginal(mean, [1000])
    exact_x = mean + STD * (x_T - mean_T) / std_T
    ours = run("Probability-flow ODE", **exact)
    x = ours.follow_ode(partial(labelled_eps, y=y), x_T, EXACT.times())
    assert_close(x, exact_x, atol=0.1 * STD, rtol=0)
    lengths = ours.circle.flatten(1).norm(dim=1) / 28
    assert_close(lengths, torch.ones(16), atol=0.1, rtol=0)
    ours = run("Inversion", **every_t, x0=exact_x, y=y, follow_ode=ours.follow_ode)
    assert_close(ours.x_T, x_T, atol=0.1, rtol=0)
    assert_close(ours.back, exact_x, atol=0.1 * STD, rtol=0)


def test_langevin_leaves_mean_and_variance_in_place_and_draws_the_data():
    """And what it draws has, before its end, the noise of the last level on it."""
    x0 = MEANS[-1] + STD * torch.randn(20000, 1).double()
    ours = run("Langevin correction", **every_t, x0=x0)
    assert_normal(ours.x_t, *marginal(MEANS[-1], ours.t))
    ours = run("Annealed Langevin sampling", **exact, x0=x0[:1000])
    assert_normal(ours.x, MEANS[-1], STD, bias=0.1 * STD)
    assert ours.x.std() < 0.95 * ours.noisy.std()
    far = {**exact, "model": partial(exact_eps, 100.0)}     # which shows the scale
    ours = run("Annealed Langevin sampling", **far, x0=x0[:1000])
    assert abs(ours.noisy.mean() - 100 * EXACT.signal[ours.path[-1]]) < 0.02


def briefly(network, loss_on, steps, **asked):
    """The page's training loop, shorter."""
    SET_UP["train"](network, loss_on, steps // 60, **asked)


brief = {"UNet": lambda shape, width, classes=0: UNet(shape, 8, classes),
         "save_picture": exact["save_picture"], "train": briefly}


def test_classifier_guidance_is_bayes_rule():
    """Two classes: eps of the mixture, guided with s = 1, is eps of the class alone."""
    ours = run("Classifier guidance", **{**exact, **brief, "diffusion": LINEAR})
    x0, y = SET_UP["x_train"][:500] / 127.5 - 1, SET_UP["y_train"][:500]
    assert ours.classifier_loss(x0, y) < 2          # log 10 = 2.3, if it knew nothing

    def classifier(x_t, t):
        laws = [Normal(*marginal(mean, t)) for mean in (-0.3, 0.3)]
        return torch.cat([law.log_prob(x_t).flatten(1) for law in laws], dim=1)

    def mixture(x_t, t):
        share = classifier(x_t, t).softmax(1)[:, 1].reshape(-1, 1, 1, 1)
        return torch.lerp(exact_eps(-0.3, x_t, t), exact_eps(0.3, x_t, t), share)

    t, y = torch.tensor([400, 400, 400]), torch.tensor([1, 1, 1])
    x_t = torch.randn(3, 1, 1, 1).double()
    eps = ours.guided_eps(mixture, classifier, y, 1.0, x_t, t)
    assert_close(eps, exact_eps(0.3, x_t, t), rtol=1e-3, atol=1e-4)


def test_vector_and_small_image_reach_the_network():
    """Told ten things of one x_t, it finds ten different eps."""
    x_t, t = torch.ones(10, 1, 28, 28), torch.full((10,), 500)
    ours = run("A vector or text embedding", **brief)
    by_vector = ours.network(x_t, t, torch.eye(10))
    ours = run("Cascade", **brief)
    by_image = ours.upscaler(x_t, t, SET_UP["x0"][:10, :, 10:18, 10:18])
    assert torch.pdist(by_vector.flatten(1)).min() > 1e-6
    assert torch.pdist(by_image.flatten(1)).min() > 1e-6


def test_latents_decode_to_the_digits_and_are_drawn_alike():
    """Encoded, each number has variance 1, and drawn about that."""
    ours = run("Latent diffusion", train=briefly)
    x0 = SET_UP["x_train"][:2000] / 127.5 - 1
    z = ours.encode(x0)
    assert (ours.decode(z) - x0).pow(2).mean() < 0.5 * x0.var(0).mean()
    assert (z.var(0) - 1).abs().max() < 0.3
    assert 0.3 < ours.z.var() < 4


def test_wrapped_networks_give_the_exact_eps():
    """Of networks that know x_0, and v."""
    x0, eps = torch.randn(2, 3, 1, 4, 4)
    t = torch.tensor([10, 500, 900])
    ours = run("A network that predicts x_0 or v", **brief, diffusion=LINEAR)
    alpha_bar = EXACT.alpha_bar[t].reshape(3, 1, 1, 1).float()
    x_t = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps
    v = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x0
    close = partial(assert_close, expected=eps, atol=1e-3, rtol=0)
    close(ours.eps_from_x0(lambda x_t, t: x0, x_t, t))
    close(ours.eps_from_v(lambda x_t, t: v, x_t, t))


@pytest.mark.parametrize("heading", ["torch.compile", "Several GPUs"])
def test_wrapped_network_fills_the_gradients_of_the_model(heading, monkeypatch):
    """Compiled: of its loss; in the second of two processes: of its half of x0."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    one = {"rank": 0, "world_size": 1, "store": torch.distributed.HashStore()}
    start = partial(torch.distributed.init_process_group, **one)
    monkeypatch.setattr(torch.distributed, "init_process_group", start)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    model, x0 = UNet(width=8), SET_UP["x0"][:4]
    torch.manual_seed(1)
    run(heading, model=model, x0=x0)
    torch.manual_seed(1)
    share = x0[1::2] if heading == "Several GPUs" else x0
    loss = SET_UP["diffusion"].loss(model, share)
    (gradient,) = torch.autograd.grad(loss, model.out.weight)
    assert_close(model.out.weight.grad, gradient, rtol=1e-2, atol=1e-4)


def loaded(path, split):
    """x and the labels that --data finds in a file."""
    x, y, labels = load_images(path, split, [])
    return x, [labels[i] for i in y]


def test_fashion_mnist():
    """Its idx files become what --data takes."""
    x = np.arange(3 * 28 * 28).reshape(3, 28, 28).astype(np.uint8)
    images = bytes([0, 0, 8, 3, 0, 0, 0, 3, 0, 0, 0, 28, 0, 0, 0, 28]) + x.tobytes()
    for split in ("train", "t10k"):
        Path(f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        labels = gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 3, 9, 0, 5]))
        Path(f"{split}-labels-idx1-ubyte.gz").write_bytes(labels)
    run("Fashion-MNIST")
    for split in ("train", "test"):
        images, y = loaded("fashion.npz", split)
        assert (images[:, 0].numpy() == x).all() and y == [9, 0, 5]


def test_cifar_10():
    """Pixels of the first row and column: red at (0, 0), green (1, 0), blue (0, 31)."""
    Path("cifar-10-batches-py").mkdir()
    rows = np.zeros((2, 3072), np.uint8)
    rows[:, [0, 1024 + 32, 2048 + 31]] = 255
    content = pickle.dumps({b"data": rows, b"labels": [7, 9]}, protocol=2)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        Path("cifar-10-batches-py", name).write_bytes(content)
    run("CIFAR-10")
    for split, count in (("train", 5), ("test", 1)):
        x, y = loaded("cifar10.npz", split)
        assert y == [7, 9] * count
        assert (x[:, :, [0, 1, 0], [0, 0, 31]] == 255 * torch.eye(3)).all()


def test_grain_is_kept_as_the_table_says(capsys):
    """What the block prints is the table."""
    run("When to say `--schedule cosine`")
    printed = re.findall(r" ([\d.]+)$", capsys.readouterr().out, re.M)
    table = re.findall(r"\| `\w+` \| ([\d.]+) \| ([\d.]+)", RECIPES.read_text())
    printed, table = np.array(printed, float), np.array(table, float).ravel()
    assert_close(printed, table, atol=0.7, rtol=0)


def test_forward_picture():
    """Rows from the digit to noise."""
    for row in run("A picture of the forward process").rows:
        assert_close(row[0], SET_UP["x0"][0])
        assert (row[1:] - row[:1]).std((1, 2, 3)).diff().min() > 0
