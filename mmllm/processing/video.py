"""Encoded clips to RGB pictures: FFmpeg (PyAV) decodes films, Pillow decodes animations; only frames asked for are kept."""

from __future__ import annotations

import io
import struct
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image, ImageOps

from mmllm.errors import MediaError
from mmllm.processing.sources import Limits

if TYPE_CHECKING:
    import av

FORMATS = "MP4, MOV, WebM, Matroska, AVI, MPEG, FLV, WMV and Ogg; animated GIF, WebP and PNG"
Spread = Literal["ends", "middles"]
KEPT = 8
"""All pictures kept of one clip have at most this many times ``Limits.max_pixels`` together (3 bytes each)."""
DECODED = 5_000
"""All frames that have to be decoded for them have at most this many times ``Limits.max_pixels`` together."""

_FILMS: tuple[tuple[int, bytes, str], ...] = (  # offset, bytes there, FFmpeg's name of the format
    (4, b"ftyp", "mov"),
    (4, b"moov", "mov"),
    (4, b"mdat", "mov"),
    (4, b"wide", "mov"),
    (0, b"\x1a\x45\xdf\xa3", "matroska"),
    (0, b"\0\0\1\xba", "mpeg"),
    (0, b"FLV\1", "flv"),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "asf"),
    (0, b"OggS", "ogg"),
)
_ANIMATIONS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"GIF87a", "GIF"),
    (0, b"GIF89a", "GIF"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (8, b"WEBP", "WEBP"),
)
_REFUSED: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"\0\0\1\xb3", "a raw MPEG stream"),
    (b"#EXTM3U", "a playlist"),
    (b"ffconcat", "a playlist"),
    (b"%PDF", "a PDF document"),
    (b"PK\3\4", "a ZIP archive"),
    (b"<", "an HTML or XML text"),
)
_PICTURE_BRANDS = (b"avif", b"heic", b"heix", b"heim", b"mif1")
_UPRIGHT = {  # signs of (a, b, c, d) of the display matrix (ISO 14496-12 8.3.2): what has to be done to the stored picture
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
}


def decode_video(
    data: bytes,
    limits: Limits,
    *,
    frames: int,
    clips: int = 1,
    seconds: float | None = None,
    spread: Spread = "ends",
) -> list[Image.Image]:
    """``clips * frames`` pictures of one film or animation, in order of time: mode ``RGB``, upright, all of one size.

    Without ``seconds`` they are spread evenly over the whole: frame ``round(i * (T - 1) / (frames - 1))`` of its T frames,
    so the first and the last are among them (one alone is the middle frame); with ``spread: middles`` the middle one of each
    of ``frames`` equal pieces, ``floor((2i + 1) T / 2 frames)``. With ``seconds``, ``clips`` stretches of that length
    are spread evenly (the first at the beginning, the last at the end), and each gives ``frames`` pictures by the same
    rule. Frames are repeated where there are too few. ``place`` is the rule.

    The format is told by the first bytes, never by a name; see ``FORMATS``. Films need PyAV, the extra ``video``. Rotation
    and mirroring that the file asks for are applied; transparency is composited on white. Sound is left alone. Pixels that
    are not square stay as they are stored.

    Raises ``MediaError``, and nothing else, for other formats, files without moving pictures, more than
    ``limits.max_bytes``, ``max_seconds``, ``max_frames`` (in the file, or asked for) or ``max_pixels`` (of one frame, and
    times ``KEPT`` and ``DECODED``), and for truncated or damaged files. Sizes and numbers are checked before memory is
    taken; only the stretches between the key frames around a wanted frame are decoded, in one thread.
    """
    if frames < 1 or clips < 1 or frames * clips > limits.max_frames:
        raise MediaError(
            f"{clips} x {frames} frames are asked for; possible are 1 to {limits.max_frames:,} (max_frames)"
        )
    if len(data) > limits.max_bytes:
        raise MediaError(f"the clip has {len(data):,} encoded bytes, the limit is {limits.max_bytes:,} (max_bytes)")
    name, animation = _sniff(data)
    try:
        decode = _decode_animation if animation else _decode_film
        return decode(data, name, _Wanted(frames, clips, seconds, spread), limits)
    except MediaError:
        raise
    except ModuleNotFoundError as error:
        raise MediaError(
            f"reading {name} films needs PyAV, which is not installed: pip install 'mmllm[video]'"
        ) from error
    except Exception as error:  # decoders raise anything on hostile bytes
        detail = " ".join(str(error).split())
        raise MediaError(f"the {name} clip is truncated or damaged ({detail}); save or download it again") from error


