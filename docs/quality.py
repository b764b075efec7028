"""How good are drawn digits?  Prints the figures of docs/experiments.md for one file.

    python mnist_ddpm.py --sample 10000 --npz digits.npz
    python docs/quality.py digits.npz
    python docs/quality.py --train-classifier mine.pt   # then --classifier mine.pt

Beside each figure stands that of as many real training images, which a perfect model
would get. Compare at one number of images only: 1,000 say something, 10,000 are good.

Frechet distance: from drawn to test images, in 128 features of docs/classifier.pt
    (Heusel et al. 2017, arXiv 1706.08500). Another classifier has another scale.
sure digits: the classifier, right on 99.5 % of the test images, gives one over 0.9.
near-copies: nearer to a training image than 1 % of the 10,000 test images are.
Parzen window: mean log-likelihood of the test images, +- its standard error, under a
    Gaussian on each drawn image, pixels in [0, 1], its sigma the best for 1,000 other
    training images: Sohl-Dickstein et al. 2015, arXiv 1503.03585, Table 2.
"""
import argparse
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from torch import nn

CLASSIFIER = Path(__file__).resolve().with_name("classifier.pt")
MNIST = CLASSIFIER.parents[1] / "data" / "mnist.npz"
SIGMAS = [n / 100 for n in range(10, 31)]       # of a Parzen window


