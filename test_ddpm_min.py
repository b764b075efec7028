"""Proofs of ddpm_min.py and swiss_roll.py, trials of mnist_ddpm.py, by oracles independent of the code.
Closed forms hold to 1e-10 in float64, Monte Carlo estimates to 5 standard errors; on CUDA, too."""
import functools
import math
import os
import signal
import struct
import subprocess
import sys
import time
import zlib

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: on tensors this small threads only wait for each other
import numpy as np
import pytest
import torch
from torch.distributions import Laplace, Normal, kl_divergence
import mnist_ddpm as mnist
import swiss_roll as roll
from ddpm_min import (EMA, GaussianDiffusion, UNet, classifier_free, classifier_guided, cosine_schedule,
                      discretised_log_likelihood, encode_png, gaussian_kl, laplace_schedule, linear_schedule)

T, BETAS, ONE, X = 50, np.linspace(0.002, 0.3, 50), torch.ones(2, dtype=torch.int64), torch.ones(2, 3)
BAR = np.array([np.prod(1 - BETAS[:t]) for t in range(T + 1)])          # alpha_bar, index 0 the data
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))
SHORT = torch.tensor([0.07, 0.2, 0.4, 0.55, 0.3], dtype=torch.float64)  # betas of a chain in two dimensions
@pytest.fixture(params=["cpu", CUDA])
def diffusion(request):
    with torch.device(request.param):
        yield GaussianDiffusion(torch.tensor(BETAS))
def seeded(seed):
    return torch.Generator(torch.get_default_device()).manual_seed(seed)
def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))
def every_t():  # t = 1..T; alpha_bar_t, alpha_bar_{t-1}, beta_t as columns
    return torch.arange(1, T + 1), *(torch.tensor(v)[:, None] for v in (BAR[1:], BAR[:-1], BETAS))
def equal(a, b, tolerance=1e-10):
    a, b = (torch.as_tensor(v, dtype=torch.float64).detach().cpu() for v in (a, b))
    assert a.shape == b.shape and bool(((a - b).abs() <= tolerance * (1 + b.abs())).all()), (a, b)

def test_schedules_have_their_closed_forms_and_buffers_start_at_the_data_and_keep_float32(diffusion):
    equal(torch.cat([linear_schedule(5, 0.1, 0.5), linear_schedule()]), np.r_[0.1:0.5:5j, 1e-4:0.02:1000j])
    f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    equal(torch.cumprod(1 - cosine_schedule(), 0), np.append(f[1:1000], 0.001 * f[999]) / f[0])  # capped
    for arguments, mu, b in (((), -1.5, 1.0), ((1000, -2, 0.75), -2.0, 0.75)):
        law = Laplace(*torch.tensor([mu, b]).double())                      # of log SNR
        bar = law.icdf(torch.arange(999, 0, -1).double() / 1000).sigmoid()
        equal(torch.cumprod(1 - laplace_schedule(*arguments), 0), torch.cat([bar, bar[-1:] / 1000]))    # too
    buffers = diffusion.beta, diffusion.alpha, diffusion.alpha_bar, diffusion.one_minus_alpha_bar
    equal(torch.stack(buffers), np.stack([[0, *BETAS], [1, *1 - BETAS], BAR, 1 - BAR]))
    d, exact = GaussianDiffusion(linear_schedule().float()), 1 - np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    assert {buffer.dtype for buffer in d.buffers()} == {torch.float32} and d.alpha_bar[1000] < 1e-4
    equal(d.one_minus_alpha_bar[1:].cpu().double().numpy() / exact, np.ones(1000), 3e-7)        # float32

