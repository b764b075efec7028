"""Train a DDPM (Ho, Jain, Abbeel 2020, arXiv 2006.11239) on MNIST, draw digits with it.

    python mnist_ddpm.py --sample 100 --model assets/model.pt   # digits at once
    python mnist_ddpm.py                            # trains, then draws out/samples.png
    python mnist_ddpm.py --resume                   # goes on after Ctrl-C or a crash
    python mnist_ddpm.py --clusters 300 --out clusters      # better ones, as quickly

Two cores of an AMD EPYC, 5 min 41 s: Frechet distance 19.3, by clusters 8.3, real 3.6.
"""
import argparse
import io
import math
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ddpm_min as ddpm

MNIST = Path(__file__).resolve().parent / "data" / "mnist.npz"
# Two cores train a narrow network on more images: docs/experiments.md.
CPU = dict(images=500_000, batch_size=64, lr=3.5e-3, width=24, schedule="laplace")
CUDA = dict(images=1_800_000, batch_size=256, lr=2.5e-3, width=96, schedule="laplace")
SETTINGS = "epochs batch_size lr width schedule conditional clusters".split()
RANGES = {"sample": (1, 10**6), "epochs": (1e-6, 1e6), "batch_size": (1, 10**5),
          "lr": (1e-9, 1), "width": (8, 1024), "clusters": (1, 10**4), "eta": (0, 1),
          "steps": (1, 1000), "guidance": (-100, 100), "seed": (0, 2**63 - 1)}


def load_data(config, split):
    """A run's images, uint8 (N, C, H, W), and their classes, int64 (N,), or -1. A new
    config learns shape, labels and shares here. What does not fit ends the program."""
    path, labelled = config["data"] or MNIST, config["conditional"]
    try:
        with np.load(path, allow_pickle=False) as file:
            x = file[f"x_{split}"]
            y = file[f"y_{split}"] if labelled else np.full(len(x), -1)
    except Exception as error:  # numpy knows a dozen for missing, broken, foreign files
        sys.exit(f"cannot read {path}: {error!r:.100}")
    found = f"{path}: x_{split} {x.dtype} {x.shape}"
    x = x[..., None] if x.ndim == 3 else x
    fits = x.dtype == np.uint8 and x.ndim == 4 and x.size and x.shape[3] in (1, 3)
    if not fits or x.shape[1] % 4 or x.shape[2] % 4:
        sys.exit(f"{found}: want x uint8 (N, H, W[, 3]), H and W divisible by 4")
    if labelled:
        found += f", y_{split} {y.dtype} {y.shape}"
        if y.dtype.kind not in "iu" or y.shape != (len(x),) or np.int64(y).min() < 0:
            sys.exit(f"{found}: want y (N,), integers of 0 or more: docs/recipes.md")
    print(f"{found}, {x.min()}..{x.max()}, white is 255", flush=True)
    x = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    y = torch.from_numpy(y.astype(np.int64))
    if config["clusters"] and split == "train":
        y = k_means(x, config["clusters"], config["seed"])
    values, counts = y.unique(return_counts=True)
    shape = config.setdefault("shape", list(x.shape[1:]))
    labels = config.setdefault("labels", values[values >= 0].tolist())
    config.setdefault("shares", (counts / len(x)).tolist())
    known = torch.tensor([-1, *labels])
    if list(x.shape[1:]) != shape or not torch.isin(values, known).all():
        sys.exit(f"{found}: want images {shape}, labels {labels}, as the model's")
    return x, torch.searchsorted(known, y) - 1          # y's place in labels, or -1


def k_means(x, K, seed):
    """The cluster, int64 (N,) in 0..K-1, of each of N images, uint8 (N, C, H, W), made
    14 x 14: 25 rounds of Lloyd's algorithm from K of them, drawn at random."""
    points = torch.nn.functional.adaptive_avg_pool2d(x / 255, 14).flatten(1)
    centres = points[np.random.default_rng(seed).permutation(len(x))[:K]]
    for _ in range(25):
        nearest = torch.cdist(points, centres).argmin(1)
        total = torch.zeros_like(centres).index_add(0, nearest, points)
        centres = total / nearest.bincount(minlength=len(centres))[:, None].clamp(min=1)
    return nearest


