"""The ten promises of mnist_ddpm.py. It 1 learns, 2 knows its images, 3 resumes as if
uninterrupted, 4 keeps model.pt whole, 5 runs no code of a file, 6 refuses what does not
fit in one line, 7 computes on the CPU without CUDA, 8 saves no NaN, 9 ends in one line
on a full disk, 10 repeats itself. And how it draws, clusters and captures."""
import os
import pickle
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import mnist_ddpm as mnist

CPU = torch.device("cpu")
saved = partial(torch.load, weights_only=True)          # what a checkpoint holds
X = np.zeros((64, 8, 8), np.uint8)
# Two kinds of dark images: those of label 7 have a bright corner.
RANDOM = np.random.default_rng(0)
Y = RANDOM.permutation(np.repeat([3, 7], [48, 16]))
KINDS = RANDOM.integers(0, 21, X.shape, dtype=np.uint8)
KINDS[Y == 7, :4, :4] += 235
IMAGES, NO_LABEL = torch.from_numpy(KINDS)[:, None], torch.full((64,), -1)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def data(name="d.npz", **arrays):
    """Write 64 images with labels 3 and 7, but for those given; a run's options."""
    default = {"x_train": KINDS, "y_train": Y, "x_test": KINDS, "y_test": Y}
    np.savez(name, **default | arrays)
    return f"--data {name} --width 8 --batch-size 8 --device cpu".split()


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
    config = {"seed": 0, "schedule": "laplace", "shape": [1, 8, 8], "labels": [],
              "shares": [], "conditional": False, "clusters": None, "data": "d.npz",
              "width": 8, "lr": 3e-3, "batch_size": 8, "images": 8000}
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


def losses(run, y):
    """Of the averaged and the last weights on IMAGES, by the same t and eps."""
    x0, pair = IMAGES.repeat(20, 1, 1, 1) / 127.5 - 1, []
    for network in (run.average.module, run.model):
        model = partial(network, y=y.repeat(20))
        loss = run.diffusion.loss(model, x0, torch.Generator().manual_seed(1))
        pair.append(loss.item())
    return pair


def test_1_it_learns():
    """The program, in 300 steps: both losses fall far below 1, which a network that has
    learned nothing has, and are higher by the labels of others."""
    train("--conditional --epochs 37.5")
    run = mnist.load_run("o/model.pt", "cpu", resume=True)
    own = torch.from_numpy(Y == 7).long()
    assert max(losses(run, own)) < 0.25
    assert min(losses(run, 1 - own)) > 1.3 * max(losses(run, own))


def test_1_the_average_keeps_up_with_the_weights():
    """Its loss is no worse than theirs by more than 5 %, in short runs too; in the end
    it is an average of 100 steps."""
    run, ratios = small_run(batch_size=32, images=32 * 2000), []
    for steps in (50, 50, 100, 200):
        for _ in range(steps):
            mnist.train_step(run, IMAGES, NO_LABEL)
        average, last = losses(run, NO_LABEL)
        ratios.append(average / last)
    assert max(ratios) < 1.05 and average != last
    run.step, before = 5000, run.average.module.out.bias.clone()
    mnist.train_step(run, IMAGES, NO_LABEL)
    moved = run.average.module.out.bias - before
    torch.testing.assert_close(moved, 0.01 * (run.model.out.bias - before))


def test_1_a_step(monkeypatch):
    """Pixels in [-1, 1], a tenth null labels, gradients of this step alone; the rate:
    warm-up, then half a cosine, which ends at 0."""
    run, seen = small_run(labels=[7], batch_size=2000, lr=2.0, images=2_000_000), {}

    def remember(model, inputs):
        seen["null"] = (inputs[2] == -1).double().mean()

    def loss(model, x0, generator):
        seen["range"] = x0.min(), x0.max()
        sign = 1 if run.step == 500 else -1
        return sign * model(x0, torch.ones(len(x0), dtype=torch.int64)).sum()
    run.model.register_forward_pre_hook(remember)
    monkeypatch.setattr(run.diffusion, "loss", loss)
    x = torch.tensor([0, 255], dtype=torch.uint8).repeat(32).reshape(1, 1, 8, 8)
    for step, rate in [(0, 0.02), (49, 0.5 * (1 + np.cos(0.049 * np.pi))), (500, 1),
                       (999, 1 - np.cos(0.001 * np.pi))]:
        run.step = step
        mnist.train_step(run, x, torch.zeros(1, dtype=torch.int64))
        assert run.optimiser.param_groups[0]["lr"] == pytest.approx(rate, rel=1e-6)
        assert (run.model.out.bias.grad[0] > 0) == (step == 500)
    assert seen["range"] == (-1, 1)
    assert abs(seen["null"] - 0.1) < 5 * (0.09 / 2000) ** 0.5


