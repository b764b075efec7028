"""Train a DDPM (Ho, Jain, Abbeel 2020, arXiv 2006.11239) on MNIST and draw digits with it.

    python mnist_ddpm.py                               # trains, then samples; watch out/samples.png
    python mnist_ddpm.py --resume                      # goes on after Ctrl-C, a crash or a full disk
    python mnist_ddpm.py --sample 100 --steps 100      # draws from out/model.pt
    python mnist_ddpm.py --evaluate                    # the variational bound on the test images, bits/dim
    python mnist_ddpm.py --conditional --out labels    # then: --out labels --sample 64 --label 7 --guidance 2

The mathematics is in ddpm_min.py; here are data, optimisers, loop and command line.
"""
import argparse
import io
import math
import os
import signal
import sys
import time

import numpy as np
import torch

import ddpm_min
from ddpm_min import EMA, GaussianDiffusion, UNet, classifier_free, encode_png

# Options that are numbers: default on a CPU, on a GPU; lowest and highest value, telling the type; help.
NUMBERS = {"epochs": (3.0, 30.0, 1e-6, 1e6, "passes over the data, may be fractional"),
           "batch_size": (32, 256, 1, 10**6, "images a step"),
           "lr": (0.02, 0.02, 1e-9, 1e3, "peak learning rate of Muon, ten times that of AdamW"),
           "width": (48, 96, 8, 1024, "channels of the U-Net, a multiple of 8"),
           "seed": (0, 0, 0, 2**31, "of all randomness"),
           "sample": (None, None, 1, 10**5, "do not train, draw this many images with the model in --out"),
           "steps": (50, 50, 1, 1000, "with --sample: network evaluations an image"),
           "eta": (1.0, 1.0, 0.0, 1.0, "with --sample: 1 is DDPM, 0 is DDIM"),
           "label": (None, None, 0, 999, "with --sample: the only class to draw"),
           "guidance": (1.0, 1.0, -100.0, 100.0, "with --sample: s of classifier-free guidance")}
SCHEDULES = {"cosine": ddpm_min.cosine_schedule, "linear": ddpm_min.linear_schedule}
DATA = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data", "mnist.npz")
LAYOUT = "an .npz of uint8 x_train, x_test (N, H, W) or (N, H, W, 3), int y_train, y_test (N,)"
EPILOG = """With its defaults the whole command ends within 15 minutes on two CPU cores, and within two
minutes on a recent GPU, where it trains longer."""


