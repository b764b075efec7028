"""Train a DDPM (Ho, Jain, Abbeel 2020, arXiv 2006.11239) on MNIST, draw digits with it.

    python mnist_ddpm.py                            # trains, then draws out/samples.png
    python mnist_ddpm.py --resume                   # goes on after Ctrl-C or a crash
    python mnist_ddpm.py --sample 100 --steps 100   # draws with out/model.pt
    python mnist_ddpm.py --evaluate                 # the variational bound, bits/dim
    python mnist_ddpm.py --conditional --out labels # with labels

Two cores of an AMD EPYC, 5 min 31 s: Frechet distance 45 to 50 (two seeds, three draws
of each; 1,000 real images have 12). On a GPU, and more: docs/experiments.md.
"""
import gc
import io
import math
import time
import uuid
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ddpm_min as ddpm
from command_line import check_drawing, check_resuming, parse_arguments
from images import encode_png, grid, load_images
from program import (
    check_room, checksum, choose_device, could_write, errors_in_one_line, fail, keep,
    progress, run_as_process, say, settings, signals_wait, write_file, write_or_wait)
from unet import UNet

DEFAULTS = {"images": 280_000, "batch_size": 32, "width": 32, "beta_2": 0.95,
            "lr": 2.5e-3, "seed": 0, "schedule": "laplace", "conditional": False,
            "data": None}
CUDA = {"images": 1_800_000, "batch_size": 256, "width": 96, "beta_2": 0.99}


class Run:
    """A training run: its settings, and all that changes as it trains."""
    def __init__(self, config, device):
        self.config, self.device, self.step = config, device, 0
        self.own = None                 # checksum of the checkpoint that it may replace
        self.generator = torch.Generator(device).manual_seed(config["seed"])
        betas = getattr(ddpm, config["schedule"] + "_schedule")()
        self.diffusion = ddpm.GaussianDiffusion(betas).to(device)
        with torch.random.fork_rng(devices=[]):         # of the initial weights
            torch.default_generator.manual_seed(config["seed"])
            classes = len(config["labels"])
            model = UNet(config["shape"][0], config["width"], classes)
        cuda = device.type == "cuda"
        layout = torch.contiguous_format if cuda else torch.channels_last
        self.model = model.to(device, memory_format=layout)
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), betas=(0.9, config["beta_2"]), weight_decay=0,
            fused=True)
        # Where a GPU has bfloat16 the networks compute in it; the weights stay float32.
        native = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        self.autocast = partial(
            torch.autocast, device.type, torch.bfloat16, enabled=native)
        self.network = self.autocast()(self.model.forward)
        self.average_network = self.autocast()(self.average.module.forward)


def save_run(path, run, loss, copies=0):
    """Write all that it takes to go on; fail if the loss or a weight is not finite, if
    there is no room for so many copies, or if path is not, or no longer, the run's own:
    then its state is saved beside."""
    if not all(value.isfinite().all() for value in (loss, *run.model.parameters())):
        fail(f"not finite at step {run.step}: lower --lr (--resume, if {path} exists)")
    buffer = io.BytesIO()
    torch.save({
        "config": run.config,
        "step": run.step,
        "model": run.model.state_dict(),
        "average": run.average.state_dict(),
        "optimiser": run.optimiser.state_dict(),
        "generator": run.generator.get_state(),
    }, buffer)
    data = buffer.getvalue()
    if path.exists() and checksum(path) != run.own:
        beside = path.with_name(f"model-{uuid.uuid4().hex}.pt")
        write_file(beside, data)
        fail(f"another program has replaced {path}: this one saved {beside}, and ends")
    if copies:
        check_room(path, copies * len(data))
    write_file(path, data)
    run.own = zlib.crc32(data)


def load_run(path, device):
    """The Run that save_run wrote, on any device, none of its code run; or fail. Config
    and average are enough to sample from: run.own is then None."""
    try:
        data = Path(path).read_bytes()
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        config = {"beta_2": 0.99, **state["config"]}    # 0.99: an older checkpoint
        missing = {*DEFAULTS, "shape", "labels"} - config.keys()
        if missing:
            raise KeyError(*missing)
        run = Run(config, device)
        run.average.load_state_dict(state["average"])
        if "optimiser" in state:
            run.own, run.step = zlib.crc32(data), state["step"]
            run.model.load_state_dict(state["model"])
            run.optimiser.load_state_dict(state["optimiser"])
            # Another device cannot take the state: there new numbers are drawn.
            run.generator.manual_seed(run.config["seed"] + run.step)
            if len(state["generator"]) == len(run.generator.get_state()):
                run.generator.set_state(state["generator"])
        # The fused AdamW takes its moments to lie in memory as the weights do.
        for weight, moments in run.optimiser.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                moments[name] = torch.empty_like(weight).copy_(moments[name])
    except FileNotFoundError:
        fail(f"no checkpoint {path}: train first, or see --out")
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # torch knows a dozen for broken, foreign files
        fail(f"cannot read {path}: {error!r:.80}")
    return run


