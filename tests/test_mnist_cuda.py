"""Trials of mnist_ddpm.py on CUDA, and of what leads there with a stand-in for it."""
import copy
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import mnist_ddpm as mnist
from test_mnist_ddpm import (data, folder, raise_error, refusal, saved,  # noqa: F401
                             small_run)

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")


@pytest.mark.parametrize("labels, arguments", [([], 2), ([3, 5], 3)])
def test_capture_gets_what_the_loss_passes(monkeypatch, labels, arguments):
    """A stand-in for CUDA: the graph's arguments have the shapes and types of those
    that a step passes, no cache of weights; the average is a network of its own."""
    run = small_run(labels=labels)
    seen = []

    def stand_in(model, args):
        assert not torch.is_autocast_cache_enabled()
        assert model is run.model

        def graph(*now):
            seen.extend(zip(args, now, strict=True))
            return model(*now)

        return graph

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", stand_in)
    mnist.capture(run)
    x = torch.zeros(64, 1, 8, 8, dtype=torch.uint8)
    mnist.train_step(run, x, torch.zeros(64, dtype=torch.int64) if labels else None)

    assert len(seen) == arguments
    for captured, passed in seen:
        assert (captured.shape, captured.dtype) == (passed.shape, passed.dtype)
        assert captured.requires_grad == passed.requires_grad
    assert torch.is_autocast_cache_enabled() and run.average.module is not run.model


def test_training_on_cuda_is_captured(monkeypatch):
    """train calls capture where the device is CUDA, before the first step."""
    run = small_run()
    run.device = SimpleNamespace(type="cuda")
    monkeypatch.setattr(mnist, "capture", partial(raise_error, StopIteration()))

    with pytest.raises(StopIteration):
        mnist.train(run, None, None, Path("o/model.pt"))


@cuda
@pytest.mark.parametrize("labels", [[], [3, 5]])
def test_captured_network_has_the_gradients_of_the_plain_one(labels):
    """From the same random numbers, up to the rounding of bfloat16."""
    run = small_run("cuda", labels=labels)
    torch.nn.init.normal_(run.model.out.weight)
    plain = copy.deepcopy(run.model)
    x0 = torch.randn(8, 1, 8, 8, device="cuda")
    y = torch.tensor([-1, 0, 1, 1] * 2, device="cuda") if labels else None
    mnist.capture(run)

    for network in (run.network, run.autocast()(plain.forward)):
        generator = torch.Generator("cuda").manual_seed(1)
        run.diffusion.loss(network, x0, y, generator).backward()

    for ours, expected in zip(run.model.parameters(), plain.parameters()):
        scale = expected.grad.abs().max().item()
        torch.testing.assert_close(ours.grad, expected.grad, rtol=0, atol=0.02 * scale)


@cuda
@pytest.mark.parametrize("options", [[], ["--conditional"]])
def test_resumed_on_cuda_equals_uninterrupted(monkeypatch, options):
    """Interrupted after three of eight steps, the same weights bit for bit."""
    command = [*data(), "--device", "cuda", "--epochs", "1", *options]
    step = mnist.train_step

    def interrupt(run, *args):
        if run.step == 2:
            signal.raise_signal(signal.SIGINT)
        return step(run, *args)

    mnist.main([*command, "--out", "a"])
    with monkeypatch.context() as context, pytest.raises(SystemExit):
        context.setattr(mnist, "train_step", interrupt)
        mnist.main([*command, "--out", "b"])
    assert saved("b/model.pt")["step"] == 3
    mnist.main([*command, "--out", "b", "--resume"])

    a, b = saved("a/model.pt"), saved("b/model.pt")
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@cuda
def test_a_full_gpu_is_one_line(capsys):
    """A batch that no GPU holds."""
    x = np.zeros((200_000, 64, 64), np.uint8)

    line = refusal(capsys, *data(x_train=x), "--device", "cuda", "--width", "512",
                   "--batch-size", "200000")

    assert "--batch-size" in line and "--width" in line