def test_q_sample_is_eq_4_predict_and_score_invert_it_and_q_posterior_is_eq_11_and_bayes_rule(diffusion):
    (t, bar, before, beta), x0, eps = every_t(), randn(T, 2), randn(T, 2, seed=1)
    x_t = bar.sqrt() * x0 + (1 - bar).sqrt() * eps
    equal(diffusion.q_sample(x0, t, eps), x_t)
    equal(diffusion.predict_x0(x_t, t, eps), x0)
    equal(diffusion.predict_eps(x_t, t, x0), eps)
    equal(diffusion.score(lambda x, t: eps, x_t, t), -(x_t - bar.sqrt() * x0) / (1 - bar))
    mean, var = diffusion.q_posterior(x0, x_t, t)
    equal(mean, (x_t - beta / (1 - bar).sqrt() * eps) / (1 - beta).sqrt())
    equal(var, 1 / (1 / (1 - before) + (1 - beta) / beta))                  # precisions add up; 0 at t = 1

def test_loss_is_the_squared_error_of_eps_with_t_uniform_on_1_to_T(diffusion, monkeypatch):
    def model(x_t, t, y):
        bar = torch.tensor(BAR)[t][:, None]
        errors.append(((x_t - bar.sqrt() * x0) / (1 - bar).sqrt() - x_t * y[:, None]).square().mean())
        seen.append(t)
        return x_t * y[:, None]
    seen, errors, x0, y = [], [], randn(7, 100), torch.arange(7)
    equal(torch.stack([diffusion.loss(model, x0, y) for _ in range(500)]), torch.stack(errors))
    counts = torch.bincount(torch.cat(seen), minlength=T + 1)
    assert counts[0] == 0 and ((counts[1:] - 3500 / T).abs() < 5 * math.sqrt(3500 / T)).all()
    assert all(len(t.unique()) == 7 and t.max() - t.min() > T / 2 for t in seen)        # low discrepancy
    monkeypatch.setattr(torch, "randn", functools.partial(torch.randn, device="meta"))  # x0 has one
    assert diffusion.loss(model, x0, y, seeded(5)) == diffusion.loss(model, x0, y, seeded(5))

@pytest.mark.parametrize("mean, std", [(0.1, 0.01), (-0.99, 0.05), (1.3, 0.2), (0.0, 2.0)])
def test_decoder_masses_are_cdf_differences_and_sum_to_one(diffusion, mean, std):
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    log_mass = discretised_log_likelihood(levels, *torch.tensor([mean, std**2], dtype=torch.float64))
    phi = [math.erfc((mean - edge) / std / math.sqrt(2)) / 2 for edge in (levels[:-1] + 1 / 255).tolist()]
    equal(log_mass.exp(), np.diff([0, *phi, 1]))
    assert log_mass.isfinite().all() and abs(log_mass.exp().sum() - 1) < 1e-10

@pytest.mark.parametrize("slope, clip", [(0.0, False), (-3.0, False), (-3.0, True)])
def test_vlb_is_eq_12_and_at_t_1_the_decoder_and_kl_and_prior_kl_are_those_of_torch(diffusion, slope, clip):
    (t, bar, before, beta), x0, eps = every_t(), randn(T, 3, seed=1).clamp(-0.9, 0.9), randn(T, 3, seed=3)
    terms = diffusion.vlb(lambda x, t: slope * x, x0, t, *[None, True] * clip, generator=seeded(3))
    x_t, tilde = bar.sqrt() * x0 + (1 - bar).sqrt() * eps, (1 - before) / (1 - bar) * beta
    x0_model = ((1 - (1 - bar).sqrt() * slope) * x_t / bar.sqrt()).clamp(*(-1, 1) if clip else (-1e9, 1e9))
    error = eps - (x_t - bar.sqrt() * x0_model) / (1 - bar).sqrt()
    p = Normal(x0_model[0], tilde[1].sqrt())                                # with the variance of t = 2
    equal(terms[0], -(p.cdf(x0[0] + 1 / 255) - p.cdf(x0[0] - 1 / 255)).log().sum(), 1e-8)       # cancellation
    equal(terms[1:], (beta**2 / (2 * tilde * (1 - beta) * (1 - bar)) * error**2).sum(1)[1:], 1e-9)      # too
    equal(gaussian_kl(x0, beta**2, eps, bar), kl_divergence(Normal(x0, beta), Normal(eps, bar.sqrt())))
    x_T = Normal(math.sqrt(BAR[T]) * x0, math.sqrt(1 - BAR[T]))
    equal(diffusion.prior_kl(x0.reshape(T, 3, 1)), kl_divergence(x_T, Normal(0 * x0, 1)).sum(1))

