"""The swiss roll of Sohl-Dickstein et al. 2015 (arXiv 1503.03585), by their bound K.

    python swiss_roll.py                # K = 2.382 +- 0.009 bits a point, in 72 s
    python swiss_roll.py --net rbf      # the paper's own network: 1.601 +- 0.009, 88 s

On one core (times: EPYC). The ceiling, -H(data), is 2.705; the best that any diagonal
f_Sigma reaches is 2.397. The paper has K = 2.35 (Table 1), for a roll whose noise it
does not give: docs/experiments.md. Draws Figure 1 as out/swiss_roll.png. Equations are
the 2015 paper's; its beta^(t) is diffusion.beta[t], t in 1..T.
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
from torch.distributions import Normal, kl_divergence

from ddpm_min import GaussianDiffusion, encode_png

T = 40                                                  # App. D.1.1
HELD_OUT = 100_000                                      # points that K is measured on
STEPS = {"mlp": 15_000, "rbf": 60_000}                  # updates, and Adam's rate
RATE = {"mlp": 0.01, "rbf": 0.003}


def bound(x0, diffusion, reverse, eps):
    """K of each of n points, nats (n,), whose mean is (Eq. 14)
    K = -sum_{t>=2} E KL(q(x^{t-1} | x^t, x^0) || p(x^{t-1} | x^t))
        + H_q(X^T | X^0) - H_q(X^1 | X^0) - H_p(X^T).
    x0 (n, d) of mean variance 1, so that the edge step (Eq. 44) adds 0 on average;
    eps ~ N(0, I), (T-1, n, d), for x^2..x^T. reverse(x_t (T-1, n, d), t int64 (T-1,)):
    mean and variance of p(x^{t-1} | x^t), broadcast with x_t."""
    n, d = x0.shape
    t = torch.arange(2, diffusion.T + 1)                # q_sample's batch: the steps
    x0 = x0.expand(len(t), n, d)                        # (T-1, n, d)
    x_t = diffusion.q_sample(x0, t, eps)
    mean_q, var_q = diffusion.q_posterior(x0, x_t, t)
    mean_p, var_p = reverse(x_t, t)
    q = Normal(mean_q, var_q.sqrt(), validate_args=False)       # train finds NaN
    p = Normal(mean_p, var_p.sqrt(), validate_args=False)
    two_pi_e = 2 * math.pi * math.e
    h_q_T = d / 2 * torch.log(two_pi_e * diffusion.noise[-1] ** 2)
    h_q_1 = d / 2 * torch.log(two_pi_e * diffusion.beta[1])
    h_p_T = d / 2 * math.log(two_pi_e)
    return -kl_divergence(q, p).sum((0, 2)) + h_q_T - h_q_1 - h_p_T


def f_mu_f_sigma(net, diffusion, x_t, t):
    """f_mu and f_Sigma's diagonal, each (S, n, 2), at x_t (S, n, 2), t int64 (S,), from
    net(x_t, t) (S, n, 4). The sigmoid: App. D.1.1. The rest: the authors' code, less
    its 1 / sqrt(T) on z_sigma. A net of zeros reverses q of data from N(0, I)."""
    beta = diffusion.beta[t, None, None]
    z_mu, z_sigma = net(x_t, t).chunk(2, dim=2)
    f_mu = (1 - beta).sqrt() * x_t + beta.sqrt() * z_mu
    f_sigma = torch.sigmoid(torch.logit(beta) + z_sigma)
    return f_mu, f_sigma


class RBF(nn.Module):
    """App. D.1.1: 16 normalised radial basis functions for all steps, and a readout for
    each step. x (S, n, 2), t int64 (S,) in 2..T -> (S, n, 4). Centres start in pairs at
    8 points of the roll: a pair's difference tells the distance from it."""

    def __init__(self, roll):
        super().__init__()
        x = roll.curve((torch.arange(8) + 0.5) / 8)
        self.centre = nn.Parameter(torch.cat([0.9 * x, 1.1 * x]))
        self.width = nn.Parameter(torch.full((16,), 0.3))
        self.readout = nn.Parameter(torch.zeros(T + 1, 16, 4))
        # A trick for Adam, whose steps are of one size: readouts, which have a longer
        # way to go than centres, move 160 times as fast.
        self.scale = 160

    def forward(self, x, t):
        square = (x[:, :, None] - self.centre).square().sum(3)          # (S, n, 16)
        unit = torch.softmax(-square / (2 * self.width**2), dim=2)
        return torch.bmm(self.scale * unit, self.readout[t])            # (S, n, 4)


class MLP(nn.Module):
    """This project's: three layers of 64 units for all steps, the first of sines; for
    each step phases and a readout. x (S, n, 2), t int64 (S,) in 2..T -> (S, n, 4)."""

    def __init__(self, generator=None):
        super().__init__()
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


