"""Proofs of encode_png: what it writes is read back, here and by Pillow."""
import io
import struct
import zlib

import numpy as np
import pytest
import torch

from ddpm_min import encode_png

COLOUR = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
GREY = COLOUR[..., 0]


@pytest.mark.parametrize("image", [GREY, COLOUR, torch.tensor(GREY)])
def test_chunks(image):
    """Header, data and end with their checksums: 8-bit grey or colour, unfiltered."""
    file = io.BytesIO(encode_png(image))
    assert file.read(8) == b"\x89PNG\r\n\x1a\n"
    chunks = {}
    while length := file.read(4):
        content = file.read(4 + int.from_bytes(length, "big"))
        assert file.read(4) == zlib.crc32(content).to_bytes(4, "big")
        chunks[content[:4]] = content[4:]
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"] and chunks[b"IEND"] == b""
    width, height, *kind = struct.unpack(">II5B", chunks[b"IHDR"])
    assert kind == [8, 2 if image.ndim == 3 else 0, 0, 0, 0]
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, -1)
    assert not rows[:, 0].any()
    pixels = rows[:, 1:].reshape(height, width, *image.shape[2:])
    np.testing.assert_array_equal(pixels, image)


def test_pillow_reads_it():
    """A reader of others sees the same image."""
    Image = pytest.importorskip("PIL.Image")
    pixels = Image.open(io.BytesIO(encode_png(COLOUR)))
    np.testing.assert_array_equal(np.asarray(pixels), COLOUR)


@pytest.mark.parametrize("image", [GREY / 2, COLOUR[..., :2]])
def test_refuses(image):
    """Floats, and two channels."""
    with pytest.raises(ValueError, match="want uint8"):
        encode_png(image)