def test_bits_per_dim_is_unbiased_with_its_standard_error_and_draws_t_by_SNR(diffusion):
    def model(x_t, t, y=None):
        seen.append(t.cpu())
        return 0.5 * x_t + (0 if y is None else 0.1 * y[:, None])
    n, y, seen, snr = 10000, torch.arange(10000) % 2, [], BAR[1:7] / (1 - BAR[1:7])
    x0 = (randn(n, 2) * 40).round().clamp(-127, 127) / 127.5 + 1 / 255
    diffusion = GaussianDiffusion(diffusion.beta[1:7])                      # so few steps that L_T counts
    for clip in (False, True):
        bits, error = diffusion.bits_per_dim(model, x0, y, *[True] * clip, batch_size=999)
        terms = [diffusion.vlb(model, x0, torch.full((n,), t), y, clip) for t in range(1, 7)]
        whole = (sum(terms) + diffusion.prior_kl(x0)) / 2 / math.log(2)
        assert abs(bits - whole.mean()) < 5 * math.hypot(error, whole.std() / math.sqrt(n))
    weight = np.diff(snr) / (1 + snr[1:])
    expected = n * np.append(weight[0], weight) / (weight[0] + weight.sum())
    counts = torch.bincount(torch.cat(seen[:11]), minlength=7)[1:].numpy()               # 11 batches of 999
    assert sum(counts) == n and (abs(counts - expected) < 5 * np.sqrt(expected + 1)).all()
    again = [diffusion.bits_per_dim(model, x0[i::100], None, True)[0] for i in range(100)]
    assert abs(np.std(again) / 10 / error - 1) < 5 / math.sqrt(2 * 100)     # of a standard deviation

@pytest.mark.parametrize("eta, S, cap", [(1, None, 9e9), (1, None, 1), (0, 7, 1), (0.5, 6, 1), (1, 1, 9e9)])
def test_sample_is_algorithm_2_and_ddim_from_T_to_the_data(diffusion, eta, S, cap, monkeypatch):
    def model(x_t, t):
        assert not torch.is_grad_enabled() and t.shape == (5,) and t.dtype == torch.int64
        seen.append(t[0].item())
        return x_t / t[:, None] ** 0.5
    seen, times, draws = [], [round(T * i / (S or T)) for i in range(S or T, -1, -1)], seeded(4)
    x, *noise = [torch.randn(5, 2, dtype=torch.float64, generator=draws) for _ in times[1:]]
    monkeypatch.setattr(torch, "randn", functools.partial(torch.randn, device="meta"))  # beta has one
    options = {key: value for key, value in (("eta", eta), ("clip", cap == 1)) if value != 1}     # defaults
    first, *states = diffusion.sample(model, (5, 2), S, generator=seeded(4), **options)
    assert seen == times[:-1] and len(states) == len(seen) and torch.is_grad_enabled() and (first == x).all()
    for state, t, s, z in zip(states, times, times[1:], [*noise, 0 * x]):   # no noise enters x_0
        x0 = ((x - math.sqrt(1 - BAR[t]) * x / t**0.5) / math.sqrt(BAR[t])).clamp(-cap, cap)
        eps = (x - math.sqrt(BAR[t]) * x0) / math.sqrt(1 - BAR[t])
        sigma = eta * math.sqrt((1 - BAR[s]) / (1 - BAR[t]) * (1 - BAR[t] / BAR[s]))
        ddim = math.sqrt(BAR[s]) * x0 + math.sqrt(1 - BAR[s] - sigma**2) * eps
        algorithm_2 = (x - BETAS[t - 1] / math.sqrt(1 - BAR[t]) * eps) / math.sqrt(1 - BETAS[t - 1])
        x = (algorithm_2 if eta == 1 and S is None else ddim) + sigma * z
        equal(state, x, 1e-8)                                               # rounding grows along the chain

