import io
import json
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mmllm.errors import MediaError
from mmllm.processing.images import MAX_JPEG_SCANS, decode_image
from mmllm.processing.sources import Limits

# pytest replaces the filter that mmllm sets; `test_bombs_...` looks at the real one.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

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


# Orientation


STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # EXIF 2.32, tag 274: what row 0 and column 0 stand for
    1: lambda seen: seen,
    2: lambda seen: seen[:, ::-1],
    3: lambda seen: seen[::-1, ::-1],
    4: lambda seen: seen[::-1],
    5: lambda seen: seen.transpose(1, 0, 2),
    6: lambda seen: seen.transpose(1, 0, 2)[::-1],
    7: lambda seen: seen.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda seen: seen.transpose(1, 0, 2)[:, ::-1],
}


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("PNG", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {"lossless": True}),
        ("JPEG", {"quality": 95, "subsampling": 0}),
    ],
)
def test_eight_orientations_give_one_picture(format: str, options: dict[str, Any]) -> None:
    # Blocks of one colour, aligned to JPEG's: every orientation has the same coefficients.
    blocks = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    seen = np.kron(blocks, np.ones((16, 16, 1), dtype=np.uint8))
    results = []
    for orientation, store in STORED.items():
        stored = Image.fromarray(np.ascontiguousarray(store(seen)))
        results.append(decoded(encoded(stored, format, exif=exif(orientation), **options)))
    for result in results:
        np.testing.assert_array_equal(result, results[0])
    np.testing.assert_allclose(results[0], seen, atol=3 if format == "JPEG" else 0)


def test_orientation_is_applied_to_every_mode_and_only_once() -> None:
    seen = np.zeros((4, 6, 4), dtype=np.uint8)
    seen[0, 0] = (10, 20, 30, 255)
    stored = Image.fromarray(np.ascontiguousarray(STORED[6](seen)))
    image = decode_image(encoded(stored, "PNG", exif=exif(6)), LIMITS, background=(0, 0, 0))
    assert image.size == (6, 4)
    assert image.getpixel((0, 0)) == (10, 20, 30)
    assert image.info == {}
    assert dict(image.getexif()) == {}


def test_a_damaged_exif_block_leaves_the_picture_as_stored() -> None:
    image = picture()
    good = encoded(image, "JPEG", exif=exif(1))
    at = good.index(b"Exif\0\0") + 6
    for damage in (b"XX*\0", b"II*\0\xff\xff\xff\xff"):
        result = decoded(good[:at] + damage + good[at + len(damage) :])
        np.testing.assert_array_equal(result, decoded(encoded(image, "JPEG")))


# Transparency


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (12, 200, 90)])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_an_alpha_channel_is_composited(mode: str, background: tuple[int, int, int]) -> None:
    values = np.random.default_rng(1).integers(0, 256, (9, 7, len(mode)), dtype=np.uint8)
    colour, alpha = values[..., :-1].astype(float), values[..., -1:] / 255
    expected = colour * alpha + np.array(background) * (1 - alpha)
    for format in ("PNG", "TIFF"):
        result = decoded(encoded(Image.fromarray(values, mode), format), background=background)
        np.testing.assert_allclose(result, np.broadcast_to(expected, result.shape), atol=1)


def test_the_default_background_is_white() -> None:
    assert decoded(encoded(Image.new("RGBA", (2, 2), (9, 9, 9, 0)), "PNG")).min() == 255


