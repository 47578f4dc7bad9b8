import io
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pictures import LIMITS, decoded, encoded, exif, picture, png, tiff
from PIL import Image

from mmllm.errors import MediaError
from mmllm.processing.images import decode_image

# pytest replaces the filter that mmllm sets; `test_bombs_...` looks at the real one.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


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
