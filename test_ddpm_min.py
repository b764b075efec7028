"""Proofs of ddpm_min.py and swiss_roll.py, trials of mnist_ddpm.py:  pytest test_ddpm_min.py

Oracles are independent of the code under test: numpy recursions, Bayes' rule on a grid, torch.distributions, data that
is exactly Gaussian. Closed forms hold to 1e-10 in float64 unless a line says why not, Monte Carlo to 5 standard errors.
The identities run on a CUDA device, too, where there is one.
"""
import itertools
import math
import struct
import zlib

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ddpm_min import (EMA, GaussianDiffusion, UNet, classifier_free, classifier_guided, cosine_schedule,
                      discretised_log_likelihood, encode_png, gaussian_kl, linear_schedule)

T, BETAS = 50, np.linspace(0.002, 0.3, 50)
BAR = np.array([np.prod(1 - BETAS[:t]) for t in range(T + 1)])          # alpha_bar, index 0 the data
MEAN, VAR = 0.3, 0.25                                                   # of data that is exactly Gaussian
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))

@pytest.fixture(params=["cpu", CUDA])
def device(request):
    with torch.device(request.param):
        yield request.param

@pytest.fixture
def diffusion(device):
    return GaussianDiffusion(torch.tensor(BETAS))

def seeded(seed):
    return torch.Generator(torch.get_default_device()).manual_seed(seed)

def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))

def at(values, t, x):
    return torch.tensor(values)[t].reshape(-1, *[1] * (x.dim() - 1))

def every_t():
    return torch.arange(1, T + 1)

def exact_eps(x_t, t):
    """E[eps | x_t] where x0 ~ N(MEAN, VAR): eps and x_t are jointly Gaussian."""
    bar = at(BAR, t, x_t)
    return (1 - bar).sqrt() * (x_t - bar.sqrt() * MEAN) / (bar * VAR + 1 - bar)

def equal(a, b, tolerance=1e-10):
    a, b = (torch.as_tensor(v, dtype=torch.float64).cpu() for v in (a, b))
    assert a.shape == b.shape and bool(((a - b).abs() <= tolerance * (1 + b.abs())).all()), (a, b)

def close_in_mean(samples, expected):
    """The mean of independent samples is the expected value to 5 standard errors."""
    assert abs(samples.mean() - expected) < 5 * samples.std() / math.sqrt(len(samples))

def test_linear_and_cosine_schedules_have_their_closed_forms(device):
    equal(linear_schedule(5, 0.1, 0.5), [0.1, 0.2, 0.3, 0.4, 0.5])
    equal(linear_schedule()[[0, -1]], [1e-4, 0.02])
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
    equal(torch.cumprod(1 - cosine_schedule(), 0)[:990], np.array(f[1:991]) / f[0])
    assert linear_schedule().dtype == cosine_schedule().dtype == torch.float64 and len(linear_schedule()) == 1000
    assert cosine_schedule()[-1] == 0.999 and (cosine_schedule()[:-1] < 0.999).all()

def test_buffers_start_at_the_data_and_one_minus_alpha_bar_is_precise_in_float32(diffusion):
    equal(diffusion.beta, [0, *BETAS])
    equal(diffusion.alpha, 1 - np.array([0, *BETAS]))
    equal(diffusion.alpha_bar, BAR)
    exact = 1 - np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    rest = GaussianDiffusion(linear_schedule()).float().one_minus_alpha_bar
    assert rest.dtype == GaussianDiffusion(linear_schedule().float()).alpha_bar.dtype == torch.float32
    equal(rest[1:].double() / torch.tensor(exact), np.ones(1000), 1e-7)                 # float32: 6e-8 of each
    betas = torch.tensor(BETAS, requires_grad=True)
    GaussianDiffusion(betas).alpha_bar[T].backward()
    equal(betas.grad, -BAR[T] / (1 - BETAS))

def test_q_sample_equals_t_single_steps(diffusion):
    signal, noise = 1.0, 0.0
    for t, beta in enumerate(BETAS, 1):
        signal, noise = signal * math.sqrt(1 - beta), noise * (1 - beta) + beta
        x0, eps = randn(1, 3, 2), randn(1, 3, 2, seed=1)
        equal(diffusion.q_sample(x0, torch.tensor([t]), eps), signal * x0 + math.sqrt(noise) * eps)

