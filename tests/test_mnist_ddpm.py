"""Trials of mnist_ddpm.py: what it learns from, that nothing is lost, bad input.

A training run here is 64 images of 8 x 8 pixels and the smallest network."""
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ddpm_min as ddpm
import mnist_ddpm as mnist

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}     # as in this process
SMALL = ["--width", "8", "--batch-size", "8", "--device", "cpu"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Each test runs in a folder of its own, and leaves the signal handlers alone."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    yield tmp_path
    signal.signal(signal.SIGINT, before[0])
    signal.signal(signal.SIGTERM, before[1])


def data(**arrays):
    """Write d.npz; 64 images, labels 0..9, test images, but for the arrays given."""
    x = np.random.default_rng(0).integers(0, 256, (64, 8, 8), dtype=np.uint8)
    y = np.arange(64) % 10
    np.savez("d.npz", **{"x_train": x, "y_train": y, "x_test": x, "y_test": y, **arrays})
    return ["--data", "d.npz", *SMALL]


def train(*options, **arrays):
    """Run the program, by default for two steps, into the folder o."""
    options = options or ("--epochs", "0.25")
    mnist.main([*data(**arrays), "--out", "o", *options])
    return torch.load("o/model.pt")


def refusal(capsys, *arguments):
    """What the program says on stderr, in one line, when it ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        mnist.main([str(argument) for argument in arguments])
    lines = capsys.readouterr().err.splitlines()
    assert (error.value.code, len(lines)) == (2, 1)
    return lines[0]


def raise_error(kind, *_):
    """A stand-in for a function that fails."""
    raise kind()


def test_resumed_equals_uninterrupted():
    """Two Ctrl-C, SIGTERM, kill -9, each resumed: state and pictures bit for bit."""
    command = [sys.executable, mnist.__file__, *data(), "--conditional", "--epochs", "30"]
    model = Path("b/model.pt")
    codes = []

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        resume = ["--resume"] if model.exists() else []
        if resume:
            os.utime(model, (0, 0))
        process = subprocess.Popen([*command, "--out", "b", *resume], env=ONE_THREAD)
        # It writes the checkpoint first when it begins.
        while not (model.exists() and model.stat().st_mtime > 0):
            time.sleep(0.01)
        time.sleep(0.1)
        process.send_signal(number)
        time.sleep(0.04)
        process.send_signal(number)
        codes.append(process.wait())
    reached = torch.load(model)["step"]
    mnist.main([*command[2:], "--out", "b", "--resume"])
    mnist.main([*command[2:], "--out", "a"])

    assert codes[0] in (130, -2) and codes[1] in (143, -15) and codes[2] == -9
    assert 0 < reached < 240
    a, b = torch.load("a/model.pt"), torch.load("b/model.pt")
    assert a.pop("config") == b.pop("config")
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    for name in ("samples.png", "denoising.png"):
        assert Path("a", name).read_bytes() == Path("b", name).read_bytes()


def test_lost_standard_output_loses_no_step():
    """With standard output on a full disk the checkpoint is written all the same."""
    command = [sys.executable, mnist.__file__, *data(), "--epochs", "1", "--out", "o"]

    with open("/dev/full", "w") as full:
        code = subprocess.run(command, stdout=full, stderr=subprocess.PIPE).returncode

    assert code == 2
    assert torch.load("o/model.pt")["step"] == 8


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
    monkeypatch.setattr(mnist.os, "replace", partial(raise_error, OSError))

    with pytest.raises(OSError):
        mnist.write_file(path, b"new")

    assert path.read_bytes() == b"old" and os.listdir() == ["f"]


def test_training_goes_on_with_a_full_disk(monkeypatch, capsys):
    """Pictures in the middle that cannot be written are a warning."""
    clock = iter(range(0, 10**6, 200))          # each look at it 200 seconds on
    monkeypatch.setattr(mnist.time, "perf_counter", partial(next, clock))
    draw = mnist.draw_pictures

    def draw_on_a_full_disk(run, out, steps):
        if steps == 20:
            raise OSError("disk full")
        draw(run, out, steps)

    monkeypatch.setattr(mnist, "draw_pictures", draw_on_a_full_disk)
    state = train()

    warning = "mnist_ddpm: disk full; training goes on"
    assert capsys.readouterr().err.splitlines() == [warning]
    assert state["step"] == 2


def test_weights_that_are_not_finite_are_not_saved(monkeypatch, capsys):
    """A loss of NaN ends the run; the checkpoint keeps the state before, from which
    --resume with a lower --lr goes on."""
    loss = ddpm.GaussianDiffusion.loss
    monkeypatch.setattr(ddpm.GaussianDiffusion, "loss", lambda *a: loss(*a) * torch.nan)
    line = refusal(capsys, *data(), "--out", "o", "--epochs", "0.25")
    monkeypatch.setattr(ddpm.GaussianDiffusion, "loss", loss)

    state = train("--resume", "--lr", "1e-4")

    assert "--resume" in line and "--lr" in line
    assert state["step"] == 2 and state["config"]["lr"] == 1e-4


def test_paths_after_a_move(monkeypatch, folder):
    """--data is stored absolute, the default not at all; --resume may name another."""
    state = train()
    default = mnist.parse_arguments([])
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")

    mnist.main(["--out", "../o", "--resume", "--epochs", "0.5"])
    os.rename("../d.npz", "moved.npz")
    mnist.main(["--out", "../o", "--evaluate", "--data", "moved.npz"])

    assert state["config"]["data"] == str(folder / "d.npz")
    assert "data" not in default and mnist.MNIST.is_file()


def test_images_and_labels_of_a_step(monkeypatch):
    """Training sees pixels as [-1, 1], and a tenth of the labels as the null label."""
    seen = []

    def loss(self, model, x0, y, generator):
        seen.append((x0, y))
        return 0 * model(x0, torch.ones(len(x0), dtype=torch.int64), y).sum()

    monkeypatch.setattr(ddpm.GaussianDiffusion, "loss", loss)
    train("--conditional", "--epochs", "25", y_train=np.full(64, 7))

    x0 = torch.cat([x0 for x0, _ in seen])
    null = torch.cat([y for _, y in seen]) == -1
    assert (x0.min(), x0.max()) == (-1, 1)
    assert abs(null.float().mean() - 0.1) < 5 * (0.09 / len(null)) ** 0.5


@pytest.mark.parametrize("shape", [(64, 8, 8), (64, 8, 8, 1), (64, 8, 8, 3)])
def test_layouts_of_images(shape):
    """Grey images, with a channel or without, and colour ones: pixels keep their place."""
    x = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    data(x_train=x)

    images, _, _ = mnist.load_images({"data": "d.npz", "conditional": False}, "train")

    channels = x.reshape(64, 8, 8, -1).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(images.numpy(), channels)


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_of_samples(monkeypatch, channels):
    """x_0 in [-1, 1] becomes 0..255, channels last; what lies outside is clipped."""
    x = torch.linspace(-1, 1, 16 * channels).reshape(1, channels, 4, 4)
    x[0, 0, 0, 0] = -3
    config = {**mnist.DEFAULTS, "shape": [channels, 4, 4], "labels": [], "width": 8}
    run = mnist.Run(config, torch.device("cpu"))
    monkeypatch.setattr(run.diffusion, "sample", lambda *a, **k: iter([x]))

    image = list(mnist.draw(run, torch.zeros(1), None))[-1][0]

    expected = np.linspace(0, 255, 16 * channels).reshape(channels, 4, 4)
    pixels = image.reshape(4, 4, channels).permute(2, 0, 1)
    np.testing.assert_allclose(pixels.numpy(), expected, atol=1)


def test_only_labels_that_occur(capsys):
    """Of labels 5 and 905 two classes are learned, drawn evenly and accepted."""
    state = train("--conditional", "--epochs", "0.25", y_train=np.resize([5, 905], 64))
    mnist.main("--out o --sample 5 --steps 2 --npz x.npz".split())
    mnist.main("--out o --sample 2 --steps 2 --npz y.npz --label 905".split())
    line = refusal(capsys, *"--out o --sample 2 --label 0".split())

    assert state["config"]["labels"] == [5, 905]
    assert state["model"]["label.weight"].shape[0] == 3         # and the null label
    with np.load("x.npz") as file:
        assert file["x"].shape == (5, 8, 8) and file["y"].tolist() == [5, 5, 5, 905, 905]
    with np.load("y.npz") as file:
        assert file["y"].tolist() == [905, 905]
    assert "[5, 905]" in line


@pytest.mark.parametrize("options, images", [([], 240_000), (["--epochs", "3"], 192)])
def test_images_seen(monkeypatch, options, images):
    """The default is a number of images, whatever the data; --epochs overrules it."""
    runs = []
    monkeypatch.setattr(mnist, "train", lambda run, *_: runs.append(run))

    mnist.main([*data(), *options])

    assert runs[0].config["total"] == images // 8


def test_grid():
    """Images stand in rows, and black fills the last."""
    images = torch.arange(1, 6, dtype=torch.uint8).reshape(5, 1, 1)

    assert mnist.grid(images, 3).tolist() == [[1, 2, 3], [4, 5, 0]]


def test_learning_rate():
    """A warm-up of 100 steps, then half a cosine to 0."""
    rates = [mnist.learning_rate(step, 1000, 2.0) for step in (0, 49, 500, 1000)]

    expected = [0.02, (1 + np.cos(0.049 * np.pi)) / 2, 1.0, 0.0]
    np.testing.assert_allclose(rates, expected, atol=1e-12)


def test_progress_fits_80_columns(capsys):
    """The progress line has at most 79 characters."""
    config = {"total": 99999, "batch_size": 256, "N": 60000}
    run = SimpleNamespace(config=config, step=12345)

    mnist.report(run, torch.tensor(0.0234), 12345.6, 12345)

    assert len(capsys.readouterr().out) == 80           # and the end of the line


def test_evaluate_prints_the_bound(capsys):
    """--evaluate prints bits/dim and its error."""
    train()
    capsys.readouterr()

    mnist.main(["--out", "o", "--evaluate"])

    words = capsys.readouterr().out.split()
    assert words[1::2] == ["+-", "bits/dim", "64", "images"] and float(words[0]) > 0


@pytest.mark.parametrize("options, says, arrays", [
    ("", "(64, 6, 8, 1)", {"x_train": np.zeros((64, 6, 8), np.uint8)}),
    ("", "float64", {"x_train": np.zeros((64, 8, 8))}),
    ("", "(0, 8, 8, 1)", {"x_train": np.zeros((0, 8, 8), np.uint8)}),
    ("", "x_train", {"x_train": np.array([None])}),
    ("", "--batch-size 8", {"x_train": np.zeros((1, 8, 8), np.uint8)}),
    ("--conditional", "0..999", {"y_train": -np.arange(64)}),
    ("--conditional", "64 whole", {"y_train": np.arange(64) / 2}),
    ("--data missing.npz", "missing.npz", {}),
    ("--data text.npz", "text.npz", {}),
    ("--resume", "out/model.pt", {}),
    ("--resume --out pickle", "pickle/model.pt", {}),
    ("--out text.npz/o", "text.npz", {}),
    ("--sample 2 --steps 1001", "1..1000", {}),
    ("--sample 2 --steps 50.5", "50.5", {}),
    ("--label 3", "go with --sample", {}),
    ("--eta 1.5", "0..1", {}),
    ("--width 12", "multiple of 8", {}),
    ("--batch-size 0", "1..1000000", {}),
    ("--lr nan", "nan", {}),
    ("--resume --overwrite", "not allowed", {}),
    ("--nonsense", "--nonsense", {}),
])
def test_bad_input_gets_one_line(options, says, arrays, capsys):
    """One line on stderr that says what is wrong, exit code 2, and no file touched."""
    Path("text.npz").write_text("no archive")
    Path("pickle").mkdir()
    Path("pickle/model.pt").write_bytes(b"cos\nmkdir\n(S'ran'\ntR.")    # makes a folder

    line = refusal(capsys, *data(**arrays), *options.split())

    assert says in line
    assert sorted(os.listdir()) == ["d.npz", "pickle", "text.npz"]


@pytest.mark.parametrize("options, says", [
    ("--resume --width 16", "width 8"),
    ("--resume --conditional", "conditional"),
    ("--resume --epochs 0.125", "before step 2"),
    ("--resume --data other.npz", "trained on"),
    ("--sample 2 --label 1", "--label 1"),
    ("--sample 2 --guidance 2", "--conditional"),
    ("--sample 2 --npz o/model.pt", "new .npz file"),
    ("--sample 2 --npz missing/x.npz", "folder that exists"),
    ("--evaluate --data other.npz", "[64, 1, 4, 4]"),
])
def test_options_that_do_not_fit_the_model(options, says, capsys):
    """The checkpoint decides: what contradicts it is refused, in one line."""
    train()
    x = np.zeros((64, 4, 4), np.uint8)
    np.savez("other.npz", x_train=x, x_test=x)

    assert says in refusal(capsys, "--out", "o", *options.split())


def test_a_full_gpu_names_the_way_out(monkeypatch, capsys):
    """CUDA out of memory is one line that names --batch-size and --width."""
    monkeypatch.setattr(mnist, "Run", partial(raise_error, torch.OutOfMemoryError))

    line = refusal(capsys, *data())

    assert "--batch-size" in line and "--width" in line