def test_classifier_free_mixes_and_classifier_guided_follows_the_gradient(diffusion):
    (t, bar, *_), x, y = every_t(), randn(T, 3), torch.arange(T)
    for s in (0, 1, 2.5):
        equal(classifier_free(lambda x, t, y: x * (y[:, None] + 3), y, s)(x, t), (2 + s * y[:, None] + s) * x)
    with torch.no_grad():
        eps = classifier_guided(diffusion, lambda x, t: 3 * x, lambda x, t: -(x**2).sum(1) * t, s)(x, t)
    equal(eps, 3 * x + s * (1 - bar).sqrt() * 2 * x * t[:, None])

def test_log_density_is_of_the_roll_a_finer_sum_a_histogram_and_integrates_to_1_and_to_the_ceiling():
    theta, s2 = (1.5 + 3 * (np.arange(200000) + 0.5) / 200000) * math.pi, (0.02 / roll.unit(0.02)) ** 2
    z = (theta * np.exp(1j * theta) - (theta * np.exp(1j * theta)).mean()) / roll.unit(0.02)
    equal(s2 + (abs(z) ** 2).mean() / 2, 1, 1e-8)                           # a midpoint rule, here and below
    x = np.array([z[130000] * (1 + 2 * s2**0.5 / abs(z[130000])), z[0]])       # two noise widths off, an end
    exact = np.log(np.exp(-abs(z - x[:, None]) ** 2 / (2 * s2)).mean(1) / (2 * math.pi * s2))
    equal(roll.log_density(torch.tensor(np.c_[x.real, x.imag]), 0.02), exact, torch.tensor([1e-8, 1e-3]))
    axis = (torch.arange(160, dtype=torch.float64) + 0.5) / 20 - 4
    p = roll.log_density(torch.cartesian_prod(axis, axis), 1.0).exp().reshape(160, 160) / 400
    equal(p.sum(), 1, 1e-9)                                                 # the grid's ends
    equal(roll.ceiling(1.0), (p * (p * 400).log()).sum(), 2e-3)             # its few nodes
    count = np.histogram2d(*roll.swiss_roll(200000, 1.0, seeded(2)).numpy().T, 16, [[-4, 4]] * 2)[0]
    expected = 200000 * p.reshape(16, 10, 16, 10).sum((1, 3)).numpy()
    assert (abs(count - expected) <= 5 * np.sqrt(expected) + 2).all()
    equal(roll.ceiling(0.02), -np.log(abs(np.diff(z)) * 2e5 * (2 * math.pi * math.e * s2)**0.5).mean(), 1e-5)

def test_the_schedule_has_the_odds_it_states_and_the_cap_by_beta_1_lies_above_the_ceiling():
    s2, odds = (0.02 / roll.unit(0.02)) ** 2, 1 / torch.cumprod(1 - roll.schedule(0.02), 0) - 1
    growth = torch.log(s2 + odds[:37]).diff()
    equal(growth, growth.mean().expand(36), 1e-9)                           # odds lose digits
    equal(torch.log(odds[36:] / 0.5) / math.log(300), [0, 1 / 9, 4 / 9, 1], 1e-9)
    equal(odds[0] / s2, 0.001, 1e-9)
    assert len(odds) == roll.T == 40 and roll.schedule(0.02)[0] < 2**-2.73 / (2 * math.pi * math.e)

@pytest.mark.parametrize("v", [[1.0, 1.0], [1.7, 0.3, 1.0]])
def test_K_is_minus_H_for_normal_data_and_less_by_edge_and_prior_KL_for_unequal_variances(v):
    def exact(x, t):                                                        # p(x^{t-1} | x^t) of N(0, diag v)
        gain = torch.tensor(c[t - 1] / c[t])[:, None]
        return (1 - SHORT[t - 1, None, None]).sqrt() * gain * x, SHORT[t - 1, None, None] * gain
    bar, b, v = np.cumprod(np.append(1, 1 - SHORT))[:, None], SHORT[0].item(), np.array(v)
    c = bar * v + 1 - bar                                                   # Var x^t
    var, slope = v * b / c[1], math.sqrt(1 - b) * (v / c[1] - 1)            # q(x^0 | x^1)
    edge = (np.log(b / var) + (var + slope**2 * c[1]) / b - 1).sum() / 2
    rule = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(3))     # exact for squares
    nodes, weight = (torch.cartesian_prod(*[a] * 2 * len(v)) for a in rule)
    x0, eps = nodes[:, :len(v)] * torch.tensor(v).sqrt(), nodes[:, len(v):].repeat(4, 1, 1)
    K = weight.prod(1) / weight.prod(1).sum() @ roll.bound(x0, GaussianDiffusion(SHORT), exact, eps)
    equal(K, -np.log(2 * math.pi * math.e * v).sum() / 2 - edge - (c[-1] - 1 - np.log(c[-1])).sum() / 2)

