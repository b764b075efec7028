"""Train a DDPM (Ho, Jain, Abbeel 2020, arXiv 2006.11239) on MNIST, draw digits with it.

    python mnist_ddpm.py --sample 100 --model assets/model.pt   # digits at once
    python mnist_ddpm.py                            # trains, then draws out/samples.png
    python mnist_ddpm.py --resume                   # goes on after Ctrl-C or a crash
    python mnist_ddpm.py --evaluate                 # the variational bound, bits/dim
    python mnist_ddpm.py --conditional --out labels # with labels

Two cores of an AMD EPYC, 5 min 41 s: Frechet distance of 1,000 digits 31, real ones 12.
"""
import argparse
import io
import math
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ddpm_min as ddpm

MNIST = Path(__file__).resolve().parent / "data" / "mnist.npz"
CPU = dict(images=500_000, batch_size=64, lr=3.5e-3, width=24, beta_2=0.95)
CUDA = dict(images=1_800_000, batch_size=256, lr=2.5e-3, width=96, beta_2=0.99)


def load_images(path, split, labels=None):
    """x_train or x_test of an .npz file: uint8 (N, C, H, W); the class of each image,
    int64 (N,): where in labels (a list; empty: all that occur) its y is, or -1 if
    labels is None; the labels. What does not fit ends the program."""
    try:
        with np.load(path, allow_pickle=False) as file:
            x = file[f"x_{split}"]
            y = np.full(len(x), -1) if labels is None else file[f"y_{split}"]
    except Exception as error:  # numpy knows a dozen for missing, broken, foreign files
        sys.exit(f"cannot read {path}: {error!r:.100}")
    found = f"{path}: x_{split} {x.dtype} {x.shape}"
    x = x[..., None] if x.ndim == 3 else x
    fits = x.dtype == np.uint8 and x.ndim == 4 and x.size and x.shape[3] in (1, 3)
    if not fits or x.shape[1] % 4 or x.shape[2] % 4:
        sys.exit(f"{found}: want x uint8 (N, H, W[, 3]), H and W divisible by 4")
    if labels is not None:
        found += f", y_{split} {y.dtype} {y.shape}"
        if y.dtype.kind not in "iu" or y.shape != (len(x),) or y.min() < 0:
            sys.exit(f"{found}: want y integers of 0 or more, (N,), made of names by "
                     "np.unique(y, return_inverse=True)[1], of one-hot by y.argmax(1)")
        labels = labels or np.unique(y).tolist()
        if not np.isin(y, labels).all():
            sys.exit(f"{found}: want only the model's labels, {labels}")
        y = np.searchsorted(labels, y)
    tip = ", where white is 255" if x.max() <= 1 else ""
    print(f"{found}, {x.min()}..{x.max()}{tip}, {len(labels or [])} labels", flush=True)
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), torch.from_numpy(y), labels


