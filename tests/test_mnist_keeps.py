"""Trials of mnist_ddpm.py: nothing is lost, and the process stays as it was."""
import os
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ddpm_min as ddpm
import mnist_ddpm as mnist
import program
from test_mnist_ddpm import (data, folder, raise_error, refusal, saved,  # noqa: F401
                             train)

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}     # as in this process


def test_resumed_equals_uninterrupted():
    """Two Ctrl-C, SIGTERM, kill -9, each resumed: state and pictures bit for bit."""
    command = [sys.executable, mnist.__file__, *data(), "--conditional"]
    command += ["--epochs", "20"]
    model = Path("b/model.pt")
    start = partial(subprocess.Popen, env=ONE_THREAD, stdout=subprocess.PIPE)
    codes = []

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        resume = ["--resume"] if model.exists() else []
        process = start([*command, "--out", "b", *resume])
        process.stdout.readline()               # step 0/160, as it begins
        time.sleep(0.1)
        process.send_signal(number)
        time.sleep(0.04)
        process.send_signal(number)
        codes.append(process.wait())
    reached = saved(model)["step"]
    mnist.main([*command[2:], "--out", "b", "--resume"])
    mnist.main([*command[2:], "--out", "a"])

    assert codes[0] in (130, -2) and codes[1] in (143, -15) and codes[2] == -9
    assert 0 < reached < 160
    a, b = saved("a/model.pt"), saved("b/model.pt")
    assert a.pop("config") == b.pop("config")
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    for name in ("samples.png", "denoising.png"):
        assert Path("a", name).read_bytes() == Path("b", name).read_bytes()


def test_lost_standard_output_loses_no_step():
    """With standard output on a full disk the checkpoint is written all the same."""
    command = [sys.executable, mnist.__file__, *data(), "--epochs", "1", "--out", "o"]

    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE)

    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1
    assert saved("o/model.pt")["step"] == 8 and Path("o/denoising.png").exists()


@pytest.mark.parametrize("error", [
    OSError(28, "full"), BrokenPipeError(), ValueError("closed file"),
    UnicodeEncodeError("cp1252", "\u6570", 0, 1, "no such letter")])
def test_no_message_ends_the_program(error):
    """Whatever printing raises, say returns."""
    stream = SimpleNamespace(write=partial(raise_error, error), flush=print)

    mnist.say("a message", stream)


def test_main_leaves_the_process_as_it_was(monkeypatch):
    """Called from a notebook: stdout that only writes, float64 by default, a generator
    in use. All stays, and the weights are those of a plain call."""
    plain = train()["model"]
    stream = SimpleNamespace(write=len, flush=list)
    torch.manual_seed(5)
    monkeypatch.setattr(sys, "stdout", stream)
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    torch.backends.cuda.enable_cudnn_sdp(True)

    def state():
        return (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM),
                torch.get_rng_state().tolist(), torch.get_default_dtype(),
                torch.backends.cudnn.deterministic, torch.get_num_threads(),
                torch.backends.cuda.cudnn_sdp_enabled(), list(warnings.filters))

    before = state()
    try:
        ours = train("--epochs", "0.25", "--overwrite")["model"]
        after = state()
    finally:
        torch.set_default_dtype(torch.float32)

    assert after == before and sys.stdout is stream
    torch.testing.assert_close(ours, plain, rtol=0, atol=0)


def test_ctrl_c_ends_the_last_pictures(monkeypatch):
    """When the run is saved Ctrl-C ends the program at once, with exit code 130."""
    monkeypatch.setattr(mnist, "draw_pictures", lambda *_: signal.raise_signal(2))

    with pytest.raises(SystemExit) as error:
        train()

    assert error.value.code == 130 and saved("o/model.pt")["step"] == 2


def test_finished_model_is_kept(capsys):
    """A new run into the folder of another is refused; --overwrite replaces it."""
    train()
    before = Path("o/model.pt").read_bytes()

    line = refusal(capsys, *data(), "--out", "o")
    kept = Path("o/model.pt").read_bytes()
    train("--epochs", "0.25", "--overwrite", "--seed", "1")

    assert "--resume" in line and "--overwrite" in line and "--out" in line
    assert kept == before != Path("o/model.pt").read_bytes()