def schedule(sigma):
    """beta_1..beta_T, float64 (T,), for a roll of that sigma in (0, 1): v_t, the
    variance of x^t across the curve, grows by a factor of 1.001 at t = 1, then by one
    factor at every step, until alpha_bar_T is 0.01: x^T is all but N(0, I)."""
    # Equal factors cost a diagonal f_Sigma least: docs/derivations.md.
    v_0 = sigma**2
    v_1 = 1.001 * v_0
    v_T = 0.01 * v_0 + 0.99
    log_v = torch.linspace(math.log(v_1), math.log(v_T), T, dtype=torch.float64)
    v = F.pad(log_v.exp(), (1, 0), value=v_0)           # v_0..v_T
    # v_t = (1 - beta_t) v_{t-1} + beta_t
    return v.diff() / (1 - v[:-1])


def train(net, roll, diffusion, steps, rate, generator):
    """Maximise K by Adam, changing net; its rate falls from this one. An update sees 32
    fresh points, at all t, with eps and -eps. SystemExit where K is not finite. (The
    paper learns the betas too, and finds fixed ones about as good: footnote 2.)"""
    optimiser = torch.optim.Adam(net.parameters(), betas=(0.9, 0.99))
    reverse = partial(f_mu_f_sigma, net, diffusion)
    every = max(1, steps // 10)
    start = time.time()
    bits = []
    for step in range(1, steps + 1):
        decay = (1 - (step - 1) / steps) ** 2
        optimiser.param_groups[0]["lr"] = rate * min(1, step / 100) * decay
        x0 = roll.sample(32, generator).repeat(2, 1)
        eps = torch.randn(T - 1, 32, 2, generator=generator)
        K = bound(x0, diffusion, reverse, torch.cat([eps, -eps], dim=1)).mean()
        optimiser.zero_grad()
        (-K).backward()
        optimiser.step()
        bits.append(K.item() / math.log(2))
        if not math.isfinite(bits[-1]):
            sys.exit(f"K is {bits[-1]} at step {step}: stopped")
        if step % every == 0:
            mean, seconds = np.mean(bits[-every:]), time.time() - start
            print(f"{step}/{steps}: K {mean:.3f} bits, {seconds:.0f} s", flush=True)


@torch.no_grad()
def sample(diffusion, reverse, n, generator=None):
    """Yield the T + 1 states (n, 2) of p: x^T ~ N(0, I), ..., x^1, x^0."""
    x = torch.randn(n, 2, generator=generator)
    yield x
    for t in range(diffusion.T, 1, -1):
        mean, variance = reverse(x[None], torch.tensor([t]))            # (1, n, 2)
        x = mean[0] + variance[0].sqrt() * torch.randn(n, 2, generator=generator)
        yield x
    # The edge step, which is not learned (Eq. 44).
    beta = diffusion.beta[1]
    yield (1 - beta).sqrt() * x + beta.sqrt() * torch.randn(n, 2, generator=generator)


class SwissRoll:
    """(theta cos theta, theta sin theta), theta uniform in 1.5 pi..4.5 pi, plus normal
    noise of this standard deviation (turns are 2 pi apart); centred, divided by unit:
    the mean variance of x and y is then 1 (Table 1), that of the noise sigma^2."""

    def __init__(self, noise):
        theta_square = 39 / 4 * math.pi**2              # its mean
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

    def nearest(self, x):
        """Distance and u, float64 (n,), of the nearest of 4001 points of the curve."""
        u = torch.linspace(0, 1, 4001, dtype=torch.float64)
        distance, i = torch.cdist(x.double(), self.curve(u)).min(dim=1)
        return distance, u[i]

    def log_density(self, x):
        """Nats, float64 (n,), at x (n, 2): a mean over the curve by the midpoint rule.
        Errors are below 1e-7, within a few sigma of the curve's ends below 1e-2."""
        # The curve moves by at most 20 du: nodes are sigma / 3 apart at most.
        n = max(1000, math.ceil(60 / self.sigma))
        nodes = self.curve((torch.arange(n, dtype=torch.float64) + 0.5) / n)
        square = (torch.cdist(x.double(), nodes) / self.sigma) ** 2
        log_sum = torch.logsumexp(-square / 2, dim=1)
        return log_sum - math.log(n * 2 * math.pi * self.sigma**2)

    def ceiling(self):
        """-H(data), nats, which no model's expected K can pass: log_density's mean, by
        quadrature over the curve and over both coordinates of the noise."""
        z, weight = torch.from_numpy(np.stack(np.polynomial.hermite_e.hermegauss(5)))
        noise = self.sigma * torch.cartesian_prod(z, z)                 # (25, 2)
        weight = torch.outer(weight, weight).flatten() / (2 * math.pi)
        u = (torch.arange(100, dtype=torch.float64) + 0.5) / 100
        x = self.curve(u)[:, None] + noise                              # (100, 25, 2)
        log_p = torch.stack([self.log_density(place) for place in x])
        return (log_p.mean(0) @ weight).item()


def draw(x, u):
    """uint8 (336, 336, 3): dots at x (n, 2) within +-3, in colours by u (n,)."""
    phase = torch.tensor([[3.2], [4.6], [1.2]])
    rgb = 0.5 + 0.45 * torch.cos(4.5 * u.float() - phase)               # (3, n)
    place = torch.stack([-x[:, 1], x[:, 0]], dim=1)     # row, column
    layers = []
    for weight in [torch.ones(len(x)), *rgb]:           # cover, then colour
        layer, _ = torch.histogramdd(place, 336, range=[-3.0, 3.0] * 2, weight=weight)
        layers.append(layer)
    # Means over 3 x 3 pixels make dots of points.
    layers = F.avg_pool2d(torch.stack(layers), 3, stride=1, padding=1)
    cover, colour = layers[:1], layers[1:]
    opacity = 1 - torch.exp(-12 * cover)
    mean = colour / cover.clamp(min=1e-9)
    page = 1 - opacity + opacity * mean                 # on white
    return (255 * page).byte().permute(1, 2, 0)


def figure_1(x0, states, diffusion, reverse, roll, generator=None):
    """uint8 (H, W, 3). Rows: q, p, drift f_mu(x, t) - x at 700 points of p. Columns:
    t = 0 (drift: 2), T/2, T. Colour: where on the roll a point starts (q), ends (p). x0
    and each of states: (n, 2), n >= 700."""
    _, start = roll.nearest(x0)
    _, end = roll.nearest(states[-1])
    eps = torch.randn(x0.shape, generator=generator)
    way = torch.linspace(0, 1, 24).sqrt()[:, None, None]        # crowded at the head
    columns = []
    for t in (0, T // 2, T):
        q = draw(diffusion.signal[t] * x0 + diffusion.noise[t] * eps, start)
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


def parse_arguments(argv=None):
    """The options; SystemExit with one line where a value does not fit."""
    parser = argparse.ArgumentParser()
    parser.error = sys.exit                             # one line, no usage
    add = parser.add_argument
    add("--net", choices=list(STEPS), default="mlp", help="default: mlp; paper: rbf")
    add("--steps", type=int, help="updates (default: mlp 15000, rbf 60000)")
    add("--noise", type=float, default=0.02, help="of the roll (default: 0.02)")
    add("--seed", type=int, default=0, help="same seed, same K (default: 0)")
    add("--out", type=Path, default="out", help="folder of the pictures (default: out)")
    args = parser.parse_args(argv)
    args.steps = STEPS[args.net] if args.steps is None else args.steps
    if args.steps < 1 or not 0.001 <= args.noise <= 10 or not 0 <= args.seed < 2**63:
        found = f"{args.steps}, {args.noise}, {args.seed}"
        parser.error(f"want --steps 1.., --noise 0.001..10, --seed 0.., got {found}")
    return args


def main(argv=None):
    """The command line: train, measure K and the samples, draw."""
    args = parse_arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)         # it may fail: before the work
    generator = torch.Generator().manual_seed(args.seed)
    roll = SwissRoll(args.noise)
    net = RBF(roll) if args.net == "rbf" else MLP(generator)
    diffusion = GaussianDiffusion(schedule(roll.sigma))
    train(net, roll, diffusion, args.steps, RATE[args.net], generator)
    reverse = partial(f_mu_f_sigma, net.requires_grad_(False), diffusion)
    x0 = roll.sample(HELD_OUT, generator)
    nats = []
    for part in x0.split(500):
        eps = torch.randn(T - 1, len(part), 2, generator=generator)
        nats.append(bound(part, diffusion, reverse, eps))
    bits = torch.cat(nats) / math.log(2)
    K = bits.mean()
    deviation = bits.std() / math.sqrt(HELD_OUT)        # of the mean
    L_null = -math.log2(2 * math.pi * math.e)           # of p(x^T) = N(0, I), Table 1
    ceiling = roll.ceiling() / math.log(2)
    print(f"K={K:.3f} +- {deviation:.3f} K-L_null={K - L_null:.3f} "
          f"ceiling={ceiling:.3f} gap={ceiling - K:.3f} bits, held out", flush=True)
    states = list(sample(diffusion, reverse, 10_000, generator))
    distance, _ = roll.nearest(states[-1])
    near = (distance < 0.1).double().mean()
    print(f"{near:.2%} of the samples within 0.1 of the curve", flush=True)
    page = figure_1(x0[:10_000], states, diffusion, reverse, roll, generator)
    (args.out / "swiss_roll.png").write_bytes(encode_png(page))


if __name__ == "__main__":
    torch.set_num_threads(1)            # on matrices this small threads only wait
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        sys.exit(f"cannot write: {error}")
