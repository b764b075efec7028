"""PNG files, animated ones too, from pixels (W3C PNG, Third Edition, 2025)."""
import struct
import zlib

import numpy as np


def encode_png(frames, fps=20):
    """The bytes of a PNG file of a list of frames, arrays or CPU tensors, uint8 (H, W)
    or (H, W, 3). Several frames make an endless animation of fps frames a second, an
    int. ValueError for other frames, or fps outside 1..65535."""
    if fps not in range(1, 65536):
        raise ValueError(f"want fps in 1..65535, got {fps!r:.40}")
    frames = np.stack(frames)
    shape = frames.shape[1:]
    grey, colour = len(shape) == 2, len(shape) == 3 and shape[2] == 3
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
