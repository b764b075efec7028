"""Train a DDPM (Ho, Jain, Abbeel 2020, arXiv 2006.11239) on MNIST, draw digits with it.

    python mnist_ddpm.py                            # trains, then draws out/samples.png
    python mnist_ddpm.py --resume                   # goes on after Ctrl-C or a crash
    python mnist_ddpm.py --sample 100 --steps 100   # draws with out/model.pt
    python mnist_ddpm.py --evaluate                 # the variational bound, bits/dim
    python mnist_ddpm.py --conditional --out labels # with labels

Two cores of an AMD EPYC, 7 minutes: Frechet distance 49 to 56 (two seeds, three draws
of each; 1,000 real images have 12; see docs/experiments.md). Never run on a GPU.
"""
import argparse
import io
import math
import os
import signal
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ddpm_min as ddpm
from png import encode_png
from unet import UNet

DEFAULTS = {"images": 240_000, "batch_size": 32, "lr": 2.5e-3, "width": 32, "seed": 0,
            "schedule": "laplace", "conditional": False, "data": None}
CUDA_DEFAULTS = {**DEFAULTS, "images": 1_800_000, "batch_size": 256, "width": 96}
MNIST = Path(__file__).resolve().parent / "data" / "mnist.npz"
LIMITS = {"epochs": (1e-9, 1e6), "batch_size": (1, 10**6), "lr": (1e-9, 1e6),
          "width": (8, 10**6), "seed": (0, 2**31), "sample": (1, 10**6),
          "steps": (1, 1000), "eta": (0, 1), "label": (0, 999), "guidance": (-100, 100)}
PARTS = "model", "average", "optimiser"             # of a Run, in its checkpoint
LAYOUT = "uint8 (N, H, W) or (N, H, W, 3), sides divisible by 4"


def fail(message):
    """End the program with one line on stderr and exit code 2."""
    print("mnist_ddpm:", " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def write_file(path, data):
    """Replace a file by these bytes, or on an OSError leave it as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_images(config, split, device="cpu"):
    """Images, uint8 (N, C, H, W); indices of labels, int64 (N,), or None; the list of
    labels that they index: config's, or all that occur. split: "train" or "test"."""
    path = config["data"] or str(MNIST)
    keys = [f"x_{split}", f"y_{split}"] if config["conditional"] else [f"x_{split}"]
    try:
        with np.load(path, allow_pickle=False) as file:
            x, *y = [np.asarray(file[key]) for key in keys]
    except Exception as error:  # numpy knows a dozen for missing, broken, foreign files
        fail(f"{path}: no .npz of numbers {', '.join(keys)} ({type(error).__name__})")
    x = x[..., None] if x.ndim == 3 else x
    fits = x.dtype == np.uint8 and x.ndim == 4 and x.shape[3] in (1, 3) and x.size > 0
    if not fits or x.shape[1] % 4 or x.shape[2] % 4:
        fail(f"{keys[0]} in {path} is {x.dtype} {x.shape}: want {LAYOUT}")
    x = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous().to(device)
    if not y:
        return x, None, []
    y = y[0].reshape(-1)
    if y.dtype.kind not in "iu" or len(y) != len(x) or y.min() < 0 or y.max() > 999:
        fail(f"{keys[1]} in {path}: want {len(x)} whole numbers in 0..999")
    labels = config.get("labels") or np.unique(y).tolist()
    if not np.isin(y, labels).all():
        fail(f"{keys[1]} in {path}: the model knows only the labels {labels}")
    return x, torch.from_numpy(np.searchsorted(labels, y)).to(device), labels


class Run:
    """A training run: its settings, and all that changes as it trains."""
    def __init__(self, config, device):
        self.config, self.device, self.step = config, device, 0
        torch.manual_seed(config["seed"])               # of the initial weights
        self.generator = torch.Generator(device).manual_seed(config["seed"])
        betas = getattr(ddpm, config["schedule"] + "_schedule")()
        self.diffusion = ddpm.GaussianDiffusion(betas).to(device)
        model = UNet(config["shape"][0], config["width"], len(config["labels"]))
        self.model = model.to(device, memory_format=torch.channels_last)
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), betas=(0.9, 0.99), weight_decay=0, fused=True)
        # Where a GPU has bfloat16 the networks compute in it; the weights stay float32.
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(
            including_emulation=False)
        bfloat16 = torch.autocast(device.type, torch.bfloat16, enabled=native)
        self.network = bfloat16(self.model.forward)
        self.average_network = bfloat16(self.average.module.forward)


