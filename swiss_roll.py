"""The swiss roll of Sohl-Dickstein et al. 2015 (arXiv 1503.03585), by their bound K.

    python swiss_roll.py                # K = 2.38 bits a point where 2.70 is the most
    python swiss_roll.py --net rbf      # the paper's own network: K = 1.60 bits

71 s, and 94 s, on one core of an AMD EPYC. The paper has K = 2.35 (Table 1), for a
roll whose noise it does not give: docs/experiments.md. Draws Figure 1,
out/swiss_roll.png, and noise that rolls itself up, out/swiss_roll_reverse.png.
Equations are the 2015 paper's, t is in 1..T. Its symbols:

    beta^(t), x^(t), x^(0)          diffusion.beta[t], x_t, x0
    q(x^(t) | x^(0))                diffusion.q_sample(x0, t, eps)
    q(x^(t-1) | x^(t), x^(0))       mean, variance = diffusion.q_posterior(x0, x_t, t)
    p(x^(t-1) | x^(t))              f_mu, f_sigma = reverse(x_t, t), f_Sigma diagonal
    K                               bound(x0, diffusion, reverse, eps).mean(), in nats
"""
import argparse
import math
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ddpm_min import GaussianDiffusion, gaussian_kl
from images import encode_png
from program import (check_room, choose_device, could_write, errors_in_one_line, fail,
                     run_as_process, say, settings, write_file)

T = 40                                                          # App. D.1.1
HELD_OUT = 100_000                                              # points, for K


def schedule(sigma, edge=0.001, alpha_bar_T=0.01):
    """beta_1..beta_T, float64 (T,), for a roll of that sigma: v_t, the variance of x^t
    across the curve, grows by 1 + edge at t = 1 and then by one factor at every step,
    until alpha_bar_T is so small that x^T is all but N(0, I)."""
    # A diagonal f_Sigma cannot turn with the roll, and loses least if all factors are
    # equal: docs/derivations.md. Step 1 learns nothing and loses log(1 + edge) / 2.
    v_0 = sigma**2
    v_T = alpha_bar_T * v_0 + 1 - alpha_bar_T
    v_1 = v_0 * (1 + edge)
    ends = math.log(v_1), math.log(v_T)
    v = torch.linspace(*ends, T, dtype=torch.float64).exp()     # v_1..v_T
    v = F.pad(v, (1, 0), value=v_0)
    # v_t = alpha_bar_t v_0 + 1 - alpha_bar_t, so 1 - v_t = alpha_bar_t (1 - v_0).
    return 1 - (1 - v[1:]) / (1 - v[:-1])                       # 1 - alpha_t


def bound(x0, diffusion, reverse, eps):
    """K of each of n points, nats (n,), whose mean is (Eq. 14)
    K = -sum_{t>=2} E KL(q(x^{t-1} | x^t, x^0) || p(x^{t-1} | x^t))
        + H_q(X^T | X^0) - H_q(X^1 | X^0) - H_p(X^T).
    x0 (n, d) with mean variance 1; eps ~ N(0, I), (T-1, n, d), gives x^2..x^T.
    reverse(x_t (T-1, n, d), t int64 (T-1,)): mean and variance of p(x^{t-1} | x^t), to
    broadcast with x_t. p(x^0 | x^1) is the edge step (Eq. 44), 0 on average."""
    n, d = x0.shape
    t = torch.arange(2, diffusion.T + 1, device=x0.device)
    x0 = x0.expand(len(t), n, d)
    x_t = diffusion.q_sample(x0, t, eps)
    mean_q, var_q = diffusion.q_posterior(x0, x_t, t)
    mean_p, var_p = reverse(x_t, t)
    kl = gaussian_kl(mean_q, var_q, mean_p, var_p)              # (T-1, n, d)
    two_pi_e = 2 * math.pi * math.e
    h_q_T = d / 2 * torch.log(two_pi_e * diffusion.one_minus_alpha_bar[-1])
    h_q_1 = d / 2 * torch.log(two_pi_e * diffusion.beta[1])
    h_p_T = d / 2 * math.log(two_pi_e)
    return -kl.sum((0, 2)) + h_q_T - h_q_1 - h_p_T


def f_mu_f_sigma(net, diffusion, x_t, t):
    """f_mu and f_Sigma's diagonal, each (S, n, 2), at x_t (S, n, 2), t int64 (S,), from
    net(x_t, t) (S, n, 4). The sigmoid: App. D.1.1. The rest: the authors' code, less
    its 1 / sqrt(T) on z_sigma. A net of zeros reverses q of data from N(0, I)."""
    alpha = diffusion.alpha[t, None, None]
    beta = diffusion.beta[t, None, None]
    z_mu, z_sigma = net(x_t, t).chunk(2, dim=2)
    f_mu = alpha.sqrt() * x_t + beta.sqrt() * z_mu
    f_sigma = torch.sigmoid(torch.logit(beta) + z_sigma)
    return f_mu, f_sigma


