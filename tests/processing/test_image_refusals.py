import json
import random
import struct
import subprocess
import sys
import zlib
from typing import Any

import numpy as np
import pytest
from pictures import LIMITS, decoded, encoded, exif, picture, png, tiff
from PIL import Image

from mmllm.errors import MediaError
from mmllm.processing.images import MAX_JPEG_SCANS, decode_image
from mmllm.processing.sources import Limits

# pytest replaces the filter that mmllm sets; `test_bombs_...` looks at the real one.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


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
        (b"\x12\xaf" + bytes(40), "another kind"),
        (b"RIFF\x24\0\0\0WAVEfmt ", "another kind"),
        (b"plain text that is no picture", "another kind"),
        (b"\x80\x04\x95" + bytes(40), "another kind"),
        (bytes(100), "another kind"),
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