def test_f_mu_is_the_posterior_mean_at_a_guess_and_f_Sigma_spans_the_entropies_of_Eq_24():
    x, guess, place = randn(4, 3, 2), torch.tensor([[0.5, -2.0]] * 3).double(), torch.tensor([[0], [1], [2]])
    beta, bar = SHORT[1:, None, None], torch.cumprod(1 - SHORT, 0)[:, None, None]
    out = torch.cat([guess, 50.0 * (place - 1).expand(3, 2)], 1).expand(4, 3, 4)
    mean, var = roll.reverse_process(lambda x, t: out, GaussianDiffusion(SHORT))(x, torch.arange(2, 6))
    upper, lower = beta.log(), (beta * (1 - bar[:-1]) / (1 - bar[1:])).log()    # Eq. 24, less a constant
    equal(mean, (1 - beta).sqrt() * x + bar[:-1].sqrt() * beta / (1 - bar[1:] + 1000 * SHORT[0]) * guess)
    equal(var.log(), (lower + place * (upper - lower)).expand(4, 3, 2))

def test_sampling_the_roll_runs_t_from_T_to_2_and_ends_with_the_edge_step():
    d, draws = GaussianDiffusion(SHORT), seeded(4)
    states = roll.sample(lambda x, t: (0.3 * x + t, 0.04 * t.double()[:, None, None]), d, 3, seeded(4))
    for state, t in zip(states, (6, 5, 4, 3, 2, 1), strict=True):
        z = torch.randn(3, 2, generator=draws).double()
        x = z if t == 6 else 0.3 * x + t + 0.2 * t**0.5 * z if t > 1 else 0.93**0.5 * x + 0.07**0.5 * z
        equal(state, x)

@pytest.mark.parametrize("learn", [False, True])
def test_training_keeps_K_below_the_ceiling_and_moves_beta_2_to_T_if_they_are_learned(learn):
    d = roll.train(net := roll.MLP(seeded(7)), 0.1, 60, learn, seeded(8), "cpu")
    K = roll.bound(roll.swiss_roll(2000, 0.1), d, roll.reverse_process(net, d), torch.randn(39, 2000, 2))
    assert -3 < K.mean() < roll.ceiling(0.1) + K.std() / 2000**0.5
    moved = (d.beta[1:] / roll.schedule(0.1) - 1).abs()
    assert moved[0] < 1e-6 and (moved[1:] > 1e-4).any() == learn

@pytest.mark.parametrize("channels, size", [(1, (28, 28)), (3, (16, 20))])
def test_unet_starts_at_zero_and_depends_on_t_y_all_pixels_but_not_on_the_batch(diffusion, channels, size):
    model, x = UNet(channels, 16, 3), torch.randn(4, channels, *size)
    t, y = torch.tensor([1, 2, 500, 999]), torch.arange(4) - 1
    assert model(x.double(), t).dtype == torch.float64 and not model(x, t).any()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1 if p.dim() > 1 else 0.5)
    out, free, moved = model(x, t, y), model(x, t), model(x + (x == x[:, :, :1, :1]), t, y)     # one pixel
    alone = torch.cat([model(x[i:i + 1], t[i:i + 1], y[i:i + 1]) for i in range(4)])
    torch.testing.assert_close(torch.cat([alone, free[:1]]), torch.cat([out, out[:1]]), rtol=1e-3, atol=1e-3)
    for change in (model(x, t + 1, y) - out, (free - out)[1:], (moved - out)[..., 8:, 8:]):
        assert (change.abs().amax((1, 2, 3)) > 1e-4).all()
    out.square().sum().backward()
    assert out.shape == x.shape and all(p.grad.any() for p in model.parameters())