BACKGROUND = (11, 22, 33)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(png([b"\x40"], 2, 1, 0, b"\0\1"), [(0, 0, 0), BACKGROUND], id="1 bit grey, white key"),
        pytest.param(png([b"\x40"], 2, 1, 0, b"\0\0"), [BACKGROUND, (255, 255, 255)], id="1 bit grey, black key"),
        pytest.param(png([b"\x90"], 2, 2, 0, b"\0\2"), [BACKGROUND, (85, 85, 85)], id="2 bit grey"),
        pytest.param(png([b"\x5a"], 2, 4, 0, b"\0\5"), [BACKGROUND, (170, 170, 170)], id="4 bit grey"),
        pytest.param(png([b"\x05\x06"], 2, 8, 0, b"\0\5"), [BACKGROUND, (6, 6, 6)], id="8 bit grey"),
        pytest.param(png([b"\x80\x01\x80\x02"], 2, 16, 0, b"\x80\1"), [BACKGROUND, (128, 128, 128)], id="16 bit grey"),
        pytest.param(png([b"\1\2\3\1\2\4"], 2, 8, 2, b"\0\1\0\2\0\3"), [BACKGROUND, (1, 2, 4)], id="8 bit colour"),
        pytest.param(
            png([b"\x10\1\x20\1\x30\1\x11\1\x20\1\x30\1"], 2, 16, 2, b"\x10\1\x20\1\x30\1"),
            [BACKGROUND, (17, 32, 48)],
            id="16 bit colour",
        ),
    ],
)
def test_a_transparent_colour_is_composited(data: bytes, expected: list[tuple[int, int, int]]) -> None:
    np.testing.assert_array_equal(decoded(data, background=BACKGROUND)[0], expected)


@pytest.mark.parametrize("transparency", [1, bytes([255, 0, 128])])
def test_palette_transparency_is_composited(transparency: int | bytes) -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1, 2])
    half = [40, 51, 61] if isinstance(transparency, bytes) else [70, 80, 90]
    result = decoded(encoded(image, "PNG", transparency=transparency), background=BACKGROUND)
    np.testing.assert_allclose(result[0], [[10, 20, 30], BACKGROUND, half], atol=1)
    if isinstance(transparency, int):
        result = decoded(encoded(image, "GIF", transparency=transparency), background=BACKGROUND)
        np.testing.assert_array_equal(result[0], [[10, 20, 30], BACKGROUND, half])


