"""docs/quality.py: each figure against a closed form or a sum in float64."""
import numpy as np
import pytest
import torch

from docs import quality
from docs.quality import CLASSIFIER, MNIST, SIGMAS, frechet_distance, load, near_copies

TEST = load(MNIST, "x_test")[:500]


def test_frechet_distance_of_diagonal_and_of_commuting_covariances():
    """Points m +- a_i q_i and n +- b_i q_i: |m - n|^2 + 2/11 sum (a_i - b_i)^2."""
    torch.manual_seed(1)
    m, n, a, b = torch.rand(4, 6).double()
    exact = ((m - n)**2 + 2 / 11 * (a - b)**2).sum()
    rotated, _ = torch.linalg.qr(torch.rand(6, 6).double())
    for q in (torch.eye(6), rotated):
        x = m + torch.cat([q * a, -q * a], 1).T
        y = n + torch.cat([q * b, -q * b], 1).T
        assert abs(frechet_distance(x, y) - exact) < 1e-10


def test_frechet_distance_of_covariances_that_do_not_commute():
    """Tr (AB)^(1/2) = Tr (R B R)^(1/2), R the symmetric root of A."""
    torch.manual_seed(2)
    x, y = torch.rand(2, 20, 6).double()
    a, b = np.cov(x.T), np.cov(y.T)
    values, vectors = np.linalg.eigh(a)
    root = vectors * np.sqrt(values) @ vectors.T
    traces = np.trace(a + b) - 2 * np.sqrt(np.linalg.eigvalsh(root @ b @ root)).sum()
    exact = (x - y).mean(0).square().sum() + traces
    assert abs(frechet_distance(x, y) - exact) < 1e-10


def log_density(x, samples, sigma):
    """The Parzen window of samples (N, D) at x (M, D) as a plain sum: float64 (M,)."""
    kernels = torch.distributions.Normal(samples, sigma).log_prob(x[:, None]).sum(2)
    return kernels.exp().mean(1).log()


def test_parzen_is_the_sum_in_bits_and_sigma_is_chosen_on_other_images():
    """Most of the training images are the images themselves: they must not count."""
    torch.manual_seed(3)
    x, others, test = torch.rand(610, 4).double().split([60, 40, 510])
    train = torch.cat([x] * 20 + [others])
    bits, error, sigma = quality.parzen_figures(x, train, test)
    scores = [log_density(others, x, s).sum() for s in SIGMAS]
    exact = log_density(test, x, sigma) / np.log(2)
    assert SIGMAS[0] < sigma == SIGMAS[np.argmax(scores)]
    assert abs(bits - exact.mean()) < 1e-10
    assert abs(error - exact.std() / 510**0.5) < 1e-10


def test_near_copies_are_nearer_than_one_in_a_hundred_of_test():
    """Six of 600 test points are nearer than 0.0117, and so are 30 of 100 points."""
    train, test = torch.eye(600), (1 - torch.arange(1, 601) / 600).diag()
    distance = torch.tensor([[0.0105]] * 30 + [[0.013]] * 70)
    assert near_copies((1 - distance) * train[:100], train, test) == 0.3


def test_share_sure():
    assert quality.share_sure(torch.tensor([[0.91, 0.09], [0.11, 0.89]])) == 0.5


def test_classifier_knows_the_digits():
    _, p = quality.classify(quality.load_classifier(CLASSIFIER), TEST)
    assert (p.argmax(1) == load(MNIST, "y_test")[:500]).sum() >= 495


def test_table_of_test_images_and_planted_copies(tmp_path, capsys, monkeypatch):
    file, train = tmp_path / "digits.npz", load(MNIST, "x_train")[:700]
    np.savez(file, x=torch.cat([TEST[:100], train[:50]]), x_train=train, x_test=TEST)
    monkeypatch.setattr(quality, "MNIST", file)
    quality.main([str(file)])
    lines = [" ".join(row.split()) for row in capsys.readouterr().out.splitlines()]
    assert lines[0] == "digits.npz: 150 images 28 x 28, 0..255"
    distance, floor = lines[3].removeprefix("Frechet distance ").split()
    assert 0 < float(distance) < float(floor)
    assert lines[4] == "sure digits 100.0% 98.7%"
    assert lines[5] == "near-copies, 150 33.3% test images: 1.0%"
    assert lines[6].startswith("Parzen of 150, bits ")
    assert lines[7] == "its sigma 0.23 0.22"


@pytest.mark.parametrize("words, message", [
    ("", "are required: file"),
    ("no.npz", "no.npz: want an .npz with an array x: FileNotFoundError"),
    ("text", "text: want an .npz with an array x: "),
    ("old.npz", "old.npz: want an .npz with an array x: ValueError"),
    ("float.npz", "float.npz: torch.float64 (200, 28, 28), want uint8 (N, 28, 28)"),
    ("flat.npz", "torch.uint8 (200, 784), want uint8 (N, 28, 28), N > 128"),
    ("few.npz", "torch.uint8 (128, 28, 28), want uint8 (N, 28, 28), N > 128"),
    ("ones.npz", "ones.npz: 1..1, want 0..255"),
    ("ones.npz --classifier text", "text: want weights of this classifier: "),
    ("text --train-classifier", "text: want a new file, in a folder that exists"),
])
def test_refused_in_one_line(words, message, tmp_path, capsys, monkeypatch):
    """Python prints a text in SystemExit to stderr and exits with code 1."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("text")
    ones = np.ones((200, 28, 28), np.uint8)
    arrays = {"old": np.array([None]), "float": ones / 255, "few": ones[:128],
              "flat": ones.reshape(200, 784), "ones": ones}
    for name in arrays:
        np.savez(f"{name}.npz", x=arrays[name])
    with pytest.raises(SystemExit) as end:
        quality.main(words.split())
    assert message in end.value.code and "\n" not in end.value.code
    assert capsys.readouterr() == ("", "")
