"""Images for the two programs: a data set read, pictures and animations written."""
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch

from program import fail

MNIST = Path(__file__).resolve().parent / "data" / "mnist.npz"
LAYOUT = "uint8 (N, H, W) or (N, H, W, 3), sides divisible by 4, at least 8"


def load_images(config, split, device="cpu"):
    """x_train or x_test, as split says, of the file config["data"], or MNIST: images,
    uint8 (N, C, H, W); if config["conditional"] their labels' indices, int64 (N,), else
    None; facts of both, a dict. The labels indexed are config's, or all that occur. A
    file that does not fit ends the program."""
    path, with_labels = config["data"] or MNIST, config["conditional"]
    keys = [f"x_{split}", f"y_{split}"] if with_labels else [f"x_{split}"]
    try:
        with np.load(path, allow_pickle=False) as file:
            x, *y = [np.asarray(file[key]) for key in keys]
    except MemoryError:
        raise
    except Exception as error:  # numpy knows a dozen for missing, broken, foreign files
        fail(f"{path}: no .npz of numbers {', '.join(keys)} ({error!r:.80})")
    x = x[..., None] if x.ndim == 3 else x
    fits = x.dtype == np.uint8 and x.ndim == 4 and x.size > 0
    fits = fits and x.shape[3] in (1, 3)
    if not fits or any(side < 8 or side % 4 for side in x.shape[1:3]):
        fail(f"{keys[0]} in {path} is {x.dtype} {x.shape}: want {LAYOUT}")
    x = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    facts = {"N": len(x), "shape": list(x.shape[1:]), "labels": []}
    facts["crc"] = zlib.crc32(x)
    x = torch.from_numpy(x).to(device)
    if not with_labels:
        return x, None, facts

    y = y[0].reshape(-1)
    labels = config.get("labels") or np.unique(y).tolist()
    fits = y.dtype.kind in "iu" and len(y) == len(x)
    if not fits or not np.isin(y, labels).all():
        fail(f"{keys[1]} in {path}: want {len(x)} whole numbers, of {labels[:10]}")
    y = np.searchsorted(labels, y)
    facts.update(labels=labels, crc=zlib.crc32(y, facts["crc"]))
    return x, torch.from_numpy(y).to(device), facts


def grid(images):
    """Images (n, H, W) or (n, H, W, 3) in rows of about sqrt(n); black fills up."""
    columns = math.ceil(math.sqrt(len(images)))
    black = images.new_zeros(-len(images) % columns, *images.shape[1:])
    rows = torch.cat([images, black]).split(columns)
    return torch.cat([torch.cat(list(row), 1) for row in rows])


def encode_png(frames, fps=20):
    """The bytes of a PNG file (W3C PNG, Third Edition, 2025) of a list of frames,
    arrays or CPU tensors, uint8 (H, W) or (H, W, 3). Several make an endless animation
    of fps frames a second. ValueError for other frames, or fps not in 1..65535."""
    if fps not in range(1, 65536):
        raise ValueError(f"want fps in 1..65535, got {fps!r:.40}")
    frames = np.stack(frames)
    shape = frames.shape[1:]
    grey = len(shape) == 2
    colour = len(shape) == 3 and shape[2] == 3
    if frames.dtype != np.uint8 or not frames.size or not (grey or colour):
        raise ValueError(f"want frames uint8 (H, W[, 3]): {frames.dtype} {shape}")

    height, width = shape[:2]
    size = struct.pack(">II", width, height)
    depth_and_kind = bytes([8, 2 if colour else 0, 0, 0, 0])
    png = b"\x89PNG\r\n\x1a\n"
    png += _chunk(b"IHDR", size + depth_and_kind)
    png += _chunk(b"acTL", struct.pack(">II", len(frames), 0))
    for i, frame in enumerate(frames):
        # fcTL and fdAT chunks share one count: 0, then 1 and 2, then 3 and 4, ...
        number = struct.pack(">I", max(0, 2 * i - 1))
        png += _chunk(b"fcTL", number + size + struct.pack(">QHHH", 0, 1, fps, 0))
        # Before each row stands the number of its filter, 0 for none.
        rows = np.pad(frame.reshape(height, -1), [(0, 0), (1, 0)])
        data = zlib.compress(rows.tobytes())
        if i == 0:
            png += _chunk(b"IDAT", data)
        else:
            png += _chunk(b"fdAT", struct.pack(">I", 2 * i) + data)
    return png + _chunk(b"IEND", b"")


def _chunk(kind, data):
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)