def save_run(path, run, loss):
    """Write all that it takes to go on; fail if the loss or a weight is not finite."""
    if not all(value.isfinite().all() for value in (loss, *run.model.parameters())):
        fail(f"not finite, step {run.step}: go on from {path} by --resume, lower --lr")
    state = {name: getattr(run, name).state_dict() for name in PARTS}
    state.update(config=run.config, step=run.step, generator=run.generator.get_state())
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_file(path, buffer.getvalue())


def load_run(path, device):
    """The Run that save_run wrote, on any device, none of its code run; or fail."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        run = Run(state["config"], device)
        for name in PARTS:
            getattr(run, name).load_state_dict(state[name])
        run.step = state["step"]
        if len(state["generator"]) == len(run.generator.get_state()):   # same device
            run.generator.set_state(state["generator"])
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # torch knows a dozen for missing, broken, foreign files
        fail(f"no checkpoint in {path} ({type(error).__name__}): train, or see --out")
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


def grid(images, columns):
    """Images (n, H, W) or (n, H, W, 3) in rows of `columns`; black fills the last."""
    black = images.new_zeros(-len(images) % columns, *images.shape[1:])
    rows = torch.cat([images, black]).split(columns)
    return torch.cat([torch.cat(list(row), 1) for row in rows])


def draw_pictures(run, out, steps):
    """Write samples.png, denoising.png: 100 images from one noise, class by class."""
    classes = torch.arange(100, device=run.device) * len(run.config["labels"]) // 100
    noise = torch.Generator(run.device).manual_seed(run.config["seed"])
    film = [grid(images, 10) for images in draw(run, classes, noise, steps)]
    write_file(out / "samples.png", encode_png(film[-1:]))
    write_file(out / "denoising.png", encode_png(film[::2] + film[-1:] * 10, 10))


def learning_rate(step, total, peak):
    """Half a cosine from peak down to 0, times a linear warm-up of 100 steps."""
    return peak * min(1, (step + 1) / 100) * (1 + math.cos(math.pi * step / total)) / 2


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


def report(run, loss, seconds, steps):
    """Print where the run stands, after `steps` steps in `seconds` of this program."""
    total, batch_size, N = [run.config[key] for key in ("total", "batch_size", "N")]
    rate = steps / seconds
    line = (f"epoch {run.step * batch_size / N:.2f}  step {run.step}/{total}  "
            f"loss {loss:.4f}  {rate * batch_size:.0f} images/s  {seconds:.0f} s, "
            f"{(total - run.step) / rate:.0f} s left")
    end = "\r" if sys.stdout and sys.stdout.isatty() and run.step < total else "\n"
    print(f"{line:<79}", end=end, flush=True)


def remember_signal(stop, number, frame):
    """A signal handler that appends the signal's number to the list `stop`."""
    stop.append(number)


def train(run, x_train, y_train, out):
    """Train to the last step or a signal; leaves model.pt and pictures in `out`."""
    path, total, start = out / "model.pt", run.config["total"], run.step
    loss = torch.zeros((), device=run.device)           # mean of the last 100 or so
    save_run(path, run, loss)           # a folder that takes no files ends the run here
    stop = []                           # signals: they wait until all is saved
    signal.signal(signal.SIGINT, partial(remember_signal, stop))
    signal.signal(signal.SIGTERM, partial(remember_signal, stop))
    begin = saved = drawn = time.perf_counter()
    while run.step < total and not stop:
        latest = train_step(run, x_train, y_train)
        loss.lerp_(latest, max(0.01, 1 / (run.step - start)))
        now = time.perf_counter()
        if now - saved > 10 or run.step == total:
            saved = now
            try:
                save_run(path, run, loss)
                if now - drawn > 120 and run.step < total:
                    drawn = now
                    draw_pictures(run, out, 20)
            except OSError as error:
                print(f"mnist_ddpm: {error}; training goes on", file=sys.stderr)
            # After the checkpoint: standard output can be a closed pipe, a full disk.
            report(run, loss, now - begin, run.step - start)
    save_run(path, run, loss)
    if run.step < total:
        print(f"mnist_ddpm: stopped at step {run.step} of {total}, saved in {path}; "
              "--resume goes on there", file=sys.stderr)
        sys.exit(128 + stop[0])
    draw_pictures(run, out, 50)
    print(f"wrote {path}, samples.png, denoising.png")


