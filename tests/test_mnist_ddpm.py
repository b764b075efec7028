"""Trials of mnist_ddpm.py: what it learns from, that nothing is lost, bad input.

A training run here is 64 images of 8 x 8 pixels and the smallest network."""
import copy
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

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}     # as in this process
SMALL = ["--width", "8", "--batch-size", "8", "--device", "cpu"]


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")


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


def raise_error(error, *_):
    """A stand-in for a function that fails."""
    raise error


def fail_at(calls, function):
    """A stand-in for a function that finds the disk full at these of its calls."""
    count = iter(range(1000))

    def stand_in(*args):
        if next(count) in calls:
            raise OSError(28, "No space left on device", str(args[0]))
        return function(*args)

    return stand_in


def small_run(device="cpu", **settings):
    """A Run with the smallest network, for images of 8 x 8 pixels."""
    config = {**mnist.DEFAULTS, "width": 8, "batch_size": 8, "shape": [1, 8, 8],
              "labels": [], "total": 100, "N": 64, **settings}
    return mnist.Run(config, torch.device(device))


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
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE)

    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1
    assert torch.load("o/model.pt")["step"] == 8 and Path("o/denoising.png").exists()


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

    assert error.value.code == 130 and torch.load("o/model.pt")["step"] == 2


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
    monkeypatch.setattr(mnist.os, "replace", partial(raise_error, OSError(28, "full")))

    with pytest.raises(OSError, match="full: 'f'"):
        mnist.write_file(path, b"new")

    assert path.read_bytes() == b"old" and os.listdir() == ["f"]


def test_room_for_two_checkpoints_shows_at_once(monkeypatch, capsys):
    """The second full-size checkpoint, beside the first, is written after one step."""
    monkeypatch.setattr(mnist, "write_file", fail_at([1], mnist.write_file))

    line = refusal(capsys, *data(), "--out", "o")

    assert "o/model.pt" in line and torch.load("o/model.pt")["step"] == 1


def test_training_goes_on_with_a_full_disk(monkeypatch, capsys):
    """Later saves that fail are a warning; the last one waits for room."""
    clock = iter(range(0, 10**6, 200))          # each look at it 200 seconds on
    monkeypatch.setattr(mnist.time, "perf_counter", partial(next, clock))
    monkeypatch.setattr(mnist, "write_file", fail_at([2, 4, 5], mnist.write_file))
    monkeypatch.setattr(mnist.time, "sleep", lambda seconds: None)

    state = train("--epochs", "0.25")

    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all("o/model.pt" in line for line in lines)
    assert state["step"] == 2 and Path("o/samples.png").exists()


def test_a_signal_ends_the_wait_for_room(monkeypatch, capsys):
    """What is on the disk stays, and --resume goes on there."""
    monkeypatch.setattr(mnist, "write_file", fail_at(range(2, 99), mnist.write_file))
    monkeypatch.setattr(mnist.time, "sleep", lambda _: signal.raise_signal(15))

    with pytest.raises(SystemExit) as error:
        train()

    assert error.value.code == 143 and "--resume" in capsys.readouterr().err
    assert torch.load("o/model.pt")["step"] == 1


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
    kept = torch.load("o/model.pt")
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

    assert mnist.grid(images).tolist() == [[1, 2, 3], [4, 5, 0]]
    assert mnist.grid(torch.zeros(400, 8, 8)).shape == (160, 160)


def test_first_frame_of_denoising_is_the_finished_digits(monkeypatch):
    """Viewers that do not animate show it."""
    films = []
    encode = ddpm.encode_png

    def remember(frames, *fps):
        films.append(frames)
        return encode(frames, *fps)

    monkeypatch.setattr(ddpm, "encode_png", remember)
    train("--epochs", "0.125")

    (digits,), film = films
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

    line = mnist.progress(run, torch.tensor(0.0234), 12345, 12345.6, cores)

    assert max(map(len, line.splitlines())) <= 79
    assert ("OMP_NUM_THREADS=1" in line) == says


def test_cores_are_processor_time_by_the_clock(monkeypatch, capsys):
    """100 s by the clock in which the threads computed for 130 s are 1.3 cores."""
    train("--epochs", "0.125")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for name, seconds in (("perf_counter", 100), ("process_time", 130)):
        clock = iter(range(0, 10**6, seconds))
        monkeypatch.setattr(mnist.time, name, partial(next, clock))
    capsys.readouterr()

    train("--resume", "--epochs", "0.25")

    assert "1.3 cores" in capsys.readouterr().out


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
    ("--device cuda", "--device cuda", {}),
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
    Path("foreign").mkdir()
    Path("foreign/samples.png").touch()

    line = refusal(capsys, *data(**arrays), *options.split())

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
    assert torch.load("b/model.pt")["step"] == 3
    mnist.main([*command, "--out", "b", "--resume"])

    a, b = torch.load("a/model.pt"), torch.load("b/model.pt")
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@cuda
def test_a_full_gpu_is_one_line(capsys):
    """A batch that no GPU holds."""
    x = np.zeros((200_000, 64, 64), np.uint8)

    line = refusal(capsys, *data(x_train=x), "--device", "cuda", "--width", "512",
                   "--batch-size", "200000")

    assert "--batch-size" in line and "--width" in line
