"""Encoded pictures to 8-bit RGB: an allow-list of formats, limits checked before decoding, a rule for every mode."""

from __future__ import annotations

import io
import re
import struct
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, TiffImagePlugin, UnidentifiedImageError

from mmllm.errors import MediaError
from mmllm.processing.sources import Limits

FORMATS = "PNG, JPEG, GIF, WebP, BMP, TIFF, AVIF, JPEG 2000, PBM/PGM/PPM, ICO and TGA"
MAX_SIDE = 65_535
"""Longest side in pixels; JPEG's own limit. Longer ones are only met in files made to exhaust a resizer."""
MAX_JPEG_SCANS = 100
"""Progressive JPEGs have about ten scans. Each costs time for the whole picture and may be only a few bytes long."""

# Pillow warns about oddities of files that it then decodes or refuses; the outcome is checked here, so the warnings say
# nothing more. Appended: a filter set by the application (or -W error) comes first.
warnings.filterwarnings("ignore", module=r"PIL\.", append=True)

_PNG = b"\x89PNG\r\n\x1a\n"
_OPENED: tuple[tuple[bytes, str], ...] = (
    (_PNG, "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG2000"),
    (b"\xff\x4f\xff\x51", "JPEG2000"),
    (b"\0\0\1\0", "ICO"),
)
_REFUSED: tuple[tuple[bytes, str], ...] = (
    (b"%PDF", "a PDF document"),
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "PostScript"),
    (b"8BPS", "a Photoshop file"),
    (b"DDS ", "a DirectDraw surface"),
    (b"qoif", "QOI"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\2\0\1\0", "a Windows cursor"),
    (b"icns", "an Apple icon"),
    (b"\xd7\xcd\xc6\x9a", "a Windows metafile"),
    (b"SIMPLE  =", "FITS"),
    (b"\x89HDF", "HDF5"),
    (b"\x1a\x45\xdf\xa3", "a Matroska or WebM video"),
    (b"PK\3\4", "a ZIP archive or office document"),
    (b"\x1f\x8b", "gzip"),
)
_PORTABLE_MAP = re.compile(rb"P([1-6]|f)[\s#]")
_JPEG_MARKER = re.compile(rb"\xff+([^\x00\x01\xff\xd0-\xd7])")
_TRANSPOSE = {  # EXIF 2.32, tag 274: what has to be done to see the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 274


def decode_image(data: bytes, limits: Limits, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """Decode one picture to mode ``RGB``, upright, without metadata.

    The format is told by the first bytes, never by a name; see ``FORMATS``. Of an animation or a multi-page file the
    first frame is taken. EXIF orientation is applied. Transparency (an alpha channel, or a transparent colour or
    palette entry) is composited on ``background`` (red, green, blue; 0..255). Colour profiles are not applied, except
    that LAB becomes sRGB. Grey values of more than 8 bits are scaled:

    - 16-bit grey: 0..65535 to 0..255; 12-bit TIFF: 0..4095 to 0..255.
    - other integer grey (signed or 32-bit TIFF): as 16-bit when all values lie in 0..65535, else minimum..maximum to
      0..255.
    - float grey (TIFF, PFM): 0..1 to 0..255 when all values lie in 0..1; unchanged when in 0..255; else
      minimum..maximum to 0..255. Infinite or NaN values are refused.

    Raises ``MediaError``, and nothing else, for other formats, more than ``limits.max_bytes`` or ``limits.max_pixels``,
    sides above ``MAX_SIDE``, and for truncated or damaged files. Size is judged from headers, before decoding, which
    then takes up to 18 bytes of memory per pixel.
    """
    if len(data) > limits.max_bytes:
        raise MediaError(f"the picture has {len(data):,} encoded bytes, the limit is {limits.max_bytes:,} (max_bytes)")
    name = _sniff(data)
    try:
        with Image.open(io.BytesIO(data), formats=(name,)) as image:
            _check_size(image.size, limits)
            for size in _inner_sizes(image, data):
                _check_size(size, limits)
            return _upright_rgb(image, background)
    except MediaError:
        raise
    except Image.DecompressionBombError as error:
        raise MediaError("the picture has more pixels than Pillow opens at all; make it smaller") from error
    except UnidentifiedImageError as error:
        raise MediaError(f"the picture starts like {name}, but its header is damaged; save it again") from error
    except Exception as error:  # decoders raise anything on hostile bytes: struct.error, SyntaxError, IndexError, ...
        raise MediaError(f"the {name} picture is truncated or damaged ({error}); save or download it again") from error


def _sniff(data: bytes) -> str:
    """Pillow's name of the format, or ``MediaError`` naming what was found instead."""
    if not data:
        raise MediaError("the picture is empty (0 bytes)")
    for magic, name in _OPENED:
        if data.startswith(magic):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if _PORTABLE_MAP.match(data):
        return "PPM"
    if data[4:8] == b"ftyp" and (data[8:12] in (b"avif", b"avis") or b"avif" in data[16:64]):
        return "AVIF"
    if _is_tga(data):
        return "TGA"
    found = _refused_name(data)
    raise MediaError(f"{found} is not opened as a picture; convert it to PNG or JPEG (opened are {FORMATS})")


def _is_tga(data: bytes) -> bool:
    """TGA has no magic bytes, so each field of its header must hold a value of the specification (Truevision, 1991)."""
    if len(data) < 18:
        return False
    _, has_map, kind, _, map_length, map_depth, _, _, width, height, depth, _ = struct.unpack("<3B2HB4H2B", data[:18])
    if width == 0 or height == 0:
        return False
    if kind in (1, 9):
        return bool(has_map == 1 and map_length and map_depth in (15, 16, 24, 32) and depth in (8, 16))
    return bool(has_map in (0, 1) and kind in (2, 3, 10, 11) and depth in (1, 8, 15, 16, 24, 32))


def _refused_name(data: bytes) -> str:
    for magic, name in _REFUSED:
        if data.startswith(magic):
            return name
    if data[4:8] == b"ftyp":
        return "HEIC" if data[8:12] in (b"heic", b"heix", b"mif1", b"heim") else "an MP4-like file"
    start = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(b"<"):
        return "SVG" if b"<svg" in start else "an HTML or XML text"
    return "a file of another kind"


def _check_size(size: tuple[int, int], limits: Limits) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise MediaError(f"the picture is {width}x{height} pixels; it has no content")
    if max(size) > MAX_SIDE or width * height > limits.max_pixels:
        raise MediaError(
            f"the picture is {width}x{height} pixels; the limits are {limits.max_pixels:,} pixels (max_pixels) and "
            f"{MAX_SIDE:,} on a side; make it smaller"
        )


def _inner_sizes(image: ImageFile.ImageFile, data: bytes) -> Iterator[tuple[int, int]]:
    """Sizes that a decoder allocates besides ``image.size``: a small outer header must not hide a large inner one."""
    if image.format == "ICO":
        yield from _ico_sizes(data)
    elif isinstance(image, TiffImagePlugin.TiffImageFile):
        if 322 in image.tag_v2 and 323 in image.tag_v2:  # TileWidth, TileLength
            yield image.tag_v2[322], image.tag_v2[323]
    elif image.format == "JPEG2000":
        yield from _jpeg2000_sizes(data)
    elif image.format in ("JPEG", "MPO"):
        _check_jpeg_scans(data)


def _ico_sizes(data: bytes) -> Iterator[tuple[int, int]]:
    (count,) = struct.unpack_from("<H", data, 4)
    for index in range(count):
        (offset,) = struct.unpack_from("<I", data, 6 + 16 * index + 12)
        if data.startswith(_PNG, offset):
            yield struct.unpack_from(">II", data, offset + 16)
        else:
            width, height = struct.unpack_from("<ii", data, offset + 4)
            yield width, abs(height) // 2  # the mask is stored below the picture


def _jpeg2000_sizes(data: bytes) -> Iterator[tuple[int, int]]:
    """The picture and tile size in the codestream's SIZ marker (ISO 15444-1 A.5.1); a JP2 box may claim another one."""
    start = 0
    while data[start : start + 4] != b"\xff\x4f\xff\x51":  # JP2 boxes up to the codestream
        length, kind = struct.unpack_from(">I4s", data, start)
        header = 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, start + 8)
            header = 16
        if kind == b"jp2c":
            start += header
        elif length >= header:
            start += length
        else:
            raise MediaError("the JPEG2000 picture has no codestream; save or download it again")
    if b"\xff\xd9" not in data[start:]:  # the decoder would fill the missing part from coarser data
        raise MediaError("the JPEG2000 picture is truncated: its end marker is missing; save or download it again")
    x1, y1, x0, y0, tile_width, tile_height = struct.unpack_from(">6I", data, start + 8)
    yield x1 - x0, y1 - y0
    yield min(tile_width, x1), min(tile_height, y1)


def _check_jpeg_scans(data: bytes) -> None:
    """Walk the markers of the first picture up to its end and count the scans (ITU T.81 B.2)."""
    position, segments, scans = 2, 0, 0
    while (marker := _JPEG_MARKER.search(data, position)) is not None and marker[1] != b"\xd9":
        segments += 1
        scans += marker[1] == b"\xda"
        if scans > MAX_JPEG_SCANS or segments > 100 * MAX_JPEG_SCANS:
            raise MediaError(f"the JPEG picture has more than {MAX_JPEG_SCANS} scans; save it again")
        if len(data) < marker.end() + 2:
            return  # truncated: the decoder says so
        position = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2])


