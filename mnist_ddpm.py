"""Train a DDPM (Ho, Jain, Abbeel 2020, arXiv 2006.11239) on MNIST and draw digits with it.

    python mnist_ddpm.py                               # trains, then samples; watch out/samples.png
    python mnist_ddpm.py --resume                      # goes on after Ctrl-C, a crash or a full disk
    python mnist_ddpm.py --sample 100 --steps 100      # draws from out/model.pt
    python mnist_ddpm.py --evaluate                    # the variational bound on the test images, bits/dim
    python mnist_ddpm.py --conditional --out labels    # then: --out labels --sample 64 --label 7 --guidance 2

Defaults on two cores of a 2.5 GHz Xeon: 8 minutes, Frechet distance 51 to 61, real images 12 (README).
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

import ddpm_min as ddpm

# Options that are numbers: default on a CPU, on a GPU; lowest and highest value, telling the type; help.
NUMBERS = {"epochs": (1.75, 30.0, 1e-6, 1e6, "passes over the data, may be fractional"),
           "batch_size": (48, 256, 1, 10**6, "images a step"),
           "lr": (0.02, 0.02, 1e-9, 1e3, "peak learning rate of Muon, ten times that of AdamW"),
           "width": (48, 96, 8, 1024, "channels of the U-Net, a multiple of 8"),
           "seed": (0, 0, 0, 2**31, "of all randomness"),
           "sample": (None, None, 1, 10**5, "do not train, draw this many images with the model in --out"),
           "steps": (50, 50, 1, 1000, "with --sample: denoising steps an image"),
           "eta": (1.0, 1.0, 0.0, 1.0, "with --sample: 1 is DDPM, 0 is DDIM"),
           "label": (None, None, 0, 999, "with --sample: the only class to draw"),
           "guidance": (1.0, 1.0, -100.0, 100.0, "with --sample: s of classifier-free guidance")}
SCHEDULES = {"laplace": ddpm.laplace_schedule, "cosine": ddpm.cosine_schedule, "linear": ddpm.linear_schedule}
DATA = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data", "mnist.npz")
LAYOUT = "an .npz of uint8 x_train, x_test (N, H, W) or (N, H, W, 3), int y_train, y_test (N,)"
EPILOG = "Defaults take under 15 minutes on two CPU cores; on a GPU they train longer and aim at 2 minutes."


def fail(message):
    """End the program with one line on stderr and exit code 2."""
    print("mnist_ddpm:", " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def write_file(path, data):
    """Replace a file by the bytes `data` in one step; after an OSError (full disk) the old one is whole."""
    temporary = f"{path}.tmp"
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError(f"{path} is not a regular file")
        os.replace(temporary, path)
    finally:
        if os.path.isfile(temporary):
            os.remove(temporary)


def load_data(config, split, device):
    """Images uint8 (N, C, H, W), labels int64 (N,) or None, of the split "train" or "test"; or fails."""
    path, labelled = config["data"], config["conditional"]
    try:
        with np.load(path, allow_pickle=False) as file:
            x, y = file[f"x_{split}"], file[f"y_{split}"] if labelled else None
    except Exception as error:  # numpy and zipfile know a dozen errors for broken or foreign files
        fail(f"no file for --data in {path} ({type(error).__name__}: {error}): want {LAYOUT}")
    fits = x.dtype == np.uint8 and x.ndim > 2 and x.shape[3:] in ((), (3,)) and 0 not in x.shape
    if not fits or x.shape[1] % 4 or x.shape[2] % 4:
        fail(f"x_{split} in {path} is {x.dtype} {x.shape}: want {LAYOUT}, both sides divisible by 4")
    if labelled and (y.dtype.kind not in "iu" or y.size != len(x) or y.min() < 0 or y.max() > 999):
        fail(f"y_{split} in {path} is {y.dtype} {y.shape}: want {len(x)} integers in 0..999")
    x = torch.from_numpy(x.reshape(*x.shape[:3], -1)).permute(0, 3, 1, 2).contiguous()
    return x.to(device), torch.from_numpy(y.reshape(-1).astype(np.int64)).to(device) if labelled else None


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
        gradient = torch.stack([p.grad.movedim(1, -1).flatten(1) for p in weights])     # as it lies in memory
        momentum.lerp_(gradient, 0.05)
        for p, new in zip([p.movedim(1, -1) for p in weights], orthogonalise(gradient.lerp(momentum, 0.95))):
            p.mul_(1 - 0.01 * lr).sub_(new.view_as(p), alpha=lr)


class Run:
    """A training run: all that changes as it trains; config has its settings and the data's facts."""
    def __init__(self, config, device):
        torch.manual_seed(config["seed"])                                           # the initial weights
        self.generator = torch.Generator(device).manual_seed(config["seed"])        # everything after them
        self.config, self.device, self.step, self.order = config, device, 0, None
        self.epoch_steps = config["images"] // config["batch_size"]
        self.total = max(1, round(config["epochs"] * self.epoch_steps))
        self.diffusion = ddpm.GaussianDiffusion(SCHEDULES[config["schedule"]]()).float().to(device)
        self.model = ddpm.UNet(config["shape"][0], config["width"], config["classes"])
        self.model.to(device, memory_format=torch.channels_last)
        self.ema = ddpm.EMA(self.model, 0.999)
        bf16 = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
        self.network, self.ema_network = bf16(self.model.forward), bf16(self.ema.model.forward)
        inner, rest = {}, []  # Muon for weights inside, AdamW for vectors, embeddings, first and last layers
        for name, p in self.model.named_parameters():
            edge = p.dim() < 2 or "emb" in name or name.startswith(("label", "stem", "out.", "gate"))
            (rest if edge else inner.setdefault(p.flatten(1).shape, [])).append(p)
        self.muon = [(ps, torch.zeros(len(ps), *shape, device=device)) for shape, ps in inner.items()]
        self.adamw = torch.optim.AdamW(rest, config["lr"], fused=True)
        self.parts = {"model": self.model, "ema": self.ema.model, "adamw": self.adamw}

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
        except Exception as error:  # torch knows a dozen errors for missing, truncated or foreign files
            fail(f"no checkpoint of this program in {path} ({type(error).__name__}): train, or see --out")