# Modes


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "TGA", "GIF", "WEBP", "JPEG2000", "ICO"])
def test_lossless_formats_return_the_pixels(format: str) -> None:
    options = {"WEBP": {"lossless": True}, "JPEG2000": {"irreversible": False}, "ICO": {"sizes": [(48, 32)]}}
    image = picture()
    if format == "GIF":
        image = image.quantize(64)
    result = decoded(encoded(image, format, **options.get(format, {})))
    np.testing.assert_array_equal(result, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("format", ["JPEG", "AVIF"])
def test_lossy_formats_return_the_library_s_pixels(format: str) -> None:
    data = encoded(picture(), format, quality=90)
    np.testing.assert_array_equal(decoded(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK"])
def test_eight_bit_modes_equal_pillow(mode: str) -> None:
    image = picture().convert(mode)
    for format in ("TIFF", "PNG") if mode in ("1", "L", "P") else ("TIFF",):
        np.testing.assert_allclose(decoded(encoded(image, format)), np.asarray(image.convert("RGB")), atol=2)


def test_cmyk_jpeg() -> None:
    ink = np.full((16, 16, 4), (0, 255, 255, 0), dtype=np.uint8)  # magenta + yellow = red
    np.testing.assert_allclose(
        decoded(encoded(Image.fromarray(ink, "CMYK"), "JPEG")), [[[255, 0, 0]] * 16] * 16, atol=2
    )


@pytest.mark.parametrize(
    ("lab", "rgb"), [((255, 0, 0), (255, 255, 255)), ((0, 0, 0), (0, 0, 0)), ((137, 0, 0), (128, 128, 128))]
)
def test_lab_becomes_srgb(lab: tuple[int, int, int], rgb: tuple[int, int, int]) -> None:
    data = tiff({256: (3, 4), 257: (3, 4), 262: (3, 8), 277: (3, 3), 258: (3, 8)}, bytes(lab) * 16)
    np.testing.assert_allclose(decoded(data), np.broadcast_to(rgb, (4, 4, 3)), atol=2)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=-1)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_sixteen_bit_grey_is_scaled_not_clipped(format: str) -> None:
    values = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    options = {"irreversible": False} if format == "JPEG2000" else {}
    expected = grey(np.rint(values / 257))
    np.testing.assert_allclose(decoded(encoded(Image.fromarray(values), format, **options)), expected, atol=1)


def test_big_endian_sixteen_bit_tiff() -> None:
    values = np.array([[0, 256, 32768, 65535]], dtype=">u2")
    little = tiff({256: (3, 4), 257: (3, 1), 262: (3, 1), 258: (3, 16), 277: (3, 1)}, values.astype("<u2").tobytes())
    np.testing.assert_array_equal(decoded(little)[0, :, 0], [0, 1, 128, 255])
    entries = [(256, 4), (257, 1), (258, 16), (259, 1), (262, 1), (277, 1), (273, 8), (279, 8)]
    rows = b"".join(struct.pack(">HHIHH", tag, 3, 1, value, 0) for tag, value in sorted(entries))
    big = b"MM\0*" + struct.pack(">I", 16) + values.tobytes() + struct.pack(">H", len(entries)) + rows + bytes(4)
    np.testing.assert_array_equal(decoded(big)[0, :, 0], [0, 1, 128, 255])


def test_twelve_bit_tiff_white_is_white() -> None:
    pixels = bytes([0xFF, 0xF8, 0x00, 0x00, 0x00, 0x00])  # 4095, 2048, 0, 0
    data = tiff({256: (3, 4), 257: (3, 1), 262: (3, 1), 258: (3, 12), 277: (3, 1)}, pixels)
    np.testing.assert_array_equal(decoded(data)[0, :, 0], [255, 128, 0, 0])


def test_sixteen_bit_colour_png() -> None:
    result = decoded(png([struct.pack(">6H", 0, 32768, 65535, 257, 514, 65280)], 2, 16, 2))
    np.testing.assert_allclose(result[0], [[0, 128, 255], [1, 2, 254]], atol=1)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 257, 65535, 300], [0, 1, 255, 1]),
        ([-1000, 0, 1000, 0], [0, 128, 255, 128]),
        ([0, 500_000, 1_000_000, 0], [0, 128, 255, 0]),
        ([-5, -5, -5, -5], [0, 0, 0, 0]),
    ],
)
def test_integer_tiff(values: list[int], expected: list[int]) -> None:
    image = Image.fromarray(np.array([values], dtype=np.int32))
    np.testing.assert_allclose(decoded(encoded(image, "TIFF"))[0, :, 0], expected, atol=1)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.25, 0.5, 1.0], [0, 64, 128, 255]),
        ([0.0, 1.0, 100.4, 255.0], [0, 1, 100, 255]),
        ([-1.0, 0.0, 1.0, 0.5], [0, 128, 255, 191]),
        ([0.0, 500.0, 1000.0, 250.0], [0, 128, 255, 64]),
        ([-3e38, 3e38, 0.0, 0.0], [0, 255, 128, 128]),
    ],
)
def test_float_pictures(values: list[float], expected: list[int]) -> None:
    image = Image.fromarray(np.array([values], dtype=np.float32))
    np.testing.assert_allclose(decoded(encoded(image, "TIFF"))[0, :, 0], expected, atol=1)
    np.testing.assert_allclose(decoded(encoded(image, "PPM"))[0, :, 0], expected, atol=1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_float_pictures_without_numbers_are_refused(value: float) -> None:
    image = Image.fromarray(np.array([[0.5, value]], dtype=np.float32))
    with pytest.raises(MediaError, match="infinite or NaN"):
        decode_image(encoded(image, "TIFF"), LIMITS)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF", "MPO", "AVIF"])
def test_the_first_frame_is_taken(format: str) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    result = decoded(encoded(frames[0], format, save_all=True, append_images=frames[1:]))
    np.testing.assert_allclose(result, np.broadcast_to((250, 0, 0), (32, 32, 3)), atol=6)


def test_one_pixel() -> None:
    assert decoded(encoded(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG")).tolist() == [[[1, 2, 3]]]


# Refusals


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "empty"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- x --><svg/>', "SVG"),
        (b"  <!DOCTYPE html><html></html>", "HTML"),
        (b"%PDF-1.7\n", "PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "PostScript"),
        (b"\xc5\xd0\xd3\xc6" + bytes(60), "PostScript"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x18ftypisom\0\0\2\0isomiso2", "MP4"),
        (b"8BPS\0\1" + bytes(40), "Photoshop"),
        (b"qoif" + bytes(30), "QOI"),
        (b"\x12\xaf" + bytes(40), "starts with"),
        (b"RIFF\x24\0\0\0WAVEfmt ", "starts with"),
        (b"plain text that is no picture", "starts with"),
        (b"\x80\x04\x95" + bytes(40), "starts with"),
        (bytes(100), "starts with"),
    ],
)
def test_other_formats_are_refused_by_name(data: bytes, found: str) -> None:
    with pytest.raises(MediaError, match=found):
        decode_image(data, LIMITS)


def test_only_the_decoder_of_the_found_format_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    original = Image.open

    def spy(file: Any, formats: Any = None) -> Any:
        asked.append(formats)
        return original(file, formats=formats)

    monkeypatch.setattr(Image, "open", spy)
    decode_image(encoded(picture(), "PNG"), LIMITS)
    with pytest.raises(MediaError):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n", LIMITS)
    assert asked == [("PNG",)]


def test_the_byte_limit() -> None:
    data = encoded(picture(), "PNG")
    with pytest.raises(MediaError, match="max_bytes"):
        decode_image(data, Limits(max_bytes=len(data) - 1))


def test_pixel_and_side_limits_are_exact() -> None:
    data = encoded(Image.new("L", (100, 100)), "PNG")
    assert decode_image(data, Limits(max_pixels=10_000)).size == (100, 100)
    with pytest.raises(MediaError, match="100x100 pixels; the limits are 9,999 pixels"):
        decode_image(data, Limits(max_pixels=9_999))
    assert decode_image(encoded(Image.new("1", (65_535, 2)), "PNG"), LIMITS).size == (65_535, 2)
    with pytest.raises(MediaError, match="on a side"):
        decode_image(encoded(Image.new("1", (65_536, 2)), "PNG"), LIMITS)


def bombs() -> dict[str, bytes]:
    """Small files that stand for, or make a decoder allocate, far more than they may."""
    row = bytes(2500)
    small = encoded(picture(), "JPEG2000")
    siz = small.index(b"\xff\x4f\xff\x51") + 8
    inner = encoded(Image.new("1", (20_000, 9_000)), "PNG")
    icon = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(inner), 22) + inner
    gif = bytearray(encoded(Image.new("P", (8, 8)), "GIF"))
    frame = gif.index(b"\x2c")
    gif[frame + 5 : frame + 9] = struct.pack("<HH", 40_000, 40_000)
    tile = zlib.compress(bytes(64))
    jpeg = encoded(Image.new("RGB", (6000, 6000), (9, 99, 9)), "JPEG", progressive=True)
    scan = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    return {
        "png 20000x20000": png([row] * 20_000, 20_000, 1, 0),
        "png 12000x12000": png([row[:1500]] * 12_000, 12_000, 1, 0),
        "bmp header": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 60_000, 60_000, 1, 24, *[0] * 6),
        "tga header": struct.pack("<3B2HB4H2B", 0, 0, 10, 0, 0, 0, 0, 0, 60_000, 60_000, 32, 8) + bytes(50),
        "ppm header": b"P6 60000 60000 255\n" + bytes(50),
        "jp2 box hides the codestream": small[:siz] + struct.pack(">2I", 60_000, 60_000) + small[siz + 8 :],
        "ico hides a png": icon,
        "gif frame beyond its screen": bytes(gif),
        "tiff tile": tiff(
            {256: (3, 8), 257: (3, 8), 258: (3, 8), 259: (3, 8), 262: (3, 1), 277: (3, 1), 322: (4, 60_000)}
            | {323: (4, 60_000), 324: (4, 8), 325: (4, len(tile))},
            tile,
        ),
        "jpeg scans": jpeg[:-2] + scan * (10 * MAX_JPEG_SCANS) + b"\xff\xd9",
        "tiff whose directory is cut": encoded(picture(), "TIFF")[:-1000],
        "png text": png([b"\0"], 1, 8, 0, more=_text_bomb()),
    }


def _text_bomb() -> bytes:
    body = b"k\0\0" + zlib.compress(bytes(100_000_000), 9)
    return struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))


