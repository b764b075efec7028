"""Every Python block of README.md and docs/recipes.md is run, and keeps its promise."""
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributions import Normal
from torch.testing import assert_close

import mnist_ddpm
from ddpm_min import GaussianDiffusion, linear_schedule
from unet import UNet

ROOT = Path(__file__).resolve().parent.parent
README, RECIPES = ROOT / "README.md", ROOT / "docs" / "recipes.md"
EXACT = GaussianDiffusion(linear_schedule(), torch.float64)
MEAN, STD = -0.2, 0.1           # of Gaussian data, whose eps is known exactly


def seed(number):
    torch.manual_seed(number + int(os.environ.get("SEED_OFFSET", "0")))


def blocks(page):
    """{heading: [Python block, ...]}, the data set's path made absolute."""
    found, heading = {}, ""
    text = page.read_text().replace('"data/', f'"{ROOT.as_posix()}/data/')
    for title, code in re.findall(r"^#+ (.+)|^```python\n([^`]+)", text, re.M):
        heading = title or heading
        if code:
            found.setdefault(heading, []).append(code)
    return found


CODE = blocks(RECIPES)
TESTS = "".join(path.read_text() for path in ROOT.glob("tests/*.py"))
SET_UP = {}
exec(*CODE["Set-up"], SET_UP)


def run(heading, **replaced):
    """All names after the set-up, with some replaced, and then the recipe."""
    names = {**SET_UP, **replaced}
    exec("\n".join(CODE[heading]), names)
    return SimpleNamespace(**names)


def wake(model):
    """The last layers of a U-Net start at zero; here none is."""
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    return model


def small():
    model = wake(UNet(channels=1, width=8))
    return {"model": model, "x0": SET_UP["x0"][:4], "y": SET_UP["y"][:4]}


def marginal(mean, t, x_t):
    """Mean and standard deviation of x_t at t (B,) for data N(mean, STD^2)."""
    alpha_bar = EXACT.alpha_bar[t].reshape(-1, *[1] * (x_t.dim() - 1))
    return alpha_bar.sqrt() * mean, (1 - alpha_bar + alpha_bar * STD**2).sqrt()


def exact_eps(mean, x_t, t):
    """E[eps | x_t] for data N(mean, STD^2)."""
    mean_t, std_t = marginal(mean, t, x_t)
    noise = EXACT.one_minus_alpha_bar[t].sqrt().reshape(mean_t.shape)
    return noise * (x_t - mean_t) / std_t**2


run_exact = partial(run, diffusion=EXACT, model=partial(exact_eps, MEAN))


def assert_normal(x, mean, std, bias=0.0):
    """Within 5 standard errors; a bias of std where the recipe itself has one."""
    assert abs(x.mean() - mean) < 5 * std / x.numel() ** 0.5
    assert abs(x.std() - std) < 5 * std / (2 * x.numel()) ** 0.5 + bias


@pytest.mark.parametrize("heading", CODE)
def test_recipe_is_short_and_tested(heading):
    assert f'"{heading}"' in TESTS
    for code in CODE[heading]:
        lines = [line for line in code.splitlines() if line]
        assert len(lines) <= 12
        assert max(map(len, lines)) <= 88 + len(str(ROOT))


@pytest.mark.parametrize("page", [README, *ROOT.glob("docs/*.md")])
def test_links_lead_somewhere(page):
    text = page.read_text()
    titles = re.findall(r"^#+ (.+)", text.lower(), re.M)
    anchors = [re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles]
    for path, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text):
        assert (page.parent / path).exists()
        assert path or anchor in anchors


def test_readme_example_draws_what_it_asks_for():
    (code,) = sum(blocks(README).values(), [])
    shape = eval(re.search(r"\(\d+, \d, \d+, \d+\)", code)[0])
    code = re.sub(r"width=\d+", "width=8", code)
    code = re.sub(r"steps=\d+", "steps=2", code)
    seed(0)
    batch = (torch.rand(4, *shape[1:]) * 2 - 1, torch.arange(4))
    names = {"batches": [batch, batch], "device": "cpu"}
    exec(code, names)
    assert names["x"].shape == shape
    assert names["x"].abs().max() <= 1


