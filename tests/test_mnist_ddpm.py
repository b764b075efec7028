"""The ten promises of mnist_ddpm.py: it 1 learns, 2 knows its images, 3 goes on as if
uninterrupted, 4 keeps model.pt whole, 5 runs no code of a file, 6 refuses in one line,
7 does without CUDA, 8 saves no NaN, 9 survives a full disk, 10 repeats itself."""
import os
import runpy
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import mnist_ddpm as mnist

saved = partial(torch.load, weights_only=True)          # what a checkpoint holds
# Two kinds of dark images: those of label 7 have a bright corner.
RANDOM = np.random.default_rng(0)
Y = RANDOM.permutation(np.repeat([3, 7], [48, 16]))
X = RANDOM.integers(0, 21, (64, 8, 8), dtype=np.uint8)
X[Y == 7, :4, :4] += 235
IMAGES, NO_LABEL = torch.from_numpy(X)[:, None], torch.full((64,), -1)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def ending(monkeypatch, capsys):
    """The line, or the exit code, with which the script ends: a function of options."""
    def run(options):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [mnist.__file__, *options.split()])
        with pytest.raises(SystemExit) as error:
            runpy.run_path(mnist.__file__, run_name="__main__")
        assert "\n" not in str(error.value.code) and not capsys.readouterr().err
        return error.value.code                         # Python prints a line, code 1
    return run


def data(name="d.npz", **arrays):
    """Write 64 images with labels 3 and 7, but for those given; a run's options."""
    default = {"x_train": X, "y_train": Y, "x_test": X, "y_test": Y}
    np.savez(name, **default | arrays)
    return f"--data {name} --width 8 --batch-size 8 --device cpu".split()


def train(options="--epochs 0.25", **arrays):
    """Run the program, by default for two steps, into the folder o."""
    mnist.main([*data(**arrays), "--out", "o", *options.split()])
    return saved("o/model.pt")


def small_run(**settings):
    config = {"seed": 0, "schedule": "laplace", "shape": [1, 8, 8], "labels": [],
              "shares": [], "conditional": False, "clusters": None, "data": "d.npz",
              "width": 8, "lr": 3e-3, "batch_size": 8, "images": 8000}
    return mnist.Run({**config, **settings}, torch.device("cpu"))


def losses(run, y):
    """Of the averaged and the last weights on IMAGES, by the same t and eps."""
    x0, pair = IMAGES.repeat(20, 1, 1, 1) / 127.5 - 1, []
    for network in (run.average.module, run.model):
        model = partial(network, y=y.repeat(20))
        loss = run.diffusion.loss(model, x0, torch.Generator().manual_seed(1))
        pair.append(loss.item())
    return pair


def test_1_it_learns():
    """In 300 steps both losses fall far below 1, where they began, by true labels."""
    train("--conditional --epochs 37.5")
    run = mnist.load_run("o/model.pt", "cpu", resume=True)
    own = torch.from_numpy(Y == 7).long()
    assert max(losses(run, own)) < 0.25
    assert min(losses(run, 1 - own)) > 1.3 * max(losses(run, own))


def test_1_the_average_keeps_up_with_the_weights():
    """Its loss is no worse by 5 % in short runs; in long ones it is of 100 steps."""
    run, ratios = small_run(batch_size=32, images=32 * 2000), []
    for steps in (50, 50, 100):
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
    """Pixels in [-1, 1], a tenth null labels, its own gradients, clipped, and rate."""
    run, seen = small_run(labels=[7], batch_size=2000, lr=2.0, images=2_000_000), {}

    def forward(x0, t, y):
        seen.update(low=x0.min(), high=x0.max(), null=(y == -1).double().mean())
        return (1 - run.step / 1000) * run.model.out.bias.sum()     # of four values

    def loss(model, x0, generator):
        return model(x0, None)
    monkeypatch.setattr(run.model, "forward", forward)
    monkeypatch.setattr(run.diffusion, "loss", loss)
    # The rate warms up, then it falls by half a cosine; gradients are at most 1 long.
    for step, rate, length in [(0, 0.02, 1), (500, 1, 1), (999, 4.9348e-6, 0.002)]:
        run.step = step
        mnist.train_step(run, IMAGES, torch.zeros(64, dtype=torch.int64))
        ours = run.optimiser.param_groups[0]["lr"], run.model.out.bias.grad.norm()
        assert ours == pytest.approx((rate, length), rel=1e-5)
    assert (seen["low"], seen["high"]) == (-1, 1)
    assert abs(seen["null"] - 0.1) < 5 * (0.09 / 2000) ** 0.5


