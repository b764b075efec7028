"""docs/quality.py: each figure against a closed form, or what was published."""
import re

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from torch.testing import assert_close

from docs import quality

TRAIN = quality.load(quality.MNIST, "x_train")
TEST = quality.load(quality.MNIST, "x_test")
LABELS = quality.load(quality.MNIST, "y_test")


def gaussian_sample(n, mean, cov):
    """Float64 (n, D) whose own mean and covariance are these, up to rounding."""
    x = torch.randn(n, len(mean)).double()
    x -= x.mean(0)
    whitened = torch.linalg.solve_triangular(
        torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False)
    return mean + (torch.linalg.cholesky(cov) @ whitened).T


def mixture(samples, sigma):
    """The Parzen window as torch has it, float64."""
    components = Independent(Normal(samples.double(), sigma), 1)
    return MixtureSameFamily(Categorical(torch.ones(len(samples)).double()), components)


def test_frechet_distance_of_a_set_with_itself_is_zero():
    torch.manual_seed(0)
    classifier = quality.load_classifier(quality.CLASSIFIER)
    h, _ = quality.classify(classifier, TEST[:200])
    assert abs(quality.frechet_distance(h, h)) < 1e-4 * torch.cov(h.T).trace()
    x = torch.randn(500, 8).double()
    assert abs(quality.frechet_distance(x, x)) < 1e-8


def test_frechet_distance_where_covariances_commute():
    """|m - n|^2 + sum (sqrt(a_i) - sqrt(b_i))^2, a and b the eigenvalues."""
    torch.manual_seed(1)
    q, _ = torch.linalg.qr(torch.randn(6, 6).double())
    a, b, m, n = torch.rand(4, 6).double() + 0.1

    ours = quality.frechet_distance(
        gaussian_sample(50, m, q @ a.diag() @ q.T),
        gaussian_sample(70, n, q @ b.diag() @ q.T))
    exact = (m - n).square().sum() + (a.sqrt() - b.sqrt()).square().sum()

    assert abs(ours - exact) < 1e-8


def test_frechet_distance_where_they_do_not():
    """In two dimensions Tr (AB)^(1/2) = sqrt(Tr AB + 2 sqrt(det AB))."""
    torch.manual_seed(2)
    a = torch.tensor([[2.0, 0.6], [0.6, 0.5]]).double()
    b = torch.tensor([[0.7, -0.4], [-0.4, 1.5]]).double()
    m, n = torch.tensor([[1.0, 2.0], [0.5, -1.0]]).double()

    x, y = gaussian_sample(50, m, a), gaussian_sample(70, n, b)
    ours = quality.frechet_distance(x, y)
    root = (torch.trace(a @ b) + 2 * torch.det(a @ b).sqrt()).sqrt()
    exact = (m - n).square().sum() + a.trace() + b.trace() - 2 * root

    assert abs(ours - exact) < 1e-8


def test_parzen_is_the_mixture_of_gaussians():
    """Of one sample, and of several."""
    torch.manual_seed(3)
    x, samples = torch.rand(700, 5).double(), torch.rand(30, 5).double()
    for count in (1, 30):
        ours = quality.parzen(x, samples[:count], 0.17)
        exact = mixture(samples[:count], 0.17).log_prob(x)
        assert_close(ours, exact, rtol=0, atol=1e-9)


def test_parzen_of_gaussian_samples_is_the_wider_gaussian():
    """Samples of N(0, s^2 I) under a window sigma: nearly N(0, (s^2 + sigma^2) I)."""
    torch.manual_seed(4)
    s, sigma = 0.5, 0.3
    samples, x = s * torch.randn(5000, 2).double(), s * torch.randn(2000, 2).double()

    ours = quality.parzen(x, samples, sigma)
    variance = s**2 + sigma**2
    exact = -np.log(2 * np.pi * variance) - s**2 / variance

    assert abs(ours.mean() - exact) < 5 * ours.std() / len(x)**0.5


def test_parzen_figures_are_in_bits_and_sigma_is_chosen_on_other_images():
    """Most of the training images are the images themselves: they must not count."""
    random = np.random.default_rng(5)
    images, others, test = random.integers(0, 256, (3, 50, 2, 2)).astype(np.uint8)
    train = np.concatenate([images] * 20 + [others])
    pixels = [torch.tensor(x.reshape(-1, 4) / 255) for x in (images, others, test)]

    bits, error, sigma = quality.parzen_figures(images, train, test)
    scores = [mixture(pixels[0], s).log_prob(pixels[1]).sum() for s in quality.SIGMAS]
    best = quality.SIGMAS[int(np.argmax(scores))]
    exact = mixture(pixels[0], best).log_prob(pixels[2]).numpy() / np.log(2)

    assert quality.SIGMAS[0] < sigma == best
    assert abs(bits - exact.mean()) < 1e-3
    assert abs(error - exact.std(ddof=1) / 50**0.5) < 1e-3