def test_q_posterior_is_bayes_rule_on_a_grid_and_the_data_itself_at_t_1(diffusion):
    grid, x0, x_t = np.linspace(-8, 8, 40001), randn(T, 1), randn(T, 1, seed=1)
    mean, var = diffusion.q_posterior(x0, x_t, every_t())
    assert mean[0] == x0[0] and var[0] == 0
    for t in range(2, T + 1):
        prior = -(grid - math.sqrt(BAR[t - 1]) * x0[t - 1].item()) ** 2 / (1 - BAR[t - 1]) / 2
        likelihood = -(x_t[t - 1].item() - math.sqrt(1 - BETAS[t - 1]) * grid) ** 2 / BETAS[t - 1] / 2
        p = np.exp(prior + likelihood - (prior + likelihood).max())
        equal(mean[t - 1], [p @ grid / p.sum()])
        equal(var[t - 1], [p @ (grid - p @ grid / p.sum()) ** 2 / p.sum()])

def test_eq_11_equals_eq_7_and_predict_eps_inverts_predict_x0(diffusion):
    t, x_t, eps = every_t(), randn(T, 2, 3), randn(T, 2, 3, seed=1)
    x0 = diffusion.predict_x0(x_t, t, eps)
    eq_11 = (x_t - at(BETAS, t - 1, x_t) / (1 - at(BAR, t, x_t)).sqrt() * eps) / (1 - at(BETAS, t - 1, x_t)).sqrt()
    equal(diffusion.q_posterior(x0, x_t, t)[0], eq_11)
    equal(diffusion.q_sample(x0, t, eps), x_t)
    equal(diffusion.predict_eps(x_t, t, x0), eps)

def test_score_of_gaussian_data_is_the_gradient_of_its_log_density(diffusion):
    x, bar = randn(T, 3).requires_grad_(), torch.tensor(BAR[1:, None])
    log_q = Normal(bar.sqrt() * MEAN, (bar * VAR + 1 - bar).sqrt()).log_prob(x).sum()
    equal(diffusion.score(exact_eps, x.detach(), every_t()), torch.autograd.grad(log_q, x)[0])

def test_loss_is_the_squared_error_of_eps_with_t_uniform_on_1_to_T(diffusion):
    seen, errors, x0 = [], [], randn(7, 100)

    def model(x_t, t, y):
        seen.append(t)
        eps = (x_t - at(BAR, t, x_t).sqrt() * x0) / (1 - at(BAR, t, x_t)).sqrt()
        errors.append((eps - x_t * y[:, None]).square().mean())
        return x_t * y[:, None]

    losses = [diffusion.loss(model, x0, torch.arange(7)) for _ in range(1000)]
    equal(torch.stack(losses), torch.stack(errors))
    counts = torch.bincount(torch.cat(seen), minlength=T + 1)
    assert counts[0] == 0 and len(counts) == T + 1
    assert ((counts[1:] - 7000 / T).abs() < 5 * math.sqrt(7000 / T)).all()
    assert all(len(t.unique()) == 7 and t.max() - t.min() > T / 2 for t in seen)        # spread within a batch
    assert diffusion.loss(model, x0, torch.zeros(7), seeded(5)) == diffusion.loss(model, x0, torch.zeros(7), seeded(5))

def test_kl_and_prior_kl_equal_torch_distributions(diffusion):
    m, p, v, w = randn(4, 50)
    expected = kl_divergence(Normal(m, (v / 2).exp()), Normal(p, (w / 2).exp()))
    equal(gaussian_kl(m, v.exp(), p, w.exp()), expected)
    x0 = randn(5, 3, 2)
    q = Normal(math.sqrt(BAR[T]) * x0, torch.full_like(x0, math.sqrt(1 - BAR[T])))
    equal(diffusion.prior_kl(x0), kl_divergence(q, Normal(torch.zeros_like(x0), torch.ones_like(x0))).sum((1, 2)))

