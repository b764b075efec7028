"""Proofs of what ddpm_min.py has beside the identities in test_ddpm_min.py: schedules,
guidance, the U-Net, averages of its weights, pictures, and what it refuses."""
import math
import os
import struct
import zlib
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributions import Normal
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ddpm_min
from ddpm_min import GaussianDiffusion, ResBlock, UNet, encode_png

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
assert_close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


def seeded(n):
    """The generator of the n-th draw; SEED_OFFSET=1 (2, 3, ...) draws all anew."""
    offset = int(os.environ.get("SEED_OFFSET", "0"))
    return torch.Generator().manual_seed(n + offset)


def same(x, t):
    return x


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=NO_CUDA)])
def device(request):
    return request.param


def test_linear_schedule():
    """beta_t rises evenly from 1e-4 to 0.02."""
    ours = ddpm_min.linear_schedule()
    t = torch.arange(1, 1001).double()
    assert_close(ours, 1e-4 + (t - 1) / 999 * (0.02 - 1e-4))


@pytest.mark.parametrize("options, T, s", [((), 1000, 0.008), ((20, 0.1), 20, 0.1)])
def test_cosine_schedule(options, T, s):
    """alpha_bar_t = f(t) / f(0) gives beta_t = 1 - alpha_bar_t / alpha_bar_{t-1}."""
    ours = ddpm_min.cosine_schedule(*options)

    u = torch.arange(T + 1).double() / T
    f = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2
    beta = 1 - f[1:] / f[:-1]
    assert_close(ours, beta.clamp(max=0.999))


@pytest.mark.parametrize("options, mu, b", [((), -1.5, 1), ((1000, 1, 0.5), 1, 0.5)])
def test_laplace_schedule(options, mu, b):
    """P(log SNR < log SNR_t) = 1 - t / (T + 1) by the CDF of Laplace(mu, b)."""
    betas = ddpm_min.laplace_schedule(*options)
    ours = torch.cumprod(1 - betas, 0)
    z = (torch.log(ours / (1 - ours)) - mu) / b
    tail = torch.exp(-z.abs()) / 2
    cdf = torch.where(z < 0, tail, 1 - tail)
    t = torch.arange(1, 1001).double()
    assert_close(cdf, 1 - t / 1001)


def test_gradient_of_betas():
    """Gradients reach betas: d log alpha_bar_T / d beta_t = -1 / (1 - beta_t)."""
    betas = torch.tensor([0.1, 0.2, 0.5], dtype=torch.float64, requires_grad=True)
    GaussianDiffusion(betas, torch.float64).alpha_bar[3].log().backward()

    assert_close(betas.grad, -1 / (1 - betas.detach()))


def test_step_takes_no_gradient():
    """No graph grows along a chain, though the model's weights ask for gradients."""
    diffusion = GaussianDiffusion(ddpm_min.linear_schedule())
    weight = torch.ones(3, requires_grad=True)
    ours = diffusion.p_sample(lambda x, t: weight * x, torch.ones(2, 3), 2)
    assert not ours.requires_grad


@pytest.mark.parametrize("ours", [
    lambda d, x0, g: d.loss(same, x0, generator=g).item(),
    lambda d, x0, g: d.bits_per_dim(same, x0, generator=g),
    lambda d, x0, g: [x.tolist() for x in d.sample(same, (2, 3), 9, generator=g)]])
def test_generator(ours):
    """A generator settles all that is drawn."""
    d = GaussianDiffusion(ddpm_min.linear_schedule())
    x0 = torch.zeros(9, 3)
    assert ours(d, x0, seeded(5)) == ours(d, x0, seeded(5))


def test_bits_draw_t():
    """bits_per_dim meets t > 1 as often as (SNR_{t-1} - SNR_t) / (1 + SNR_t) says."""
    diffusion = GaussianDiffusion(ddpm_min.linear_schedule(6, 0.1, 0.5))
    seen = []

    def model(x_t, t):
        seen.append(t)
        return x_t

    diffusion.bits_per_dim(model, torch.zeros(20000, 1), generator=seeded(6))

    counts = torch.cat(seen).bincount()[2:]
    snr = diffusion.alpha_bar[1:] / (1 - diffusion.alpha_bar[1:])
    size = (snr[:-1] - snr[1:]) / (1 + snr[1:])
    expected = counts.sum() * size / size.sum()
    z = (counts - expected) / expected.sqrt()
    assert z.abs().max() < 5