def fail(message):
    """End the program with one line on stderr and exit code 2."""
    print("mnist_ddpm:", " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def write_file(path, data):
    """Replace a file by the bytes `data` in one step; after an OSError (full disk) the old one is whole."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.isfile(temporary):
            os.remove(temporary)


def load_data(path, split, labelled):
    """Images uint8 (N, C, H, W), labels int64 (N,) or None, of the split "train" or "test"; or fails."""
    try:
        with np.load(path, allow_pickle=False) as file:
            x, y = file[f"x_{split}"], file[f"y_{split}"] if labelled else None
    except FileNotFoundError:
        fail(f"no file {path}: put {LAYOUT} there, or name another with --data")
    except Exception as error:  # numpy and zipfile know a dozen errors for broken or foreign files
        fail(f"cannot read {path} ({type(error).__name__}: {error}): want {LAYOUT}")
    fits = x.dtype == np.uint8 and x.ndim > 2 and x.shape[3:] in ((), (3,)) and 0 not in x.shape
    if not fits or x.shape[1] % 4 or x.shape[2] % 4:
        fail(f"x_{split} in {path} is {x.dtype} {x.shape}: want {LAYOUT}, both sides divisible by 4")
    if labelled:
        if y.dtype.kind not in "iu" or y.size != len(x) or y.min() < 0 or y.max() > 999:
            fail(f"y_{split} in {path} is {y.dtype} {y.shape}: want {len(x)} integers in 0..999")
        y = torch.from_numpy(y.reshape(-1).astype(np.int64))
    return torch.from_numpy(x.reshape(*x.shape[:3], -1)).permute(0, 3, 1, 2).contiguous(), y


def orthogonalise(matrices):
    """For U S V^T (k, m, n) about U V^T, times sqrt(m / n) if m > n (Jordan 2024)."""
    k, m, n = matrices.shape
    if m > n:
        return orthogonalise(matrices.mT).mT * (m / n) ** 0.5
    matrices = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-12)
    gram, eye = matrices @ matrices.mT, torch.eye(m, device=matrices.device)
    product = eye
    for _ in range(5):  # S -> 3.4445 S - 4.775 S^3 + 2.0315 S^5, on the small Gram matrices
        factor = 3.4445 * eye - 4.775 * gram + 2.0315 * gram @ gram
        product, gram = factor @ product, factor @ factor @ gram
    return product @ matrices


@torch.no_grad()
def muon_step(groups, lr):
    """Muon (Jordan 2024): orthogonal Nesterov momentum, so that a weight moves in all directions at rate lr.
    groups: pairs of k weights, of one shape as matrices (first dimension, others), and momentum (k, m, n)."""
    for weights, momentum in groups:
        gradient = torch.stack([p.grad.flatten(1) for p in weights])
        momentum.lerp_(gradient, 0.05)
        for p, update in zip(weights, orthogonalise(gradient.lerp(momentum, 0.95))):
            p.mul_(1 - 0.01 * lr).sub_(update.reshape(p.shape), alpha=lr)


class Run:
    """A training run: all that changes as it trains; config has its settings and the data's facts."""
    def __init__(self, config, device):
        torch.manual_seed(config["seed"])                                           # the initial weights
        self.generator = torch.Generator(device).manual_seed(config["seed"])        # everything after them
        self.config, self.device, self.step, self.order = config, device, 0, None
        self.epoch_steps = config["images"] // config["batch_size"]
        self.total = max(1, round(config["epochs"] * self.epoch_steps))
        self.diffusion = GaussianDiffusion(SCHEDULES[config["schedule"]]()).float().to(device)
        self.model = UNet(config["shape"][0], config["width"], config["classes"])
        self.model.to(device, memory_format=torch.channels_last)
        self.ema = EMA(self.model, 0.999)
        bf16 = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
        self.network, self.ema_network = bf16(self.model.forward), bf16(self.ema.model.forward)
        inner, rest = {}, []  # Muon for weights inside, AdamW for vectors, embeddings, first and last layers
        for name, p in self.model.named_parameters():
            edge = p.dim() < 2 or name.startswith(("emb", "label", "stem", "out", "gate"))
            (rest if edge else inner.setdefault(p.flatten(1).shape, [])).append(p)
        self.muon = [(ps, torch.zeros(len(ps), *shape, device=device)) for shape, ps in inner.items()]
        self.adamw = torch.optim.AdamW(rest, config["lr"], fused=True)
        self.parts = {"model": self.model, "ema": self.ema.model, "adamw": self.adamw}

    def learning_rate(self):
        """Muon's at the next step: a warm-up of 100 steps, then half a cosine from the peak down to 0."""
        share = min(1, (self.step + 1) / 100) * (1 + math.cos(math.pi * self.step / self.total)) / 2
        return self.config["lr"] * share

    def save(self, path):
        """Write the checkpoint, as write_file does."""
        buffer = io.BytesIO()
        torch.save({"config": self.config, "step": self.step, "order": self.order,
                    "generator": self.generator.get_state(), "muon": [momentum for _, momentum in self.muon],
                    **{name: part.state_dict() for name, part in self.parts.items()}}, buffer)
        write_file(path, buffer.getvalue())

    @classmethod
    def load(cls, path, device, given, free):
        """The run in a checkpoint, none of its code run; settings in `given`, not in `free`, must agree."""
        try:
            state = torch.load(path, map_location=device, weights_only=True)
            for key in given.keys() - free:
                if given[key] != state["config"][key]:
                    fail(f"{path} has {key} {state['config'][key]}, not {given[key]}: leave out that option")
            run = cls({**state["config"], **given}, device)
            for name, part in run.parts.items():
                part.load_state_dict(state[name])
            for (_, momentum), saved in zip(run.muon, state["muon"], strict=True):
                momentum.copy_(saved)
            run.order, run.step, run.ema.n = state["order"], state["step"], state["step"]
            if len(state["generator"]) == len(run.generator.get_state()):  # else of another kind of device
                run.generator.set_state(state["generator"].cpu())
            return run
        except FileNotFoundError:
            fail(f"no checkpoint {path}: train first, or name its folder with --out")
        except Exception as error:  # torch knows a dozen errors for truncated or foreign files
            fail(f"{path} is not a whole checkpoint of this program ({type(error).__name__}): train anew")


def draw(run, y, generator, steps=50, eta=1.0, guidance=1.0):
    """Yield the sampler's states, x_T first, uint8 (n, H, W) or (n, H, W, 3) on the CPU; y: labels (n,)."""
    eps = classifier_free(run.ema_network, y, guidance) if run.config["classes"] else run.ema_network
    for x in run.diffusion.sample(eps, (len(y), *run.config["shape"]), steps, eta, generator=generator):
        image = ((x + 1) * 127.5).round().clamp(0, 255).byte().cpu()                    # [-1, 1] -> 0..255
        yield image[:, 0] if image.shape[1] == 1 else image.permute(0, 2, 3, 1)


def grid(images, columns):
    """Images (n, H, W) or (n, H, W, 3) side by side in rows of `columns`, the last filled up with black."""
    missing = images.new_zeros(-len(images) % columns, *images.shape[1:])
    return torch.cat([torch.cat(list(row), 1) for row in torch.cat([images, missing]).split(columns)])


def train(run, x_train, y_train, out):
    """Algorithm 1 up to the run's last step; leaves model.pt and the pictures in the folder out."""
    model, batch_size, device, start = run.model, run.config["batch_size"], run.device, run.step
    x_train, y_train = x_train.to(device), None if y_train is None else y_train.to(device)
    path, average, interrupted = os.path.join(out, "model.pt"), torch.zeros((), device=device), []

    def report(end="\n"):
        if not all(value.isfinite().all() for value in (average, *model.parameters())):
            fail(f"loss or weights not finite at step {run.step}: lower --lr ({path} is the last good state)")
        seconds = time.perf_counter() - begin
        rate = (run.step - start) / seconds
        print(f"epoch {run.step / run.epoch_steps:.2f}/{run.total / run.epoch_steps:.2f}  "
              f"step {run.step}/{run.total}  loss {average:.4f}  {rate * batch_size:.0f} images/s  elapsed "
              f"{seconds:.0f} s  remaining {(run.total - run.step) / rate:.0f} s", end=end, flush=True)

    def draw_pictures(steps):  # always from the same noise; of a conditional model one row a class
        y = torch.arange(100, device=device) * run.config["classes"] // 100
        noise = torch.Generator(device).manual_seed(run.config["seed"])
        frames = [grid(x, 10) for x in draw(run, y, noise, steps)]
        write_file(os.path.join(out, "samples.png"), encode_png(frames[-1:]))
        write_file(os.path.join(out, "denoising.png"), encode_png(frames[::2] + frames[-1:] * 10, fps=10))

    if start == 0 and os.path.isfile(path):
        os.replace(path, f"{path}.old")  # a new run in an old run's folder
    run.save(path)  # a folder that cannot be written to ends the program here
    # the first Ctrl-C ends the loop after its step, a second one the program
    handler = signal.signal(signal.SIGINT, lambda *_: sys.exit(130) if interrupted else interrupted.append(1))
    begin = told = saved = time.perf_counter()
    while run.step < run.total and not interrupted:
        # batch: the next part of this epoch's random order; one label in ten becomes the null label
        i = run.step % run.epoch_steps * batch_size
        if i == 0:
            run.order = torch.randperm(len(x_train), device=device, generator=run.generator)
        chosen, y = run.order[i:i + batch_size], None
        x0 = x_train[chosen].float() / 127.5 - 1
        if y_train is not None:
            dropped = torch.rand(batch_size, device=device, generator=run.generator) < 0.1
            y = y_train[chosen].masked_fill(dropped, -1)

        # one step of Algorithm 1
        loss = run.diffusion.loss(run.network, x0, y, run.generator)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon_step(run.muon, run.learning_rate())
        run.adamw.param_groups[0]["lr"] = run.learning_rate() / 10
        run.adamw.step()
        run.ema.update(model)
        run.step += 1
        average.lerp_(loss.detach(), max(0.01, 1 / (run.step - start)))

        # progress, checkpoint and pictures: the only places that wait for the device
        now = time.perf_counter()
        if now - told > 5:
            report("   \r" if sys.stdout.isatty() else "\n")
            told = now
        if now - saved > (120 if device.type == "cpu" else 20):
            try:
                report()
                run.save(path)
                draw_pictures(20)
            except OSError as error:
                print(f"mnist_ddpm: cannot write: {error}; training goes on", file=sys.stderr)
            saved = time.perf_counter()

    signal.signal(signal.SIGINT, handler)
    if run.step > start:
        report()
        run.save(path)
    if run.step < run.total:
        print(f"interrupted at step {run.step}, saved in {path}; --resume goes on there", file=sys.stderr)
        sys.exit(130)
    draw_pictures(50)


def sample(run, args):
    """Draw args.sample images; write the grid, one row a class if all are drawn, and the .npz."""
    n, npz, classes, label = args.sample, args.npz, run.config["classes"], args.label
    if not classes and (label, args.guidance) != (None, None) or label is not None and label >= classes:
        fail(f"--label and --guidance want a --conditional model, --label one of its classes, {classes} here")
    if npz:
        write_file(npz, b"")  # what cannot be written ends the program before the drawing
    columns = math.ceil(n / classes if classes and label is None else n**0.5)
    y = torch.arange(n, device=run.device) // columns
    y = y if label is None else torch.full_like(y, label)
    options = {key: value for key, value in vars(args).items()
               if key in ("steps", "eta", "guidance") and value is not None}
    generator = torch.Generator(run.device).manual_seed(args.seed or 0)
    parts = y.split(250 if run.device.type == "cpu" else 2500)
    images = torch.cat([list(draw(run, part, generator, **options))[-1] for part in parts])
    write_file(os.path.join(args.out, "samples.png"), encode_png([grid(images, columns)]))
    if npz:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, x=images.numpy())
        write_file(npz, buffer.getvalue())