def draw(run, classes, generator, steps=50, eta=1.0, guidance=1.0):
    """Yield x_T..x_0 as images, uint8 (n, H, W) or (n, H, W, 3), on the CPU; classes:
    int64 (n,), as load_images makes them (without labels only n matters)."""
    y = classes if run.config["labels"] else None
    network = partial(run.average_network, y=y)
    if guidance != 1:
        network = ddpm.classifier_free(run.average_network, y, guidance)
    shape = (len(classes), *run.config["shape"])
    for x in run.diffusion.sample(network, shape, steps, eta, generator=generator):
        images = ((x + 1) * 127.5).round().clamp(0, 255).byte().cpu()
        yield images[:, 0] if images.shape[1] == 1 else images.permute(0, 2, 3, 1)


def draw_pictures(run, out, steps):
    """Write samples.png, 100 images of all classes, and a film of a quarter of them."""
    classes = torch.arange(100, device=run.device) * len(run.config["labels"]) // 100
    noise = torch.Generator(run.device).manual_seed(run.config["seed"])
    film = []
    for images in draw(run, classes, noise, steps):
        film.append(grid(images[::4]))
    write_file(out / "samples.png", encode_png([grid(images)]))
    frames = film[-1:] * 10 + film[::2]     # some viewers show the first frame only
    write_file(out / "denoising.png", encode_png(frames, fps=10))


def learning_rate(step, total, peak):
    """Half a cosine from peak down to 0, times a linear warm-up of 100 steps."""
    return peak * min(1, (step + 1) / 100) * (1 + math.cos(math.pi * step / total)) / 2


def capture(run):
    """Replay run.network as a CUDA graph: a small network waits for its launches. It
    takes one batch size then, in training; the average, a copy, stays as it is."""
    gc.collect()        # the graph of a run before, if freed later, would disturb this
    x_t = torch.zeros(run.config["batch_size"], *run.config["shape"], device=run.device)
    t = torch.ones(len(x_t), dtype=torch.int64, device=run.device)
    # The arguments that the loss will pass.
    arguments = (x_t, t, torch.zeros_like(t)) if run.config["labels"] else (x_t, t)
    with run.autocast(cache_enabled=False):
        run.network = torch.cuda.make_graphed_callables(run.model, arguments)


def train_step(run, x_train, y_train):
    """A step of Algorithm 1 on what load_images returns; the loss, detached."""
    config, device, generator = run.config, run.device, run.generator
    size = (config["batch_size"],)
    i = torch.randint(len(x_train), size, device=device, generator=generator)
    x0 = x_train[i].float() / 127.5 - 1
    y = None
    if y_train is not None:
        # One label in ten becomes the null label, as classifier_free wants it.
        null = torch.rand(size, device=device, generator=generator) < 0.1
        y = y_train[i].masked_fill(null, -1)
    loss = run.diffusion.loss(run.network, x0, y, generator)
    run.optimiser.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    rate = learning_rate(run.step, config["total"], config["lr"])
    run.optimiser.param_groups[0]["lr"] = rate
    run.optimiser.step()
    run.average.update_parameters(run.model)
    run.step += 1
    return loss.detach()


def train(run, x_train, y_train, path):
    """Train to the last step or a signal; writes path, and pictures beside it."""
    total, start, reports, saved = run.config["total"], run.step, 0, True
    if run.device.type == "cuda":
        capture(run)
    loss = torch.zeros((), device=run.device)           # mean of the last 100 or so
    say(f"step {start}/{total}; every 10 s a line, and {path}")
    begin = time.perf_counter(), time.process_time()
    due = begin[0] + 10
    with signals_wait() as stop:
        while run.step < total and not stop:
            latest = train_step(run, x_train, y_train)
            loss.lerp_(latest, max(0.01, 1 / (run.step - start)))
            if run.step == 1:
                save_run(path, run, loss, copies=2)     # the next is written beside it
            if time.perf_counter() > due:
                say(progress(run, loss, start, begin))
                could_write(save_run, path, run, loss)
                reports += 1
                if reports % 12 == 0:
                    could_write(draw_pictures, run, path.parent, 20)
                due = time.perf_counter() + 10
        if run.step > start:
            say(progress(run, loss, start, begin))
            saved = write_or_wait(stop, save_run, path, run, loss)
    if stop:
        lost = "" if saved else ", which could not be saved"
        fail(f"stopped at step {run.step} of {total}{lost}: --resume goes on from what "
             f"{path} has", 128 + stop[0])
    draw_pictures(run, path.parent, 50)
    say(f"wrote {path}, samples.png, denoising.png")


