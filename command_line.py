"""The command line of mnist_ddpm.py: its options, and which go together."""
import argparse
import os
from contextlib import suppress
from functools import partial
from pathlib import Path

from images import LAYOUT
from program import fail

TRAINING = ("epochs", "batch_size", "lr", "width", "schedule", "conditional", "data")
FIXED = ("batch_size", "width", "schedule", "conditional", "seed")      # once trained


def number(kind, low, high):
    """An argparse type: an int or a float, as `kind` says, in low..high."""
    return partial(_number, kind, low, high)


def _number(kind, low, high, text):
    with suppress(ValueError):
        if low <= kind(text) <= high:
            return kind(text)
    raise argparse.ArgumentTypeError(f"{text}: want {kind.__name__} {low}..{high}")


def parse_arguments(argv):
    """The command line as a namespace; a setting of the run is there only if given."""
    parser = argparse.ArgumentParser(description="Diffusion on images.")
    parser.error = fail
    whole, real = partial(number, int), partial(number, float)
    add = parser.add_argument
    add("--out", type=Path, default="out", help="folder to write to (default: out)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
        help="what computes (default: auto, which is CUDA or else the CPU)")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--overwrite", action="store_true", help="replace the run in --out")
    add("--evaluate", action="store_true", help="print the bound on x_test, bits/dim")
    add("--sample", type=whole(1, 10**6), help="draw so many with --out's model")
    group = parser.add_argument_group("training")
    add = partial(group.add_argument, default=argparse.SUPPRESS)
    add("--epochs", type=real(1e-9, 1e6), help="default: 280,000 images' worth, "
        "on CUDA 1,800,000")
    add("--batch-size", type=whole(1, 10**6), help="default: 32, on CUDA 256")
    add("--lr", type=real(1e-9, 1e6), help="of AdamW (default: 0.0025)")
    add("--width", type=whole(8, 10**6), help="by eights (default: 32, CUDA 96)")
    add("--seed", type=whole(0, 2**31), help="of --sample, too (default: 0)")
    add("--schedule", choices=["laplace", "cosine", "linear"],
        help="of beta (default: laplace; cosine suits fine texture, photographs)")
    add("--conditional", action="store_true", help="train with labels (default: no)")
    add("--data", type=os.path.abspath, help=f".npz of x_train, {LAYOUT}; x_test for "
        "--evaluate; for --conditional y_train, y_test (default: MNIST)")
    add = parser.add_argument_group("drawing, with --sample").add_argument
    add("--steps", type=whole(1, 1000), default=50, help="of the chain (default: 50)")
    add("--eta", type=real(0, 1), default=1.0, help="1 (default) DDPM, 0 DDIM")
    add("--label", type=int, help="draw only this (default: all)")
    add("--guidance", type=real(-100, 100), default=1.0,
        help="classifier-free, s (default: 1)")
    add("--npz", type=Path, help="a new file for the images, uint8 x, and labels, y")
    args = parser.parse_args(argv)
    check_together(args)
    return args


def check_together(args):
    """Fail if options do not fit each other, or --out is no folder."""
    if args.out.exists() and not args.out.is_dir():
        fail(f"--out {args.out}: want a folder")
    if getattr(args, "width", 8) % 8:
        fail(f"--width {args.width}: want a multiple of 8")
    drawing = (args.steps, args.eta, args.label, args.guidance, args.npz)
    if not args.sample and drawing != (50, 1.0, None, 1.0, None):
        fail("--steps, --eta, --label, --guidance and --npz go with --sample")


def check_drawing(args, path, config):
    """Fail if an option does not fit --sample or --evaluate with the model in path."""
    for name in TRAINING:
        if name in args and not (args.evaluate and name == "data"):
            option = "--" + name.replace("_", "-")
            fail(f"{option} is for training: leave it out")
    labels = config["labels"]
    if not labels and (args.label is not None or args.guidance != 1):
        fail(f"--label, --guidance: {path} was not trained with --conditional")
    if args.label not in (None, *labels):
        fail(f"--label {args.label}: the labels in {path} are {labels}")
    if args.npz and (args.npz.exists() or not args.npz.parent.is_dir()
                     or args.npz.suffix != ".npz"):
        fail(f"--npz {args.npz}: want a new .npz file, in a folder that exists")


def check_resuming(args, path, config):
    """Fail if an option would change what a run in path cannot change."""
    for name in FIXED:
        if getattr(args, name, config[name]) != config[name]:
            option = "--" + name.replace("_", "-")
            fail(f"{path} was trained with {option} {config[name]}: leave it out")
