"""How good are drawn digits?  Prints the figures of docs/experiments.md for one file.

    python mnist_ddpm.py --sample 10000 --npz digits.npz
    python docs/quality.py digits.npz
    python docs/quality.py --train-classifier mine.pt   # then --classifier mine.pt

Beside each figure stands that of as many real training images, which a perfect model
would get. Compare at one number of images only: 1,000 say something, 10,000 are good.

Frechet distance: between Gaussians fitted to the drawn and to the test images, in the
    128 features of a small classifier (Heusel et al. 2017, arXiv 1706.08500, Eq. 6,
    there with Inception's features). Its scale is that of this classifier.
sure digits: the classifier gives one of the ten more than 0.9.
near-copies: nearer to a training image than 1 % of the test images are.
Parzen window: Table 2 of Sohl-Dickstein et al. 2015, arXiv 1503.03585. A Gaussian of
    deviation sigma stands on each of 10,000 images, pixels in [0, 1]; the figure is the
    mean log-likelihood of the test images under their mixture, +- its standard error.
    Sigma is the best one for training images that are not among the 10,000. The measure
    is blunt, and a model can pass real images, as centroids of k-means do: Theis et al.
    2016, arXiv 1511.01844, who advise against it. Here it serves to compare with 2015.

docs/classifier.pt has 99.5 % of the test images right. In the features of another
classifier the Frechet distance has another scale: its figures are not comparable.
"""
import argparse
import io
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))                   # where program.py is

from program import (check_room, errors_in_one_line, fail, run_as_process, say,
                     write_file)

CLASSIFIER = ROOT / "docs" / "classifier.pt"
MNIST = ROOT / "data" / "mnist.npz"
SIGMAS = [n / 100 for n in range(10, 31)]       # of a Parzen window
ROW = "{:24} {:>20} {:>24}"                     # of the table


