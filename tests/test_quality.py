"""docs/quality.py: each figure against a closed form or a sum in float64."""
import numpy as np
import pytest
import torch

from docs import quality
from docs.quality import MNIST, SIGMAS, frechet_distance, load

TEST = load(MNIST, "x_test")[:500]


def test_frechet_distance():
    """Tr (AB)^(1/2) = Tr (R B R)^(1/2), R the symmetric root of A."""
    torch.manual_seed(2)
    x, y = torch.rand(2, 20, 6).double()
    a, b = np.cov(x.T), np.cov(y.T)
    values, vectors = np.linalg.eigh(a)
    root = vectors * np.sqrt(values) @ vectors.T
    roots = np.sqrt(np.linalg.eigvalsh(root @ b @ root))
    exact = (x - y).mean(0).square().sum() + np.trace(a + b) - 2 * roots.sum()
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
    assert lines[7] == "its sigma 0.23 0.22"


@pytest.mark.parametrize("n, says", [(128, "want .*N > 128"), (200, "want 0..255")])
def test_refuses(n, says, tmp_path):
    """Too few images for 128 features, and pixels in 0..1."""
    np.savez(tmp_path / "x.npz", x=np.ones((n, 28, 28), np.uint8))
    with pytest.raises(SystemExit, match=says):
        quality.main([str(tmp_path / "x.npz")])