def sample(run, args):
    """Draw args.sample images into samples.png and, if asked, an .npz."""
    n, labels = args.sample, run.config["labels"]
    classes = torch.arange(n) * len(labels) // n        # counts differ by at most one
    rows = len(labels) or n**0.5
    if args.label is not None:
        classes, rows = torch.full((n,), labels.index(args.label)), n**0.5
    images = []
    # So many at once stay in a CPU's cache, or fill a GPU.
    for part in classes.to(run.device).split(100 if run.device.type == "cpu" else 1000):
        for x in draw(run, part, run.generator, args.steps, args.eta, args.guidance):
            pass
        images.append(x)
    images = torch.cat(images)
    picture = args.out / "samples.png"
    write_file(picture, encode_png([grid(images, math.ceil(n / rows))]))
    if args.npz:
        y = {"y": np.array(labels)[classes]} if labels else {}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, x=images.numpy(), **y)
        write_file(args.npz, buffer.getvalue())
    print(f"wrote {picture}" + (f" and {args.npz}" if args.npz else ""))


def evaluate(run):
    """Print the variational bound on x_test."""
    x, y, _ = load_images(run.config, "test", run.device)
    if len(x) < 2 or list(x.shape[1:]) != run.config["shape"]:
        fail(f"x_test is {list(x.shape)}: want two or more of {run.config['shape']}")
    model = run.average.module          # in float32, on a GPU too
    bits, error = run.diffusion.bits_per_dim(
        model, x / 127.5 - 1, y, clip=True, generator=run.generator)
    print(f"{bits:.3f} +- {error:.3f} bits/dim on {len(x)} test images")


def parse_arguments(argv):
    """The command line as a namespace; a setting of the run is there only if given."""
    parser = argparse.ArgumentParser(description="Diffusion on images.")
    parser.error = fail
    add = partial(parser.add_argument, default=argparse.SUPPRESS)
    add("--epochs", type=float, help="default: 240,000 images' worth, CUDA 1,800,000")
    add("--batch-size", type=int, help="images a step (default: 32, on CUDA 256)")
    add("--lr", type=float, help="highest learning rate of AdamW (default: 0.0025)")
    add("--width", type=int, help="of the U-Net, by eights (default: 32, on CUDA 96)")
    add("--seed", type=int, help="of the training, or of what is drawn (default: 0)")
    add("--schedule", choices=["laplace", "cosine", "linear"],
        help="of beta (default: laplace; cosine suits fine texture, photographs)")
    add("--conditional", action="store_true", help="train with labels (default: no)")
    add("--data", type=os.path.abspath, help=f".npz of x_train, {LAYOUT}; x_test for "
        "--evaluate; for --conditional y_train, y_test (default: MNIST)")
    add = parser.add_argument
    add("--out", type=Path, default="out", help="folder to write to (default: out)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--overwrite", action="store_true", help="replace the run in --out")
    add("--evaluate", action="store_true", help="print the bound on x_test, bits/dim")
    add("--sample", type=int, help="draw so many images with the model in --out")
    add = parser.add_argument_group("with --sample").add_argument
    add("--steps", type=int, default=50, help="default: 50")
    add("--eta", type=float, default=1.0, help="1: DDPM, 0: DDIM")
    add("--label", type=int, help="only this (default: all)")
    add("--guidance", type=float, default=1.0, help="classifier-free, s (default: 1)")
    add("--npz", type=Path, help="a new file for the images, uint8 x, and labels, y")
    args = parser.parse_args(argv)
    for name, (low, high) in LIMITS.items():
        value = getattr(args, name, None)
        if value is not None and not low <= value <= high:
            fail(f"--{name} {value}: want {low}..{high}".replace("_", "-"))
    if getattr(args, "width", 8) % 8:
        fail(f"--width {args.width}: want a multiple of 8")
    drawing = (args.steps, args.eta, args.label, args.guidance, args.npz)
    if not args.sample and drawing != (50, 1.0, None, 1.0, None):
        fail("--steps, --eta, --label, --guidance and --npz go with --sample")
    return args