def test_1_the_averaged_weights_draw_and_are_evaluated(capsys):
    """Each image with its own label; pixels are those of x_0; guided by 0, no label."""
    run, y, draws = small_run(labels=[0, 1]), torch.tensor([0, 1]), torch.Generator()
    for weight in run.average.module.parameters():
        torch.nn.init.normal_(weight, std=0.1, generator=draws.manual_seed(2))
    model, x0 = partial(run.average.module, y=y), IMAGES[:2] / 127.5 - 1
    ours = mnist.draw(run, y, draws.manual_seed(1), steps=3)
    draws.manual_seed(1)
    *_, x_0 = run.diffusion.sample(model, x0.shape, 3, generator=draws)
    assert (ours - (x_0[:, 0] + 1) * 127.5).abs().max() <= 0.5
    guided = mnist.draw(run, y, draws.manual_seed(1), steps=3, guidance=0)
    unlabelled = mnist.draw(run, 0 * y - 1, draws.manual_seed(1), steps=3)
    assert guided.equal(unlabelled) and not guided.equal(ours)
    mnist.evaluate(run, IMAGES[:2], y)
    bits = run.diffusion.bits_per_dim(model, x0, generator=draws.manual_seed(0))
    assert capsys.readouterr().out.split("\n")[-2].startswith(f"{bits.mean():.3f} +- ")


def test_2_a_run_knows_its_images(capsys, ending):
    """--resume and --evaluate read, and name, its file, or another on purpose."""
    train()
    data("e.npz")
    for command, opening in [
            ("--resume", "d.npz: x_train"), ("--evaluate", "d.npz: x_test"),
            ("--evaluate --data e.npz", "e.npz: x_test")]:
        capsys.readouterr()
        mnist.main(f"{command} --out o --device cpu".split())
        assert capsys.readouterr().out.startswith(opening)
    os.remove("d.npz")
    assert "cannot read d.npz" in ending("--resume --out o")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("options", ["--conditional", "--clusters 2"])
