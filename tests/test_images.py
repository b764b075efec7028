"""Proofs of images.py's PNG: what it writes is read back, here and by Pillow."""
import io
import struct
import zlib

import numpy as np
import pytest

from images import encode_png

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 3), dtype=np.uint8)
GREY = PIXELS[..., 0]


def png_chunks(data):
    """The (kind, content) of each chunk; signature and checksums must be right."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    place, chunks = 8, []
    while place < len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        content = data[place + 8:place + 8 + length]
        checksum, = struct.unpack_from(">I", data, place + 8 + length)
        assert checksum == zlib.crc32(kind + content)
        chunks.append((kind, content))
        place += 12 + length
    return chunks


def png_frames(data):
    """The frames of a PNG in 8-bit grey or colour whose rows are unfiltered."""
    chunks, frames = png_chunks(data), []
    width, height, *kind = struct.unpack(">IIBBBBB", chunks[0][1])
    assert kind in ([8, 0, 0, 0, 0], [8, 2, 0, 0, 0])
    channels = [3] if kind[1] == 2 else []
    for kind, content in chunks:
        if kind in (b"IDAT", b"fdAT"):
            packed = content[4:] if kind == b"fdAT" else content
            rows = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(height, -1)
            assert not rows[:, 0].any()
            frames.append(rows[:, 1:].reshape(height, width, *channels))
    return np.stack(frames)


@pytest.mark.parametrize(
    "frames", [GREY[:1], GREY, PIXELS[:1], PIXELS, PIXELS[:, :1, :1]])
def test_frames(frames):
    """Grey or coloured frames (N, H, W) or (N, H, W, 3) read back."""
    ours = png_frames(encode_png(list(frames)))

    np.testing.assert_array_equal(ours, frames)


def test_pillow_reads_it():
    """A reader of others sees the same frames, for ever, at 20 frames a second."""
    Image = pytest.importorskip("PIL.Image")

    image = Image.open(io.BytesIO(encode_png(PIXELS)))

    assert (image.n_frames, image.info["loop"]) == (3, 0)
    for i in range(3):
        image.seek(i)
        assert image.info["duration"] == 50
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), PIXELS[i])


def test_animation():
    """Three frames for ever, each of the whole picture and 1/7 s; numbers count on."""
    chunks = png_chunks(encode_png(GREY, fps=7))

    kinds = [kind for kind, _ in chunks]
    assert kinds == b"IHDR acTL fcTL IDAT fcTL fdAT fcTL fdAT IEND".split()
    assert chunks[1][1] == struct.pack(">II", 3, 0)
    control = struct.pack(">IIIIHHBB", 6, 4, 0, 0, 1, 7, 0, 0)
    assert [chunks[i][1][4:] for i in (2, 4, 6)] == [control] * 3
    assert [chunks[i][1][3] for i in (2, 4, 5, 6, 7)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("frames, fps", [
    ([], 20), ([GREY[0], GREY[0].T], 20), ([GREY[0, 0]], 20), ([GREY[0] / 2], 20),
    ([GREY[0][:, :, None]], 20), ([GREY[0, :, :0]], 20), (GREY, 0), (GREY, 2.5)])
def test_refuses(frames, fps):
    """Frames that are none, of two sizes, no pictures or empty; a time that is none."""
    with pytest.raises(ValueError, match="fps|frames|array|shape"):
        encode_png(frames, fps)