def evaluate(run, args):
    """Print the variational bound on x_test of the run's data."""
    path, shape, classes = (run.config[key] for key in ("data", "shape", "classes"))
    x, y = load_data(path, "test", classes > 0)
    if len(x) < 2 or list(x.shape[1:]) != shape or classes and y.max() >= classes:
        fail(f"x_test {tuple(x.shape)} in {path} does not fit the model's {shape} and {classes} classes")
    x, y = x.to(run.device) / 127.5 - 1, None if y is None else y.to(run.device)
    generator = torch.Generator(run.device).manual_seed(args.seed or 0)
    bits, error = run.diffusion.bits_per_dim(run.ema.model, x, y, clip=True, generator=generator)
    print(f"{bits:.3f} +- {error:.3f} bits/dim on {len(x)} test images")


def parse_arguments(argv):
    """The command line as a namespace; an option that was not given is None."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=EPILOG)
    parser.error = fail
    add = parser.add_argument
    for key, (cpu, gpu, low, _, text) in NUMBERS.items():
        default = f"default: {cpu}" if cpu == gpu else f"default: {cpu}, on a GPU {gpu}"
        add("--" + key.replace("_", "-"), type=type(low), help=f"{text} ({default})", metavar="N")
    add("--npz", metavar="FILE", help="with --sample: write the images as uint8 x there (default: None)")
    add("--schedule", choices=SCHEDULES, help="of beta (default: cosine)")
    add("--conditional", action="store_true", default=None, help="train with labels (default: without)")
    add("--data", metavar="FILE", help=f"{LAYOUT} (default: data/mnist.npz beside this program)")
    add("--out", default="out", help="folder for all that is written (default: out)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default: auto, the best")
    add("--resume", action="store_true", help="go on with the run in --out (default: start anew)")
    add("--evaluate", action="store_true", help="do not train, print bits/dim on x_test")
    args = parser.parse_args(argv)
    for key, (_, _, low, high, text) in NUMBERS.items():
        value = getattr(args, key)
        if value is not None and not (low <= value <= high and (key != "width" or value % 8 == 0)):
            fail(f"--{key.replace('_', '-')} {value} is not in {low}..{high} ({text})")
    if args.sample is None and {args.steps, args.eta, args.label, args.guidance, args.npz} != {None}:
        fail("--steps, --eta, --label, --guidance and --npz go with --sample N")
    if args.resume + args.evaluate + (args.sample is not None) > 1:
        fail("only one of --resume, --sample and --evaluate at a time")
    return args


def run_command(args):
    """What the options ask for."""
    found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    name = found if args.device == "auto" else args.device
    if name not in ("cpu", found):
        print(f"mnist_ddpm: no {name} device here, going on with the CPU", file=sys.stderr)
        name = "cpu"
    device, path = torch.device(name), os.path.join(args.out, "model.pt")
    torch.backends.cudnn.deterministic = True  # same seed, same samples

    # settings: the options given, else the checkpoint's, else the defaults
    config = {key: NUMBERS[key][name != "cpu"] for key in ("epochs", "batch_size", "lr", "width", "seed")}
    config.update(schedule="cosine", conditional=False, data=DATA)
    given = {key: getattr(args, key) for key in config if getattr(args, key) is not None}
    if args.sample is not None or args.evaluate:
        run = Run.load(path, device, given, {"data", "seed"})
        return evaluate(run, args) if args.evaluate else sample(run, args)
    run = Run.load(path, device, given, {"data", "epochs"}) if args.resume else None
    config = run.config if run else {**config, **given}

    x, y = load_data(config["data"], "train", config["conditional"])
    facts = {"images": len(x), "shape": list(x.shape[1:]), "classes": 0 if y is None else int(y.max()) + 1}
    if config["batch_size"] > len(x):
        fail(f"--batch-size {config['batch_size']} is more than the {len(x)} images in {config['data']}")
    if run and facts != {key: config[key] for key in facts}:
        fail(f"{path} was trained on other data than {config['data']}: name that file with --data")
    if run:
        print(f"going on at step {run.step} of {run.total}, learning rate from {run.learning_rate():.2g} to 0"
              if run.step < run.total else f"step {run.total} was the last: only more --epochs train on")
    os.makedirs(args.out, exist_ok=True)
    train(run or Run({**config, **facts}, device), x, y, args.out)


def main(argv=None):
    """The command line; see the module's docstring."""
    try:
        run_command(parse_arguments(argv))
    except OSError as error:
        fail(f"cannot write: {error}; what was saved before is whole")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