def _upright_rgb(image: ImageFile.ImageFile, background: tuple[int, int, int]) -> Image.Image:
    key = _colour_key(image)
    white = 4095 if image.tile and "I;12" in str(image.tile[0].args) else 65535
    image.load()
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        grey = _float_grey(values) if image.mode == "F" else _integer_grey(values, white)
        rgb = Image.fromarray(grey).convert("RGB")
        if key is not None:
            rgb = _composite(rgb, Image.fromarray(np.where(values == key[0], 0, 255).astype(np.uint8)), background)
    elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or (image.mode == "P" and "transparency" in image.info):
        straight = image.convert("LA") if image.mode == "La" else image
        rgba = straight if straight.mode == "RGBA" else straight.convert("RGBA")
        rgb = _composite(rgba, rgba, background)
    else:
        # A transparent colour left in `info` would be converted along; it has been read and is applied below.
        image.info.pop("transparency", None)
        rgb = image.convert("RGB")
        if key is not None:
            same = np.all(np.asarray(rgb) == np.array(key, dtype=np.int64), axis=-1)
            rgb = _composite(rgb, Image.fromarray(np.where(same, 0, 255).astype(np.uint8)), background)
    method = _TRANSPOSE.get(_orientation(image))
    if method is not None:
        rgb = rgb.transpose(method)
    rgb.info = {}  # no EXIF or transparency that a later step could apply a second time
    return rgb


