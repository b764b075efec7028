"""The recipes of docs/recipes.md that make pictures and data sets are run, on small
files in the real formats."""
import gzip
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from torch.testing import assert_close

from test_readme import ROOT, seed
from test_recipes import RECIPES, SET_UP, folder, run


def test_fashion_mnist():
    x = np.arange(3 * 28 * 28).reshape(3, 28, 28).astype(np.uint8)
    for split in ("train", "t10k"):
        images = bytes([0, 0, 8, 3, 0, 0, 0, 3, 0, 0, 0, 28, 0, 0, 0, 28]) + x.tobytes()
        labels = bytes([0, 0, 8, 1, 0, 0, 0, 3, 9, 0, 5])
        Path(f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        Path(f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    run("Fashion-MNIST")
    data = np.load("fashion.npz")
    for split in ("train", "test"):
        assert (data[f"x_{split}"] == x).all()
        assert data[f"y_{split}"].tolist() == [9, 0, 5]


def test_cifar_10():
    """Pixels of the first row and column: red at (0, 0), green (1, 0), blue (0, 31)."""
    Path("cifar-10-batches-py").mkdir()
    rows = np.zeros((2, 3072), np.uint8)
    rows[:, [0, 1024 + 32, 2048 + 31]] = 255
    for i in range(6):
        name = f"data_batch_{i + 1}" if i < 5 else "test_batch"
        content = pickle.dumps({b"data": rows, b"labels": [i, 9]}, protocol=2)
        Path("cifar-10-batches-py", name).write_bytes(content)
    run("CIFAR-10")
    data = np.load("cifar10.npz")
    assert data["y_train"].tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
    assert data["y_test"].tolist() == [5, 9]
    for split in ("x_train", "x_test"):
        pixels = data[split][:, [0, 1, 0], [0, 0, 31]]
        assert (pixels == 255 * np.eye(3)).all()


def test_photographs():
    """cats: red above blue, held upright; dogs: green on the left of nothing. Notes,
    those of macOS too, are no photographs; of 30 photographs 27 are left."""
    Image = pytest.importorskip("PIL.Image")
    cat = Image.new("RGB", (80, 64), "red")
    cat.paste("blue", (0, 32, 80, 64))
    cat = cat.transpose(Image.Transpose.ROTATE_90)
    dog = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    dog.paste("lime", (0, 0, 32, 64))
    exif = Image.Exif()
    exif[0x0112] = 6                                    # to be turned clockwise
    Path("photos/cats").mkdir(parents=True)
    Path("photos/dogs").mkdir()
    Path("photos/cats/notes.txt").touch()
    Path("photos/cats/._0.jpg").write_bytes(b"Mac OS X")
    for i in range(10):
        cat.save(f"photos/cats/{i}.JPG", exif=exif)
        dog.save(f"photos/dogs/{i}.png")
        dog.save(f"photos/dogs/{i}.webp", lossless=True)
    run("A folder of photographs")
    data = np.load("photos.npz")
    assert (len(data["x_train"]), len(data["x_test"])) == (27, 3)
    colours = np.array([[[255, 0, 0], [0, 0, 255]], [[255, 255, 255], [0, 255, 0]]])
    for split in ("train", "test"):
        corners = data[f"x_{split}"][:, [5, 58], [58, 5]].astype(int)
        assert abs(corners - colours[data[f"y_{split}"]]).max() < 10


def test_grain_is_kept_as_the_table_says(capsys):
    seed(13)
    run("When to say `--schedule cosine`")
    printed = re.findall(r" ([\d.]+)$", capsys.readouterr().out, re.M)
    row = r"^\| `\w+` \| ([\d.]+) \| ([\d.]+) \|$"
    told = re.findall(row, RECIPES.read_text(), re.M)
    printed, told = np.array(printed, float), np.array(told, float)
    assert abs(printed - told.ravel()).max() < 0.7


def test_forward_picture():
    """Rows from the digit to noise; the picture is as large as the one shown."""
    seed(14)
    rows = run("A picture of the forward process").rows
    shown = (ROOT / "assets" / "forward.png").read_bytes()
    assert shown[:24] == Path("out/forward.png").read_bytes()[:24]
    for row in rows:
        assert_close(row[0], SET_UP["x0"][0])
        assert (row[1:] - row[:1]).std((1, 2, 3)).diff().min() > 0
        assert abs(row[-1].std() - 1) < 0.1