def test_1_the_averaged_weights_draw_and_are_evaluated(capsys):
    """Each image with its own label; draw's pixels are those of x_0."""
    run, y, draws = small_run(labels=[0, 1]), torch.tensor([0, 1]), torch.Generator()
    for weight in run.average.module.parameters():
        torch.nn.init.normal_(weight, std=0.1, generator=draws.manual_seed(2))
    model = partial(run.average.module, y=y)
    ours = mnist.draw(run, y, draws.manual_seed(1), steps=3)
    *_, x_0 = run.diffusion.sample(
        model, (2, 1, 8, 8), 3, generator=draws.manual_seed(1))
    assert (ours - (x_0[:, 0] + 1) * 127.5).abs().max() <= 0.5
    mnist.evaluate(run, IMAGES[:2], y)
    bits = run.diffusion.bits_per_dim(
        model, IMAGES[:2] / 127.5 - 1, generator=run.generator.manual_seed(0))
    assert capsys.readouterr().out.split("\n")[-2].startswith(f"{bits.mean():.3f} +- ")


def test_2_a_run_knows_its_images(capsys):
    """--resume and --evaluate read the file it was begun with, or another on purpose,
    and say which; one that is gone is one line."""
    train()
    data("e.npz")
    for command, opening in [
            ("--resume", "d.npz: x_train"), ("--evaluate", "d.npz: x_test"),
            ("--evaluate --data e.npz", "e.npz: x_test")]:
        capsys.readouterr()
        mnist.main(f"{command} --out o --device cpu".split())
        assert capsys.readouterr().out.startswith(opening)
    os.remove("d.npz")
    assert "cannot read d.npz" in refusal(capsys, "--resume --out o")


