"""Pictures for tests, encoded on the spot."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from mmllm.processing.images import decode_image
from mmllm.processing.sources import Limits

LIMITS = Limits()


def decoded(data: bytes, **options: Any) -> np.ndarray:
    """(H, W, 3) int64."""
    image = decode_image(data, LIMITS, **options)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def picture(width: int = 48, height: int = 32) -> Image.Image:
    """A picture without symmetry, in colour."""
    y, x = np.mgrid[:height, :width]
    image = Image.fromarray(np.stack([x * 255 // width, y * 255 // height, (x * y) % 251], axis=-1).astype(np.uint8))
    ImageDraw.Draw(image).rectangle([2, 3, width // 2, height // 3], fill=(250, 20, 40))
    return image


def png(rows: list[bytes], width: int, depth: int, colour: int, trns: bytes | None = None, more: bytes = b"") -> bytes:
    """A PNG from unfiltered rows, written here so that no library's own rules come in."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0))
    transparency = chunk(b"tRNS", trns) if trns is not None else b""
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows), 9))
    return b"\x89PNG\r\n\x1a\n" + header + more + transparency + pixels + chunk(b"IEND", b"")


def tiff(tags: dict[int, tuple[int, int]], pixels: bytes) -> bytes:
    """A little-endian one-strip TIFF. ``tags``: number -> (type, value)."""
    body = {**tags, 273: (4, 8), 279: (4, len(pixels))}
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, (kind, value) in sorted(body.items()))
    pad = b"\0" * (len(pixels) % 2)
    start = 8 + len(pixels) + len(pad)
    return b"II*\0" + struct.pack("<I", start) + pixels + pad + struct.pack("<H", len(body)) + entries + bytes(4)


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[274] = orientation
    return block