def check_options(args, path, config):
    """Fail if an option does not fit the model in path."""
    fixed = ["batch_size", "width", "schedule", "conditional"]
    for key in fixed + (["seed"] if args.resume else []):
        if getattr(args, key, config[key]) != config[key]:
            option = "--" + key.replace("_", "-")
            fail(f"{path} was trained with {option} {config[key]}: leave out {option}")
    if args.label not in (None, *config["labels"]):
        fail(f"--label {args.label}: the labels in {path} are {config['labels']}")
    if args.guidance != 1 and not config["labels"]:
        fail(f"--guidance: {path} was not trained with --conditional")
    if args.npz and (args.npz.exists() or not args.npz.parent.is_dir()
                     or args.npz.suffix != ".npz"):
        fail(f"--npz {args.npz}: want a new .npz file, in a folder that exists")


def run_program(args):
    """Sample, evaluate or train, as the command line says."""
    path, loads = args.out / "model.pt", args.resume or args.evaluate or args.sample
    # MPS lacks log_ndtr, which --evaluate needs.
    best = "mps" if torch.backends.mps.is_available() and not args.evaluate else "cpu"
    best = "cuda" if torch.cuda.is_available() else best
    device = torch.device(best if args.device in ("auto", best) else "cpu")
    if args.device not in ("auto", device.type):
        print(f"mnist_ddpm: no {args.device} for this, so the CPU", file=sys.stderr)
    # On a GPU, too, the same seed is to give the same samples.
    torch.backends.cudnn.deterministic = True
    torch.backends.cuda.enable_cudnn_sdp(False)
    if loads:
        run = load_run(path, device)
        config = run.config
        check_options(args, path, config)
    elif path.exists() and not args.overwrite:
        fail(f"{path} exists: --resume goes on, --overwrite replaces, or another --out")
    else:
        config = dict(CUDA_DEFAULTS if device.type == "cuda" else DEFAULTS)
    config.update({key: getattr(args, key) for key in DEFAULTS if key in args})
    if args.sample or args.evaluate:
        run.generator.manual_seed(getattr(args, "seed", 0))
        return evaluate(run) if args.evaluate else sample(run, args)

    x, y, labels = load_images(config, "train", device)
    facts = {"N": len(x), "shape": list(x.shape[1:]), "labels": labels}
    if loads and facts != {key: config[key] for key in facts}:
        fail(f"--data is not what {path} was trained on")
    if config["batch_size"] > len(x):
        fail(f"--batch-size {config['batch_size']} is more than the {len(x)} images")
    images = args.epochs * len(x) if "epochs" in args else config["images"]
    config.update(facts, images=images, total=math.ceil(images / config["batch_size"]))
    run = run if loads else Run(config, device)
    if run.step > config["total"]:
        fail(f"--epochs {args.epochs} end before step {run.step}, where {path} is")
    train(run, x, y, args.out)


def main(argv=None):
    """The command line; see the module's docstring."""
    warnings.simplefilter("ignore")             # torch warns of foreign checkpoints
    try:
        run_program(parse_arguments(argv))
        print(end="", flush=True)               # a full disk shows here
    except OSError as error:
        sys.stdout = None                       # or Python writes to it once more
        fail(f"cannot write: {error}")
    except torch.OutOfMemoryError:
        fail("the GPU's memory is full: lower --batch-size or --width")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