@pytest.mark.parametrize("mean, std", [(0.1, 0.01), (-0.99, 0.05), (1.3, 0.2), (0.0, 2.0)])
def test_decoder_masses_are_cdf_differences_and_sum_to_one(device, mean, std):
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    log_mass = discretised_log_likelihood(levels, *torch.tensor([mean, std**2], dtype=torch.float64))
    phi = [0, *(math.erfc((mean - edge) / std / math.sqrt(2)) / 2 for edge in (levels[:-1] + 1 / 255).tolist()), 1]
    equal(log_mass.exp(), np.diff(phi))
    equal(log_mass.exp().sum(), 1)
    assert log_mass.isfinite().all()                                    # far into either tail, too

def test_vlb_of_gaussian_data_has_its_closed_form_mean(diffusion):
    x0 = MEAN + math.sqrt(VAR) * randn(20000, 2)
    for t in range(2, T + 1):
        bar, before, beta = BAR[t], BAR[t - 1], BETAS[t - 1]
        residual = VAR * (1 - bar) / (bar * VAR + 1 - bar)              # Var(x0 | x_t)
        tilde = (1 - before) / (1 - bar) * beta
        terms = diffusion.vlb(exact_eps, x0, torch.full((20000,), t))
        close_in_mean(terms, 2 * before * beta**2 / (1 - bar) ** 2 * residual / 2 / tilde)

def test_vlb_at_t_1_is_the_decoder_with_the_variance_of_t_2_and_clip_bounds_x0(diffusion):
    x0, ones = torch.randint(1, 255, (4, 3)).double() / 127.5 - 1, torch.ones(4, dtype=torch.int64)
    for slope, clip in ((0.0, False), (-3.0, True)):
        value = diffusion.vlb(lambda x, t: slope * x, x0, ones, clip=clip, generator=seeded(3))
        x_1 = math.sqrt(BAR[1]) * x0 + math.sqrt(1 - BAR[1]) * randn(4, 3, seed=3)
        mean = (1 - slope * math.sqrt(1 - BAR[1])) * x_1 / math.sqrt(BAR[1])
        p = Normal(mean.clamp(-1, 1) if clip else mean, math.sqrt((1 - BAR[1]) / (1 - BAR[2]) * BETAS[1]))
        equal(value, -(p.cdf(x0 + 1 / 255) - p.cdf(x0 - 1 / 255)).log().sum(1), 1e-8)   # cdf differences cancel

def test_bits_per_dim_is_an_unbiased_estimate_with_its_standard_error(diffusion):
    def model(x_t, t, y):
        return exact_eps(x_t, t) + 0.1 * y[:, None]

    n, y = 20000, torch.arange(20000) % 2
    x0 = (randn(n, 2) * 40).round().clamp(-127, 127) / 127.5 + 1 / 255
    whole = sum(diffusion.vlb(model, x0, torch.full((n,), t), y) for t in range(1, T + 1)) + diffusion.prior_kl(x0)
    whole = whole / 2 / math.log(2)
    bits, error = diffusion.bits_per_dim(model, x0, y, batch_size=999)
    assert abs(bits - whole.mean()) < 5 * math.hypot(error, whole.std() / math.sqrt(n))
    again = np.std([diffusion.bits_per_dim(model, x0[i::100], y[i::100])[0] for i in range(100)])
    assert abs(again / 10 / error - 1) < 5 / math.sqrt(2 * 100)         # the error of a standard deviation
    assert error < whole.std() / math.sqrt(n) * 20                      # importance sampling works

@pytest.mark.parametrize("eta, steps, clip", [(1, None, False), (1, None, True), (0, None, False), (0.5, 6, True),
                                              (0, 7, True), (1, 1, False)])