def write_file(path, data):
    """Write bytes whole or not at all; OSError where they cannot be written."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class Run:
    """A training run: its settings, and all that changes as it trains."""

    def __init__(self, config, device):
        self.config, self.device, self.step = config, device, 0
        self.steps = math.ceil(config["images"] / config["batch_size"])
        self.generator = torch.Generator(device).manual_seed(config["seed"])
        betas = getattr(ddpm, config["schedule"] + "_schedule")()
        self.diffusion = ddpm.GaussianDiffusion(betas).to(device)
        with torch.random.fork_rng(devices=[]):         # torch's own state stays
            torch.default_generator.manual_seed(config["seed"])     # not CUDA's
            model = ddpm.UNet(config["shape"], config["width"], len(config["labels"]))
        cuda = device.type == "cuda"
        layout = torch.contiguous_format if cuda else torch.channels_last
        self.model = model.to(device, memory_format=layout)
        self.average = AveragedModel(model)
        self.optimiser = torch.optim.Adam(
            self.model.parameters(), betas=(0.9, 0.95), fused=True)     # rate: below
        # Networks compute in bfloat16 where a GPU has it, uncached, as capture wants.
        on = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        self.autocast = partial(torch.autocast, device.type, torch.bfloat16, on, False)

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
        run = Run(state["config"], torch.device(device))
        run.average.load_state_dict(state["average"])
        if resume:
            run.step = state["step"]
            run.model.load_state_dict(state["model"])
            run.optimiser.load_state_dict(state["optimiser"])
            run.generator.set_state(state["generator"])
    except Exception as error:  # torch knows a dozen for missing, broken, foreign files
        sys.exit(f"cannot use {path} on {device}: {error!r:.100}")
    return run


def draw(run, y, generator, steps=50, eta=1.0, guidance=1.0):
    """Images, uint8 (n, H, W[, 3]), of classes y, int64 (n,); averaged weights."""
    network = run.autocast()(run.average.module)        # autocast is a decorator
    images = []
    # So many at once stay in a CPU's cache, or fill a GPU.
    for part in y.split(100 if run.device.type == "cpu" else 1000):
        model = partial(network, y=part)
        if guidance != 1:
            model = ddpm.guide(model, network, guidance)
        shape = (len(part), *run.config["shape"])
        for x in run.diffusion.sample(model, shape, steps, eta, generator=generator):
            pass                                        # x_T, ..., x_0
        images += ((x + 1) * 127.5).round().clamp(0, 255).byte().cpu()
        print(f"{len(images)} of {len(y)} images", flush=True)
    return torch.stack(images).permute(0, 2, 3, 1).squeeze(3)


def grid(images):
    """Images (n, H, W) or (n, H, W, 3) in rows of about sqrt(n); black fills up."""
    columns = math.ceil(math.sqrt(len(images)))
    black = images.new_zeros(-len(images) % columns, *images.shape[1:])
    rows = torch.cat([images, black]).unflatten(0, (-1, columns))   # (R, C, H, W)
    return rows.transpose(1, 2).flatten(0, 1).flatten(1, 2)         # (R H, C W)


def capture(run):
    """Give run.model a forward that replays a CUDA graph, as launches take longest."""
    x_t = torch.zeros(run.config["batch_size"], *run.config["shape"], device=run.device)
    t = torch.ones(len(x_t), dtype=torch.int64, device=run.device)
    with run.autocast():
        torch.cuda.make_graphed_callables(run.model, (x_t, t, -t))      # y: -1


def train_step(run, x_train, y_train):
    """A step of Algorithm 1 on what load_data returns; the loss, detached."""
    config, draws = run.config, {"generator": run.generator, "device": run.device}
    i = torch.randint(len(x_train), (config["batch_size"],), **draws)
    x0 = x_train[i] / 127.5 - 1
    # A tenth is told no class, for guidance (Ho & Salimans 2022, Sec. 4.2).
    y = y_train[i].masked_fill(torch.rand(len(i), **draws) < 0.1, -1)
    def model(x_t, t):
        return run.model(x_t, t, y)         # by position, as a captured network wants
    with run.autocast():
        loss = run.diffusion.loss(model, x0, run.generator)
    run.optimiser.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)     # as the authors do
    # The rate rises while Adam's moments settle, and falls to 0 by half a cosine.
    warm_up = min(1, (run.step + 1) / 100)
    cosine = (1 + math.cos(math.pi * run.step / run.steps)) / 2
    run.optimiser.param_groups[0]["lr"] = config["lr"] * warm_up * cosine
    run.optimiser.step()
    # The last 100 steps count, as runs are short; at first fewer, as weights improve.
    decay = min(0.99, (1 + run.step) / (40 + run.step))
    run.average.multi_avg_fn = get_ema_multi_avg_fn(decay)
    run.average.update_parameters(run.model)
    run.step += 1
    return loss.detach()


def train(run, x_train, y_train, path):
    """Train to the last step; every ten seconds print a line and save at path."""
    first_step, start, saved = run.step, time.monotonic(), -math.inf    # saves step 1
    loss = torch.zeros((), device=run.device)           # mean of the last 100 or so
    if run.step == run.steps:
        print(f"{path} is finished, at step {run.step}", flush=True)
    elif run.device.type == "cuda":
        capture(run)
    while run.step < run.steps:
        latest = train_step(run, x_train, y_train)
        loss.lerp_(latest, max(0.01, 1 / (run.step - first_step)))
        if run.step == run.steps or time.monotonic() > saved + 10:
            run.save(path)
            pace = (run.step - first_step) / (time.monotonic() - start)
            print(f"step {run.step}/{run.steps}  loss {loss:.4f}  "
                  f"{pace * run.config['batch_size']:.0f} images/s  "
                  f"{(run.steps - run.step) / pace:.0f} s left", flush=True)
            saved = time.monotonic()


def sample(run, args):
    """Draw args.sample images, or 100, into samples.png and, if asked, an .npz."""
    n, labels, device = args.sample or 100, run.config["labels"], run.device
    choices = labels if run.config["conditional"] else []
    if args.label not in (None, *choices) or args.guidance != 1 and not labels:
        sys.exit(f"--label, --guidance: the model's labels are {choices}")
    run.generator.manual_seed(args.seed)
    y = torch.full((n,), -1, device=device)
    if args.label is not None:
        y.fill_(labels.index(args.label))
    elif choices:                           # in order, as evenly as n allows
        y = torch.arange(n, device=device) * len(choices) // n
    elif labels:                            # clusters, by their shares
        shares = torch.tensor(run.config["shares"], device=device)
        y = shares.multinomial(n, replacement=True, generator=run.generator)
    images = draw(run, y, run.generator, args.steps, args.eta, args.guidance)
    if args.npz:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, x=images, y=np.array([*labels, -1])[y.cpu()])
        write_file(args.npz.with_suffix(".npz"), buffer.getvalue())
    write_file(args.out / "samples.png", ddpm.encode_png(grid(images)))
    print("wrote", args.out / "samples.png")


def evaluate(run, x, y):
    """Print the variational bound on what load_data returns."""
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
    add("--data", help="an .npz, see docs/recipes.md (default: MNIST, or the run's)")
    add("--seed", type=int, default=0, help="same seed, same digits (default: 0)")
    one = parser.add_mutually_exclusive_group().add_argument
    one("--resume", action="store_true", help="go on with the run in --out")
    one("--overwrite", action="store_true", help="replace the run in --out")
    one("--evaluate", action="store_true", help="print the bound on x_test, bits/dim")
    one("--sample", type=int, help="draw so many")
    add("--epochs", type=float, help="train: default 500,000 images, on CUDA 1,800,000")
    add("--batch-size", type=int, help="train: default 64, on CUDA 256")
    add("--lr", type=float, help="train: Adam's, default 0.0035, on CUDA 0.0025")
    add("--width", type=int, help="train: by eights, default 24, on CUDA 96")
    add("--schedule", choices=["laplace", "cosine", "linear"],
        help="train: default laplace; cosine suits fine texture, photographs")
    one = parser.add_mutually_exclusive_group().add_argument
    one("--conditional", action="store_true", help="train with labels")
    one("--clusters", type=int, help="train with so many clusters, by k-means")
    add("--model", type=Path, help="sample, evaluate: default model.pt in --out")
    add("--steps", type=int, default=50, help="sample: 1..1000, default 50")
    add("--eta", type=float, default=1.0, help="sample: default 1, DDPM; 0 is DDIM")
    add("--label", type=int, help="sample: only this, default all")
    add("--guidance", type=float, default=1.0, help="sample: s, default 1, no guidance")
    add("--npz", type=Path, help="sample: uint8 x and labels y, written to NPZ.npz")
    args = parser.parse_args(argv)
    for name, (low, high) in RANGES.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            parser.error(f"--{name.replace('_', '-')} {value}: want {low}..{high}")
    if args.width and args.width % 8:
        parser.error(f"--width {args.width}: want a multiple of 8")
    unfit = ["data"] if args.sample else ["steps", "eta", "label", "guidance", "npz"]
    unfit += SETTINGS if args.resume or args.evaluate or args.sample else []
    unfit += ["seed"] if args.resume or args.evaluate else []
    unfit += [] if args.sample or args.evaluate else ["model"]
    for name in unfit:
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} is not for this: see --help")
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
        return sample(load_run(args.model or path, device), args)
    if args.evaluate or args.resume:
        run = load_run(args.model or path, device, args.resume)
        run.config["data"] = args.data or run.config["data"]
        args.seed = run.config["seed"]
        x, y = load_data(run.config, "test" if args.evaluate else "train")
    elif path.exists() and not args.overwrite:
        sys.exit(f"{path} exists: --resume goes on, --overwrite replaces it")
    else:
        config = {name: getattr(args, name) for name in ["data", "seed", *SETTINGS]}
        for name, default in (CUDA if cuda else CPU).items():
            config[name] = config.get(name) or default
        x, y = load_data(config, "train")
        config["images"] = args.epochs * len(x) if args.epochs else config["images"]
        run = Run(config, device)
    x, y = x.to(device), y.to(device)
    if args.evaluate:
        return evaluate(run, x, y)
    train(run, x, y, path)
    sample(run, args)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        sys.exit(f"cannot write: {error}")