class RBF(nn.Module):
    """App. D.1.1: 16 normalised radial basis functions for all steps, and a readout for
    each step. x (S, n, 2), t (S,) -> (S, n, 4). Centres start in pairs along the roll,
    inside and outside: a pair's difference tells the distance from the roll."""
    def __init__(self, roll):
        super().__init__()
        self.rate = 0.003                                       # for train
        x = roll.curve((torch.arange(8) + 0.5) / 8)
        self.centre = nn.Parameter(torch.cat([0.9 * x, 1.1 * x]))
        self.width = nn.Parameter(torch.full((16,), 0.3))
        self.readout = nn.Parameter(torch.zeros(T + 1, 16, 4))

    def forward(self, x, t):
        square = (x[:, :, None] - self.centre).square().sum(3)  # (S, n, 16)
        unit = torch.softmax(-square / (2 * self.width**2), dim=2)
        # Adam's steps are of one size, and readouts have a longer way than centres.
        return torch.bmm(160 * unit, self.readout[t])           # (S, n, 4)


class MLP(nn.Module):
    """This project's: three layers of 64 units for all steps, the first of sines; for
    each step phases and a readout. x (S, n, 2), t (S,) -> (S, n, 4)."""
    def __init__(self, generator=None):
        super().__init__()
        self.rate = 0.01                                        # for train
        self.frequency = nn.Parameter(2 * torch.randn(64, 2, generator=generator))
        phase = torch.randn(64, generator=generator)
        self.phase = nn.Parameter(phase.repeat(T + 1, 1, 1))
        self.inner = nn.Parameter(0.18 * torch.randn(2, 64, 64, generator=generator))
        self.inner_bias = nn.Parameter(torch.zeros(2, 64))
        self.readout = nn.Parameter(torch.zeros(T + 1, 64, 4))
        self.readout_bias = nn.Parameter(torch.zeros(T + 1, 1, 4))

    def forward(self, x, t):
        h = torch.sin(F.linear(x, self.frequency) + self.phase[t])      # (S, n, 64)
        h = F.silu(F.linear(h, self.inner[0], self.inner_bias[0]))
        h = F.silu(F.linear(h, self.inner[1], self.inner_bias[1]))
        return torch.bmm(h, self.readout[t]) + self.readout_bias[t]     # (S, n, 4)