def test_full_disk_keeps_the_old_file(monkeypatch):
    """write_file replaces a file whole or, if the disk is full, not at all."""
    path = Path("f")
    mnist.write_file(path, b"old")
    full = partial(raise_error, OSError(28, "full"))
    monkeypatch.setattr(program.os, "replace", full)

    with pytest.raises(OSError, match="full: 'f'"):
        mnist.write_file(path, b"new")

    assert path.read_bytes() == b"old" and os.listdir() == ["f"]


def fail_at(calls, function):
    """A stand-in for a function that finds the disk full at these of its calls."""
    count = iter(range(1000))

    def stand_in(*args):
        if next(count) in calls:
            raise OSError(28, "No space left on device", str(args[0]))
        return function(*args)

    return stand_in


def test_room_for_two_checkpoints_shows_before_a_model_is_replaced(monkeypatch, capsys):
    """One is written beside the other. Without room, after one step, the run ends and
    the model that it was to replace stays."""
    train()
    before = Path("o/model.pt").read_bytes()
    monkeypatch.setattr(program, "write_file", fail_at([0], program.write_file))

    command = [*data(), "--out", "o", "--epochs", "0.25", "--overwrite"]
    line = refusal(capsys, *command)

    assert "o/model.pt" in line and Path("o/model.pt").read_bytes() == before


def test_sigterm_while_sampling_leaves_no_file():
    """The exit code is 143."""
    train()
    before = sorted(os.listdir("o"))
    command = [sys.executable, mnist.__file__, "--out", "o", "--sample", "100000"]
    process = subprocess.Popen(command, env=ONE_THREAD, stdout=subprocess.PIPE)

    process.stdout.readline()
    process.terminate()

    assert process.wait() == 143
    assert sorted(os.listdir("o")) == before


@pytest.mark.parametrize("part, key", [
    (None, "average"), ("config", "schedule"), ("config", "labels"),
    ("optimiser", "state")])
def test_a_checkpoint_that_misses_a_key(part, key, capsys):
    """Is said to be unreadable, and stays."""
    state = train()
    del (state if part is None else state[part])[key]
    torch.save(state, "o/model.pt")

    line = refusal(capsys, "--out", "o", "--resume")

    assert line.startswith("cannot read o/model.pt") and key in line


def test_training_goes_on_with_a_full_disk(monkeypatch, capsys):
    """Later saves that fail are a warning; the last one waits for room."""
    clock = iter(range(0, 10**6, 200))          # each look at it 200 seconds on
    monkeypatch.setattr(mnist.time, "perf_counter", partial(next, clock))
    monkeypatch.setattr(mnist, "write_file", fail_at([1, 2, 3], mnist.write_file))
    monkeypatch.setattr(mnist.time, "sleep", lambda seconds: None)

    state = train("--epochs", "0.25")

    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all("o/model.pt" in line for line in lines)
    assert state["step"] == 2 and Path("o/samples.png").exists()


def test_a_signal_ends_the_wait_for_room(monkeypatch, capsys):
    """What is on the disk stays, and --resume goes on there."""
    monkeypatch.setattr(mnist, "write_file", fail_at(range(1, 99), mnist.write_file))
    monkeypatch.setattr(mnist.time, "sleep", lambda _: signal.raise_signal(15))

    with pytest.raises(SystemExit) as error:
        train()

    assert error.value.code == 143 and "--resume" in capsys.readouterr().err
    assert saved("o/model.pt")["step"] == 1


def nan_from(step, monkeypatch):
    """Make the loss NaN from this step on, counted from 0."""
    count, loss = iter(range(1000)), ddpm.GaussianDiffusion.loss

    def stand_in(*args):
        return loss(*args) * (1 if next(count) < step else torch.nan)

    monkeypatch.setattr(ddpm.GaussianDiffusion, "loss", stand_in)


def test_weights_that_are_not_finite_are_not_saved(monkeypatch, capsys):
    """A loss of NaN ends the run; the checkpoint keeps the state before, and its
    settings until new ones have worked. --resume with a lower --lr goes on."""
    with monkeypatch.context() as context:
        nan_from(1, context)
        line = refusal(capsys, *data(), "--out", "o", "--epochs", "0.25")
        nan_from(0, context)
        refusal(capsys, "--out", "o", "--resume", "--lr", "10", "--device", "cpu")
    kept = saved("o/model.pt")
    state = train("--resume", "--lr", "1e-4")

    assert "--resume" in line and "--lr" in line
    assert kept["step"] == 1 and kept["config"]["lr"] == 2.5e-3
    assert state["step"] == 2 and state["config"]["lr"] == 1e-4


