"""The ten promises of mnist_ddpm.py (1 to 10), and what it learns from and draws."""
import os
import pickle
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import mnist_ddpm as mnist

CPU = torch.device("cpu")
saved = partial(torch.load, weights_only=True)          # what a checkpoint holds
X = np.zeros((64, 8, 8), np.uint8)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def data(**arrays):
    """Write d.npz, 64 images with labels 0..9 but for those given; a run's options."""
    x = np.random.default_rng(0).integers(0, 256, (64, 8, 8), dtype=np.uint8)
    y = np.arange(64) % 10
    default = {"x_train": x, "y_train": y, "x_test": x, "y_test": y}
    np.savez("d.npz", **default | arrays)
    return "--data d.npz --width 8 --batch-size 8 --device cpu".split()


def train(options="--epochs 0.25", **arrays):
    """Run the program, by default for two steps, into the folder o."""
    mnist.main([*data(**arrays), "--out", "o", *options.split()])
    return saved("o/model.pt")


def refusal(capsys, command):
    """The one line on stderr with which the program ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        mnist.main(command.split())
    line = error.value.code                             # Python prints it, with code 1
    assert isinstance(line, str) and "\n" not in line and not capsys.readouterr().err
    return line


def small_run(**settings):
    config = {"seed": 0, "schedule": "laplace", "shape": [1, 8, 8], "labels": None,
              "width": 8, "lr": 2.5e-3, "beta_2": 0.95, "batch_size": 8, "images": 8000}
    return mnist.Run({**config, **settings}, CPU)


def after_step(monkeypatch, action):
    def step_and_act(run, *arguments, step=mnist.train_step):
        loss = step(run, *arguments)
        action(run)
        return loss
    monkeypatch.setattr(mnist, "train_step", step_and_act)


def half(monkeypatch, name):
    """Have a write of the file of that name fail in the middle."""
    def write_half(path, content, write=Path.write_bytes):
        full = path.name == name
        write(path, content[:1] if full else content)
        if full:
            raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", write_half)


def test_1_a_write_that_fails_leaves_the_old_file(monkeypatch):
    """And nothing beside; the file itself is never written, but replaced."""
    mnist.write_file(Path("o/a"), b"old")
    half(monkeypatch, "a")
    mnist.write_file(Path("o/a"), b"older")
    half(monkeypatch, "a.tmp")
    with pytest.raises(SystemExit, match="cannot write o/a.*No space"):
        mnist.write_file(Path("o/a"), b"new")
    assert os.listdir("o") == ["a"] and Path("o/a").read_bytes() == b"older"


def assert_same_state(a, b):
    a, b = saved(a), saved(b)
    assert a.pop("config") == b.pop("config")
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_2_3_resumed_equals_uninterrupted():
    """Ctrl-C (exit code 130), SIGTERM (143), kill -9, each resumed: bit for bit."""
    new = [*data(), "--conditional", "--epochs", "40"]
    resume, codes = "--data d.npz --device cpu --resume".split(), []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        options = resume if codes else new
        command = [sys.executable, mnist.__file__, *options, "--out", "b"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        process.stdout.readline()               # the data are read
        process.stdout.readline()               # the first step is saved
        time.sleep(0.05)
        process.send_signal(number)
        codes.append(process.wait())
    mnist.main([*resume, "--out", "b"])
    mnist.main([*new, "--out", "a"])
    assert codes == [130, 143, -9]
    assert_same_state("a/model.pt", "b/model.pt")
    assert Path("a/samples.png").read_bytes() == Path("b/samples.png").read_bytes()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
@pytest.mark.parametrize("options", ["", " --conditional"])
def test_2_resumed_on_cuda_equals_uninterrupted(monkeypatch, options):
    """Interrupted after three of eight steps, the same weights bit for bit."""
    command = [*data()[:6], "--epochs", "1", *options.split()]
    mnist.main([*command, "--out", "a"])
    with monkeypatch.context() as context, pytest.raises(SystemExit):
        after_step(context, lambda run: run.step == 3 and os.kill(os.getpid(), 2))
        mnist.main([*command, "--out", "b"])
    mnist.main("--data d.npz --resume --out b".split())
    assert_same_state("a/model.pt", "b/model.pt")


def test_4_a_finished_model_is_not_replaced(capsys):
    """But by --overwrite; --resume leaves it as it is."""
    train()
    before = Path("o/model.pt").read_bytes()
    line = refusal(capsys, "--data d.npz --out o")
    mnist.main("--data d.npz --device cpu --out o --resume".split())
    assert "--overwrite" in line and Path("o/model.pt").read_bytes() == before
    assert train("--overwrite --epochs 0.125")["step"] == 1


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_5_no_code_of_a_file_is_run(capsys):
    """A checkpoint and an .npz that would make a folder when unpickled make none."""
    Path("evil.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
    np.savez("evil.npz", x_train=np.array([Evil()]))
    assert "evil.pt" in refusal(capsys, "--sample 1 --model evil.pt")
    assert "evil.npz" in refusal(capsys, "--data evil.npz")
    assert sorted(os.listdir()) == ["evil.npz", "evil.pt"]


@pytest.mark.parametrize("says, arrays", [
    ("(64, 6, 8)", {"x_train": X[:, :6]}),
    ("float64", {"x_train": X / 1}),
    ("(64, 8, 8, 4)", {"x_train": np.zeros((64, 8, 8, 4), np.uint8)}),
    ("argmax", {"y_train": np.eye(64)}),
    ("return_inverse", {"y_train": np.array(["a", "b"] * 32)}),
    ("0 or more", {"y_train": np.arange(64) - 1})])
def test_6_data_that_do_not_fit(capsys, says, arrays):
    """The line names the dtype and shape that were found, and what is wanted."""
    data(**arrays)
    assert says in refusal(capsys, "--data d.npz --conditional")
    assert os.listdir() == ["d.npz"]


@pytest.mark.parametrize("command", [
    "--steps 1001 --sample 2", "--steps 0 --sample 2", "--eta 1.5", "--width 12",
    "--lr nan", "--epochs -1", "--sample 0", "--label 3", "--model o", "--what",
    "--overwrite --resume", "--width 16 --sample 2", "--data d --sample 2",
    "--lr 1 --resume", "--seed 1 --resume", "--seed 1 --evaluate"])
def test_6_options_out_of_range_or_together(capsys, command):
    """The line names the first option; nothing is written."""
    assert command.split()[0] in refusal(capsys, command)
    assert os.listdir() == []


@pytest.mark.parametrize("command, says", [
    ("--resume --out o --data other.npz", "[1, 8, 8]"),
    ("--evaluate --out o --data other.npz", "[1, 8, 8]"),
    ("--evaluate --out labels --data d.npz", "labels, [0, 2]"),
    ("--resume --out half", "half/model.pt"),
    ("--sample 2 --out o --label 1", "labels are []"),
    ("--sample 2 --out o --guidance 2", "labels are []"),
    ("--sample 2 --out labels --label 1", "[0, 2]")])
def test_6_options_that_do_not_fit_the_model(capsys, command, says):
    """The checkpoint decides: what contradicts it is refused."""
    np.savez("other.npz", x_train=np.zeros((64, 12, 12), np.uint8), x_test=X[:, :4])
    small_run().save(Path("o/model.pt"))
    small_run(labels=[0, 2]).save(Path("labels/model.pt"))
    Path("half").mkdir()
    half = {key: saved("o/model.pt")[key] for key in ("config", "average")}
    torch.save(half, "half/model.pt")
    data()
    assert says in refusal(capsys, command + " --device cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_7_without_cuda_the_cpu_computes(capsys):
    """--device cuda is then a line on stderr, and a run on the CPU."""
    assert train("--device cuda --epochs 0.125")["step"] == 1
    assert capsys.readouterr().err == "no CUDA device here, so the CPU\n"


def test_3_8_what_is_not_finite_is_not_saved(monkeypatch, capsys):
    """A weight that is NaN ends the run: the file of before stays, and the handlers of
    signals of before come back."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train()
    data = Path("o/model.pt").read_bytes()
    after_step(monkeypatch, lambda run: run.model.out.bias.data.fill_(float("nan")))
    line = refusal(capsys, "--data d.npz --width 8 --out o --overwrite")
    assert "--lr" in line and Path("o/model.pt").read_bytes() == data
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


