"""The recipes of docs/recipes.md that train, and those about training: each for seconds
only, and with a number that a broken one does not reach."""
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributions import Normal
from torch.testing import assert_close

from ddpm_min import GaussianDiffusion, linear_schedule
from test_readme import ROOT, seed
from test_recipes import (
    CODE, EXACT, MEAN, SET_UP, exact_eps, folder, ignore, marginal, run)
from unet import UNet


def wake(model):
    """The last layers of a U-Net start at zero; here none is."""
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    return model


def small():
    model = wake(UNet(channels=1, width=8))
    return {"model": model, "x0": SET_UP["x0"][:4], "y": SET_UP["y"][:4]}


def narrow(channels, width=48, classes=0):
    """A U-Net of width 8, whichever is asked for."""
    return UNet(channels, 8, classes)


def briefly(steps):
    """The page's training loop, for so many steps whatever is asked for."""
    def train(network, loss_on, **asked):
        SET_UP["train"](network, loss_on, **{**asked, "steps": steps})
    return train


def train_on_greys(network, loss_on, **asked):
    """On images of one grey value each, which the label decides: quickly learned."""
    optimiser = torch.optim.Adam(network.parameters(), 5e-3)
    for _ in range(200):
        y = torch.randint(10, (32,))
        x0 = grey_of_label(y).reshape(32, 1, 1, 1).expand(32, 1, 8, 8)
        optimiser.zero_grad()
        loss_on(x0, y).backward()
        optimiser.step()


def grey_of_label(y):
    return (y - 4.5) / 6


def test_training_loop_finds_the_mean_of_the_digits():
    """The least squares of a constant image."""
    network = nn.ParameterList([torch.zeros(1, 28, 28)])

    def loss_on(x0, y):
        assert y.shape == (64,)
        return (10 * network[0] - x0).pow(2).mean()

    seed(7)
    SET_UP["train"](network, loss_on, steps=500, batch_size=64)
    mean = SET_UP["x_train"].float().mean(0) / 127.5 - 1
    assert (10 * network[0] - mean).abs().mean() < 0.03


def test_classifier_guidance_is_bayes_rule():
    """Two classes: eps of the mixture, guided with s = 1, is eps of the class alone."""
    seed(8)
    diffusion = GaussianDiffusion(linear_schedule())    # that of exact_eps
    model = partial(exact_eps, MEAN)
    world = {"diffusion": diffusion, "model": model, "train": briefly(600)}
    ours = run("Classifier guidance", **world)
    x0 = SET_UP["x_train"][:500] / 127.5 - 1
    t = torch.full((500,), 200)
    x_t = diffusion.q_sample(x0, t, torch.randn_like(x0))
    guesses = ours.classifier(x_t, t).argmax(1)
    assert (guesses == SET_UP["y_train"][:500]).float().mean() > 0.8

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


def test_vector_decides_what_is_drawn():
    """A network that does not look at c draws greys that have nothing to do with it."""
    seed(9)
    x0 = torch.zeros(16, 1, 8, 8)
    world = {"UNet": narrow, "train": train_on_greys, "save_picture": ignore}
    ours = run("A vector or text embedding", x0=x0, **world)
    assert ours.x.shape == x0.shape
    y = torch.arange(100) % 10
    c = nn.functional.one_hot(y, 10).float()
    guided = ours.classifier_free(ours.network, c, 10.0)
    for x in ours.diffusion.sample(guided, (100, 1, 8, 8), steps=50):
        pass
    both = torch.stack([x.mean((1, 2, 3)), grey_of_label(y)])
    assert torch.corrcoef(both)[0, 1] > 0.4