def train(net, roll, steps, learn_beta, generator):
    """Maximise K by Adam; an update sees 32 fresh points, at all t, with eps and -eps.
    Changes net, prints, returns the GaussianDiffusion, on the CPU. learn_beta: beta_2
    to beta_T too, eps frozen (Sec. 2.4.1). SystemExit with 1 where K is not finite."""
    device = net.readout.device
    betas = schedule(roll.sigma)
    logits = torch.logit(betas[1:]).requires_grad_(learn_beta)
    optimiser = torch.optim.Adam([*net.parameters(), logits], betas=(0.9, 0.99))
    every = max(1, steps // 10)
    start = time.time()
    bits = []
    for step in range(1, steps + 1):
        decay = (1 - (step - 1) / steps) ** 2
        optimiser.param_groups[0]["lr"] = net.rate * min(1, step / 100) * decay

        beta = torch.cat([betas[:1], torch.sigmoid(logits)])
        diffusion = GaussianDiffusion(beta).to(device)
        reverse = partial(f_mu_f_sigma, net, diffusion)
        x0 = roll.sample(32, generator).repeat(2, 1).to(device)
        eps = torch.randn(T - 1, 32, 2, generator=generator).to(device)
        K = bound(x0, diffusion, reverse, torch.cat([eps, -eps], dim=1)).mean()

        optimiser.zero_grad()
        (-K).backward()
        optimiser.step()

        bits.append(K.item() / math.log(2))
        if not math.isfinite(bits[-1]):
            fail(f"K is {bits[-1]} at step {step}: stopped", 1)
        if step % every == 0:
            mean, seconds = np.mean(bits[-every:]), time.time() - start
            say(f"{step}/{steps}: K {mean:.3f} bits, {seconds:.0f} s")
    return GaussianDiffusion(diffusion.beta[1:].detach().cpu())


@torch.no_grad()
def sample(reverse, diffusion, n, generator=None):
    """Yield the T + 1 states (n, 2) of p: x^T ~ N(0, I), ..., x^1, x^0. At t = 1, which
    is never trained, f_mu_f_sigma's net is 0, and this is the edge step (Eq. 44)."""
    x = torch.randn(n, 2, generator=generator).to(diffusion.beta)
    yield x
    for t in range(diffusion.T, 0, -1):
        mean, variance = reverse(x[None], torch.tensor([t]))    # (1, n, 2)
        x = mean[0] + variance[0].sqrt() * torch.randn(n, 2, generator=generator)
        yield x


class SwissRoll:
    """(theta cos theta, theta sin theta), theta uniform in 1.5 pi..4.5 pi, plus normal
    noise of this standard deviation (turns are 2 pi apart); centred, divided by unit:
    the mean variance of x and y is then 1 (Table 1), that of the noise sigma^2."""
    def __init__(self, noise):
        theta_square = 39 / 4 * math.pi**2                      # its mean
        centre_square = 2**2 + (2 / (3 * math.pi)) ** 2
        self.unit = math.sqrt((theta_square - centre_square) / 2 + noise**2)
        self.sigma = noise / self.unit

    def curve(self, u):
        """The noise-free roll, (n, 2), at places u (n,) in 0..1."""
        theta = 1.5 * math.pi * (1 + 2 * u)
        x = theta * torch.cos(theta) - 2
        y = theta * torch.sin(theta) - 2 / (3 * math.pi)
        return torch.stack([x, y], dim=1) / self.unit

    def sample(self, n, generator=None):
        """n points of the roll, float32 (n, 2)."""
        u = torch.rand(n, generator=generator)
        return self.curve(u) + self.sigma * torch.randn(n, 2, generator=generator)

    def log_density(self, x):
        """Nats, float64 (n,), at x (n, 2): a mean over the curve by the midpoint rule.
        Errors are below 1e-7, within a few sigma of the curve's ends below 1e-2."""
        # The curve moves by at most 20 du: nodes are sigma / 3 apart at most.
        n = max(1000, math.ceil(60 / self.sigma))
        nodes = self.curve((torch.arange(n, dtype=torch.float64) + 0.5) / n)
        log_sums = []
        for part in x.double().split(max(1, 2**22 // n)):       # 32 MiB at a time
            exponent = -0.5 * (torch.cdist(part, nodes) / self.sigma) ** 2
            log_sums.append(torch.logsumexp(exponent, dim=1))
        norm = n * 2 * math.pi * self.sigma**2
        return torch.cat(log_sums) - math.log(norm)

    def ceiling(self):
        """-H(data), nats, which no model's expected K can pass: log_density's mean, by
        quadrature over the curve and over both coordinates of the noise."""
        z, weight = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(5))
        noise = self.sigma * torch.cartesian_prod(z, z)                 # (25, 2)
        u = (torch.arange(100, dtype=torch.float64) + 0.5) / 100
        x = self.curve(u)[:, None] + noise                              # (100, 25, 2)
        log_p = self.log_density(x.reshape(-1, 2)).reshape(100, 5, 5)
        return (weight @ log_p.mean(0) @ weight).item() / (2 * math.pi)

    def nearest(self, x):
        """Distance and u, float64 (n,), of the nearest of 4001 points of the curve."""
        u = torch.linspace(0, 1, 4001, dtype=torch.float64)
        distance, i = torch.cdist(x.double(), self.curve(u)).min(dim=1)
        return distance, u[i]


def draw(x, u, size=336):
    """uint8 (size, size, 3): dots at x (n, 2) within +-3, in colours by u (n,)."""
    rgb = 0.5 + 0.45 * np.cos(4.5 * u.numpy() - [[3.2], [4.6], [1.2]])
    row = -x[:, 1].numpy()
    column = x[:, 0].numpy()
    window = [[-3, 3], [-3, 3]]
    layers = []
    for weight in (None, *rgb):
        layer, _, _ = np.histogram2d(row, column, size, window, weights=weight)
        layers.append(torch.from_numpy(layer))
    layers = torch.stack(layers)
    # Means over 3 x 3 pixels make dots of points.
    layers = F.avg_pool2d(layers, 3, stride=1, padding=1)
    cover, colour = layers[:1], layers[1:]
    opacity = 1 - torch.exp(-12 * cover)
    page = 1 - opacity * (1 - colour / cover.clamp(min=1e-9))
    return (255 * page).byte().permute(1, 2, 0)


def figure_1(x0, states, diffusion, reverse, roll, generator=None):
    """uint8 (H, W, 3). Rows: q, p, drift f_mu(x, t) - x at 700 points of p. Columns:
    t = 0 (drift: 2), T/2, T. Colour: where on the roll a point starts (q), ends (p). x0
    and each of states: (n, 2), n >= 700."""
    _, start = roll.nearest(x0)
    _, end = roll.nearest(states[-1])
    eps = torch.randn(*x0.shape, generator=generator)
    # 24 dots along the drift, crowded at its head.
    way = torch.linspace(0, 1, 24).sqrt()[:, None, None]
    columns = []
    for t in (0, T // 2, T):
        signal = diffusion.alpha_bar[t].sqrt()
        noise = diffusion.one_minus_alpha_bar[t].sqrt()
        q = draw(signal * x0 + noise * eps, start)
        p = draw(states[T - t], end)
        learned = max(t, 2)
        x = states[T - learned][:700]
        f_mu, _ = reverse(x[None], torch.tensor([learned]))
        drift = f_mu[0] - x
        speed = drift.norm(dim=1, keepdim=True)
        # 0.35 long, or shorter where the drift is below its ninth decile.
        stroke = 0.35 * drift / speed.clamp(min=speed.quantile(0.9))
        dots = (x + way * stroke).reshape(-1, 2)
        drift = draw(dots, end[:700].repeat(24))
        columns.append(torch.cat([q, p, drift]))
    return torch.cat(columns, dim=1)


def report(bits, samples, roll):
    """Print K from bits of each held-out point, and how samples lie on the roll."""
    K = bits.mean()
    error = bits.std() / math.sqrt(len(bits))
    null = -math.log2(2 * math.pi * math.e)                     # Table 1
    ceiling = roll.ceiling() / math.log(2)
    close = roll.nearest(samples)[0] < 0.1
    say(f"samples: {close.double().mean():.2%} within 0.1 of the curve")
    say(f"held out, to +- {error:.3f}; the paper: K=2.35 K-L_null=6.45")
    say(f"K={K:.3f} L_null={null:.3f} K-L_null={K - null:.3f} "
        f"ceiling={ceiling:.3f} gap={ceiling - K:.3f} bits/point")


def parse_arguments(argv=None):
    """The options; exits with 2 where a value does not fit."""
    parser = argparse.ArgumentParser()
    parser.error = fail                                         # one line, no usage
    add = parser.add_argument
    add("--net", choices=["mlp", "rbf"], default="mlp", help="default: mlp; paper: rbf")
    add("--steps", type=int, help="updates (default: mlp 15000, rbf 60000)")
    add("--noise", type=float, default=0.02, help="of the roll (default: 0.02)")
    add("--learn-beta", action="store_true", help="learn beta_2..beta_T as well")
    add("--seed", type=int, default=0, help="same seed, same K (default: 0)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto",
        help="auto is the CPU, as cuda was never run")
    add("--out", type=Path, default="out", help="folder of the pictures (default: out)")
    args = parser.parse_args(argv)
    if args.steps is None:
        args.steps = 15000 if args.net == "mlp" else 60000
    if args.steps < 1 or not 0 <= args.seed < 2**63 or not 0.001 <= args.noise <= 10:
        fail("want --steps above 0, --seed in 0..2^63 - 1, --noise in 0.001..10")
    return args


def run_program(args):
    """Train, measure, draw."""
    picture, film = args.out / "swiss_roll.png", args.out / "swiss_roll_reverse.png"
    for path in (picture, film):
        if path.is_dir():
            fail(f"cannot write {path}: a folder of that name is there")
        check_room(path, 2**22)                                 # before the work
    device = choose_device("cpu" if args.device == "auto" else args.device)

    generator = torch.Generator().manual_seed(args.seed)
    roll = SwissRoll(args.noise)
    net = RBF(roll) if args.net == "rbf" else MLP(generator)
    net.to(device)
    diffusion = train(net, roll, args.steps, args.learn_beta, generator)
    reverse = partial(f_mu_f_sigma, net.cpu().requires_grad_(False), diffusion)

    x0 = roll.sample(HELD_OUT, generator)
    nats = []
    for part in x0.split(500):
        eps = torch.randn(T - 1, len(part), 2, generator=generator)
        nats.append(bound(part, diffusion, reverse, eps))
    states = list(sample(reverse, diffusion, 10000, generator))
    bits = torch.cat(nats) / math.log(2)
    report(bits, states[-1], roll)

    page = figure_1(x0[:10000], states, diffusion, reverse, roll, generator)
    _, u = roll.nearest(states[-1][:1200])
    frames = [draw(x[:1200], u, size=240) for x in states]
    wrote = could_write(write_file, picture, encode_png([page]))
    wrote &= could_write(write_file, film, encode_png(frames, fps=6))
    if not wrote:
        sys.exit(2)


def main(argv=None):
    """The command line; see the module's docstring. It leaves the process as it was."""
    with settings(), errors_in_one_line("take fewer --steps"):
        run_program(parse_arguments(argv))


if __name__ == "__main__":
    torch.set_num_threads(1)            # on matrices this small threads only wait
    run_as_process(main)