def write_file(path, data):
    """Write bytes whole or not at all; where there is no room the program ends."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        if temporary.exists():
            temporary.unlink()
        sys.exit(f"cannot write {path}: {error}")


class Run:
    """A training run: its settings, and all that changes as it trains."""

    def __init__(self, config, device):
        self.config, self.device, self.step, self.stopped = config, device, 0, None
        self.steps = math.ceil(config["images"] / config["batch_size"])
        self.generator = torch.Generator(device).manual_seed(config["seed"])
        betas = getattr(ddpm, config["schedule"] + "_schedule")()
        self.diffusion = ddpm.GaussianDiffusion(betas).to(device)
        torch.manual_seed(config["seed"])               # of the initial weights
        model = ddpm.UNet(config["shape"], config["width"], len(config["labels"] or []))
        cuda = device.type == "cuda"
        layout = torch.contiguous_format if cuda else torch.channels_last
        self.model = model.to(device, memory_format=layout)
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
        self.optimiser = torch.optim.Adam(
            self.model.parameters(), betas=(0.9, config["beta_2"]), fused=True)
        # Networks compute in bfloat16 where a GPU has it, uncached, as capture wants.
        on = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        self.autocast = partial(torch.autocast, device.type, torch.bfloat16, on, False)

    def stop(self, number, frame):
        """A signal's handler: train ends after the step at hand."""
        self.stopped = number

    def save(self, path):
        """Write all that it takes to go on; end if a weight is not finite."""
        if not all(weight.isfinite().all() for weight in self.model.parameters()):
            sys.exit(f"weights are not finite at step {self.step}: lower --lr")
        buffer = io.BytesIO()
        torch.save({
            "config": self.config, "step": self.step, "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "generator": self.generator.get_state()}, buffer)
        write_file(path, buffer.getvalue())


def load_run(path, device, resume=False):
    """The Run that save wrote; config and average are enough unless it is to resume."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        run = Run(state["config"], device)
        run.average.load_state_dict(state["average"])
        if resume:
            run.step = state["step"]
            run.model.load_state_dict(state["model"])
            run.optimiser.load_state_dict(state["optimiser"])
            run.generator.set_state(state["generator"])
    except Exception as error:  # torch knows a dozen for missing, broken, foreign files
        sys.exit(f"cannot use {path} on this {device.type}: {error!r:.100}")
    return run


def draw(run, classes, generator, steps=50, eta=1.0, guidance=1.0):
    """Yield x_T..x_0 of classes, int64 (n,), as uint8 (n, H, W[, 3]) on the CPU."""
    def network(x_t, t, y=classes):
        with run.autocast():
            return run.average.module(x_t, t, y)
    guided = ddpm.classifier_free(network, classes, guidance)
    model = network if guidance == 1 else guided
    shape = (len(classes), *run.config["shape"])
    for x in run.diffusion.sample(model, shape, steps, eta, generator=generator):
        images = ((x + 1) * 127.5).round().clamp(0, 255).byte().cpu()
        yield images[:, 0] if images.shape[1] == 1 else images.permute(0, 2, 3, 1)


def grid(images):
    """Images (n, H, W) or (n, H, W, 3) in rows of about sqrt(n); black fills up."""
    columns = math.ceil(math.sqrt(len(images)))
    black = images.new_zeros(-len(images) % columns, *images.shape[1:])
    rows = torch.cat([images, black]).unflatten(0, (-1, columns))   # (R, C, H, W)
    return rows.transpose(1, 2).flatten(0, 1).flatten(1, 2)         # (R H, C W)


def capture(run):
    """Have run.model replayed as a CUDA graph: a small one waits for its launches."""
    x_t = torch.zeros(run.config["batch_size"], *run.config["shape"], device=run.device)
    t = torch.ones(len(x_t), dtype=torch.int64, device=run.device)
    try:
        with run.autocast():
            torch.cuda.make_graphed_callables(run.model, (x_t, t, -t))
    except RuntimeError as error:
        print(f"no CUDA graph, so slower: {error!r:.100}", file=sys.stderr)


def train_step(run, x_train, y_train):
    """A step of Algorithm 1 on what load_images returns; the loss, detached."""
    config, draws = run.config, {"generator": run.generator, "device": run.device}
    i = torch.randint(len(x_train), (config["batch_size"],), **draws)
    x0 = x_train[i].float() / 127.5 - 1
    # One label in ten becomes the null label, as classifier_free wants it.
    null = torch.rand(len(i), **draws) < 0.1
    y = y_train[i].masked_fill(null, -1)

    def model(x_t, t):
        return run.model(x_t, t, y)         # by position, as a captured network wants
    with run.autocast():
        loss = run.diffusion.loss(model, x0, run.generator)
    run.optimiser.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    # The rate warms up for 100 steps and falls to 0 by half a cosine.
    warm_up = min(1, (run.step + 1) / 100)
    cosine = (1 + math.cos(math.pi * run.step / run.steps)) / 2
    run.optimiser.param_groups[0]["lr"] = config["lr"] * warm_up * cosine
    run.optimiser.step()
    run.average.update_parameters(run.model)
    run.step += 1
    return loss.detach()


def train(run, x_train, y_train, path):
    """Train, and save at path, to the last step; Ctrl-C or SIGTERM end the program."""
    steps, start, B = run.steps, run.step, run.config["batch_size"]
    if run.device.type == "cuda":
        capture(run)
    loss = torch.zeros((), device=run.device)           # mean of the last 100 or so
    begin, saved = time.perf_counter(), -math.inf       # so that step 1 is saved
    last = run.step == steps
    handlers = {n: signal.signal(n, run.stop) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not last:
            latest = train_step(run, x_train, y_train)
            loss.lerp_(latest, max(0.01, 1 / (run.step - start)))
            now, last = time.perf_counter(), run.step == steps or run.stopped
            if last or now > saved + 10:
                saved, rate = now, B * (run.step - start) / (now - begin)
                print(f"step {run.step}/{steps}  loss {loss:.4f}  {rate:.0f} images/s  "
                      f"{B * (steps - run.step) / rate:.0f} s left", flush=True)
                run.save(path)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if run.stopped:
        print(f"stopped at step {run.step}: --resume goes on", file=sys.stderr)
        sys.exit(128 + run.stopped)


def sample(run, args):
    """Draw args.sample images, or 100, into samples.png and, if asked, an .npz."""
    labels, n = run.config["labels"] or [], args.sample or 100
    if args.label not in (None, *labels) or args.guidance != 1 and not labels:
        sys.exit(f"--label, --guidance: the model's labels are {labels}")
    classes = torch.full((n,), -1)
    if labels:                              # in order, as evenly as n allows
        classes = torch.arange(n) * len(labels) // n
    if args.label is not None:
        classes.fill_(labels.index(args.label))
    run.generator.manual_seed(args.seed)
    parts = []
    # So many at once stay in a CPU's cache, or fill a GPU.
    for part in classes.to(run.device).split(100 if run.device.type == "cpu" else 1000):
        *_, images = draw(run, part, run.generator, args.steps, args.eta, args.guidance)
        parts.append(images)
        print(f"{sum(map(len, parts))} of {n} images", flush=True)
    images = torch.cat(parts)
    if args.npz:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, x=images, y=np.array(labels or [-1])[classes])
        write_file(args.npz, buffer.getvalue())
    write_file(args.out / "samples.png", ddpm.encode_png(grid(images)))
    print("wrote", args.out / "samples.png", args.npz or "")


def evaluate(run, x, y):
    """Print the variational bound on what load_images returns."""
    bits = []
    for x_i, y_i in zip(x.split(500), y.split(500)):
        model = partial(run.average.module, y=y_i)      # in float32, on a GPU too
        x0 = x_i / 127.5 - 1
        bits.append(run.diffusion.bits_per_dim(model, x0, generator=run.generator))
    bits, n = torch.cat(bits), len(x)
    print(f"{bits.mean():.3f} +- {bits.std() / n**0.5:.3f} bits/dim on {n} images")


def parse_arguments(argv=None):
    """The command line as a namespace; one that does not fit ends the program."""
    parser = argparse.ArgumentParser(description="Diffusion on images.")
    parser.error = sys.exit                             # one line, no usage
    add = parser.add_argument
    add("--out", type=Path, default="out", help="folder to write to (default: out)")
    add("--device", choices=["cpu", "cuda"], help="default: CUDA if there is one")
    add("--data", type=Path, default=MNIST, help="an .npz, see load_images (MNIST)")
    add("--seed", type=int, default=0, help="same seed, same digits (default: 0)")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--overwrite", action="store_true", help="replace the run in --out")
    add("--evaluate", action="store_true", help="print the bound on x_test, bits/dim")
    add("--sample", type=int, help="draw so many")
    add = parser.add_argument_group("a new run").add_argument
    add("--epochs", type=float, help="default: 500,000 images, on CUDA 1,800,000")
    add("--batch-size", type=int, help="default: 64, on CUDA 256")
    add("--lr", type=float, help="of Adam (default: 0.0035, on CUDA 0.0025)")
    add("--width", type=int, help="by eights (default: 24, on CUDA 96)")
    add("--schedule", choices=["laplace", "cosine", "linear"], default="laplace",
        help="default: laplace; cosine suits fine texture, photographs")
    add("--conditional", action="store_true", help="train with labels")
    add = parser.add_argument_group("drawing, with --sample").add_argument
    add("--model", type=Path, help="for --evaluate, too (default: model.pt in --out)")
    add("--steps", type=int, default=50, help="of the chain, 1..1000 (default: 50)")
    add("--eta", type=float, default=1.0, help="1 (default) DDPM, 0 DDIM")
    add("--label", type=int, help="draw only this (default: all)")
    add("--guidance", type=float, default=1.0, help="classifier-free s (default: 1)")
    add("--npz", type=Path, help="write the images, uint8 x, and labels, y, here too")
    return check(parser, parser.parse_args(argv))


def check(parser, args):
    """args, unless a number is out of range or options contradict each other."""
    for name in ("sample", "epochs", "batch_size", "lr", "width", "steps"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} {value}: want a number above 0")
    if args.steps > 1000 or not 0 <= args.eta <= 1 or (args.width or 8) % 8:
        parser.error("want --steps 1..1000, --eta 0..1, --width a multiple of 8, got "
                     f"{args.steps}, {args.eta}, {args.width}")
    unfit = ["data"] if args.sample else ["steps", "eta", "label", "guidance", "npz"]
    if args.resume or args.evaluate or args.sample:
        unfit += ["epochs", "batch_size", "lr", "width", "schedule", "conditional"]
    unfit += ["seed"] if args.resume or args.evaluate else []
    unfit += [] if args.sample or args.evaluate else ["model"]
    for name in unfit:
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} does not go with the others")
    return args


def main(argv=None):
    """The command line; see the module's docstring."""
    args = parse_arguments(argv)
    cuda = torch.cuda.is_available() and args.device != "cpu"
    if args.device == "cuda" and not cuda:
        print("no CUDA device here, so the CPU", file=sys.stderr)
    device, path = torch.device("cuda" if cuda else "cpu"), args.out / "model.pt"
    torch.backends.cudnn.deterministic = True           # one seed, the same digits
    if args.sample:
        sample(load_run(args.model or path, device), args)
        return
    if args.evaluate or args.resume:
        run = load_run(args.model or path, device, args.resume)
        args.seed = run.config["seed"] if args.resume else args.seed
        split = "test" if args.evaluate else "train"
        x, y, _ = load_images(args.data, split, run.config["labels"])
        if list(x.shape[1:]) != run.config["shape"]:
            sys.exit(f"{args.data}: want images {run.config['shape']}, as the model's")
    elif path.exists() and not args.overwrite:
        sys.exit(f"{path} exists: --resume goes on, --overwrite replaces it")
    else:
        x, y, labels = load_images(args.data, "train", [] if args.conditional else None)
        config = {**(CUDA if cuda else CPU), "seed": args.seed, "labels": labels,
                  "schedule": args.schedule, "shape": list(x.shape[1:])}
        for name in ("batch_size", "lr", "width"):
            config[name] = getattr(args, name) or config[name]
        if args.epochs:
            config["images"] = args.epochs * len(x)
        run = Run(config, device)
    x, y = x.to(device), y.to(device)
    if args.evaluate:
        evaluate(run, x, y)
    else:
        train(run, x, y, path)
        sample(run, args)


if __name__ == "__main__":
    main()