def test_upscaler_follows_the_small_image():
    """Where x_t is almost noise, and the small image another's, its guess is the other;
    a network that does not look at it cannot do that."""
    seed(10)
    ours = run("Cascade", UNet=narrow, train=briefly(150))
    shown = ours.shrink(ours.x0).roll(1, 0)
    t = torch.full((16,), 900)
    x_t = ours.diffusion.q_sample(ours.x0, t, torch.randn_like(ours.x0))
    with torch.no_grad():
        eps = ours.upscaler(x_t, t, ours.add_noise(shown))
    guess = ours.shrink(ours.diffusion.predict_x0(x_t, t, eps))
    to_shown = (guess - shown).pow(2).mean()
    to_own = (guess - ours.shrink(ours.x0)).pow(2).mean()
    assert to_shown < 0.95 * to_own
    assert ours.small_loss(ours.x0, ours.y) < 0.6
    assert ours.x.shape == ours.x0.shape


def test_latents_decode_to_the_digits_and_are_drawn_alike():
    """Encoded, each number has variance 1, and drawn about that."""
    seed(11)
    ours = run("Latent diffusion", train=briefly(150))
    x0 = SET_UP["x_train"][:2000] / 127.5 - 1
    with torch.no_grad():
        z = ours.autoencoder.encode(x0)
        error = (ours.autoencoder.decode(z) - x0).pow(2).mean()
    assert error < 0.5 * x0.var(0).mean()
    assert (z.var(0) - 1).abs().max() < 0.3
    for drawn in ours.diffusion.sample(ours.network, (500, 16), steps=50, clip=False):
        pass
    assert 0.3 < drawn.var() < 4


def test_wrapped_networks_give_the_exact_eps():
    seed(12)
    x0, eps = torch.randn(2, 3, 1, 4, 4)
    t = torch.tensor([10, 500, 900])
    world = {"diffusion": GaussianDiffusion(linear_schedule()), "x0": small()["x0"]}
    world |= {"UNet": narrow, "train": briefly(30)}
    ours = run("A network that predicts x_0 or v", **world)
    x_t = ours.diffusion.q_sample(x0, t, eps)
    alpha_bar = ours.diffusion.alpha_bar[t].reshape(3, 1, 1, 1)
    v = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x0
    close = partial(assert_close, expected=eps, atol=1e-3, rtol=0)
    close(ours.eps_from_x0(lambda x_t, t: x0, x_t, t))
    close(ours.eps_from_v(lambda x_t, t: v, x_t, t))
    assert ours.v_loss(SET_UP["x0"], SET_UP["y"]) < 0.5


def test_diffusers_network_counts_from_0():
    diffusers = pytest.importorskip("diffusers")
    seed(13)
    ours = run("A network of diffusers", x0=SET_UP["x0"][:4])
    seen = []
    time = ours.network.time_proj
    time.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    eps = ours.FromDiffusers(ours.network)(ours.x0[:2], torch.tensor([1, 1000]))
    assert eps.shape == (2, 1, 28, 28)
    assert seen[0].tolist() == [0, 999]
    theirs = diffusers.DDPMScheduler().alphas_cumprod
    assert_close(theirs.double(), EXACT.alpha_bar[1:], rtol=1e-3, atol=1e-6)


def gradients(model):
    return [p.grad for p in model.parameters()]


assert_near = partial(assert_close, rtol=1e-2, atol=1e-4)


def test_compiled_network_fills_the_same_gradients(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    seed(14)
    ours = run("torch.compile", **small())
    seed(14)
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
    (recipe,), set_up = CODE["Several GPUs"], "\n".join(CODE["Set-up"])
    command = [sys.executable, "-c", TWO_PROCESSES.format(set_up=set_up, recipe=recipe)]
    subprocess.run(command, check=True, env={**os.environ, **told})

    model, first = torch.load(tmp_path / "0.pt", weights_only=False)
    for rank in (0, 1):
        torch.manual_seed(rank)
        loss = SET_UP["diffusion"].loss(model, SET_UP["x0"][rank::2])
        (loss / 2).backward()
    assert_near(first, gradients(model))
    assert_near(first, torch.load(tmp_path / "1.pt", weights_only=False)[1])


def test_saved_weights_come_back():
    pytest.importorskip("safetensors")
    model = wake(UNet(channels=1, width=32, classes=10))
    ours = run("Saving", model=model)
    assert_close(model.state_dict(), ours.trained.average.module.state_dict())