@pytest.mark.parametrize("s", [0, 1, 2.5])
def test_guidance(s):
    """The guided score is the gradient of log q(x_t) + s log q(y | x_t)."""
    diffusion = GaussianDiffusion(ddpm_min.linear_schedule(50, 0.002, 0.3), torch.float64)
    t = torch.arange(1, 51)
    y = t % 2
    bar = diffusion.alpha_bar[t, None]
    means = torch.tensor([-0.5, 0.5]).double()          # x0 ~ N(means[y], 0.04)
    var = 0.04 * bar + 1 - bar
    q = Normal(bar.sqrt() * means, var.sqrt())          # q(x_t | y), columns y = 0, 1

    def model(x_t, t, y):
        """E[eps | x_t, y] by linear regression, its mean over q(y | x_t) for y = -1."""
        eps = (1 - bar).sqrt() / var * (x_t - q.mean)
        q_y = q.log_prob(x_t).softmax(1)
        null = (q_y * eps).sum(1)
        return torch.where(y < 0, null, eps[t - 1, y])[:, None]

    x_t = torch.randn(50, 1, generator=seeded(0)).double().requires_grad_()
    ours = diffusion.score(ddpm_min.classifier_free(model, y, s), x_t, t)

    log_q = q.log_prob(x_t)
    log_q_x = log_q.logsumexp(1)
    log_q_y = log_q[t - 1, y] - log_q_x                 # Bayes' rule
    (log_q_x + s * log_q_y).sum().backward()
    assert_close(ours, x_t.grad)


def test_embedding():
    """The U-Net gets sin, cos of t / 10000^(2i/d), i = 0, ..., d/2 - 1, d = 64."""
    model, seen = UNet(1, 8), []
    model.time1.register_forward_pre_hook(lambda layer, inputs: seen.extend(inputs))

    model(torch.zeros(3, 1, 4, 4), torch.tensor([1, 37, 100]))

    t = torch.tensor([[1.0], [37.0], [100.0]]).double()
    i = torch.arange(32).double()
    angle = t / 10000 ** (2 * i / 64)
    oracle = torch.cat([angle.sin(), angle.cos()], dim=1)
    assert_close(seen[0].double(), oracle, rtol=0, atol=1e-3)   # in float32 1e-5


def random_unet(device):
    """A U-Net for colour and three classes, all weights random, none at its zero start;
    in float64, where convolutions agree to rounding on CUDA too (no TF32)."""
    model, draws = UNet(channels=3, width=8, classes=3).double(), seeded(1)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.2, generator=draws)
    return model.to(device)