def sample(run, args):
    """Draw args.sample images into samples.png and, if asked, an .npz."""
    n, labels = args.sample, run.config["labels"]
    classes = torch.arange(n) * len(labels) // n        # counts differ by at most one
    if args.label is not None:
        classes = torch.full((n,), labels.index(args.label))
    picture, size = args.out / "samples.png", n * math.prod(run.config["shape"])
    for path in filter(None, (args.npz, picture)):
        check_room(path, 2 * size)      # before the work
    images = []
    # So many at once stay in a CPU's cache, or fill a GPU.
    for part in classes.to(run.device).split(100 if run.device.type == "cpu" else 1000):
        for x in draw(run, part, run.generator, args.steps, args.eta, args.guidance):
            pass
        images.append(x)
        say(f"{sum(map(len, images))} of {n} images")
    images = torch.cat(images)
    if args.npz:
        y = {"y": np.array(labels)[classes.numpy()]} if labels else {}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, x=images.numpy(), **y)
        write_file(args.npz, buffer.getvalue())
    write_file(picture, encode_png([grid(images)]))
    say(f"wrote {picture}" + (f", {args.npz}" if args.npz else ""))


def evaluate(run):
    """Print the variational bound on x_test."""
    x, y, facts = load_images(run.config, "test", run.device)
    if len(x) < 2 or facts["shape"] != run.config["shape"]:
        fail(f"x_test is {list(x.shape)}: want two or more of {run.config['shape']}")
    model = run.average.module          # in float32, on a GPU too
    bits, error = run.diffusion.bits_per_dim(
        model, x / 127.5 - 1, y, generator=run.generator)
    say(f"{bits:.3f} +- {error:.3f} bits/dim on {len(x)} test images")


def open_model(args, path, device):
    """The Run in path, to sample or evaluate; or fail if an option does not fit."""
    run = load_run(path, device)
    check_drawing(args, path, run.config)
    run.config["data"] = getattr(args, "data", run.config["data"])
    run.generator.manual_seed(getattr(args, "seed", 0))
    return run


def training_data(args, config, device):
    """What to train on; adds what args say and what the data are to config. Or fail."""
    config.update({key: getattr(args, key) for key in DEFAULTS if key in args})
    x, y, facts = load_images(config, "train", device)
    # A resumed run has them already; one of an earlier version lacks the checksum.
    if any(config.get(key, value) != value for key, value in facts.items()):
        fail("these images are not what the model was trained on: see --data")
    if config["batch_size"] > len(x):
        fail(f"--batch-size {config['batch_size']} is more than the {len(x)} images")
    images = args.epochs * len(x) if "epochs" in args else config["images"]
    config.update(facts, images=images, total=math.ceil(images / config["batch_size"]))
    return x, y


def new_run(args, path, device):
    """A new Run, and its data; or fail."""
    for file in (path, path.with_name("samples.png"), path.with_name("denoising.png")):
        if file.exists() and not args.overwrite:
            fail(f"{file} exists: --overwrite replaces it, another --out keeps it, "
                 "--resume goes on with a run")
    # Read now: what another program writes from now on is not replaced.
    own = checksum(path) if path.exists() else None
    config = DEFAULTS | (CUDA if device.type == "cuda" else {})
    x, y = training_data(args, config, device)
    run = Run(config, device)
    run.own = own
    return run, x, y


def resumed_run(args, path, device):
    """The Run in path with the command line's settings, and its data; or fail."""
    run = load_run(path, device)
    if run.own is None:
        fail(f"{path} is only to sample from: it lacks what --resume needs")
    check_resuming(args, path, run.config)
    config = dict(run.config)
    x, y = training_data(args, config, device)
    if run.step > config["total"]:
        fail(f"--epochs {args.epochs} end before step {run.step}, where {path} is")
    # The rate of a run that goes on otherwise rises again: its model may get worse.
    if (config["total"], config["lr"]) != (run.config["total"], run.config["lr"]):
        keep(path, run.step)
    check_room(path, path.stat().st_size)
    run.config = config
    return run, x, y


def run_program(args):
    """Sample, evaluate or train, as the command line says."""
    path, device = args.out / "model.pt", choose_device(args.device)
    if args.sample:
        sample(open_model(args, path, device), args)
    elif args.evaluate:
        # MPS lacks log_ndtr.
        device = torch.device("cpu") if device.type == "mps" else device
        evaluate(open_model(args, path, device))
    elif args.resume:
        train(*resumed_run(args, path, device), path)
    else:
        train(*new_run(args, path, device), path)


def main(argv=None):
    """The command line; see the module's docstring. It leaves the process as it was."""
    full = "training wants a lower --batch-size or --width, drawing --device cpu"
    with settings(), errors_in_one_line(if_memory_is_full=full):
        run_program(parse_arguments(argv))


if __name__ == "__main__":
    run_as_process(main)
