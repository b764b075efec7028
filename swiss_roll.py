"""A swiss roll learned by maximising the bound K of Sohl-Dickstein et al. 2015 (arXiv 1503.03585), Fig. 1.

    python swiss_roll.py                           # K = 2.37 bits a point where 2.70 is the most, 2.5 minutes
    python swiss_roll.py --net rbf --steps 9000    # the paper's network: K = 0.89 bits, 1.5 minutes

Both on one core of a 2.5 GHz Xeon; Table 1 has K = 2.35, for a roll whose noise it does not state. Draws
Fig. 1, out/swiss_roll.png, and noise that rolls itself up, out/swiss_roll_reverse.png. Symbols and equations
are the paper's: q is the forward process, p the reverse one, t is in 1..T, x^0 the data. ddpm_min.py has q.
"""
import argparse
import math
import os
import signal
import sys
import time


def fail(message, code=2):
    """One line on stderr, then exit with the code."""
    print(f"swiss_roll.py: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":  # Ctrl-C; before the next imports, as they take a while
    signal.signal(signal.SIGINT, lambda *_: fail("interrupted", 130))

import numpy as np
import torch
from torch import nn

from ddpm_min import GaussianDiffusion, encode_png, gaussian_kl
from mnist_ddpm import orthogonalise, write_file

T = 40                                                              # App. D.1.1
CENTRE = 2, 2 / (3 * math.pi)                                       # mean of (theta cos, theta sin)(theta)


def unit(noise):
    """Raw units in one unit of x: the root of the mean variance (theta^2 has mean 39/4 pi^2). noise > 0."""
    if not 0 < noise < math.inf:
        raise ValueError(f"noise must be positive and finite, got {noise}")
    return math.sqrt((39 / 4 * math.pi**2 - CENTRE[0] ** 2 - CENTRE[1] ** 2) / 2 + noise**2)


def curve(u, noise):
    """The noise-free roll (n, 2) at u (n,) in 0..1, centred and scaled as the roll of that noise is."""
    theta = 1.5 * math.pi * (1 + 2 * u)
    raw = torch.stack([theta * torch.cos(theta), theta * torch.sin(theta)], -1)
    return (raw - torch.tensor(CENTRE, dtype=u.dtype)) / unit(noise)


def swiss_roll(n, noise, generator=None):
    """n points of the roll, float32 (n, 2), of mean 0 and, over the two coordinates, mean variance 1.
    noise is the standard deviation in raw units, where turns are 2 pi apart; ValueError unless > 0."""
    x = curve(torch.rand(n, generator=generator), noise)
    return x + noise / unit(noise) * torch.randn(n, 2, generator=generator)


def log_density(x, noise):
    """The roll's log-density in nats, float64 (n,), at x (n, 2): a midpoint sum over theta, nodes at most
    noise / 3 apart. Its errors are below 1e-9, but within a few noise widths of the two ends 1e-2."""
    sigma, nodes = noise / unit(noise), max(1000, math.ceil(400 / noise))    # the raw arc is at most 134 du
    c = curve((torch.arange(nodes, dtype=torch.float64) + 0.5) / nodes, noise)
    log_sum = [torch.logsumexp(torch.cdist(part, c, compute_mode="donot_use_mm_for_euclid_dist") ** 2
                               / (-2 * sigma**2), 1) for part in x.double().split(max(1, 2**22 // nodes))]
    return torch.cat(log_sum) - math.log(nodes * 2 * math.pi * sigma**2)


def ceiling(noise):
    """-H(data) in nats, which no model's expected K can pass: quadrature over theta and over the noise."""
    z, weight = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(5))
    u = (torch.arange(100, dtype=torch.float64) + 0.5) / 100
    x = curve(u, noise)[:, None] + noise / unit(noise) * torch.cartesian_prod(z, z)     # (100, 25, 2)
    log_p = log_density(x.reshape(-1, 2), noise).reshape(100, 25).mean(0)
    return (log_p @ torch.outer(weight, weight).ravel() / weight.sum() ** 2).item()


def schedule(noise):
    """beta_1..beta_T, float64 (T,), by the odds (1 - alpha_bar) / alpha_bar; s2 is the roll's noise, squared.
    Where the roll looks like a line, a step in which s2 + odds grows r-fold costs a diagonal Sigma some
    log(r)^2 / 16 nats: 37 levels grow by one factor. The edge step costs log(1 + odds_1 / s2) / 2."""
    s2 = (noise / unit(noise)) ** 2
    near = torch.linspace(math.log(1.001 * s2), math.log(0.5 + s2), T - 3, dtype=torch.float64).exp() - s2
    far = 0.5 * 300 ** (torch.arange(1, 4, dtype=torch.float64) / 3) ** 2    # odds_T = 150
    odds = torch.cat([torch.zeros(1, dtype=torch.float64), near, far])       # odds_0 = 0
    return (odds[1:] - odds[:-1]) / (1 + odds[1:])                  # 1 - alpha_bar_t / alpha_bar_{t-1}


def bound(x0, diffusion, reverse, eps):
    """K of each point in nats, (n,), the bound being its mean; all steps at once (Eqs. 12-14, App. B).
    x0: (n, d), of mean variance 1. eps ~ N(0, I), (T-1, n, d), makes x^2..x^T. reverse: a callable
    (x_t (T-1, n, d), t int64 (T-1,)) -> mean and variance of p(x^{t-1} | x^t), which broadcast with x_t.
    The edge step p(x^0 | x^1) is fixed, its term zero on average (Eq. 44). ValueError where shapes differ."""
    n, d = x0.shape
    t = torch.arange(2, diffusion.T + 1, device=x0.device)
    x0 = x0.expand(len(t), n, d)
    x_t = diffusion.q_sample(x0, t, eps)
    kl = gaussian_kl(*diffusion.q_posterior(x0, x_t, t), *reverse(x_t, t))   # (T-1, n, d)
    variances = diffusion.one_minus_alpha_bar[-1], diffusion.beta[1], torch.ones_like(diffusion.beta[1])
    h_T, h_1, h_p = (d / 2 * torch.log(2 * math.pi * math.e * v) for v in variances)    # entropies, App. B
    return -kl.sum((0, 2)) + h_T - h_1 - h_p                        # Eq. 14


@torch.no_grad()
def sample(reverse, diffusion, n, generator=None):
    """A generator of T + 1 states (n, 2) of the reverse process: x^T ~ N(0, I), ..., x^1, x^0."""
    x = torch.randn(n, 2, generator=generator).to(diffusion.beta)
    yield x
    for t in range(diffusion.T, 0, -1):
        mean, variance = diffusion.alpha[1].sqrt() * x[None], diffusion.beta[1:2]       # Eq. 44
        if t > 1:
            mean, variance = reverse(x[None], torch.tensor([t], device=x.device))       # (1, n, 2)
        x = mean[0] + variance[0].sqrt() * torch.randn(n, 2, generator=generator).to(x)
        yield x


def reverse_process(net, diffusion):
    """The callable (x_t (S, n, 2), t int64 (S,)) -> f_mu, f_Sigma's diagonal, (S, n, 2), of p(x^{t-1} | x^t).
    f_mu is the posterior's mean at a guess of x^0. f_Sigma lies on a log scale between the posterior's
    variance and its mirror image about beta_t (Eq. 24). A net of zeros is exact for N(0, I) data."""
    def reverse(x_t, t):
        alpha_bar, rest = diffusion.alpha_bar[t, None, None], diffusion.one_minus_alpha_bar[t, None, None]
        reach = rest / (rest + 1000 * diffusion.beta[1])            # 1000 beta_1 is the roll's own noise
        shift, squash = net(x_t, t).chunk(2, -1)
        mean, lower = diffusion.q_posterior(alpha_bar.sqrt() * x_t + reach * shift, x_t, t)
        return mean, lower * (diffusion.beta[t, None, None] / lower) ** (2 * torch.sigmoid(squash))
    return reverse


class RBF(nn.Module):
    """App. D.1.1: 16 normalised RBFs for all steps, a readout each: x (S, n, 2), t (S,) -> (S, n, 4)."""
    def __init__(self, generator=None):
        super().__init__()
        self.centre = nn.Parameter(torch.randn(16, 2, generator=generator))
        self.log_width = nn.Parameter(torch.full((16,), -0.5))
        self.readout = nn.Parameter(torch.zeros(T + 1, 16, 4))      # f_mu's two, f_Sigma's two

    def forward(self, x, t):
        square = (x[:, :, None] - self.centre).square().sum(-1)     # (S, n, 16)
        return torch.bmm(torch.softmax(-square / (2 * torch.exp(2 * self.log_width)), -1), self.readout[t])


class MLP(nn.Module):
    """Three layers of 64 units for all steps, sines first; for each step phases and a readout, as RBF's."""
    def __init__(self, generator=None):
        super().__init__()
        self.first = nn.Parameter(2 * torch.randn(64, 2, generator=generator))
        self.inner = nn.Parameter(0.18 * torch.randn(2, 64, 64, generator=generator))
        self.phase = nn.Parameter(torch.randn(64, generator=generator).repeat(T + 1, 1, 1))
        self.bias = nn.Parameter(torch.zeros(2, 64))
        self.readout = nn.Parameter(torch.zeros(T + 1, 65, 4))      # as above; the last row is a bias

    def forward(self, x, t):
        h = torch.sin(nn.functional.linear(x, self.first) + self.phase[t])  # (S, n, 64)
        for weight, bias in zip(self.inner, self.bias):
            h = nn.functional.silu(nn.functional.linear(h, weight, bias))
        return torch.baddbmm(self.readout[t, 64:], h, self.readout[t, :64])


def train(net, noise, steps, learn_beta, generator, device):
    """Ascent on K, with 32 fresh points, eps and -eps, all t an update, by Muon for the MLP's inner weights,
    Adam for the rest. Changes net, returns the GaussianDiffusion; exits if K is not finite. learn_beta: the
    logits of beta_2..beta_T take part, eps frozen as they move (Sec. 2.4.1)."""
    betas, inner = schedule(noise), getattr(net, "inner", None)
    logits = torch.logit(betas[1:]).requires_grad_(learn_beta)
    adam = torch.optim.Adam([p for p in [*net.parameters(), logits] if p is not inner], betas=(0.9, 0.99))
    momentum, t0, log, every = 0.0, time.time(), [], max(1, steps // 10)
    for step in range(1, steps + 1):
        lr = adam.param_groups[0]["lr"] = 0.01 * min(1, step / 100) * (1 - (step - 1) / steps) ** 2
        if learn_beta or step == 1:
            diffusion = GaussianDiffusion(torch.cat([betas[:1], logits.sigmoid()]).float()).to(device)
        x0 = swiss_roll(32, noise, generator).repeat(2, 1).to(device)
        eps = torch.randn(T - 1, 32, 2, generator=generator).to(device)
        K = bound(x0, diffusion, reverse_process(net, diffusion), torch.cat([eps, -eps], 1)).mean()
        if not K.isfinite():
            fail(f"K is {K.item()} at step {step}: stopped", 1)
        net.zero_grad()
        adam.zero_grad()
        (-K).backward()
        adam.step()
        if inner is not None:
            momentum = 0.95 * momentum + 0.05 * inner.grad
            inner.data -= 4 * lr * orthogonalise(0.05 * inner.grad + 0.95 * momentum)
        log.append(K.item() / math.log(2))
        if step % every == 0:
            print(f"{step}/{steps}: K {np.mean(log[-every:]):.3f} bits, {time.time() - t0:.0f} s", flush=True)
    return GaussianDiffusion(diffusion.beta[1:].detach().cpu())


def nearest(x, noise):
    """Distance (n,) of x (n, 2) from the noise-free roll, u (n,) of the nearest of 4001 points on it."""
    u = torch.linspace(0, 1, 4001)
    distance, i = torch.cdist(x, curve(u, noise)).min(1)
    return distance, u[i]


def draw(x, rgb, size, radius):
    """uint8 (size, size, 3): anti-aliased discs of colour rgb (n, 3) at x (n, 2) in a white window of +-3.
    radius: a number or (n,), in pixels, at most 2."""
    p = np.clip(np.stack([3 + x[:, 0], 3 - x[:, 1]], 1) * size / 6, -4, size + 4)  # column, row
    ink = np.zeros((size + 16, size + 16, 4))                       # cover, cover * rgb; a margin of 8 pixels
    for offset in np.ndindex(7, 7):
        pixel = np.floor(p).astype(int) + offset - 3
        cover = np.clip(radius + 0.5 - np.hypot(*(pixel + 0.5 - p).T), 0, 1)[:, None]
        np.add.at(ink, (pixel[:, 1] + 8, pixel[:, 0] + 8), np.hstack([cover, cover * rgb]))
    cover, ink = ink[8:-8, 8:-8, :1], ink[8:-8, 8:-8, 1:]
    return np.uint8(255.5 - 255 * (1 - np.exp(-1.5 * cover)) * (1 - ink / np.maximum(cover, 1e-9)))


def pictures(x0, states, diffusion, reverse, noise, generator):
    """Figure 1 as a list of one frame, and the frames of p, uint8 (H, W, 3); x0 and states are (n, 2).
    Rows: q, p, drift f_mu(x, t) - x at points of p. Columns: t = 0 (drift: 2, the last learned), T/2, T.
    Colour: the place on the roll where a point starts (q) or ends (p)."""
    place, stops = np.linspace(0, 1, 4), ((45, 139, 224, 251), (30, 31, 53, 139), (143, 169, 107, 36))
    start, end = (np.stack([np.interp(nearest(x, noise)[1], place, c) / 255 for c in stops], -1)
                  for x in (x0, states[-1]))
    eps, page, frames = torch.randn(x0.shape, generator=generator), [[], [], []], []
    for t in (0, T // 2, T):
        x_t = diffusion.q_sample(x0[None], torch.tensor([t]), eps[None])[0] if t > 0 else x0
        x, step = states[T - max(t, 2)][:700], torch.tensor([max(t, 2)])
        drift = (reverse(x[None], step)[0][0] - x).detach().numpy()
        length = np.hypot(*drift.T)[:, None]
        part, rgb = np.linspace(0, 1, 24)[:, None, None], np.tile(end[:700], (24, 1))   # 24 discs a stroke
        stroke = x.numpy() + part * drift * 0.35 / np.maximum(length, np.quantile(length, 0.9))
        page[0].append(draw(x_t.numpy(), start, 336, 1.3))
        page[1].append(draw(states[T - t].numpy(), end, 336, 1.3))
        page[2].append(draw(stroke.reshape(-1, 2), rgb, 336, np.repeat(0.3 + 0.9 * part, 700)))
    for x, y in zip(states, states[1:]):                            # at an even pace
        between = math.ceil((x - y).square().mean().sqrt() / 0.15)
        frames += [torch.lerp(x, y, i / between)[:1200].numpy() for i in range(between)]
    frames += [states[-1][:1200].numpy()] * 10
    return [np.concatenate(np.concatenate(page, 1), 1)], [draw(x, end[:1200], 240, 1.3) for x in frames]


def save(path, data):
    """Write the bytes data to path whole or not at all; exit if that fails."""
    try:
        write_file(path, data)
    except OSError as error:
        fail(f"cannot write: {error}")


def main(argv=None):
    """Train, measure, draw. Exits with 1 if K is not finite, 2 for bad values or a failed write."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error, add = fail, parser.add_argument
    add("--net", choices=["mlp", "rbf"], default="mlp", help="rbf is the paper's")
    add("--steps", type=int, default=11000, help="updates")
    add("--noise", type=float, default=0.02, help="of the roll, whose turns are 2 pi apart")
    add("--learn-beta", action="store_true", help="learn beta_2..beta_T as well")
    add("--seed", type=int, default=0, help="same seed, same K")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="to train on")
    add("--out", default="out", help="folder of the two pictures")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # on matrices this small threads only wait for each other
    for name, low, high in (("steps", 1, 10**9), ("noise", 0.001, 10), ("seed", 0, 2**63 - 1)):
        if not low <= getattr(args, name) <= high:
            fail(f"--{name} must be from {low} to {high}, got {getattr(args, name)}")
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = best if args.device in ("auto", best) else "cpu"
    if args.device not in ("auto", device):
        print(f"swiss_roll.py: no {args.device} here, going on with the CPU", file=sys.stderr)
    path = os.path.join(args.out, "swiss_roll")
    save(path + ".probe", bytes(2**22))                             # is there room, before the work?
    os.remove(path + ".probe")
    generator = torch.Generator().manual_seed(args.seed)
    net = {"mlp": MLP, "rbf": RBF}[args.net](generator).to(device)
    diffusion = train(net, args.noise, args.steps, args.learn_beta, generator, device)
    reverse = reverse_process(net.cpu().requires_grad_(False), diffusion)
    x0 = swiss_roll(20000, args.noise, generator)
    K = torch.cat([bound(x.repeat(4, 1), diffusion, reverse, torch.randn(T - 1, 1000, 2, generator=generator))
                   .reshape(4, 250).mean(0) for x in x0.split(250)]) / math.log(2)      # four draws of eps
    states = list(sample(reverse, diffusion, 10000, generator))
    distance, u = nearest(states[-1], args.noise)
    uneven = (torch.histc(u, 20, 0, 1) / 500 - 1).abs().max()
    page, frames = pictures(x0[:10000], states, diffusion, reverse, args.noise, generator)
    error, K = K.std() / len(K) ** 0.5, K.mean()
    top, null = ceiling(args.noise) / math.log(2), -math.log2(2 * math.pi * math.e)
    print(f"samples: {(distance < 0.1).float().mean():.2%} within 0.1 of the curve, 20 bins of theta within "
          f"{uneven:.0%} of uniform\nheld out: K +- {error:.3f}; the paper: K=2.35 K-L_null=6.45\nK={K:.3f} "
          f"L_null={null:.3f} K-L_null={K - null:.3f} ceiling={top:.3f} gap={top - K:.3f} bits/point")
    save(path + ".png", encode_png(page))
    save(path + "_reverse.png", encode_png(frames, fps=15))


if __name__ == "__main__":
    main()
