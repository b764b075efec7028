"""Trials of mnist_ddpm.py: what it learns from, what it draws, bad input.

A training run here is 64 images of 8 x 8 pixels and the smallest network."""
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import ddpm_min as ddpm
import images
import mnist_ddpm as mnist

SMALL = ["--width", "8", "--batch-size", "8", "--device", "cpu"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Each test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    return tmp_path


def data(**arrays):
    """Write d.npz; 64 images, labels 0..9, test images, but for the arrays given."""
    x = np.random.default_rng(0).integers(0, 256, (64, 8, 8), dtype=np.uint8)
    y = np.arange(64) % 10
    default = {"x_train": x, "y_train": y, "x_test": x, "y_test": y}
    np.savez("d.npz", **{**default, **arrays})
    return ["--data", "d.npz", *SMALL]


def saved(path):
    """What a checkpoint holds."""
    return torch.load(path, weights_only=True)


def train(*options, **arrays):
    """Run the program, by default for two steps, into the folder o."""
    options = options or ("--epochs", "0.25")
    mnist.main([*data(**arrays), "--out", "o", *options])
    return saved("o/model.pt")


def refusal(capsys, *arguments):
    """What the program says on stderr, in one line, when it ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        mnist.main([str(argument) for argument in arguments])
    lines = capsys.readouterr().err.splitlines()
    assert (error.value.code, len(lines)) == (2, 1)
    return lines[0]


def raise_error(error, *_):
    """A stand-in for a function that fails."""
    raise error


def small_run(device="cpu", **settings):
    """A Run with the smallest network, for images of 8 x 8 pixels."""
    config = {**mnist.DEFAULTS, "width": 8, "batch_size": 8, "shape": [1, 8, 8],
              "labels": [], "total": 100, "N": 64, **settings}
    return mnist.Run(config, torch.device(device))


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
    assert "data" not in default and images.MNIST.is_file()


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
    """Grey images, with a channel or without, and colour: pixels keep their place."""
    x = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    data(x_train=x)

    pixels, _, _ = mnist.load_images({"data": "d.npz", "conditional": False}, "train")

    channels = x.reshape(64, 8, 8, -1).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(pixels.numpy(), channels)


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_of_samples(monkeypatch, channels):
    """x_0 in [-1, 1] becomes 0..255, channels last; what lies outside is clipped."""
    x = torch.linspace(-1, 1, 16 * channels).reshape(1, channels, 4, 4)
    x[0, 0, 0, 0] = -3
    run = small_run(shape=[channels, 4, 4])
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
        assert file["x"].shape == (5, 8, 8)
        assert file["y"].tolist() == [5, 5, 5, 905, 905]
    with np.load("y.npz") as file:
        assert file["y"].tolist() == [905, 905]
    assert "[5, 905]" in line


@pytest.mark.parametrize("options, images", [([], 280_000), (["--epochs", "3"], 192)])
def test_images_seen(monkeypatch, options, images):
    """The default is a number of images, whatever the data; --epochs overrules it."""
    runs = []
    monkeypatch.setattr(mnist, "train", lambda run, *_: runs.append(run))

    mnist.main([*data(), *options])

    assert runs[0].config["total"] == images // 8


def test_grid():
    """Images stand in rows, and black fills the last."""
    images = torch.arange(1, 6, dtype=torch.uint8).reshape(5, 1, 1)

    assert mnist.grid(images).tolist() == [[1, 2, 3], [4, 5, 0]]
    assert mnist.grid(torch.zeros(400, 8, 8)).shape == (160, 160)


def test_first_frame_of_denoising_is_the_finished_digits(monkeypatch):
    """A quarter of them; viewers that do not animate show it."""
    films = []
    encode = mnist.encode_png

    def remember(frames, **options):
        films.append(frames)
        return encode(frames, **options)

    monkeypatch.setattr(mnist, "encode_png", remember)
    train("--epochs", "0.125")

    (page,), film = films
    images = page.reshape(10, 8, 10, 8).transpose(1, 2).reshape(100, 8, 8)
    digits = mnist.grid(images[::4])
    assert torch.equal(film[0], digits) and torch.equal(film[-1], digits)
    assert not torch.equal(film[10], digits)


def test_learning_rate():
    """A warm-up of 100 steps, then half a cosine to 0."""
    rates = [mnist.learning_rate(step, 1000, 2.0) for step in (0, 49, 500, 1000)]

    expected = [0.02, (1 + np.cos(0.049 * np.pi)) / 2, 1.0, 0.0]
    np.testing.assert_allclose(rates, expected, atol=1e-12)


@pytest.mark.parametrize("threads, cores, says", [
    (1, 0.5, False), (2, 1.99, False), (2, 1.3, True), (8, 5.0, True)])
def test_progress(monkeypatch, threads, cores, says):
    """At most 79 characters a line; it says what helps if threads lack their cores."""
    run = small_run(total=99999, batch_size=256, N=60000)
    run.step = 12345
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(mnist.time, "perf_counter", lambda: 7 + 12345.6)
    monkeypatch.setattr(mnist.time, "process_time", lambda: 9 + 12345.6 * cores)

    line = mnist.progress(run, torch.tensor(0.0234), start=0, begin=(7, 9))

    assert "256 images/s  12346 s" in line and f"on {cores} cores" in line or not says
    assert max(map(len, line.splitlines())) <= 79
    assert ("OMP_NUM_THREADS=1" in line) == says


def test_sampling_says_how_far_it_is(capsys):
    """Once for each hundred, which take seconds."""
    train()
    capsys.readouterr()

    mnist.main("--out o --sample 250 --steps 1".split())

    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[:3]] == [
        "100", "200", "250"]


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
    ("", "(8, 8, 4, 1)", {"x_train": np.zeros((8, 8, 4), np.uint8)}),
    ("--conditional", "64 whole", {"y_train": np.arange(63)}),
    ("--conditional", "64 whole", {"y_train": np.arange(64) / 2}),
    ("--data missing.npz", "missing.npz", {}),
    ("--data text.npz", "text.npz", {}),
    ("--resume", "no checkpoint out/model.pt", {}),
    ("--resume --out pickle", "cannot read pickle/model.pt", {}),
    ("--sample 2 --out foreign", "no checkpoint", {}),
    ("--out foreign", "foreign/samples.png exists", {}),
    ("--out text.npz/o", "text.npz", {}),
    ("--out text.npz", "a folder", {}),
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
    Path("foreign").mkdir()
    Path("foreign/samples.png").touch()

    command = [*data(**arrays), "--epochs", "0.25", *options.split()]

    line = refusal(capsys, *command)

    assert says in line
    assert sorted(os.listdir()) == ["d.npz", "foreign", "pickle", "text.npz"]


@pytest.mark.parametrize("options, says", [
    ("--resume --width 16", "width 8"),
    ("--resume --conditional", "conditional"),
    ("--resume --data other.npz", "trained on"),
    ("--resume --epochs 0.125", "before step 2"),
    ("--sample 2 --label 1", "not trained with --conditional"),
    ("--sample 2 --epochs 3", "--epochs"),
    ("--sample 2 --data other.npz", "--data"),
    ("--evaluate --batch-size 8", "--batch-size"),
    ("--sample 2 --guidance 2", "--conditional"),
    ("--sample 2 --npz o/model.pt", "new .npz file"),
    ("--sample 2 --npz missing/x.npz", "folder that exists"),
    ("--evaluate --data other.npz", "[64, 1, 12, 12]"),
])
def test_options_that_do_not_fit_the_model(options, says, capsys):
    """The checkpoint decides: what contradicts it is refused, in one line."""
    train()
    x = np.zeros((64, 12, 12), np.uint8)
    np.savez("other.npz", x_train=x, x_test=x)

    assert says in refusal(capsys, "--out", "o", *options.split())


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()])
def test_full_memory_names_the_way_out(monkeypatch, capsys, error):
    """One line that names --batch-size and --width, on a GPU and on the CPU."""
    monkeypatch.setattr(mnist, "Run", partial(raise_error, error))

    line = refusal(capsys, *data())

    assert "--batch-size" in line and "--width" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_without_cuda_the_cpu_computes(capsys):
    """--device cuda is then a line on stderr, and a run on the CPU."""
    state = train("--epochs", "0.25", "--device", "cuda")

    assert state["step"] == 2
    assert capsys.readouterr().err == "no cuda here, so the CPU\n"