@pytest.mark.parametrize("full, command", [
    ("o/model.pt", "--data d.npz --width 8 --out o --overwrite"),
    ("o/samples.png", "--sample 2 --out o"),
    ("x.npz", "--sample 2 --out o --npz x.npz")])
def test_9_a_full_disk_is_one_line(monkeypatch, capsys, full, command):
    """It names the file; the model of before stays whole."""
    train()
    half(monkeypatch, Path(full).name + ".tmp")
    assert f"cannot write {full}" in refusal(capsys, command)
    assert saved("o/model.pt")["step"] == 2


def test_10_one_seed_one_result():
    """Two runs have the same weights and pictures, another seed has others."""
    runs = []
    for seed in (3, 3, 4):
        state = train(f"--overwrite --seed {seed} --epochs 0.25")
        runs.append((str(state["average"]), Path("o/samples.png").read_bytes()))
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[2][0] and runs[0][1] != runs[2][1]


def test_10_labels_come_out_as_the_data_have_them(capsys):
    """5 and 905 stay so; the opening line tells what was read, and what white is."""
    x, y = X + np.eye(8, dtype=np.uint8), np.resize([5, 905], 64)
    state = train("--conditional --epochs 0.25", x_train=x, y_train=y)
    assert capsys.readouterr().out.startswith(
        "d.npz: x_train uint8 (64, 8, 8), y_train int64 (64,), "
        "0..1, where white is 255, 2 labels")
    mnist.main("--out o --sample 5 --steps 2 --npz x.npz".split())
    mnist.main("--out o --sample 2 --steps 2 --npz y.npz --label 905".split())
    assert state["config"]["labels"] == [5, 905]
    assert state["model"]["label.weight"].shape[0] == 3         # and the null label
    x, y = np.load("x.npz"), np.load("y.npz")
    assert x["x"].shape == (5, 8, 8)
    assert x["y"].tolist() == [5, 5, 5, 905, 905] and y["y"].tolist() == [905, 905]