def _orientation(image: Image.Image) -> int:
    """The EXIF (or XMP) orientation, 1 when there is none. Call after ``load``: PNG may store it behind the pixels."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # an unreadable EXIF block in a readable picture: shown as stored, as browsers do
        return 1
    return value if isinstance(value, int) else 1


def _colour_key(image: ImageFile.ImageFile) -> tuple[int, ...] | None:
    """The one transparent colour of a grey or RGB picture (PNG ``tRNS``), in the scale of the decoded pixels, or None.

    The file states it in the file's own bit depth (PNG 11.3.2.1), Pillow hands it over unscaled.
    """
    value = image.info.get("transparency")
    if value is None or image.mode not in ("1", "L", "RGB", "I", "I;16", "I;16B"):
        return None
    depth = str(image.tile[0].args) if image.tile else ""
    if image.mode == "RGB":
        return tuple(channel >> 8 for channel in value) if "16" in depth else tuple(value)
    if image.mode == "L" and depth in ("L;2", "L;4"):
        value *= {"L;2": 85, "L;4": 17}[depth]
    return (value,) if image.mode.startswith("I") else (value, value, value)


def _composite(colour: Image.Image, alpha: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """``alpha`` is a mode L picture, or the RGBA picture itself; of the latter Pillow uses the alpha channel."""
    canvas = Image.new("RGB", colour.size, background)
    canvas.paste(colour, mask=alpha)
    return canvas


def _integer_grey(values: NDArray[Any], white: int) -> NDArray[np.uint8]:
    """(H, W) integers to (H, W) uint8, 0..``white`` to 0..255; values beyond 16 bits are stretched instead."""
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        return _stretched(values.astype(np.float32), low, high)
    table: NDArray[np.uint8] = np.minimum(np.rint(np.arange(65536) * (255 / white)), 255).astype(np.uint8)
    return np.take(table, values)


def _float_grey(values: NDArray[Any]) -> NDArray[np.uint8]:
    """(H, W) floats to (H, W) uint8 by the rule that ``decode_image`` states."""
    floats = values.astype(np.float32)
    if not np.isfinite(floats).all():
        raise MediaError("the picture has infinite or NaN pixels; replace them by numbers and save it again")
    low, high = float(floats.min()), float(floats.max())
    if low >= 0 and high <= 1:
        return np.rint(floats * 255).astype(np.uint8)
    if low >= 0 and high <= 255:
        return np.rint(floats).astype(np.uint8)
    return _stretched(floats, low, high)


def _stretched(floats: NDArray[np.float32], low: float, high: float) -> NDArray[np.uint8]:
    span = high - low
    if span == 0:
        return np.zeros(floats.shape, dtype=np.uint8)
    # Halves: the span of float32 values does not always fit into float32.
    halves = floats * np.float32(0.5) - np.float32(low / 2)
    grey: NDArray[np.float32] = np.rint(halves * np.float32(510 / span))
    return grey.clip(0, 255).astype(np.uint8)
