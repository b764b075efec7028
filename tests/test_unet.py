"""Proofs of unet.py: what its output depends on, how it starts, what it refuses."""
from functools import partial

import pytest
import torch
from torch import nn

from ddpm_min import GaussianDiffusion, linear_schedule
from test_ddpm_min import seeded
from unet import ResBlock, UNet

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
SKIPS = {"stem": "decode0", "encode1": "decode1", "encode2": "decode2"}
assert_close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=NO_CUDA)])
def device(request):
    return request.param


@pytest.fixture
def bfloat16_by_default():
    """torch's default dtype is bfloat16 as long as a test runs."""
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


def random_unet(device="cpu"):
    """A U-Net for colour and three classes, all weights random, none at its zero start;
    in float64, where convolutions agree to rounding on CUDA too (no TF32)."""
    model, draws = UNet(channels=3, width=8, classes=3).double(), seeded(1)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.2, generator=draws)
    return model.to(device)


def batch(device="cpu"):
    """Colour images x, not square, with t."""
    x = torch.randn(3, 3, 16, 20, dtype=torch.float64, generator=seeded(2, "cpu"))
    return x.to(device), torch.tensor([1, 500, 900], device=device)


def embedding_input(t):
    """What a U-Net's embedding of t (B,) goes through its layers as."""
    model, seen = UNet(1, 8), []
    model.time1.register_forward_pre_hook(lambda layer, inputs: seen.extend(inputs))
    model(torch.zeros(len(t), 1, 4, 4), t)
    return seen[0]


def test_embedding():
    """The U-Net gets sin, cos of t / 10000^(2i/d), i = 0, ..., d/2 - 1, d = 64."""
    ours = embedding_input(torch.tensor([1, 37, 100]))

    t = torch.tensor([[1.0], [37.0], [100.0]]).double()
    i = torch.arange(32).double()
    angle = t / 10000 ** (2 * i / 64)
    oracle = torch.cat([angle.sin(), angle.cos()], dim=1)
    assert_close(ours.double(), oracle, rtol=0, atol=1e-3)      # in float32 1e-5


def test_embedding_tells_t_whatever_the_default_dtype(bfloat16_by_default):
    """t = 999 and 1000 differ, though they are one number in bfloat16."""
    a, b = embedding_input(torch.tensor([999, 1000]))

    assert (a - b).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_starts_at_zero(device, dtype):
    """A new U-Net answers 0, in x's shape and dtype whatever its own."""
    model = UNet(channels=3, width=8).to(device, dtype)
    x, t = batch(device)

    ours = model(x, t)

    assert_close(ours, torch.zeros_like(x))


def test_defaults():
    """One channel, width 48, no classes."""
    a, b = UNet().state_dict(), UNet(1, 48, 0).state_dict()

    assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}


def test_blocks_start_as_identity():
    """New residual blocks hand x on, and a new attention adds nothing."""
    x = torch.randn(2, 8, 4, 4, generator=seeded(3, "cpu"))

    ours = ResBlock(8, 8, 32)(x, torch.ones(2, 32))

    assert_close(ours, x)
    assert not UNet(1, 8).attention.out_proj.weight.any()


@pytest.mark.parametrize("changed", ["x", "t", "y"])
def test_sees(device, changed):
    """A pixel, t or y of image 0 moves the far corner of this image and of no other."""
    model, (x, t) = random_unet(device), batch(device)
    inputs = {"x": x, "t": t, "y": t % 3}
    before = model(**inputs)

    inputs[changed] = inputs[changed].clone()
    inputs[changed][0].view(-1)[0] += 1
    after = model(**inputs)

    change = (after - before)[:, :, -4:, -4:].abs()
    moved = change.amax((1, 2, 3)) > 1e-9
    assert moved.tolist() == [True, False, False]


def test_null_label(device):
    """No y is y = -1."""
    model, (x, t) = random_unet(device), batch(device)

    ours = model(x, t)

    assert_close(ours, model(x, t, y=0 * t - 1))