def load(path, key):
    """The array of that name in an .npz file, as a tensor; or exit."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return torch.from_numpy(file[key])
    except Exception as error:  # numpy knows a dozen for missing, broken, foreign files
        sys.exit(f"{path}: want an .npz with an array {key}: {type(error).__name__}")


def load_digits(path):
    """x of an .npz, uint8 (N, 28, 28), 0..255; or exit. 128 features want N > 128."""
    x = load(path, "x")
    if x.dtype != torch.uint8 or x.shape[1:] != (28, 28) or len(x) <= 128:
        sys.exit(f"{path}: {x.dtype} {tuple(x.shape)}, want uint8 (N, 28, 28), N > 128")
    if x.max() <= 1:
        sys.exit(f"{path}: {x.min()}..{x.max()}, want 0..255")
    print(f"{path.name}: {len(x)} images 28 x 28, {x.min()}..{x.max()}", flush=True)
    return x


def new_classifier():
    """Images (B, 1, 28, 28) in [-1, 1] to 128 features, and these to 10 logits."""
    layers = []
    for channels_in, channels_out in [(1, 32), (32, 32), (32, 64), (64, 64)]:
        layers.append(nn.Conv2d(channels_in, channels_out, 3, padding=1))
        layers += [nn.BatchNorm2d(channels_out), nn.ReLU()]
        if channels_in == channels_out:
            layers.append(nn.MaxPool2d(2))
    features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 49, 128), nn.ReLU())
    return nn.Sequential(OrderedDict(features=features, digits=nn.Linear(128, 10)))


def load_classifier(path):
    """The classifier whose weights lie in the file, channels-last (faster); or exit."""
    classifier = new_classifier()
    try:
        classifier.load_state_dict(torch.load(path, weights_only=True))
    except Exception as error:  # torch too knows many
        sys.exit(f"{path}: want weights of this classifier: {type(error).__name__}")
    return classifier.eval().to(memory_format=torch.channels_last)


@torch.no_grad()
def classify(classifier, images):
    """Features, float64 (N, 128), and class probabilities (N, 10), of uint8 images."""
    chunks = (images[:, None] / 127.5 - 1).split(100)
    features = torch.cat([classifier.features(chunk) for chunk in chunks])
    return features.double(), classifier.digits(features).softmax(1)


def share_sure(probabilities):
    """Share of the rows of (N, 10) in which one digit has more than 0.9."""
    return (probabilities.amax(1) > 0.9).double().mean().item()


def frechet_distance(a, b):
    """Between Gaussians fitted to a (N, D) and b (M, D), float64: |mean_a - mean_b|^2 +
    Tr(A + B - 2 (A B)^(1/2)), A and B the covariances (Heusel et al. 2017, Eq. 6)."""
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # A root's trace is the sum of the eigenvalues' roots, >= 0 but for rounding.
    eigenvalues = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0)
    traces = cov_a.trace() + cov_b.trace() - 2 * eigenvalues.sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + traces).item()


def near_copies(x, train, test):
    """Share of x that is nearer to one of train than 1 % of test are. (N, D) each."""
    parts = torch.cat([test, x]).split(500)
    nearest = torch.cat([torch.cdist(part, train).amin(1) for part in parts])
    threshold = nearest[:len(test)].quantile(0.01)
    return (nearest[len(test):] < threshold).double().mean().item()


def parzen(x, samples, sigma):
    """log of the mean of N(x; sample, sigma^2 I) over samples (N, D) at x (M, D)."""
    constant = np.log(len(samples)) + x.shape[1] / 2 * np.log(2 * np.pi * sigma**2)
    parts = []
    for chunk in x.split(500):
        squares = torch.cdist(chunk, samples).double().square()
        parts.append(torch.logsumexp(-squares / (2 * sigma**2), 1) - constant)
    return torch.cat(parts)


def parzen_figures(x, train, test):
    """Mean log-likelihood in bits of test under a Parzen window of x, standard error,
    and sigma: the best for 1,000 of train that are not among x. (N, D) each."""
    known = {image.numpy().tobytes() for image in x}
    others = [image for image in train if image.numpy().tobytes() not in known]
    held_out = torch.stack(others)[torch.arange(1000) * len(others) // 1000]
    scores = [parzen(held_out, x, sigma).mean() for sigma in SIGMAS]
    sigma = SIGMAS[torch.stack(scores).argmax()]
    bits = parzen(test, x, sigma) / np.log(2)
    return bits.mean().item(), bits.std().item() / len(bits)**0.5, sigma


def row(name, drawn, real):
    """Print a row of the table."""
    print(f"{name:24} {drawn:>20} {real:>24}", flush=True)


def print_figures(path, classifier):
    """Print the figures of the images in an .npz file beside those of real ones."""
    images = load_digits(path)
    train, test = load(MNIST, "x_train"), load(MNIST, "x_test")
    real = train[np.random.default_rng(0).permutation(len(train))[:len(images)]]
    row("", path.name, "real training images")
    row("images", f"{len(images):,}", f"{len(real):,}")

    h, p = classify(classifier, images)
    h_real, p_real = classify(classifier, real)
    h_test, _ = classify(classifier, test)
    distance, floor = frechet_distance(h, h_test), frechet_distance(h_real, h_test)
    row("Frechet distance", f"{distance:.1f}", f"{floor:.1f}")
    row("sure digits", f"{share_sure(p):.1%}", f"{share_sure(p_real):.1%}")
    # At random, as a file can be sorted by class.
    x = images[np.random.default_rng(0).permutation(len(images))[:10_000]]
    x, real, train, test = [a.flatten(1) / 255 for a in (x, real[:10_000], train, test)]
    copies = near_copies(x, train, test)
    row(f"near-copies, {len(x):,}", f"{copies:.1%}", "test images: 1.0%")
    bits, error, sigma = parzen_figures(x, train, test)
    bits_real, error_real, sigma_real = parzen_figures(real, train, test)
    drawn, floor = f"{bits:.1f} +- {error:.1f}", f"{bits_real:.1f} +- {error_real:.1f}"
    row(f"Parzen of {len(x):,}, bits", drawn, floor)
    row("its sigma", sigma, sigma_real)
    print("In 2015, of 10,000: that paper 317 +- 2.7, adversarial nets 325 +- 2.9")
    if bits > bits_real:
        print("More than real images have: this measure is blunt, see arXiv 1511.01844")


def train_classifier(path, epochs=4):
    """Train on the training images, write the weights to a new file; or exit."""
    if path.exists() or not path.parent.is_dir():
        sys.exit(f"{path}: want a new file, in a folder that exists")
    torch.manual_seed(0)
    x, y = load(MNIST, "x_train")[:, None] / 127.5 - 1, load(MNIST, "y_train").long()
    classifier = new_classifier()
    optimiser = torch.optim.AdamW(classifier.parameters())
    steps = epochs * (len(x) // 64 + 1)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, steps)
    for epoch in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            loss = nn.functional.cross_entropy(classifier(x[batch]), y[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            rate.step()
        print(f"epoch {epoch + 1} of {epochs}, last loss {loss:.4f}", flush=True)
    torch.save(classifier.state_dict(), path)
    _, p = classify(classifier.eval(), load(MNIST, "x_test"))
    right = (p.argmax(1) == load(MNIST, "y_test")).double().mean()
    print(f"{right:.2%} of the test images right, wrote {path}", flush=True)


def main(argv=None):
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Figures for drawn MNIST digits.")
    parser.error = sys.exit
    parser.add_argument("file", type=Path, help=".npz of x, uint8 (N, 28, 28)")
    parser.add_argument("--classifier", type=Path, default=CLASSIFIER, help="weights")
    parser.add_argument("--train-classifier", action="store_true", help="write to file")
    args = parser.parse_args(argv)
    if args.train_classifier:
        train_classifier(args.file)
    else:
        print_figures(args.file, load_classifier(args.classifier))


if __name__ == "__main__":
    main()