def test_trained_model_is_the_average(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = {"width": 8, "shape": [1, 28, 28], "labels": [3, 5], "schedule": "cosine"}
    trained = mnist_ddpm.Run({**mnist_ddpm.DEFAULTS, **config}, torch.device("cpu"))
    wake(trained.average)
    mnist_ddpm.save_run(Path("out/model.pt"), trained, loss=torch.zeros(1))
    ours = run("A model that mnist_ddpm.py trained")
    assert_close(ours.model.state_dict(), trained.average.module.state_dict())
    assert_close(ours.diffusion.beta, trained.diffusion.beta)


def test_img2img_of_a_gaussian():
    """The mean given a guide: Bayes' rule at x_t = sqrt(alpha_bar_t) guide, t = T/2."""
    seed(1)
    guide = 100                         # far away, as noise leaves little of it
    x = run_exact("img2img", x0=torch.full((2000, 1), guide).double()).x
    snr = EXACT.alpha_bar[500] / EXACT.one_minus_alpha_bar[500]
    mean = (snr * guide + MEAN / STD**2) / (snr + 1 / STD**2)
    assert_normal(x, mean, STD, bias=0.1 * STD)


def test_inpainting_keeps_the_known_and_fits_the_new_to_it():
    """The model knows images of one grey value: the new half takes that of the old."""
    seed(2)
    diffusion = GaussianDiffusion(linear_schedule(50, 0.002, 0.4), torch.float64)

    def model(x_t, t):
        grey = x_t.mean(-1, keepdim=True) / diffusion.alpha_bar[t[0]].sqrt()
        return diffusion.predict_eps(x_t, t, grey.expand_as(x_t))

    greys = torch.linspace(-0.5, 0.5, 100).double().reshape(100, 1, 1, 1)
    x0 = greys.expand(100, 1, 1, 28)
    x = run("Inpainting", diffusion=diffusion, model=model, x0=x0).x
    assert_close(x[..., :14], x0[..., :14])
    assert (x - x0)[..., 14:].std() < 0.02


def test_ode_maps_noise_to_the_exact_image():
    """A Gaussian keeps its quantiles along the ODE."""
    seed(3)
    ours = run_exact("Probability-flow ODE", x0=torch.zeros(500, 1).double())
    law_T = Normal(*marginal(MEAN, torch.tensor([1000]), ours.x_T))
    exact = MEAN + STD * (ours.x_T - law_T.mean) / law_T.stddev
    assert_close(ours.x, exact, atol=0.1 * STD, rtol=0)


def test_langevin_leaves_mean_and_variance_in_place_and_draws_the_data():
    seed(4)
    x0 = MEAN + STD * torch.randn(20000, 1).double()
    ours = run_exact("Langevin correction", x0=x0)
    mean, std = marginal(MEAN, ours.t[:1], x0)
    assert_normal(ours.x_t, mean.item(), std.item())
    x = run_exact("Annealed Langevin sampling", x0=x0[:1000]).x
    assert_normal(x, MEAN, STD, bias=0.1 * STD)


def test_classifier_guidance_is_bayes_rule():
    """Two classes: eps of the mixture, guided with s = 1, is eps of the class alone."""
    seed(5)
    ours = run("Classifier guidance", model=lambda x_t, t: torch.zeros_like(x_t))
    t = torch.full((64,), 50)
    x_t = ours.diffusion.q_sample(ours.x0, t, torch.randn_like(ours.x0))
    guesses = ours.classifier(x_t, t).argmax(1)
    assert (guesses == ours.y).float().mean() > 0.8

    def classifier(x_t, t):
        laws = [Normal(*marginal(mean, t, x_t)) for mean in (-0.3, 0.3)]
        return torch.cat([law.log_prob(x_t).flatten(1) for law in laws], dim=1)

    def mixture(x_t, t):
        share = classifier(x_t, t).softmax(1)[:, 1].reshape(-1, 1, 1, 1)
        return torch.lerp(exact_eps(-0.3, x_t, t), exact_eps(0.3, x_t, t), share)

    t, y = torch.tensor([200, 400, 600]), torch.tensor([1, 1, 1])
    x_t = torch.randn(3, 1, 1, 1).double()
    eps = ours.guided_eps(mixture, classifier, y, 1.0, x_t, t)
    assert_close(eps, exact_eps(0.3, x_t, t), rtol=1e-3, atol=1e-4)


def test_vector_and_small_image_reach_the_network():
    seed(6)
    x0, t = small()["x0"], torch.full((4,), 9)
    ours = run("A vector or text embedding", **small())
    network = wake(ours.network)
    assert ours.x.shape == x0.shape
    assert (network(x0, t, ours.c) - network(x0, t, -ours.c)).abs().min() > 0

    ours = run("Cascade", **small())
    network, low = wake(ours.upscaler), ours.low
    assert ours.x.shape == x0.shape
    eps = network(x0, t, low, t)
    assert (eps - network(x0, t, low.flip(0), t)).abs().max() > 1e-3
    assert (eps - network(x0, t, low, t + 1)).abs().max() > 1e-3


def test_latent_diffusion_loses_only_the_small_components():
    """The squared error is the sum of the eigenvalues left out; z has variance 1."""
    seed(7)
    diffusion = GaussianDiffusion(linear_schedule(20))
    ours = run("Latent diffusion", diffusion=diffusion)
    z = ours.autoencoder.encode(ours.x0)
    flat = (ours.x0 - ours.x0.mean(0)).flatten(1).double()
    left_out = torch.linalg.eigvalsh(flat @ flat.T)[:-32].sum()
    error = (ours.autoencoder.decode(z) - ours.x0).double()
    assert_close(error.pow(2).sum(), left_out, rtol=1e-3, atol=0)
    assert_close(z.pow(2).mean(0), torch.ones(32), rtol=1e-3, atol=0)
    assert ours.images.shape == (16, 1, 28, 28)


def test_wrapped_networks_give_the_exact_eps():
    seed(8)
    x0, eps = torch.randn(2, 3, 1, 4, 4)
    t = torch.tensor([10, 500, 900])
    ours = run("A network that predicts x_0 or v", **small())
    x_t = ours.diffusion.q_sample(x0, t, eps)
    alpha_bar = ours.diffusion.alpha_bar[t].reshape(3, 1, 1, 1)
    v = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x0
    close = partial(assert_close, expected=eps, atol=1e-3, rtol=0)
    close(ours.eps_from_x0(lambda x_t, t: x0, x_t, t))
    close(ours.eps_from_v(lambda x_t, t: v, x_t, t))
    ours = run("A noise-conditional score network")
    close(ours.eps_from_score(lambda x, sigma: (x0 - x) / sigma**2, x_t, t))


def test_diffusers_network_counts_from_0():
    diffusers = pytest.importorskip("diffusers")
    seed(9)
    ours = run("A network of diffusers", **small())
    seen = []
    time = ours.network.time_proj
    time.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    eps = ours.FromDiffusers(ours.network)(ours.x0[:2], torch.tensor([1, 1000]))
    assert eps.shape == (2, 1, 28, 28)
    assert seen[0].tolist() == [0, 999]
    theirs = diffusers.DDPMScheduler().alphas_cumprod
    assert_close(theirs, ours.diffusion.alpha_bar[1:], rtol=1e-3, atol=1e-6)


def gradients(model):
    return [p.grad for p in model.parameters()]


assert_near = partial(assert_close, rtol=1e-2, atol=1e-4)


def test_compiled_network_fills_the_same_gradients(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    seed(10)
    ours = run("torch.compile", **small())
    seed(10)
    plain = small()["model"]
    ours.diffusion.loss(plain, ours.x0).backward()
    assert_near(gradients(ours.model), gradients(plain))


# DistributedDataParallel imports torch._dynamo, which takes seconds: both processes are
# forked from one that has it, and leave without tidying up.
TWO_PROCESSES = """
import os
import torch._dynamo
os.environ["RANK"] = str(int(os.fork() == 0))
{set_up}
model = UNet(channels=1, width=8)
nn.init.ones_(model.out.weight)
{recipe}
torch.save([model, [p.grad for p in model.parameters()]], f"{{rank}}.pt")
os._exit(os.wait()[1] if rank == 0 else 0)
"""


def test_two_processes_average_the_gradients(tmp_path):
    """As one process finds them that takes both shares in turn."""
    told = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "CUDA_VISIBLE_DEVICES": ""}
    told |= {"MASTER_PORT": str(20000 + os.getpid() % 10000), "PYTHONPATH": str(ROOT)}
    (set_up,), (recipe,) = CODE["Set-up"], CODE["Several GPUs"]
    command = [sys.executable, "-c", TWO_PROCESSES.format(set_up=set_up, recipe=recipe)]
    subprocess.run(command, check=True, cwd=tmp_path, env={**os.environ, **told})

    model, first = torch.load(tmp_path / "0.pt", weights_only=False)
    for rank in (0, 1):
        torch.manual_seed(rank)
        loss = SET_UP["diffusion"].loss(model, SET_UP["x0"][rank::2])
        (loss / 2).backward()
    assert_near(first, gradients(model))
    assert_near(first, torch.load(tmp_path / "1.pt", weights_only=False)[1])


def test_accumulated_gradients_are_those_of_the_whole_batch():
    seed(11)
    ours = run("Gradient accumulation", **small())
    seed(11)
    model = small()["model"]
    t, eps = torch.zeros(4).long(), torch.zeros(4, 1, 28, 28)
    for i in range(4):
        t[i] = torch.randint(1, 1001, (1,))
        eps[i] = torch.randn(1, 1, 28, 28)
    x_t = ours.diffusion.q_sample(ours.x0, t, eps)
    nn.functional.mse_loss(model(x_t, t), eps).backward()
    assert_near(gradients(ours.model), gradients(model))


def test_mixed_precision_keeps_weights_and_average_in_float32():
    """2,000 updates from 0 towards 1 reach 1 - 0.999^2000 = 0.865, in bfloat16 half."""
    seed(12)
    world, seen = small(), []
    world["model"].out.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    ours = run("Mixed precision", **world)
    assert seen == [torch.bfloat16]
    kept = [*ours.model.parameters(), *ours.average.parameters()]
    assert {p.dtype for p in kept} == {torch.float32}
    update = ours.get_ema_multi_avg_fn(0.999)
    average, stalled = torch.zeros(1), torch.zeros(1).bfloat16()
    for n in range(2000):
        update([average], [torch.ones(1)], n)
        update([stalled], [torch.ones(1).bfloat16()], n)
    assert abs(average - 0.865) < 1e-3
    assert stalled < 0.6