BOUNDED = """
import json, resource, sys, time
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
from mmllm.errors import MediaError
from mmllm.processing.images import decode_image
from mmllm.processing.sources import Limits
from PIL import Image
Image.init()
for line in sys.stdin:
    name, data = json.loads(line)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    try:
        outcome = str(decode_image(bytes.fromhex(data), Limits()).size)
    except MediaError as error:
        outcome = "refused: " + str(error)
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(json.dumps([name, outcome, growth, time.perf_counter() - start]))
"""


def test_bombs_are_refused_in_bounded_memory_and_time() -> None:
    files = bombs()
    lines = "\n".join(json.dumps([name, data.hex()]) for name, data in files.items())
    run = subprocess.run([sys.executable, "-c", BOUNDED], input=lines, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    results = {name: rest for name, *rest in map(json.loads, run.stdout.splitlines())}
    assert results.keys() == files.keys()
    for name, (outcome, growth, seconds) in results.items():
        assert outcome.startswith("refused: "), (name, outcome)
        assert growth < 100, (name, outcome, growth)  # MiB
        assert seconds < 2, (name, outcome, seconds)
    assert len(files["png 20000x20000"]) < 100_000
    assert "Warning" not in run.stderr  # Pillow's warnings about these files are silenced


def test_a_progressive_jpeg_is_not_taken_for_a_bomb() -> None:
    data = encoded(picture(640, 480), "JPEG", progressive=True, exif=exif(1))
    assert data.count(b"\xff\xda") >= 6
    assert decode_image(data, LIMITS).size == (640, 480)


def samples() -> dict[str, bytes]:
    image = picture()
    return {
        "png": encoded(image, "PNG"),
        "palette png": encoded(image.quantize(16), "PNG", transparency=3),
        "jpeg": encoded(image, "JPEG", exif=exif(6)),
        "progressive jpeg": encoded(image, "JPEG", progressive=True),
        "gif": encoded(image.quantize(64), "GIF"),
        "bmp": encoded(image, "BMP"),
        "webp": encoded(image, "WEBP"),
        "tiff": encoded(image, "TIFF"),
        "lzw tiff": encoded(image, "TIFF", compression="tiff_lzw"),
        "16-bit tiff": encoded(Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32)), "TIFF"),
        "ppm": encoded(image, "PPM"),
        "avif": encoded(image, "AVIF"),
        "jpeg 2000": encoded(image, "JPEG2000"),
        "tga": encoded(image, "TGA", compression="tga_rle"),
        "ico": encoded(image, "ICO", sizes=[(32, 32)]),
    }