def test_sample_is_algorithm_2_and_ddim_from_T_to_the_data(diffusion, eta, steps, clip):
    seen = []

    def model(x_t, t):
        assert not torch.is_grad_enabled() and t.shape == (5,) and t.dtype == torch.int64
        seen.append(t[0].item())
        return 2 * exact_eps(x_t, t)

    states = list(diffusion.sample(model, (5, 2), steps, eta, clip, seeded(4)))
    times = [round(T * i / (steps or T)) for i in range(steps or T, -1, -1)]
    assert seen == times[:-1] and len(states) == len(times) and torch.is_grad_enabled()
    noise = (torch.randn(5, 2, dtype=torch.float64, generator=g) for g in itertools.repeat(seeded(4)))
    x = next(noise)
    equal(states[0], x)
    for state, t, s in zip(states[1:], times, times[1:]):
        eps = 2 * exact_eps(x, torch.full((5,), t))
        x0 = (x - math.sqrt(1 - BAR[t]) * eps) / math.sqrt(BAR[t])
        if clip:
            x0 = x0.clamp(-1, 1)
            eps = (x - math.sqrt(BAR[t]) * x0) / math.sqrt(1 - BAR[t])
        sigma = eta * math.sqrt((1 - BAR[s]) / (1 - BAR[t]) * (1 - BAR[t] / BAR[s]))
        if eta == 1 and steps is None:                                  # Algorithm 2, else DDIM
            x = (x - BETAS[t - 1] / math.sqrt(1 - BAR[t]) * eps) / math.sqrt(1 - BETAS[t - 1])
        else:
            x = math.sqrt(BAR[s]) * x0 + math.sqrt(1 - BAR[s] - sigma**2) * eps
        x = x + sigma * next(noise) if s > 0 else x
        equal(state, x, 1e-8)                                           # rounding grows along the chain

def test_samples_of_gaussian_data_have_the_moments_of_the_chain(diffusion):
    *_, x0 = diffusion.sample(exact_eps, (4000, 1), clip=False, generator=seeded(1))
    var = 1.0
    for t, beta in reversed(list(enumerate(BETAS, 1))):
        var *= (1 - beta / (BAR[t] * VAR + 1 - BAR[t])) ** 2 / (1 - beta)
        var += (1 - BAR[t - 1]) / (1 - BAR[t]) * beta
    close_in_mean(x0, MEAN)
    close_in_mean((x0 - MEAN) ** 2, var)

def test_classifier_free_mixes_and_classifier_guided_follows_the_gradient(diffusion):
    def model(x_t, t, y):
        return x_t * (y[:, None] + 3)

    def log_prob(x_t, t):
        return -(x_t**2).sum(1) * t

    x, t, y = randn(T, 3), every_t(), every_t() - 1
    for s in (0, 1, 2.5):
        equal(classifier_free(model, y, s)(x, t), x * (2 + s * (y[:, None] + 1)))
        with torch.no_grad():
            guided = classifier_guided(diffusion, exact_eps, log_prob, s)(x, t)
        equal(guided, exact_eps(x, t) + s * (1 - at(BAR, t, x)).sqrt() * 2 * x * t[:, None])

ONE, X = torch.ones(2, dtype=torch.int64), torch.ones(2, 3)

@pytest.mark.parametrize("x, t, other", [(X, 0 * ONE, X), (X, (T + 1) * ONE, X), (X, ONE.int(), X), (X, ONE[:1], X),
                                         (X.byte(), ONE, X.byte()), (X, ONE, X[:, :2])])
def test_what_does_not_fit_raises_value_error(x, t, other):
    d, calls = GaussianDiffusion(torch.tensor(BETAS)), []
    calls += [(d.q_sample, x, t, other), (d.q_posterior, other, x, t), (d.predict_x0, x, t, other)]
    calls += [(d.predict_eps, x, t, other), (d.score, lambda x, t: other, x, t), (d.vlb, lambda x, t: other, x, t)]
    calls += [(GaussianDiffusion, betas) for betas in (X, X[0], 0 * X[0], X[0, :0])]
    calls += [(d.sample, exact_eps, (1,), *bad) for bad in ((0,), (T + 1,), (1, -0.1), (1, 1.1), (1, math.nan))]
    calls += [(UNet(1, 8), torch.ones(shape), ONE) for shape in ((2, 3, 8, 8), (2, 1, 6, 8), (2, 1, 8, 6), (2, 8, 8))]
    calls += [(UNet(1, 8), torch.ones(2, 1, 8, 8), ONE, ONE), (UNet, 1, 12), (UNet, 1, 0), (encode_png, [])]
    calls += [(d.q_sample, X, ONE, X.double())]
    calls += [(UNet(1, 8, 2), torch.ones(2, 1, 8, 8), ONE, y) for y in (ONE[:1], ONE.int())]
    calls += [(encode_png, frames) for frames in ([X], [X.byte(), X.byte().T], [X.byte()[0]], [X.byte()[:, :, None]])]
    for function, *arguments in calls:
        with pytest.raises(ValueError, match=r"want|need|got|lie"):
            function(*arguments)