def place(
    times: Sequence[Fraction], end: Fraction, frames: int, clips: int, seconds: float | None, spread: Spread = "ends"
) -> list[int]:
    """Indices of the ``clips * frames`` frames to keep. ``times`` (ascending) is when each frame is shown, in seconds from
    the first; ``end`` is when the last one goes.
    """
    if seconds is None:
        stretches = [(0, len(times))] * clips
    else:
        length = Fraction(seconds)
        room = max(end - length, Fraction(0))
        starts = [room * k / max(clips - 1, 1) for k in range(clips)]
        stretches = [(bisect_left(times, start), bisect_left(times, start + length)) for start in starts]
    chosen = []
    for first, stop in stretches:
        first = min(first, len(times) - 1)
        count = max(stop - first, 1)  # between two frames of a slow clip there may be none: the next one is shown
        if spread == "middles":
            chosen += [first + (2 * i + 1) * count // (2 * frames) for i in range(frames)]
            continue
        steps = [Fraction(i, frames - 1) for i in range(frames)] if frames > 1 else [Fraction(1, 2)]
        chosen += [first + int(step * (count - 1) + Fraction(1, 2)) for step in steps]
    return chosen


@dataclass(frozen=True)
class _Wanted:
    frames: int
    clips: int
    seconds: float | None
    spread: Spread

    def indices(self, times: Sequence[Fraction], end: Fraction, limits: Limits) -> list[int]:
        _check_count(len(times), limits)
        if end > limits.max_seconds:
            raise MediaError(
                f"the clip is longer than {limits.max_seconds:g} seconds (max_seconds); cut it into shorter pieces"
            )
        return place(times, end, self.frames, self.clips, self.seconds, self.spread)


def _sniff(data: bytes) -> tuple[str, bool]:
    """The library's name of the format, and whether it is an animation; ``MediaError`` naming what was found instead."""
    if not data:
        raise MediaError("the clip is empty (0 bytes)")
    for offset, magic, name in _ANIMATIONS:
        if data.startswith(magic, offset):
            return name, True
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return "avi", False
    if data[:1] == b"\x47" and data[188:189] == b"\x47":  # MPEG transport stream: packets of 188 bytes
        return "mpegts", False
    if data[8:12] not in _PICTURE_BRANDS:
        for offset, magic, name in _FILMS:
            if data.startswith(magic, offset):
                return name, False
    found = next((name for magic, name in _REFUSED if data.lstrip().startswith(magic)), "a file of another kind")
    raise MediaError(f"{found} is not opened as a clip; convert it to MP4 (opened are {FORMATS})")


def _check_size(width: int, height: int, limits: Limits) -> None:
    if width < 1 or height < 1:
        raise MediaError("the file has no moving pictures of a known size; a clip has frames")
    if width * height > limits.max_pixels:
        raise MediaError(
            f"the clip's frames are {width}x{height} pixels; the limit is {limits.max_pixels:,} pixels (max_pixels); "
            "make it smaller"
        )


def _check_count(count: int, limits: Limits) -> None:
    if count > limits.max_frames:
        raise MediaError(
            f"the clip has more than {limits.max_frames:,} frames (max_frames); cut it into shorter pieces"
        )
    if count == 0:
        raise MediaError("the clip has no frames")


def _check_work(kept: int, decoded: int, pixels: int, limits: Limits) -> None:
    for count, times, what in ((kept, KEPT, "frames to keep"), (decoded, DECODED, "frames to decode for them")):
        if count * pixels > times * limits.max_pixels:
            raise MediaError(
                f"{count:,} {what} of {pixels:,} pixels each are more than {times:,} times max_pixels; make the clip "
                "smaller or shorter"
            )


def _one_size(pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """Frames of the first one's size: a film may change its size on the way."""
    size = pictures[0].size
    return [p if p.size == size else p.resize(size, Image.Resampling.BICUBIC) for p in pictures]


# Animations -----------------------------------------------------------------------------------------------------------
def _decode_animation(data: bytes, name: str, wanted: _Wanted, limits: Limits) -> list[Image.Image]:
    image: Any
    with Image.open(io.BytesIO(data), formats=(name,)) as image:
        _check_size(image.width, image.height, limits)
        count: int = image.n_frames
        _check_count(count, limits)
        _check_work(min(wanted.frames * wanted.clips, count), count, image.width * image.height, limits)
        times, end = [], Fraction(0)
        for index in range(count):
            image.seek(index)
            times.append(end)
            # As browsers do: no delay, or one of a hundredth of a second, means a tenth.
            delay = Fraction(image.info.get("duration") or 0) / 1000
            end += delay if delay > Fraction(1, 100) else Fraction(1, 10)
        chosen = wanted.indices(times, end, limits)
        pictures: dict[int, Image.Image] = {}
        for index in sorted(set(chosen)):
            image.seek(index)
            shown = ImageOps.exif_transpose(image.convert("RGBA"))
            pictures[index] = Image.new("RGB", shown.size, (255, 255, 255))
            pictures[index].paste(shown, mask=shown)
        return [pictures[index] for index in chosen]


# Films ----------------------------------------------------------------------------------------------------------------
def _decode_film(data: bytes, name: str, wanted: _Wanted, limits: Limits) -> list[Image.Image]:
    import av

    # The format is given, so FFmpeg does not guess: playlists and the like, which name other files, are never opened.
    with av.open(io.BytesIO(data), format=name, options={"fflags": "+genpts"}) as file:
        stream = _moving(file.streams.video)
        codec = stream.codec_context
        _check_size(codec.width, codec.height, limits)
        codec.thread_count = 1
        codec.options = {"max_pixels": str(limits.max_pixels)}
        packets: list[av.Packet[Any]] = []
        for packet in file.demux(stream):
            if packet.size and packet.pts is not None and not packet.is_discard:
                packets.append(packet)
                if len(packets) > limits.max_frames:
                    _check_count(len(packets), limits)
        _check_count(len(packets), limits)
        if len(packets) < stream.frames:
            raise MediaError(
                f"the clip is truncated: {len(packets):,} of {stream.frames:,} frames are there; save or download it again"
            )
        order = sorted(range(len(packets)), key=lambda index: packets[index].pts)
        first, last = packets[order[0]], packets[order[-1]]
        base = Fraction(stream.time_base)
        times = [(packets[index].pts - first.pts) * base for index in order]
        rate = stream.average_rate or Fraction(25)
        end = times[-1] + (last.duration * base if last.duration else 1 / rate)
        chosen = wanted.indices(times, end, limits)
        stretches = _stretches([(p.pts, p.is_keyframe) for p in packets], {order[index] for index in chosen})
        decoded = sum(max(inside) - start + 1 for start, inside in stretches.items())
        _check_work(len(set(chosen)), decoded, codec.width * codec.height, limits)
        pictures: dict[int, Image.Image] = {}
        for start, inside in stretches.items():
            codec.flush_buffers()
            pictures |= _decode_stretch(codec, packets[start:], {packets[index].pts for index in inside}, limits)
        return _one_size([pictures[packets[order[index]].pts] for index in chosen])


def _moving(streams: Iterable[Any]) -> Any:
    """The first video stream that is not a cover picture."""
    import av

    for stream in streams:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            return stream
    raise MediaError("the file has no moving pictures, only sound; a clip has frames")


def _stretches(packets: Sequence[tuple[int, bool]], wanted: Iterable[int]) -> dict[int, set[int]]:
    """Where decoding has to begin for the ``wanted`` packets, and which of them each beginning serves.

    ``packets`` are (time, is key frame) in decoding order. A picture shown before the key frame that precedes it in the
    file may be built from frames before that key frame too (an open group of pictures), so it begins one key frame earlier.
    """
    keys = [index for index, (_, key) in enumerate(packets) if key]
    stretches: dict[int, set[int]] = {}
    for index in sorted(wanted):
        at = bisect_left(keys, index + 1) - 1
        if at > 0 and packets[index][0] < packets[keys[at]][0]:
            at -= 1
        start = keys[at] if at >= 0 else 0
        stretches.setdefault(start, set()).add(index)
    return stretches


def _decode_stretch(codec: Any, packets: Sequence[Any], wanted: set[int], limits: Limits) -> dict[int, Image.Image]:
    """The pictures shown at the times ``wanted``, from a key frame on."""
    pictures: dict[int, Image.Image] = {}
    for packet in (*packets, None):  # None: give out what is left
        for frame in codec.decode(packet):
            if frame.pts not in wanted:
                continue
            if frame.is_corrupt:
                raise MediaError("the clip is damaged: a frame cannot be decoded completely; save or download it again")
            _check_size(frame.width, frame.height, limits)
            pictures[frame.pts] = _upright(frame)
        if len(pictures) == len(wanted):
            return pictures
    raise MediaError("the clip is truncated or damaged: a frame cannot be decoded; save or download it again")


def _upright(frame: Any) -> Image.Image:
    picture: Image.Image = frame.to_image()
    matrix = next((bytes(data) for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return picture
    a, b, _, c, d = struct.unpack("=5i", matrix[:20])
    method = _UPRIGHT.get(tuple((value > 0) - (value < 0) for value in (a, b, c, d)))
    return picture if method is None else picture.transpose(method)