def draw(run, y, generator, steps=50, eta=1.0, guidance=1.0):
    """Yield the sampler's states, x_T first, uint8 (n, H, W) or (n, H, W, 3) on the CPU; y: labels (n,)."""
    eps = ddpm.classifier_free(run.ema_network, y, guidance) if run.config["classes"] else run.ema_network
    for x in run.diffusion.sample(eps, (len(y), *run.config["shape"]), steps, eta, generator=generator):
        image = ((x + 1) * 127.5).round().clamp(0, 255).byte().cpu()                    # [-1, 1] -> 0..255
        yield image[:, 0] if image.shape[1] == 1 else image.permute(0, 2, 3, 1)


def grid(images, columns):
    """Images (n, H, W) or (n, H, W, 3) side by side in rows of `columns`, the last filled up with black."""
    missing = images.new_zeros(-len(images) % columns, *images.shape[1:])
    return torch.cat([torch.cat(list(row), 1) for row in torch.cat([images, missing]).split(columns)])


def train(run, x_train, y_train, out):
    """Algorithm 1 up to the last step or Ctrl-C; leaves model.pt and the pictures in the folder out."""
    model, batch_size, device, start = run.model, run.config["batch_size"], run.device, run.step
    path, average, interrupted = os.path.join(out, "model.pt"), torch.zeros((), device=device), []
    def report(end="\n"):
        if not all(value.isfinite().all() for value in (average, *model.parameters())):
            fail(f"loss or weights not finite at step {run.step}: lower --lr ({path} is the last good state)")
        elapsed = time.perf_counter() - begin
        rate = (run.step - start) / elapsed
        print(f"epoch {run.step / run.epoch_steps:.2f}  step {run.step}/{run.total}  loss {average:.4f}  "
              f"{rate * batch_size:.0f} images/s  elapsed {elapsed:.0f} s  remaining "
              f"{(run.total - run.step) / rate:.0f} s", end=end, flush=True)
    def draw_pictures(steps):  # always from the same noise; 100 labels in order: of ten classes a row each
        y = torch.arange(100, device=device) * run.config["classes"] // 100
        noise = torch.Generator(device).manual_seed(run.config["seed"])
        film = [grid(x, 10) for x in draw(run, y, noise, steps)]
        write_file(os.path.join(out, "samples.png"), ddpm.encode_png(film[-1:]))
        write_file(os.path.join(out, "denoising.png"), ddpm.encode_png(film[::2] + film[-1:] * 10, fps=10))
    run.save(path)  # a folder that cannot be written to ends the program here
    handler = signal.signal(signal.SIGINT, lambda *_: sys.exit(130) if interrupted else interrupted.append(1))
    begin = told = saved = time.perf_counter()
    while run.step < run.total and not interrupted:
        i = run.step % run.epoch_steps * batch_size
        if i == 0:  # an epoch begins: a new random order
            run.order = torch.randperm(len(x_train), device=device, generator=run.generator)
        chosen, y = run.order[i:i + batch_size], None
        x0 = x_train[chosen].float() / 127.5 - 1
        if y_train is not None:
            dropped = torch.rand(batch_size, device=device, generator=run.generator) < 0.1
            y = y_train[chosen].masked_fill(dropped, -1)  # one label in ten becomes the null label
        loss = run.diffusion.loss(run.network, x0, y, run.generator)                    # Algorithm 1
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        # half a cosine from the peak learning rate down to 0, times a linear warm-up of 100 steps
        share = min(1, (run.step + 1) / 100) * (1 + math.cos(math.pi * run.step / run.total)) / 2
        muon_step(run.muon, run.config["lr"] * share)
        run.adamw.param_groups[0]["lr"] = run.config["lr"] * share / 10
        run.adamw.step()
        run.ema.update(model)
        run.step += 1
        average.lerp_(loss.detach(), max(0.01, 1 / (run.step - start)))
        # progress, checkpoint, pictures: the only places that wait for the device
        if time.perf_counter() - told > 5:
            report("   \r" if sys.stdout.isatty() else "\n")
            told = time.perf_counter()
        if time.perf_counter() - saved > (120 if device.type == "cpu" else 20):
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
    columns = math.ceil(n / classes if classes and label is None else n**0.5)
    y = (torch.arange(n) // columns if label is None else torch.full((n,), label)).to(run.device)
    options = {key: vars(args)[key] for key in ("steps", "eta", "guidance") if vars(args)[key] is not None}
    parts = y.split(max(250, 4 * run.config["batch_size"]))  # enough to fill a device
    images = torch.cat([list(draw(run, part, run.generator, **options))[-1] for part in parts])
    write_file(os.path.join(args.out, "samples.png"), ddpm.encode_png([grid(images, columns)]))
    if npz:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, x=images.numpy())
        write_file(npz, buffer.getvalue())