def test_ema_follows_its_recursion_with_warm_up_and_copies_buffers(diffusion):
    model = torch.nn.BatchNorm1d(1).double()
    ema, average = EMA(model, decay=0.3), 1.0
    for n in range(9):
        model.weight.data[0] = model.running_mean[0] = n
        ema.update(model)
        average += (1 - min(0.3, (1 + n) / (10 + n))) * (n - average)
        equal(ema.model.weight, [average])
    assert EMA(model).decay == 0.9999 and ema.model.running_mean == n
    assert not ema.model.training and not ema.model.weight.requires_grad

@pytest.mark.parametrize("shape, n", [((4, 6), 1), ((5, 3, 3), 1), ((4, 6), 3)])
def test_png_and_animation_read_back_pixel_for_pixel(shape, n):
    frames, size = np.random.default_rng(0).integers(0, 256, (n, *shape), np.uint8), shape[1::-1]
    data, i, chunks = encode_png(list(frames), fps=7), 8, []
    while i < len(data):
        end = i + 8 + int.from_bytes(data[i:i + 4], "big")
        kind, body, head = data[i + 4:i + 8], data[i + 8:end], 4 * (data[i + 4:i + 8] == b"fdAT")
        assert zlib.crc32(kind + body) == int.from_bytes(data[end:end + 4], "big")
        pixels = zlib.decompress(body[head:]) if kind in (b"IDAT", b"fdAT") else body[head:]
        chunks, i = [*chunks, kind + body[:head] + pixels], end + 4
    expected = [b"IHDR" + struct.pack(">II5B", *size, 8, 2 * len(shape) - 4, 0, 0, 0)]
    expected += [struct.pack(">4sII", b"acTL", n, 0)] * (n > 1)
    for k, frame in enumerate(frames):
        expected += [struct.pack(">4s5IHHBB", b"fcTL", max(0, 2 * k - 1), *size, 0, 0, 1, 7, 0, 0)] * (n > 1)
        kind = struct.pack(">4sI", b"fdAT", 2 * k) if k else b"IDAT"
        expected.append(kind + b"".join(b"\0" + row.tobytes() for row in frame))
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and chunks == [*expected, b"IEND"]

@pytest.mark.parametrize("x, t, other", [(X, 0 * ONE, X), (X, (T + 1) * ONE, X), (X, ONE.int(), X),
                                         (X, ONE[:1], X), (X.byte(), ONE, X.byte()), (X, ONE, X[:, :2])])
def test_what_does_not_fit_raises_value_error(x, t, other):
    d, image, byte, net = GaussianDiffusion(SHORT.repeat(10)), torch.ones(2, 1, 8, 8), X.byte(), UNet(1, 8, 2)
    calls = [(f, x, t, other) for f in (d.q_sample, d.predict_x0, d.predict_eps)]
    calls += [(f, lambda x, t: other, x, t) for f in (d.score, d.vlb)] + [(d.q_sample, X, ONE, X.double())]
    calls += [(net, image, ONE, ONE[:1]), (net, image, ONE, ONE.int()), (UNet, 1, 12), (UNet, 1, 0)]
    calls += [(GaussianDiffusion, betas) for betas in (X, X[0], 0 * X[0], X[0, :0])]
    calls += [(d.sample, None, (1,), *bad) for bad in ((0,), (T + 1,), (1, -0.1), (1, 1.1))]
    calls += [(net, torch.ones(2, *s), ONE) for s in ((3, 8, 8), (1, 6, 8), (1, 8, 6), (8, 8))]
    calls += [(encode_png, frames) for frames in ([], [X], [byte, byte.T], [byte[0]], [byte[:, :, None]])]
    for function, *arguments in [*calls, (d.q_posterior, other, x, t), (roll.unit, 0), (roll.unit, math.inf)]:
        pytest.raises(ValueError, function, *arguments).match("want|need|got|lie")