def shaken(model):
    """The model with all parameters random, zero-initialised layers, too."""
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1 if p.dim() > 1 else 0.5)
    return model

def test_unet_keeps_shapes_starts_at_zero_and_trains_every_parameter(device):
    for channels, classes, size in ((1, 0, (28, 28)), (3, 4, (8, 12))):
        model, x, t = UNet(channels, 16, classes), torch.randn(2, channels, *size), torch.tensor([1, 1000])
        assert model(x.double(), t).dtype == torch.float64 and not model(x, t).any()
        out = shaken(model)(x, t, torch.tensor([3, -1]) if classes else None)
        assert out.shape == x.shape
        out.square().sum().backward()
        assert all(p.grad.abs().max() > 0 for p in model.parameters())

def test_unet_depends_on_t_y_and_far_pixels_but_not_on_the_rest_of_the_batch(device):
    model, x, t, y = shaken(UNet(1, 16, 3)), torch.randn(4, 1, 16, 16), torch.tensor([1, 2, 500, 999]), torch.arange(4) - 1
    out, far = model(x, t, y), x.clone()
    far[:, :, 0, 0] += 1
    alone = torch.cat([model(x[i:i + 1], t[i:i + 1], y[i:i + 1]) for i in range(4)])
    torch.testing.assert_close(alone, out, rtol=1e-3, atol=1e-3)        # float32
    for other in (model(x, t + 1, y), model(x, t), model(far, t, y)[..., 8:, 8:] , ):
        change = (other - out[..., -other.shape[2]:, -other.shape[3]:]).abs().amax((1, 2, 3))
        assert (change[1:] > 1e-4).all()
    torch.testing.assert_close(model(x, t)[0], out[0])                  # -1 is the null label

def test_ema_follows_its_recursion_with_warm_up_and_copies_buffers(device):
    model = torch.nn.BatchNorm1d(1).double()
    ema, average = EMA(model, decay=0.3), 1.0
    for n in range(9):
        model.weight.data.fill_(n)
        model.running_mean.fill_(n)
        ema.update(model)
        d = min(0.3, (1 + n) / (10 + n))
        average = d * average + (1 - d) * n
        equal(ema.model.weight, [average])
        assert ema.model.running_mean == n and not ema.model.training and not ema.model.weight.requires_grad
    assert EMA(model).decay == 0.9999

@pytest.mark.parametrize("shape", [(4, 6), (5, 3, 3)])
@pytest.mark.parametrize("n", [1, 3])
def test_png_and_animation_read_back_pixel_for_pixel(shape, n):
    frames = [np.random.default_rng(i).integers(0, 256, shape, dtype=np.uint8) for i in range(n)]
    data, i, chunks = encode_png(frames, fps=7), 8, [b"\x89PNG\r\n\x1a\n"]
    while i < len(data):
        end = i + 8 + int.from_bytes(data[i:i + 4], "big")
        kind, body = data[i + 4:i + 8], data[i + 8:end]
        assert zlib.crc32(kind + body) == int.from_bytes(data[end:end + 4], "big")
        head = 4 * (kind == b"fdAT")                                    # its sequence number
        chunks.append(kind + (body[:head] + zlib.decompress(body[head:]) if kind[1:] in (b"DAT", b"dAT") else body))
        i = end + 4
    rows = [b"".join(b"\0" + row.tobytes() for row in frame) for frame in frames]
    control = struct.pack(">IIIIHHBB", shape[1], shape[0], 0, 0, 1, 7, 0, 0)
    expected = [data[:8], struct.pack(">4sIIBBBBB", b"IHDR", shape[1], shape[0], 8, 2 * (len(shape) == 3), 0, 0, 0)]
    expected += [struct.pack(">4sII", b"acTL", n, 0), b"fcTL\0\0\0\0" + control] * (n > 1) + [b"IDAT" + rows[0]]
    for k in range(1, n):
        expected += [struct.pack(">4sI", b"fcTL", 2 * k - 1) + control, struct.pack(">4sI", b"fdAT", 2 * k) + rows[k]]
    assert chunks == [*expected, b"IEND"]