def evaluate(run):
    """Print the variational bound on x_test of the run's data."""
    config, (x, y) = run.config, load_data(run.config, "test", run.device)
    if len(x) < 2 or list(x.shape[1:]) != config["shape"] or y is not None and y.max() >= config["classes"]:
        fail(f"x_test in {config['data']} has too few images, or other sizes or labels than x_train")
    bits, error = run.diffusion.bits_per_dim(run.ema.model, x / 127.5 - 1, y, True, generator=run.generator)
    print(f"{bits:.3f} +- {error:.3f} bits/dim on {len(x)} test images")


def parse_arguments(argv):
    """The command line as a namespace; an option that was not given is None."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=EPILOG)
    parser.error, add = fail, parser.add_argument
    for key, (cpu, gpu, low, _, text) in NUMBERS.items():
        help_text = f"{text} (default: {cpu})" if cpu == gpu else f"{text} (default: {cpu}, on a GPU {gpu})"
        add("--" + key.replace("_", "-"), type=type(low), help=help_text, metavar="N")
    add("--npz", metavar="FILE", help="with --sample: write the images as uint8 x there (default: None)")
    add("--schedule", choices=SCHEDULES, help="of beta (default: laplace)")
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
    drawing, extras = args.sample is not None, {args.steps, args.eta, args.label, args.guidance, args.npz}
    if drawing + args.resume + args.evaluate > 1 or extras != {None} and not drawing:
        fail("one of --resume, --sample, --evaluate; with --sample: --steps --eta --label --guidance --npz")
    return args


def main(argv=None):
    """The command line; see the module's docstring."""
    try:
        args = parse_arguments(argv)
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        device = torch.device(best if args.device in ("auto", best) else "cpu")
        if args.device not in ("auto", device.type):
            print(f"mnist_ddpm: no {args.device} device here, going on with the CPU", file=sys.stderr)
        torch.backends.cudnn.deterministic = True  # same seed, same samples
        path, gpu = os.path.join(args.out, "model.pt"), device.type != "cpu"
        defaults = {key: NUMBERS[key][gpu] for key in ("epochs", "batch_size", "lr", "width", "seed")}
        defaults.update(schedule="laplace", conditional=False, data=DATA)
        given = {key: getattr(args, key) for key in defaults if getattr(args, key) is not None}
        if args.sample is not None or args.evaluate:
            run = Run.load(path, device, given, {"data", "seed"})
            run.generator.manual_seed(args.seed or 0)
            return evaluate(run) if args.evaluate else sample(run, args)
        run = Run.load(path, device, given, {"data", "epochs"}) if args.resume else None
        config = run.config if run else {**defaults, **given}
        x, y = load_data(config, "train", device)
        facts = {"images": len(x), "shape": [*x.shape[1:]], "classes": 0 if y is None else int(y.max()) + 1}
        if config["batch_size"] > len(x) or run and facts != {key: config[key] for key in facts}:
            fail(f"{config['data']}: {len(x)} images, less than a batch or not what {path} was trained on")
        if run:
            print(f"going on at step {run.step} of {run.total}; the last ends the learning rate's cosine")
        elif os.path.isfile(path):  # a new run in an old run's folder
            os.replace(path, f"{path}.old")
        train(run or Run({**config, **facts}, device), x, y, args.out)
    except OSError as error:
        fail(f"cannot write: {error}; what was saved before is whole")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