def test_3_10_resumed_equals_uninterrupted(monkeypatch, device, options):
    """From its first save: the same weights and pictures. Another seed has others."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA here")
    command = [*data()[:6], "--device", device, "--epochs", "1", *options.split()]
    mnist.main([*command, "--seed", "3", "--out", "a"])
    mnist.main([*command, "--seed", "4", "--out", "c"])

    def save_and_stop(run, path, save=mnist.Run.save):
        save(run, path)
        raise KeyboardInterrupt
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(mnist.Run, "save", save_and_stop)
        mnist.main([*command, "--seed", "3", "--out", "b"])
    mnist.main(["--resume", "--out", "b", "--device", device])
    a, b, c = [saved(f"{folder}/model.pt") for folder in "abc"]
    assert a.pop("config") == b.pop("config")
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not a["model"]["out.bias"].equal(c["model"]["out.bias"])
    a, b, c = [Path(folder, "samples.png").read_bytes() for folder in "abc"]
    assert a == b != c


def test_3_saves_every_ten_seconds(monkeypatch):
    """Counted from the end of the save before, which here takes twelve; a step one."""
    run, at = small_run(images=8 * 40), []

    def seconds():
        return run.step + 12 * len(at)

    def save(run, path):
        at.append(run.step)
    monkeypatch.setattr(mnist.time, "monotonic", seconds)
    monkeypatch.setattr(mnist.Run, "save", save)
    mnist.train(run, IMAGES, NO_LABEL, None)
    assert at == [1, 12, 23, 34, 40]


def test_4_ctrl_c(monkeypatch, ending):
    """It ends the script with exit code 130."""
    def interrupt(*arguments):
        raise KeyboardInterrupt
    data()
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", interrupt)
    assert ending("--data d.npz --width 8") == 130


def test_4_a_finished_model_is_not_replaced(capsys, ending):
    """But by --overwrite; --resume says that it is finished, and leaves it."""
    train()
    before = Path("o/model.pt").read_bytes()
    assert "--overwrite" in ending("--data d.npz --epochs 1 --out o")
    mnist.main("--resume --out o --device cpu".split())
    assert "o/model.pt is finished, at step 2\n" in capsys.readouterr().out
    assert Path("o/model.pt").read_bytes() == before
    assert train("--overwrite --epochs 0.125")["step"] == 1


def test_5_loading_runs_no_code_and_changes_nothing_else(ending):
    """As a checkpoint, or as data; the random state of torch stays as it was."""
    Path("evil").write_bytes(b"cos\nmkdir\n(S'ran'\ntR.")      # os.mkdir("ran")
    assert "cannot use evil" in ending("--sample 1 --model evil")
    assert "cannot read evil" in ending("--data evil")
    assert os.listdir() == ["evil"]
    small_run().save(Path("o/model.pt"))
    before = torch.manual_seed(1).get_state()           # another seed than the run's
    mnist.load_run("o/model.pt", "cpu")
    assert before.equal(torch.get_rng_state())


@pytest.mark.parametrize("says, name, array", [
    ("(64, 6, 8)", "x_train", X[:, :6]),
    ("float64", "x_train", X / 1),
    ("(64, 8, 8, 4)", "x_train", np.zeros((64, 8, 8, 4), np.uint8)),
    ("(64, 1): want y (N,), integers", "y_train", Y[:, None]),
    ("<U1", "y_train", np.array(["a", "b"] * 32)),
    ("0 or more", "y_train", (-Y).astype(np.uint64))])
def test_6_data_that_do_not_fit(ending, says, name, array):
    """The line names the dtype and shape that were found, and what is wanted."""
    data(**{name: array})
    assert says in ending("--data d.npz --conditional --epochs 1")
    assert os.listdir() == ["d.npz"]


@pytest.mark.parametrize("command", [
    "--steps 1001 --sample 2", "--eta 1.5 --sample 2", "--width 12", "--lr nan",
    "--epochs -1", "--sample 0", "--clusters 0", "--guidance nan --sample 2",
    "--seed 12345678901234567890", "--label 3", "--model o", "--lr 1 --resume",
    "--overwrite --resume", "--width 16 --sample 2", "--data d --sample 2",
    "--seed 1 --evaluate", "--conditional --clusters 2"])
def test_6_options_out_of_range_or_together(ending, command, monkeypatch):
    """The line names the first option; nothing is read or written."""
    monkeypatch.setattr(np, "load", None)
    assert command.split()[0] in ending(command)
    assert os.listdir() == []


@pytest.mark.parametrize("command, says", [
    ("--resume --out o --data other.npz", "[1, 8, 8]"),
    ("--evaluate --out labels", "labels [0, 2], as the model's"),
    ("--resume --out half", "cannot use half/model.pt"),
    ("--sample 2 --out o --guidance 2", "labels are []"),
    ("--sample 2 --out labels --label 1", "labels are [0, 2]"),
    ("--sample 2 --out clusters --label 1", "labels are []")])
def test_6_options_that_do_not_fit_the_model(ending, command, says):
    """The checkpoint decides: what contradicts it is refused."""
    data()
    data("other.npz", x_train=X[:, :4])
    small_run().save(Path("o/model.pt"))
    small_run(labels=[0, 2], conditional=True).save(Path("labels/model.pt"))
    small_run(labels=[0, 1], clusters=2).save(Path("clusters/model.pt"))
    assert says in ending(command + " --device cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_7_without_cuda_the_cpu_computes(capsys):
    """--device cuda is then a line on stderr, and a run on the CPU."""
    assert train("--device cuda --epochs 0.125")["step"] == 1
    assert capsys.readouterr().err == "no CUDA device here, so the CPU\n"


def test_8_what_is_not_finite_is_not_saved():
    """A weight that is NaN ends the run: the file of before stays."""
    run, path = small_run(), Path("model.pt")
    run.save(path)
    run.model.out.bias.data.fill_(float("nan"))
    with pytest.raises(SystemExit, match="not finite at step 0: lower --lr"):
        run.save(path)
    assert saved(path)["model"]["out.bias"].isfinite().all()


def test_4_9_model_pt_is_the_old_one_or_the_new_one(monkeypatch, ending):
    """It is replaced, never written; a full disk is one line, and leaves it, alone."""
    no_room = ["model.pt"]

    def write_half(path, content, write=Path.write_bytes):
        if path.name not in no_room:
            return write(path, content)
        write(path, content[:1])
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", write_half)
    train()
    for name, command in [("model.pt", "--data d.npz --width 8 --out o --overwrite"),
                          ("x.npz", "--sample 2 --out o --npz x.npz")]:
        no_room.append(name + ".tmp")
        line = ending(command)
        assert line == "cannot write: [Errno 28] No space left on device"
    assert saved("o/model.pt")["step"] == 2
    assert sorted(os.listdir("o")) == ["model.pt", "samples.png"]


def test_10_labels_come_out_as_the_data_have_them(capsys):
    """5 and 905 stay so; config and average, also in float16, are enough to draw."""
    y = np.resize([5, 905], 64)
    state = train("--conditional --epochs 0.25", x_train=X % 2, y_train=y)
    assert capsys.readouterr().out.startswith(
        "d.npz: x_train uint8 (64, 8, 8), y_train int64 (64,), 0..1, white is 255\n")
    assert state["config"]["labels"] == [5, 905]
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
    """Grey, with a channel or without, and colour; draw clips what is above 1."""
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
    """k-means finds the two kinds, drawn by their shares; the bound takes no label."""
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
    """Images of any size are nearest to their cluster's mean; equal ones share one."""
    images = RANDOM.integers(0, 256, (400, 3, 28, 56), dtype=np.uint8)
    y = mnist.k_means(torch.from_numpy(images), 2, seed=1).numpy()
    small = images.reshape(400, 3, 14, 2, 14, 4).mean((3, 5)).reshape(400, -1)
    means = np.stack([small[y == 0].mean(0), small[y == 1].mean(0)])
    distance = ((small[:, None] - means) ** 2).sum(2)
    assert (distance.argmin(1) == y).all()
    grey = torch.tensor([100, 140, 140, 180, 220], dtype=torch.uint8)
    y = mnist.k_means(grey.reshape(5, 1, 1, 1).expand(5, 1, 8, 8), 5, seed=0)
    assert y[1] == y[2] and len(y.unique()) == 4


def test_capture_gets_what_a_step_passes(monkeypatch):
    """Shapes and types, by position, uncached: the same at a stand-in for CUDA's."""
    run, seen = small_run(), []

    def remember(model, arguments):
        assert model is run.model and not torch.is_autocast_cache_enabled()
        seen.append([(value.shape, value.dtype) for value in arguments])
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", remember)
    mnist.capture(run)
    run.model.register_forward_pre_hook(remember)
    mnist.train_step(run, IMAGES, NO_LABEL)
    assert len(seen) == 2 and seen[0] == seen[1]
