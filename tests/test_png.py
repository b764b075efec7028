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
IMAGES = pytest.mark.parametrize(
    "image", [GREY, COLOUR, COLOUR[:1, :1], torch.tensor(GREY)])


def png_chunks(data):
    """The (kind, content) of each chunk; signature and checksums must be right."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    place, chunks = 8, []
    while place < len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        end = place + 8 + length
        content = data[place + 8:end]
        assert data[end:end + 4] == zlib.crc32(kind + content).to_bytes(4, "big")
        chunks.append((kind, content))
        place = end + 4
    return chunks


@IMAGES
def test_chunks(image):
    """Header, data and end: 8-bit grey or colour, whose rows are unfiltered."""
    (ihdr, header), (idat, data), end = png_chunks(encode_png(image))

    assert (ihdr, idat, end) == (b"IHDR", b"IDAT", (b"IEND", b""))
    width, height, *kind = struct.unpack(">IIBBBBB", header)
    assert kind == [8, 2 if image.ndim == 3 else 0, 0, 0, 0]
    rows = np.frombuffer(zlib.decompress(data), np.uint8).reshape(height, -1)
    assert not rows[:, 0].any()
    pixels = rows[:, 1:].reshape(height, width, *image.shape[2:])
    np.testing.assert_array_equal(pixels, image)


@IMAGES
def test_pillow_reads_it(image):
    """A reader of others sees the same image."""
    Image = pytest.importorskip("PIL.Image")

    pixels = Image.open(io.BytesIO(encode_png(image)))

    np.testing.assert_array_equal(np.asarray(pixels), image)


@pytest.mark.parametrize("image", [
    GREY / 2, GREY[0], COLOUR[..., :2], COLOUR[None], [COLOUR], [GREY, GREY.T]])
def test_refuses(image):
    """Floats, a row, two channels, lists of images, of one size or of two."""
    with pytest.raises(ValueError, match="want uint8|not enough|inhomogeneous"):
        encode_png(image)