def test_config_and_average_are_enough_to_draw(capsys):
    """--model names any file, also in float16, as small files have them."""
    state = train("--conditional --epochs 0.25")
    average = {name: value.half() for name, value in state["average"].items()}
    torch.save({"config": state["config"], "average": average}, "small.pt")
    mnist.main("--sample 3 --steps 2 --label 1 --guidance 2 --model small.pt".split())
    mnist.main("--evaluate --model small.pt --data d.npz".split())
    bits, _, error, *_ = capsys.readouterr().out.splitlines()[-1].split()
    run = mnist.load_run("small.pt", CPU)
    for name, value in run.average.state_dict().items():
        torch.testing.assert_close(value, state["average"][name], rtol=1e-3, atol=1e-7)
    x, y, _ = mnist.load_images("d.npz", "test", [])
    ours = run.diffusion.bits_per_dim(partial(run.average.module, y=y), x / 127.5 - 1)
    error = np.hypot(float(error), ours.std().item() / 8)
    assert abs(float(bits) - ours.mean()) < 5 * error


def test_drawing_takes_the_averaged_weights():
    """With the label bound; pixels are those of x_0."""
    run, y, draws = small_run(labels=[0, 1]), torch.tensor([0, 1]), torch.Generator()
    run.average.module.out.bias.data.fill_(0.5)
    *_, ours = mnist.draw(run, y, draws.manual_seed(1), steps=3)
    model = partial(run.average.module, y=y)
    draws.manual_seed(1)
    *_, x_0 = run.diffusion.sample(model, (2, 1, 8, 8), 3, generator=draws)
    assert (ours - (x_0[:, 0] + 1) * 127.5).abs().max() <= 0.5


def test_a_step_sees_images_and_labels(monkeypatch):
    """Pixels in [-1, 1], a tenth null labels; the rate: warm-up, then half a cosine."""
    run, seen = small_run(labels=[7], batch_size=2000, lr=2.0, images=2_000_000), {}

    def remember(model, inputs):
        seen["null"] = (inputs[2] == -1).double().mean()

    def loss(model, x0, generator):
        seen["range"] = x0.min(), x0.max()
        return model(x0, torch.ones(len(x0), dtype=torch.int64)).sum()
    run.model.register_forward_pre_hook(remember)
    monkeypatch.setattr(run.diffusion, "loss", loss)
    x = torch.tensor([0, 255], dtype=torch.uint8).repeat(32).reshape(1, 1, 8, 8)
    for step, rate in [(0, 0.02), (49, 0.5 * (1 + np.cos(0.049 * np.pi))), (500, 1)]:
        run.step = step
        mnist.train_step(run, x, torch.zeros(1, dtype=torch.int64))
        assert run.optimiser.param_groups[0]["lr"] == pytest.approx(rate, rel=1e-9)
    assert seen["range"] == (-1, 1)
    assert abs(seen["null"] - 0.1) < 5 * (0.09 / 2000) ** 0.5


@pytest.mark.parametrize("shape", [(64, 8, 8), (64, 8, 8, 1), (64, 8, 12, 3)])
def test_images_keep_their_place(monkeypatch, shape):
    """Grey images, with a channel or without, and colour, read and drawn again; what
    lies outside [-1, 1] is clipped."""
    pixels = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    data(x_train=pixels)
    x, _, _ = mnist.load_images("d.npz", "train")
    run = small_run(shape=list(x.shape[1:]))
    x_0 = torch.where(x == 255, 3, x / 127.5 - 1)
    monkeypatch.setattr(run.diffusion, "sample", lambda *a, **k: [x_0])
    (images,) = mnist.draw(run, torch.full((64,), -1), None)
    np.testing.assert_array_equal(images.numpy().reshape(shape), pixels)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("labels", [None, [3, 5]])
def test_capture_gets_what_a_step_passes(monkeypatch, capsys, labels, fails):
    """A stand-in for CUDA: a step's shapes and types; a failure is one line, no more."""
    run, seen = small_run(labels=labels), []
    forward = run.model.forward

    def stand_in(model, arguments):
        assert model is run.model and not torch.is_autocast_cache_enabled()
        if fails:
            raise RuntimeError("capture failed")
        def graph(*now):
            seen.extend(zip(arguments, now, strict=True))
            return forward(*now)
        forward(*arguments)
        model.forward = graph
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", stand_in)
    mnist.capture(run)
    x, y = torch.zeros(64, 1, 8, 8).byte(), torch.full((64,), 1 if labels else -1)
    mnist.train_step(run, x, y)
    assert len(seen) == (0 if fails else 3)
    for captured, passed in seen:
        assert (captured.shape, captured.dtype) == (passed.shape, passed.dtype)
    assert ("capture failed" in capsys.readouterr().err) == fails