def batch(device):
    """Colour images x, not square, with t and y."""
    x = torch.randn(3, 3, 16, 20, dtype=torch.float64, generator=seeded(2))
    return x.to(device), torch.tensor([1, 500, 900], device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_unet_starts_at_zero(device, dtype):
    """A new U-Net answers 0, in x's shape and dtype whatever its own."""
    model = UNet(channels=3, width=8).to(device, dtype)
    x, t = batch(device)

    ours = model(x, t)
    assert_close(ours, torch.zeros_like(x))


def test_blocks_start_as_identity():
    """New residual blocks hand x on, and a new attention adds nothing."""
    x = torch.randn(2, 8, 4, 4, generator=seeded(3))
    ours = ResBlock(8, 8, 32)(x, torch.ones(2, 32))
    assert_close(ours, x)
    assert not UNet(1, 8).attention.out_proj.weight.any()


@pytest.mark.parametrize("changed", ["x", "t", "y"])
def test_unet_sees(device, changed):
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


def test_unet_null_label(device):
    """No y is y = -1."""
    model, (x, t) = random_unet(device), batch(device)
    ours = model(x, t)
    assert_close(ours, model(x, t, y=0 * t - 1))


def test_unet_uses_every_weight(device):
    """Each weight has its part in the output."""
    model, (x, t) = random_unet(device), batch(device)

    model(x, t, t % 3).square().sum().backward()

    unused = [name for name, p in model.named_parameters() if not p.grad.any()]
    assert unused == []


def test_bfloat16_network(device):
    """Around a network in bfloat16 all stays in float32, and agrees to its digits."""
    diffusion = GaussianDiffusion(ddpm_min.linear_schedule()).to(device)
    x, t = batch(device)
    model, x = random_unet(device), x.float()
    oracle = diffusion.score(model.float(), x, t)

    ours = diffusion.score(model.bfloat16(), x, t)

    scale = oracle.abs().max().item()
    assert_close(ours, oracle, rtol=0, atol=0.1 * scale)


def test_everything_on_one_device():
    """Nothing is made on the CPU where x and the schedule are elsewhere."""
    diffusion = GaussianDiffusion(ddpm_min.linear_schedule(4)).to("meta")
    model = UNet(1, 8).to("meta")
    x0 = torch.ones(2, 1, 8, 8, device="meta")
    t = torch.ones(2, dtype=torch.int64, device="meta")

    ours = [diffusion.loss(model, x0), diffusion.vlb(model, x0, t)]
    ours += [diffusion.prior_kl(x0), *diffusion.sample(model, x0.shape)]

    assert all(value.is_meta for value in ours)
    assert [value.shape for value in ours[:4]] == [(), (2,), (2,), (2, 1, 8, 8)]


def test_average():
    """avg <- decay avg + (1 - decay) w from the first w on, after a restart too."""
    new = partial(AveragedModel, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    model = nn.Linear(1, 1, bias=False).double()
    average, oracle = new(model), None

    for w in range(10):
        nn.init.constant_(model.weight, w)
        average.update_parameters(model)
        oracle = 0.9 * oracle + 0.1 * w if w else 0.0
        if w == 5:
            state, average = average.state_dict(), new(model)
            average.load_state_dict(state)

    assert_close(average.module.weight.item(), oracle)


def png_chunks(data):
    """The (kind, content) of each chunk; signature and checksums must be right."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    place, chunks = 8, []
    while place < len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        content = data[place + 8:place + 8 + length]
        checksum, = struct.unpack_from(">I", data, place + 8 + length)
        assert checksum == zlib.crc32(kind + content)
        chunks.append((kind, content))
        place += 12 + length
    return chunks


def png_frames(data):
    """The frames of a PNG in 8-bit grey or colour whose rows are unfiltered."""
    chunks, frames = png_chunks(data), []
    width, height, *kind = struct.unpack(">IIBBBBB", chunks[0][1])
    assert kind in ([8, 0, 0, 0, 0], [8, 2, 0, 0, 0])
    channels = [3] if kind[1] == 2 else []
    for kind, content in chunks:
        if kind in (b"IDAT", b"fdAT"):
            packed = content[4:] if kind == b"fdAT" else content
            rows = torch.tensor(list(zlib.decompress(packed))).reshape(height, -1)
            assert not rows[:, 0].any()
            frames.append(rows[:, 1:].reshape(height, width, *channels))
    return torch.stack(frames).byte()


@pytest.mark.parametrize("shape", [(1, 4, 6), (3, 4, 6), (1, 5, 3, 3), (2, 5, 3, 3)])
def test_png_frames(shape):
    """Grey or coloured frames (N, H, W) or (N, H, W, 3) read back."""
    frames = torch.randint(256, shape, dtype=torch.uint8, generator=seeded(4))

    ours = png_frames(encode_png(list(frames)))
    assert_close(ours, frames)


def test_png_animation():
    """Three frames for ever, each of the whole picture and 1/7 s; numbers count on."""
    frames = torch.zeros(3, 4, 6, dtype=torch.uint8)

    chunks = png_chunks(encode_png(list(frames), fps=7))

    kinds = [kind for kind, _ in chunks]
    assert kinds == b"IHDR acTL fcTL IDAT fcTL fdAT fcTL fdAT IEND".split()
    assert chunks[1][1] == struct.pack(">II", 3, 0)
    control = struct.pack(">IIIIHHBB", 6, 4, 0, 0, 1, 7, 0, 0)
    assert [chunks[i][1][4:] for i in (2, 4, 6)] == [control] * 3
    assert [chunks[i][1][3] for i in (2, 4, 5, 6, 7)] == [0, 1, 2, 3, 4]


X, T1 = torch.ones(2, 3), torch.ones(2, dtype=torch.int64)
IMAGE = torch.ones(2, 1, 8, 8)
PIXELS = torch.zeros(4, 6, dtype=torch.uint8)
NET = UNet(1, 8, classes=2)
D = GaussianDiffusion(torch.full((5,), 0.1))
HALF = GaussianDiffusion(ddpm_min.cosine_schedule()).half()


@pytest.mark.parametrize("call", [
    lambda: D.q_sample(X, 0 * T1, X),
    lambda: D.q_sample(X, 6 * T1, X),                   # T = 5
    lambda: D.q_sample(X, T1.int(), X),
    lambda: D.q_sample(X, T1[:1], X),
    lambda: D.predict_x0(X, T1, X[:, :2]),
    lambda: D.loss(same, X.byte()),                     # images in 0..255
    lambda: HALF.loss(same, X),
    lambda: HALF.p_sample(same, X, 5),
    lambda: D.loss(lambda x, t: (x, t), X),
    lambda: list(D.sample(same, X.shape, 1.5)),
    lambda: D.p_sample(same, X, 2, eta=1.1),
    lambda: D.p_sample(same, X, 2, 2),
    lambda: GaussianDiffusion(0 * X[0]),
    lambda: GaussianDiffusion(X[0]),
    lambda: GaussianDiffusion(math.nan * X[0]),
    lambda: GaussianDiffusion(0.1 * X),
    lambda: NET(IMAGE[:, :, :6], T1),
    lambda: NET(IMAGE, T1, torch.tensor([1, 2])),       # of two classes, 0 and 1
    lambda: NET(IMAGE, T1, T1[:1]),
    lambda: encode_png([IMAGE[0, 0]]),
    lambda: encode_png([PIXELS, PIXELS.T]),
    lambda: encode_png([PIXELS[:, :, None]])])
def test_refuses(call):
    """What does not fit is a ValueError."""
    with pytest.raises(ValueError):
        call()
