"""ddpm_min.py at the edge of what it takes: the right answer, or one ValueError, short,
that names the argument."""
import math
from functools import partial

import numpy as np
import pytest
import torch

from ddpm_min import (GaussianDiffusion, classifier_free, cosine_schedule,
                      laplace_schedule, linear_schedule)
from test_ddpm_min import seeded

assert_close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
X = torch.ones(2, 3)
ONES = torch.ones(2, dtype=torch.int64)         # as t, and as y
TINY = torch.tensor([0.1, 1e-50, 0.1], dtype=torch.float64)
D = GaussianDiffusion(torch.full((5,), 0.1))
HALVED = GaussianDiffusion(cosine_schedule()).bfloat16()
CHAIN_OF_1 = GaussianDiffusion(torch.tensor([0.5]))


def same(x, t, y=None):
    """A model that takes x_t for eps."""
    return x


def pair(x, t):
    """A model that returns more than eps."""
    return x, t


def short(x, t):
    """A model whose eps would broadcast."""
    return x[:1]


@pytest.mark.parametrize(
    "schedule", [linear_schedule, cosine_schedule, laplace_schedule])
@pytest.mark.parametrize("T", [1, np.int64(2), 1000])
def test_any_T(schedule, T):
    """T betas, with which a chain runs from T to 0."""
    diffusion = GaussianDiffusion(schedule(T))

    states = list(diffusion.sample(same, (1, 1), min(T, 3)))

    assert diffusion.T == T
    assert len(states) == min(T, 3) + 1 and states[-1].isfinite()


def test_float16():
    """The roots are taken in float32: alpha_bar_T = 2.4e-9 is no 0, and no NaN."""
    diffusion = GaussianDiffusion(cosine_schedule())
    x_t, t = torch.full((2, 3), 0.5).half(), torch.tensor([1, 1000])

    ours = diffusion.predict_eps(x_t, t, diffusion.predict_x0(x_t, t, 0.9 * x_t))

    assert ours.dtype == torch.float16
    assert_close(ours, 0.9 * x_t, rtol=0.01, atol=0.01)
    assert diffusion.p_sample(same, x_t, 1000).isfinite().all()


def test_numbers_of_numpy():
    """They are taken for what they are."""
    bits = partial(D.bits_per_dim, same, X)

    assert_close(laplace_schedule(b=np.float32(0.5)), laplace_schedule(b=0.5))
    ours = bits(batch_size=np.int64(2), generator=seeded(7, "cpu"))
    assert ours == bits(batch_size=2, generator=seeded(7, "cpu"))


def test_bits_per_dim_clips():
    """By default, as p_sample does."""
    def bits(**options):
        return D.bits_per_dim(same, 9 * X, generator=seeded(8, "cpu"), **options)

    assert bits() == bits(clip=True) != bits(clip=False)


def test_compiled_loss():
    """torch.compile takes the loss as one graph."""
    compiled = torch.compile(D.loss, backend="eager", fullgraph=True)

    assert compiled(same, X).isfinite()


@pytest.mark.parametrize("name, call, arguments", [
    ("T", linear_schedule, (0,)),
    ("T", linear_schedule, (True,)),
    ("T", cosine_schedule, (2.5,)),
    ("T", laplace_schedule, (ONES,)),
    ("beta_T", linear_schedule, (9, 0.1, 2.2)),
    ("s", cosine_schedule, (9, ONES)),
    ("b", laplace_schedule, (9, 0, 0)),
    ("mu", laplace_schedule, (9, math.nan)),
    ("betas", GaussianDiffusion, (0 * X[0],)),
    ("betas", GaussianDiffusion, (X[0],)),
    ("betas", GaussianDiffusion, (math.nan * X[0],)),
    ("betas", GaussianDiffusion, (0.1 * X,)),
    ("betas", GaussianDiffusion, ([0.1],)),
    ("betas", GaussianDiffusion, (X[0, :0],)),
    ("betas", GaussianDiffusion, (TINY,)),                  # beta_2 = 0 in float32
    ("betas", GaussianDiffusion, (linear_schedule(50_000),)),   # alpha_bar_T = 0
    ("schedule", GaussianDiffusion, (0.1 * X[0], torch.float16)),
    ("schedule", HALVED.loss, (same, X)),
    ("schedule", HALVED.prior_kl, (X,)),
    ("schedule", HALVED.p_sample, (same, X, 5)),
    ("t", D.q_sample, (X, 0 * ONES, X)),
    ("t", D.q_sample, (X, 6 * ONES, X)),                    # T = 5
    ("t", D.q_sample, (X, ONES.int(), X)),
    ("t", D.q_posterior, (X, X, ONES[:1])),
    ("t", D.predict_x0, (X, 1, X)),
    ("t", D.score, (same, X, [1, 1])),
    ("t", D.signal_noise, (0 * ONES, X)),
    ("eps", D.predict_x0, (X, ONES, X[:, :2])),
    ("eps", D.q_sample, (X, ONES, X[:, :1])),
    ("eps", D.q_sample, (X, ONES, 0.0)),
    ("x0", D.predict_eps, (X, ONES, X[:1])),
    ("x0", D.q_posterior, (X[0], X, ONES)),
    ("x0", D.loss, (same, X.byte())),
    ("x0", D.loss, (same, X[:0])),
    ("x0", D.loss, (same, X.tolist())),
    ("x0", D.loss, (same, X[0, 0])),
    ("x0", D.prior_kl, (np.ones(3),)),
    ("x0", D.vlb, (same, X.half(), ONES)),
    ("T", CHAIN_OF_1.vlb, (same, X, ONES)),
    ("T", CHAIN_OF_1.bits_per_dim, (same, X)),
    ("N", D.bits_per_dim, (same, X[:1])),
    ("x0", D.bits_per_dim, (same, [1, 2])),
    ("y", D.bits_per_dim, (same, X, ONES[:1])),
    ("batch_size", D.bits_per_dim, (same, X, None, True, 0)),
    ("model", D.loss, (pair, X)),
    ("model", D.score, (short, X, ONES)),
    ("steps", D.times, (1.5,)),
    ("steps", D.times, (6,)),
    ("steps", D.times, (ONES,)),
    ("t", D.p_sample, (same, X, 0)),
    ("t", D.p_sample, (same, X, ONES)),
    ("t_prev", D.p_sample, (same, X, 2, 2)),
    ("x_t", D.p_sample, (same, X.int(), 2)),
    ("eta", D.p_sample, (same, X, 2, 1, 1.1)),
    ("eta", D.p_sample, (same, X, 2, 1, X)),
    ("y", classifier_free, (same, ONES.byte(), 2)),         # has no -1
    ("s", classifier_free(same, ONES, X), (X, ONES))])
def test_refuses(name, call, arguments):
    """A ValueError, short, that names what does not fit."""
    with pytest.raises(ValueError, match=rf"\b{name}\b") as error:
        call(*arguments)
    assert len(str(error.value)) < 120


@pytest.mark.parametrize("shape", [(), (0, 3), (3, 0)])
def test_refuses_shapes(shape):
    """sample wants at least one point, and at least one number in it."""
    with pytest.raises(ValueError, match="shape"):
        list(D.sample(same, shape))