def load(path, key):
    """The array of that name in an .npz file; or fail."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return np.asarray(file[key])
    except Exception as error:  # numpy knows a dozen for missing, broken, foreign files
        fail(f"{path}: no .npz with an array {key} ({type(error).__name__})")


def load_digits(path):
    """The array x of an .npz file, uint8 (N, 28, 28), N > 128 for a covariance of 128
    features that has full rank; or fail."""
    images = load(path, "x")
    if images.dtype != np.uint8 or images.shape[1:] != (28, 28):
        fail(f"x in {path} is {images.dtype} {images.shape}: want uint8 (N, 28, 28)")
    if len(images) < 129:
        fail(f"{path} has {len(images)} images, 129 are the least and 1,000 say "
             "something: python mnist_ddpm.py --sample 1000 --npz digits.npz")
    return images


def block(channels_in, channels_out):
    """A 3x3 convolution, normalised and rectified: a list of modules."""
    convolution = nn.Conv2d(channels_in, channels_out, 3, padding=1)
    return [convolution, nn.BatchNorm2d(channels_out), nn.ReLU()]


class Classifier(nn.Module):
    """Classifies digits; the layer before the last gives the features."""
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            *block(1, 32), *block(32, 32), nn.MaxPool2d(2),
            *block(32, 64), *block(64, 64), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * 7 * 7, 128), nn.ReLU())
        self.digits = nn.Linear(128, 10)

    def forward(self, images):
        """Images, uint8 (B, 28, 28), to features (B, 128) and logits (B, 10)."""
        x = images[:, None] / 127.5 - 1
        features = self.features(x)
        return features, self.digits(features)


def load_classifier(path):
    """The Classifier whose weights lie in the file, channels-last (faster); or fail."""
    classifier = Classifier()
    try:
        classifier.load_state_dict(torch.load(path, weights_only=True))
    except Exception as error:  # torch too knows many
        fail(f"{path}: no weights of this classifier ({type(error).__name__})")
    return classifier.eval().to(memory_format=torch.channels_last)


@torch.no_grad()
def classify(classifier, images):
    """Features, float64 (N, 128), and class probabilities (N, 10), of uint8 images."""
    chunks = torch.from_numpy(images).split(100)
    features, logits = zip(*[classifier(chunk) for chunk in chunks])
    return torch.cat(features).double(), torch.cat(logits).softmax(1)


def share_sure(probabilities):
    """Share of the rows of (N, 10) in which one digit has more than 0.9."""
    return (probabilities.amax(1) > 0.9).double().mean().item()


def frechet_distance(a, b):
    """Between Gaussians fitted to a (N, D) and b (M, D), float64: |mean_a - mean_b|^2 +
    Tr(A + B - 2 (A B)^(1/2)), A and B the covariances (Heusel et al. 2017, Eq. 6)."""
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # The trace of a root is the sum of the roots of the eigenvalues. Those of A B are
    # real and not negative, but for rounding.
    eigenvalues = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0)
    between_means = (a.mean(0) - b.mean(0)).square().sum()
    traces = cov_a.trace() + cov_b.trace() - 2 * eigenvalues.sqrt().sum()
    return (between_means + traces).item()


def pixels(images):
    """Images, uint8 (N, H, W), as float32 (N, H * W) in [0, 1]."""
    return torch.from_numpy(images).flatten(1) / 255


def spread(images, count):
    """At most so many of the images, evenly spread: a file can be sorted by class."""
    count = min(count, len(images))
    return images[np.arange(count) * len(images) // count]


def nearest(x, bank):
    """Euclidean distance of each x (M, D) to the nearest of bank (N, D): (M,)."""
    return torch.cat([torch.cdist(part, bank).amin(1) for part in x.split(500)])


def near_copies(x, train, test):
    """Share of x that is nearer to one of train than 1 % of test are. (N, D) each."""
    threshold = torch.quantile(nearest(test, train), 0.01)
    return (nearest(x, train) < threshold).double().mean().item()


def parzen(x, samples, sigma):
    """log of the mean of the densities N(sample, sigma^2 I) at each x (M, D), over the
    samples (N, D): nats, float64 (M,)."""
    n, dim = samples.shape
    constant = math.log(n) + dim / 2 * math.log(2 * math.pi * sigma**2)
    parts = []
    for chunk in x.split(500):
        squares = torch.cdist(chunk, samples).double().square()
        parts.append(torch.logsumexp(-squares / (2 * sigma**2), 1) - constant)
    return torch.cat(parts)


def parzen_figures(images, train, test):
    """Mean log-likelihood in bits of test under a Parzen window of images, its standard
    error, and sigma: the best for 1,000 of train that are not among images."""
    known = {image.tobytes() for image in images}
    unknown = [image for image in train if image.tobytes() not in known]
    if not unknown:
        fail("every training image is in the file: none is left to choose sigma by")
    held_out = pixels(spread(np.array(unknown), 1000))
    samples = pixels(images)
    scores = [parzen(held_out, samples, sigma).mean() for sigma in SIGMAS]
    sigma = SIGMAS[torch.stack(scores).argmax()]
    bits = parzen(pixels(test), samples, sigma) / math.log(2)
    return bits.mean().item(), bits.std().item() / len(bits)**0.5, sigma


def print_figures(name, images, classifier):
    """Print the figures of images, uint8 (N, 28, 28), beside those of real ones."""
    train, test = load(MNIST, "x_train"), load(MNIST, "x_test")
    order = np.random.default_rng(0).permutation(len(train))
    real = train[order[:len(images)]]
    say(ROW.format("", name, "real training images"))
    say(ROW.format("images", f"{len(images):,}", f"{len(real):,}"))

    h, p = classify(classifier, images)
    h_real, p_real = classify(classifier, real)
    h_test, _ = classify(classifier, test)
    distance, floor = frechet_distance(h, h_test), frechet_distance(h_real, h_test)
    say(ROW.format("Frechet distance", f"{distance:.1f}", f"{floor:.1f}"))
    sure, sure_real = share_sure(p), share_sure(p_real)
    say(ROW.format("sure digits", f"{sure:.1%}", f"{sure_real:.1%}"))

    few = pixels(spread(images, 500))
    copies = near_copies(few, pixels(train), pixels(test[:500]))
    say(ROW.format(f"near-copies, {len(few)}", f"{copies:.1%}", "test images: 1.0%"))

    images, real = spread(images, 10_000), real[:10_000]
    bits, error, sigma = parzen_figures(images, train, test)
    bits_real, error_real, sigma_real = parzen_figures(real, train, test)
    drawn, real = f"{bits:.1f} +- {error:.1f}", f"{bits_real:.1f} +- {error_real:.1f}"
    say(ROW.format(f"Parzen of {len(images):,}, bits", drawn, real))
    say(ROW.format("its sigma", sigma, sigma_real))
    say("In 2015, of 10,000: that paper 317 +- 2.7, adversarial nets 325 +- 2.9")
    if bits > bits_real:
        say("More than real images have: this measure is blunt, see arXiv 1511.01844")


def train_classifier(path, epochs=4):
    """Train a Classifier on the training images, write its weights, print its share of
    right test images; or fail."""
    if path.exists() or not path.parent.is_dir():
        fail(f"{path}: want a new file, in a folder that exists")
    check_room(path, 2**22)                     # before the work
    torch.manual_seed(0)
    x = torch.from_numpy(load(MNIST, "x_train"))
    y = torch.from_numpy(load(MNIST, "y_train")).long()
    classifier = Classifier()
    optimiser = torch.optim.AdamW(classifier.parameters())
    rate = OneCycleLR(optimiser, 3e-3, epochs * (len(x) // 64 + 1))
    for epoch in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            _, logits = classifier(x[batch])
            loss = nn.functional.cross_entropy(logits, y[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            rate.step()
        say(f"epoch {epoch + 1} of {epochs}, last loss {loss:.4f}")
    buffer = io.BytesIO()
    torch.save(classifier.state_dict(), buffer)
    write_file(path, buffer.getvalue())
    _, p = classify(classifier.eval(), load(MNIST, "x_test"))
    right = p.argmax(1).numpy() == load(MNIST, "y_test")
    say(f"{right.mean():.2%} of the test images right, wrote {path}")


def main(argv=None):
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Figures for drawn MNIST digits.")
    parser.error = fail
    parser.add_argument("--classifier", type=Path, metavar="WEIGHTS",
                        default=CLASSIFIER, help="default: docs/classifier.pt")
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument("file", type=Path, nargs="?", help=".npz of x, (N, 28, 28)")
    either.add_argument("--train-classifier", type=Path, metavar="WEIGHTS",
                        help="train a classifier, some minutes, and write it there")
    args = parser.parse_args(argv)
    with errors_in_one_line("take fewer images"):
        if args.train_classifier:
            train_classifier(args.train_classifier)
            return
        classifier = load_classifier(args.classifier)
        print_figures(args.file.name, load_digits(args.file), classifier)


if __name__ == "__main__":
    run_as_process(main)
