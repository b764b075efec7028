"""Proofs of the U-Net and of the PNG encoder in ddpm_min.py."""
import io
import struct
import zlib
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ddpm_min import ResBlock, UNet, encode_png
from test_ddpm_min import DEVICE, assert_close, randn, seeded

SHAPE = (3, 16, 20)
COLOUR = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
GREY = COLOUR[..., 0]


def random(model):
    """The model, none of its weights 0; in float64, so on CUDA without TF32."""
    model, draws = model.to(DEVICE, torch.float64), seeded(1)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.2, generator=draws)
    return model


def batch(shape=SHAPE):
    t = torch.tensor([1, 500, 900], device=DEVICE)
    return randn(3, *shape, generator=seeded(2)), t, t % 3


def run(model, *inputs):
    """The input and output of each layer, by its name."""
    seen = {}

    def remember(name, layer, inputs, output):
        seen[name] = inputs[0], output
    for name, layer in model.named_children():
        layer.register_forward_hook(partial(remember, name))
    model(*inputs)
    return seen


def test_embedding():
    """sin, cos of t / 10000^(2i/64), though the weights' bfloat16 has no 999."""
    t = torch.tensor([37, 999, 1000], device=DEVICE)
    model = UNet(SHAPE, 8).to(DEVICE, torch.bfloat16)
    waves, _ = run(model, batch()[0], t)["time"]
    i = torch.arange(32, dtype=torch.float64, device=DEVICE)
    angle = t[:, None] / 10000 ** (2 * i / 64)
    oracle = torch.cat([angle.sin(), angle.cos()], dim=1)
    assert_close(waves.double(), oracle, rtol=0, atol=0.01)         # rounding: 0.002


def test_start():
    """A new U-Net answers 0, in x's dtype whatever its own; its parts hand x on."""
    model, (x, t, _) = UNet(SHAPE, 8).to(DEVICE, torch.bfloat16), batch()
    seen = run(model, x, t)
    assert_close(model(x, t), torch.zeros_like(x))
    assert_close(*seen["encode_fine"])
    assert_close(*seen["decode_coarse"][0].chunk(2, dim=1))


def test_adaptive_norm():
    """emb gives the second normalisation its weight, 1 + scale, and its bias, shift."""
    block = ResBlock(16, 8, 32).to(DEVICE, torch.float64)
    nn.init.normal_(block.conv2.weight)                 # 0 at the start
    x, emb = randn(3, 16, 4, 4, generator=seeded(3)), randn(1, 32, generator=seeded(4))
    ours = block(x, emb.expand(3, 32))
    scale, shift = block.scale_shift(emb)[0].chunk(2)
    h = block.conv1(F.silu(block.norm1(x)))
    h = F.group_norm(h, 8, 1 + scale, shift)
    assert_close(ours, block.shortcut(x) + block.conv2(F.silu(h)))


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_sees(changed):
    """A pixel, t or y of image 0 moves the far corner of this image and of no other."""
    model, inputs = random(UNet(SHAPE, 8, 3)), batch()
    before = model(*inputs)
    inputs[changed][0].view(-1)[0] += 1
    change = (model(*inputs) - before)[:, :, -4:, -4:].abs()
    assert (change.amax((1, 2, 3)) > 1e-9).tolist() == [True, False, False]


@pytest.mark.parametrize("shape", [SHAPE, (1, 8, 8), (3, 64, 64)])
def test_uses_every_weight(shape):
    """Each weight, row of a matrix and label has its part; the null label without y."""
    model, (x, t, y) = random(UNet(shape, 8, 3)), batch(shape)
    (model(x, t, y) + model(x, t)).square().sum().backward()
    for name, weight in model.named_parameters():
        rows = weight.grad.flatten(1) if weight.dim() > 1 else weight.grad[None]
        assert rows.any(1).all(), name


def test_skip_connections():
    """Each decoder sees its encoder's output, as does the way down."""
    seen = run(random(UNet(SHAPE, 8, 3)), *batch())
    seen["encode_stem"] = seen["stem"]
    for level in ("stem", "fine", "coarse"):
        skip, joined = seen[f"encode_{level}"][1], seen[f"decode_{level}"][0]
        assert_close(joined[:, -skip.shape[1]:], skip)
    assert_close(seen["down"][0], seen["encode_fine"][1])


@pytest.mark.parametrize("image", [GREY, COLOUR, torch.tensor(GREY)])
def test_png_chunks(image):
    """Header, data and end with their checksums: 8-bit grey or colour, unfiltered."""
    file = io.BytesIO(encode_png(image))
    assert file.read(8) == b"\x89PNG\r\n\x1a\n"
    chunks = {}
    while length := file.read(4):
        content = file.read(4 + int.from_bytes(length, "big"))
        assert file.read(4) == zlib.crc32(content).to_bytes(4, "big")
        chunks[content[:4]] = content[4:]
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"] and chunks[b"IEND"] == b""
    width, height, *kind = struct.unpack(">II5B", chunks[b"IHDR"])
    assert kind == [8, 2 if image.ndim == 3 else 0, 0, 0, 0]
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, -1)
    assert not rows[:, 0].any()
    pixels = rows[:, 1:].reshape(height, width, *image.shape[2:])
    np.testing.assert_array_equal(pixels, image)