def test_planted_copies_are_found():
    """30 of 100 points lie near training points, the others as far as test points."""
    torch.manual_seed(6)
    train, test, new = torch.rand(500, 20), torch.rand(300, 20), torch.rand(70, 20)
    copies = train[:30] + 0.001
    assert quality.near_copies(copies, train, test) == 1
    assert 0.3 <= quality.near_copies(torch.cat([copies, new]), train, test) < 0.34


def test_spread_takes_all_of_a_sorted_file():
    assert quality.spread(np.arange(10), 5).tolist() == [0, 2, 4, 6, 8]
    assert quality.spread(np.arange(3), 5).tolist() == [0, 1, 2]


def test_classifier_knows_the_digits_also_one_by_one():
    classifier = quality.load_classifier(quality.CLASSIFIER)
    _, p = quality.classify(classifier, TEST[:1000])
    assert (p.argmax(1).numpy() == LABELS[:1000]).mean() > 0.99
    assert_close(p.sum(1), torch.ones(1000))
    _, alone = quality.classify(classifier, TEST[:1])
    assert_close(alone, p[:1], rtol=0, atol=1e-4)


def test_table_has_the_published_floor_and_the_planted_copies(
        tmp_path, capsys, monkeypatch):
    """1,000 real training images have 11.8; a fifth of the file is copied from them."""
    monkeypatch.setattr(quality, "SIGMAS", [0.21])
    images = TEST[:1000].copy()
    images[::5] = TRAIN[:200]
    np.savez(tmp_path / "digits.npz", x=images)

    quality.main([str(tmp_path / "digits.npz")])
    rows = [re.split(r"  +", row) for row in capsys.readouterr().out.splitlines()]
    table = {row[0]: row[1:] for row in rows[1:7]}

    assert rows[0] == ["", "digits.npz", "real training images"]
    assert table["images"] == ["1,000", "1,000"]
    assert abs(float(table["Frechet distance"][1]) - 11.8) < 0.11
    assert abs(float(table["sure digits"][1][:-1]) - 98.5) < 0.3
    assert 20 <= float(table["near-copies, 500"][0][:-1]) < 22
    bits, error = map(float, table["Parzen of 1,000, bits"][1].split(" +- "))
    assert abs(bits - 176.1) < 0.3 and abs(error - 2.4) < 0.11
    assert table["its sigma"] == ["0.21", "0.21"]


def test_trained_classifier_can_be_used(tmp_path, capsys, monkeypatch):
    """Two classes that are told apart by their brightness."""
    y = np.arange(128) % 2
    x = np.broadcast_to(y[:, None, None] * 200, (128, 28, 28)).astype(np.uint8)
    np.savez(tmp_path / "data.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    monkeypatch.setattr(quality, "MNIST", tmp_path / "data.npz")

    quality.train_classifier(tmp_path / "mine.pt", epochs=8)
    assert "100.00% of the test images right" in capsys.readouterr().out
    classifier = quality.load_classifier(tmp_path / "mine.pt")
    _, p = quality.classify(classifier, x)
    assert (p.argmax(1).numpy() == y).all()


DIGITS = np.zeros((200, 28, 28), np.uint8)
BAD = {
    "missing": (None, "FileNotFoundError"),
    "other name": ({"images": DIGITS}, "no .npz with an array x"),
    "pickled": ({"x": np.array([None, DIGITS], dtype=object)}, "no .npz with"),
    "float": ({"x": DIGITS / 255}, "is float64 (200, 28, 28): want uint8"),
    "channels": ({"x": DIGITS[..., None]}, "(200, 28, 28, 1): want uint8 (N, 28, 28)"),
    "one image": ({"x": DIGITS[0]}, "want uint8 (N, 28, 28)"),
    "few": ({"x": DIGITS[:128]}, "has 128 images, 129 are the least"),
}


def assert_refused(argv, message, capsys):
    with pytest.raises(SystemExit) as end:
        quality.main([str(word) for word in argv])
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == ""
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_refused_in_one_line(name, tmp_path, capsys):
    arrays, message = BAD[name]
    path = tmp_path / "digits.npz"
    if arrays is not None:
        np.savez(path, **arrays)
    assert_refused([path], message, capsys)


def test_bad_command_is_refused_in_one_line(tmp_path, capsys):
    path, broken = tmp_path / "digits.npz", tmp_path / "broken.pt"
    np.savez(path, x=DIGITS)
    broken.write_text("no weights")
    assert_refused([], "is required", capsys)
    assert_refused([path, "--classifier", broken], "no weights of this", capsys)
    nowhere = tmp_path / "missing" / "mine.pt"
    for place in (nowhere, path, path / "mine.pt"):
        assert_refused(["--train-classifier", place], "in a folder that exists", capsys)
    assert broken.read_text() == "no weights"