def assert_same_state(a, b):
    a, b = saved(a), saved(b)
    assert a.pop("config") == b.pop("config")
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_3_ctrl_c_and_kill():
    """Exit codes 130 and -9, the file whole, and --resume goes on."""
    options, codes = [*data(), "--epochs", "400"], []
    for number in (signal.SIGINT, signal.SIGKILL):
        command = [sys.executable, mnist.__file__, *options, "--out", "o"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        process.stdout.readline()               # the data are read
        process.stdout.readline()               # the first step is saved
        process.send_signal(number)
        codes.append(process.wait())
        options = ["--resume"]
    assert codes == [130, -9] and saved("o/model.pt")["step"] == 2


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("options", ["", "--conditional", "--clusters 2"])
def test_3_resumed_equals_uninterrupted(monkeypatch, device, options):
    """Interrupted after three of eight steps: the same weights, bit for bit."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA here")
    command = [*data()[:6], "--device", device, "--epochs", "1", *options.split()]
    mnist.main([*command, "--out", "a"])

    def interrupt(run):
        if run.step == 3:
            run.save(Path("b/model.pt"))
            raise KeyboardInterrupt
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        after_step(context, interrupt)
        mnist.main([*command, "--out", "b"])
    mnist.main(f"--resume --out b --device {device}".split())
    assert_same_state("a/model.pt", "b/model.pt")


def test_3_saves_every_ten_seconds(monkeypatch, capsys):
    """Counted from the end of the save before, which here takes twelve; a step one."""
    run, clock, at = small_run(images=8 * 40), [0], []

    def save(run, path):
        at.append(run.step)
        clock[0] += 12
    after_step(monkeypatch, lambda run: clock.append(clock.pop() + 1))
    monkeypatch.setattr(mnist.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(mnist.Run, "save", save)
    mnist.train(run, IMAGES, NO_LABEL, None)
    assert at == [1, 12, 23, 34, 40]


def test_4_a_write_that_fails_leaves_the_old_file(monkeypatch):
    """And nothing beside; the file itself is never written, but replaced."""
    mnist.write_file(Path("o/a"), b"old")
    half(monkeypatch, "a")
    mnist.write_file(Path("o/a"), b"older")
    half(monkeypatch, "a.tmp")
    with pytest.raises(SystemExit, match="cannot write o/a.*No space"):
        mnist.write_file(Path("o/a"), b"new")
    assert os.listdir("o") == ["a"] and Path("o/a").read_bytes() == b"older"


def test_4_a_finished_model_is_not_replaced(capsys):
    """But by --overwrite; --resume says that it is finished, and leaves it."""
    train()
    before = Path("o/model.pt").read_bytes()
    line = refusal(capsys, "--data d.npz --out o")
    mnist.main("--device cpu --out o --resume".split())
    assert "o/model.pt is finished, at step 2\n" in capsys.readouterr().out
    assert "--overwrite" in line and Path("o/model.pt").read_bytes() == before
    assert train("--overwrite --epochs 0.125")["step"] == 1


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_5_loading_runs_no_code_and_changes_nothing_else(capsys):
    """A checkpoint and an .npz that would make a folder when unpickled make none. The
    random state of torch stays as it was."""
    Path("evil.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
    np.savez("evil.npz", x_train=np.array([Evil()]))
    assert "evil.pt" in refusal(capsys, "--sample 1 --model evil.pt")
    assert "evil.npz" in refusal(capsys, "--data evil.npz")
    assert sorted(os.listdir()) == ["evil.npz", "evil.pt"]
    small_run().save(Path("o/model.pt"))
    before = torch.get_rng_state()
    mnist.load_run("o/model.pt", "cpu")
    assert before.equal(torch.get_rng_state())


@pytest.mark.parametrize("says, arrays", [
    ("(64, 6, 8)", {"x_train": X[:, :6]}),
    ("float64", {"x_train": X / 1}),
    ("(64, 8, 8, 4)", {"x_train": np.zeros((64, 8, 8, 4), np.uint8)}),
    ("(64, 1): want y (N,), integers", {"y_train": Y[:, None]}),
    ("<U1", {"y_train": np.array(["a", "b"] * 32)}),
    ("0 or more", {"y_train": Y - 4})])
def test_6_data_that_do_not_fit(capsys, says, arrays):
    """The line names the dtype and shape that were found, and what is wanted."""
    data(**arrays)
    assert says in refusal(capsys, "--data d.npz --conditional")
    assert os.listdir() == ["d.npz"]


@pytest.mark.parametrize("command", [
    "--steps 1001 --sample 2", "--eta 1.5 --sample 2", "--width 12", "--lr nan",
    "--epochs -1", "--sample 0", "--clusters 0", "--guidance nan --sample 2",
    "--seed 12345678901234567890", "--label 3", "--model o", "--what",
    "--lr 1 --resume", "--overwrite --resume", "--width 16 --sample 2",
    "--data d --sample 2",
    "--seed 1 --evaluate", "--conditional --clusters 2", "--clusters 2 --resume"])
def test_6_options_out_of_range_or_together(capsys, command):
    """The line names the first option; nothing is written."""
    assert command.split()[0] in refusal(capsys, command)
    assert os.listdir() == []


@pytest.mark.parametrize("command, says", [
    ("--resume --out o --data other.npz", "[1, 8, 8]"),
    ("--evaluate --out o --data other.npz", "[1, 8, 8]"),
    ("--evaluate --out labels", "labels [0, 2], as the model's"),
    ("--resume --out half", "half/model.pt"),
    ("--sample 2 --out o --guidance 2", "labels are []"),
    ("--sample 2 --out labels --label 1", "labels are [0, 2]"),
    ("--sample 2 --out clusters --label 1", "labels are []")])
def test_6_options_that_do_not_fit_the_model(capsys, command, says):
    """The checkpoint decides: what contradicts it is refused."""
    data()
    np.savez("other.npz", x_train=np.zeros((64, 12, 12), np.uint8), x_test=X[:, :4])
    small_run().save(Path("o/model.pt"))
    small_run(labels=[0, 2], conditional=True).save(Path("labels/model.pt"))
    small_run(labels=[0, 1], clusters=2).save(Path("clusters/model.pt"))
    Path("half").mkdir()
    half = {key: saved("o/model.pt")[key] for key in ("config", "average")}
    torch.save(half, "half/model.pt")
    assert says in refusal(capsys, command + " --device cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_7_without_cuda_the_cpu_computes(capsys):
    """--device cuda is then a line on stderr, and a run on the CPU."""
    assert train("--device cuda --epochs 0.125")["step"] == 1
    assert capsys.readouterr().err == "no CUDA device here, so the CPU\n"


def test_8_what_is_not_finite_is_not_saved(monkeypatch, capsys):
    """A weight that is NaN ends the run: the file of before stays."""
    train()
    before = Path("o/model.pt").read_bytes()
    after_step(monkeypatch, lambda run: run.model.out.bias.data.fill_(float("nan")))
    line = refusal(capsys, "--data d.npz --width 8 --out o --overwrite")
    assert "--lr" in line and Path("o/model.pt").read_bytes() == before


def test_9_a_full_disk_is_one_line(monkeypatch, capsys):
    """It names the file; the model of before stays whole."""
    train()
    for full, command in [("o/model.pt", "--data d.npz --width 8 --out o --overwrite"),
                          ("x.npz", "--sample 2 --out o --npz x.npz")]:
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
    """5 and 905 stay so; the opening line tells what was read, and what white is. With
    config and average, also in float16, a small file is enough to draw."""
    x, y = X + np.eye(8, dtype=np.uint8), np.resize([5, 905], 64)
    state = train("--conditional --epochs 0.25", x_train=x, y_train=y)
    assert capsys.readouterr().out.startswith(
        "d.npz: x_train uint8 (64, 8, 8), y_train int64 (64,), 0..1, white is 255\n")
    assert state["config"]["labels"] == [5, 905]
    assert state["model"]["label.weight"].shape[0] == 3         # and the null label
    average = {name: value.half() for name, value in state["average"].items()}
    torch.save({"config": state["config"], "average": average}, "small.pt")
    sample = "--model small.pt --steps 2 --npz x.npz --sample "
    mnist.main((sample + "5 --guidance 2").split())
    assert np.load("x.npz")["x"].shape == (5, 8, 8)
    assert np.load("x.npz")["y"].tolist() == [5, 5, 5, 905, 905]
    mnist.main((sample + "2 --label 905").split())
    assert np.load("x.npz")["y"].tolist() == [905, 905]


@pytest.mark.parametrize("shape", [(64, 8, 8), (64, 8, 8, 1), (64, 8, 12, 3)])
def test_images_keep_their_place(monkeypatch, shape):
    """Grey images, with a channel or without, and colour, read and drawn again; what
    lies outside [-1, 1] is clipped."""
    pixels = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    data(x_train=pixels)
    run = small_run()
    config = {"data": "d.npz", "conditional": False, "clusters": None}
    x, y = mnist.load_data(config, "train")
    x_0 = torch.where(x == 255, 3, x / 127.5 - 1)
    monkeypatch.setattr(run.diffusion, "sample", lambda *a, **k: [x_0])
    images = mnist.draw(run, y, None)
    np.testing.assert_array_equal(images.numpy().reshape(shape), pixels)
    assert config["shape"] == list(x.shape[1:]) and y.tolist() == [-1] * 64


def test_clusters():
    """k-means finds the two kinds of images without labels, and they are drawn by their
    shares, 48 and 16 of 64; the bound takes the null label."""
    state = train("--clusters 2 --epochs 0.25")
    shares = state["config"]["shares"]
    _, y = mnist.load_data(state["config"], "train")
    assert len(set(zip(y.tolist(), Y))) == 2 and sorted(shares) == [0.25, 0.75]
    mnist.main("--out o --sample 400 --steps 1 --npz x.npz".split())
    rare = np.load("x.npz")["y"] == np.argmin(shares)
    assert abs(rare.mean() - 0.25) < 5 * (0.25 * 0.75 / 400) ** 0.5
    _, y = mnist.load_data(state["config"], "test")
    assert y.equal(NO_LABEL)


def test_k_means():
    """Each image is nearest to the mean of its own cluster, in colour and of any size;
    none of K is lost where as many are far apart."""
    images = RANDOM.integers(0, 256, (100, 3, 28, 56), dtype=np.uint8)
    y = mnist.k_means(torch.from_numpy(images), 4, seed=1).numpy()
    small = images.reshape(100, 3, 14, 2, 14, 4).mean((3, 5)).reshape(100, -1)
    means = np.stack([small[y == cluster].mean(0) for cluster in range(4)])
    distance = ((small[:, None] - means) ** 2).sum(2)
    assert (distance.argmin(1) == y).all()
    far = torch.arange(5).mul(60).byte().reshape(5, 1, 1, 1).expand(5, 1, 8, 8)
    assert mnist.k_means(far, 5, seed=0).unique().tolist() == [0, 1, 2, 3, 4]


def test_capture_gets_what_a_step_passes(monkeypatch):
    """A stand-in for CUDA: a step's shapes and types."""
    run, seen = small_run(), []
    forward = run.model.forward

    def stand_in(model, arguments):
        assert model is run.model and not torch.is_autocast_cache_enabled()
        forward(*arguments)

        def graph(*now):
            seen.extend(zip(arguments, now, strict=True))
            return forward(*now)
        model.forward = graph
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", stand_in)
    mnist.capture(run)
    mnist.train_step(run, IMAGES, NO_LABEL)
    assert len(seen) == 3
    for captured, passed in seen:
        assert (captured.shape, captured.dtype) == (passed.shape, passed.dtype)