def test_a_finished_model_that_trains_on_is_kept():
    """Before other settings continue a run its checkpoint is copied."""
    train()

    train("--resume")
    same = sorted(os.listdir("o"))
    before = Path("o/model.pt").read_bytes()
    state = train("--resume", "--epochs", "0.5")

    assert "model-2.pt" not in same and state["step"] == 4
    assert Path("o/model-2.pt").read_bytes() == before


def test_only_its_own_file_is_replaced(monkeypatch, capsys):
    """A run whose checkpoint another program has replaced ends and leaves it alone."""
    step = mnist.train_step

    def replace(run, *args):
        if run.step == 1:
            mnist.write_file(Path("o/model.pt"), b"of another program")
        return step(run, *args)

    monkeypatch.setattr(mnist, "train_step", replace)
    line = refusal(capsys, *data(), "--out", "o", "--epochs", "0.25")

    assert "another program" in line
    assert Path("o/model.pt").read_bytes() == b"of another program"


def test_data_of_the_same_shape_are_told_apart(capsys):
    """By a checksum of images and labels, which older checkpoints lack."""
    state = train("--conditional", "--epochs", "0.125")
    x = np.zeros((64, 8, 8), np.uint8)
    line = refusal(capsys, *data(x_train=x), "--out", "o", "--resume")
    y = np.arange(64)[::-1] % 10
    refusal(capsys, *data(y_train=y), "--out", "o", "--resume")
    del state["config"]["crc"]
    torch.save(state, "o/model.pt")

    assert "--data" in line
    assert train("--resume", "--epochs", "0.25")["step"] == 2


@pytest.mark.parametrize("full", ["o/x.npz", "o/samples.png"])
def test_room_is_looked_for_before_drawing(monkeypatch, capsys, full):
    """A place without room for one of the two files ends --sample at once."""
    train()
    write = program.write_file

    def write_where_there_is_room(path, data):
        if str(path).startswith(full):
            raise OSError(28, "No space left on device", str(path))
        write(path, data)

    monkeypatch.setattr(program, "write_file", write_where_there_is_room)
    monkeypatch.setattr(mnist, "draw", None)
    line = refusal(capsys, "--out", "o", "--sample", "3", "--npz", "o/x.npz")

    assert full in line and ".room" not in line


def test_config_and_average_are_enough_to_sample(capsys):
    """Also in float16, as small files have them; --resume refuses such a file."""
    state = train("--conditional", "--epochs", "0.25")
    average = {name: value.half() if value.is_floating_point() else value
               for name, value in state["average"].items()}
    torch.save({"config": state["config"], "average": average}, "o/model.pt")

    mnist.main("--out o --sample 3 --steps 2 --label 1".split())
    mnist.main("--out o --evaluate".split())
    run = mnist.load_run(Path("o/model.pt"), torch.device("cpu"))
    line = refusal(capsys, "--out", "o", "--resume")

    assert "sample" in line
    for name, value in run.average.state_dict().items():
        assert value.dtype == state["average"][name].dtype
        torch.testing.assert_close(value, state["average"][name], rtol=1e-3, atol=1e-7)


def test_moments_take_the_layout_of_the_weights():
    """A checkpoint of a device with other strides goes on as it would have there."""
    state = train("--epochs", "0.25")
    for moments in state["optimiser"]["state"].values():
        for name in ("exp_avg", "exp_avg_sq"):
            moments[name] = moments[name].contiguous()
    torch.save(state, "moved.pt")

    ends = []
    for path in ("o/model.pt", "moved.pt"):
        run = mnist.load_run(Path(path), torch.device("cpu"))
        run.config["total"] = 100
        mnist.train_step(run, torch.zeros(64, 1, 8, 8, dtype=torch.uint8), None)
        ends.append(run.model.state_dict())

    torch.testing.assert_close(*ends, rtol=0, atol=0)