@pytest.mark.parametrize("name", samples())
def test_a_truncated_file_is_refused_or_whole(name: str) -> None:
    data = samples()[name]
    whole = decoded(data)
    refused = 0
    for percent in range(1, 100):
        try:
            result = decoded(data[: len(data) * percent // 100])
        except MediaError:
            refused += 1
        else:  # only a trailer was cut
            np.testing.assert_array_equal(result, whole)
    assert refused >= 90


@pytest.mark.parametrize("name", samples())
def test_damaged_bytes_raise_media_errors_only(name: str) -> None:
    data = samples()[name]
    source = random.Random(0)
    outcomes = set()
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(source.choice([1, 3, 20])):
            damaged[source.randrange(min(len(data), source.choice([64, len(data)])))] = source.randrange(256)
        try:
            outcomes.add(decode_image(bytes(damaged), Limits(max_pixels=1_000_000)).mode)
        except MediaError:
            outcomes.add("refused")
    assert outcomes <= {"RGB", "refused"}
    assert "refused" in outcomes


def test_errors_keep_their_cause_and_hide_library_objects() -> None:
    data = encoded(picture(), "PNG")
    with pytest.raises(MediaError, match=r"PNG picture is truncated or damaged .*; save") as caught:
        decode_image(data[: len(data) // 2], LIMITS)
    assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(MediaError, match="header is damaged") as caught:
        decode_image(data[:8] + bytes(30), LIMITS)
    assert "BytesIO" not in str(caught.value)