def test_one_small_image():
    """The smallest batch and the smallest sides: the image alone, as in a batch."""
    model, (x, t) = random_unet(), batch()
    x = x[:, :, :4, :4]

    ours = model(x[:1], t[:1])

    assert_close(ours, model(x, t)[:1])


def test_uses_every_weight(device):
    """Each weight has its part in the output, and each row of a matrix; of the labels'
    rows only those that occur."""
    model, (x, t) = random_unet(device), batch(device)

    model(x, t, t % 3).square().sum().backward()

    model.label.weight.grad[0] = 1                      # the null label does not occur
    for name, weight in model.named_parameters():
        rows = weight.grad.flatten(1) if weight.dim() > 1 else weight.grad[None]
        assert rows.any(1).all(), name


def test_skip_connections():
    """Each decoder sees its encoder's output beside what comes from below."""
    model, (x, t) = random_unet(), batch()
    seen = {}

    def remember(name, layer, inputs, output):
        seen[name] = inputs[0], output

    for name, layer in model.named_children():
        layer.register_forward_hook(partial(remember, name))
    model(x, t)

    for encoder, decoder in SKIPS.items():
        (_, skip), (joined, _) = seen[encoder], seen[decoder]
        assert_close(joined[:, -skip.shape[1]:], skip)


def test_bfloat16_network(device):
    """Around a network in bfloat16 all stays in float32, and agrees to its digits."""
    diffusion = GaussianDiffusion(linear_schedule()).to(device)
    x, t = batch(device)
    model, x = random_unet(device), x.float()
    oracle = diffusion.score(model.float(), x, t)

    ours = diffusion.score(model.bfloat16(), x, t)

    scale = oracle.abs().max().item()
    assert_close(ours, oracle, rtol=0, atol=0.1 * scale)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("inputs", ["x t", "x t y"])
def test_compiled_and_mapped(inputs):
    """The whole graph compiled, and vmap, with labels and without."""
    model, (x, t) = random_unet(), batch()
    values = {"x": x, "t": t, "y": t % 3}
    values = tuple(values[name] for name in inputs.split())
    oracle = model(*values)

    compiled = torch.compile(model, backend="eager", fullgraph=True)(*values)
    rows = [value[:, None] for value in values]
    mapped = torch.vmap(model)(*rows)[:, 0]

    assert_close([compiled, mapped], [oracle] * 2)


def test_exported():
    """torch.export, without labels."""
    model, values = random_unet(), batch()

    exported = torch.export.export(model, values).module()

    assert_close(exported(*values), model(*values))


X, T1 = torch.ones(2, 1, 8, 8), torch.ones(2, dtype=torch.int64)


@pytest.mark.parametrize("name, inputs", [
    ("x", (X[:, :, :6], T1)), ("x", (X[0], T1)), ("x", (X.expand(2, 3, 8, 8), T1)),
    ("x", (X.byte(), T1)), ("x", (X.tolist(), T1)), ("x", (X[:, :, :0], T1)),
    ("t", (X, T1[:1])), ("t", (X, T1.float())), ("t", (X, 3)), ("t", (X, [1, 1])),
    ("y", (X, T1, T1[:1])), ("y", (X, T1, T1.float())), ("y", (X, T1, [1, 1])),
    ("y", (X, T1, T1 + 1)), ("y", (X, T1, -2 * T1))])
def test_refuses_inputs(name, inputs):
    """Of two classes, 0 and 1: a ValueError that names the input, not its content."""
    with pytest.raises(ValueError, match=f"want {name} ") as error:
        UNet(1, 8, classes=2)(*inputs)
    assert len(str(error.value)) < 90


@pytest.mark.parametrize("name, value", [
    ("channels", 0), ("channels", 1.0), ("width", 0), ("width", 12), ("width", [8]),
    ("classes", -1), ("classes", torch.ones(2))])
def test_refuses_sizes(name, value):
    """A ValueError that names the size."""
    with pytest.raises(ValueError, match=f"want {name} "):
        UNet(**{name: value})