def write_data(path, **arrays):
    x, y = np.random.default_rng(0).integers(0, 256, (64, 8, 8), dtype=np.uint8), np.arange(64) % 10
    np.savez(path, **{"x_train": x, "y_train": y, **arrays})
    return ["--data", str(path), "--width", "8", "--batch-size", "8", "--device", "cpu"]

@pytest.mark.parametrize("program, options, says, arrays", [
    (mnist, "", "(64, 6, 8)", {"x_train": np.zeros((64, 6, 8), np.uint8)}), (roll, "--noise nan", "nan", {}),
    (mnist, "--conditional", "0..999", {"y_train": -np.arange(64)}), (mnist, "--resume", "out/model.pt", {}),
    (mnist, "", "float64", {"x_train": np.zeros((64, 8, 8))}), (mnist, "--resume --out .", "./model.pt", {}),
    (mnist, "--data missing.npz", "missing.npz", {}), (mnist, "--sample 2 --steps 1001", "1001", {}),
    (mnist, "--out model.pt/x", "model.pt/x", {}), (roll, "--out model.pt/x", "model.pt/x", {}),
    (mnist, "", "d.npz", {"x_train": [None]}), (mnist, "--batch-size 65", "64", {}),
    (mnist, "--width 12", "12", {}), (mnist, "--lr nan", "nan", {}), (roll, "--steps 0", "0", {})])
def test_bad_input_gets_one_line_and_code_2(program, options, says, arrays, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.pt").write_bytes(b"cos\nmkdir\n(S'ran'\ntR.")        # a pickle that makes a folder
    with pytest.raises(SystemExit, match="2"):
        program.main(write_data("d.npz", **arrays) * (program is mnist) + options.split())
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and says in error and len(os.listdir()) == 2

def test_resume_after_sigint_and_sigkill_ends_in_the_very_same_state_and_pictures(tmp_path, monkeypatch):
    def loss(self, model, x0, *rest, loss=GaussianDiffusion.loss):
        equal(torch.stack(x0.aminmax()), [-1, 1], 0.1)                      # the images are in [-1, 1]
        return loss(self, model, x0, *rest)
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "b" / "model.pt"
    monkeypatch.setattr(torch, "load", functools.partial(torch.load, map_location="meta"))      # it names one
    data = [*write_data("d.npz"), "--conditional", "--epochs", "8", "--out"]
    for number, code, resume in ((signal.SIGINT, 130, []), (signal.SIGKILL, -signal.SIGKILL, ["--resume"])):
        process = subprocess.Popen([sys.executable, mnist.__file__, *data, "b", *resume])
        while process.poll() is None and not (model.exists() and model.stat().st_mtime):
            time.sleep(0.01)                                                # it saves first when it starts
        time.sleep(0.1)
        process.send_signal(number)
        assert process.wait() == code
        os.utime(model, (0, 0))
    assert 0 < torch.load(model, map_location="cpu")["step"] < 64
    mnist.main([*data, "b", "--resume"])
    monkeypatch.setattr(GaussianDiffusion, "loss", loss)
    mnist.main([*data, "a"])
    a, b = (torch.load(f"{folder}/model.pt", map_location="cpu") for folder in "ab")
    assert a["step"] == 64 and a.pop("config") == b.pop("config")
    torch.testing.assert_close(a, b, rtol=0, atol=0)                        # model, EMA, optimisers, ...
    a, b = ([file.read_bytes() for file in sorted((tmp_path / name).glob("*.png"))] for name in "ab")
    assert a == b and len(a) == 2                                           # samples, denoising
    monkeypatch.setattr(UNet, "forward", lambda self, x, t, y: 1.1060 * x)  # at t = 500 eps of x0 = 0: grey
    mnist.main("--out a --sample 3 --label 9 --steps 2 --npz x.npz".split())
    equal(np.load("x.npz")["x"], np.full((3, 8, 8), 127.5), 1 / 128)
