"""Clips: which frames are taken, how they stand, what is refused."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zipfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from films import FRAMES, film, pictures, shown, sound_file
from PIL import Image
from test_packs import DATA

from mmllm.errors import MediaError
from mmllm.processing.sources import Limits
from mmllm.processing.video import decode_video, place

LIMITS = Limits()
FILMS = [
    ("mp4", "libx264", {"bf": "3", "g": "7"}),
    ("mov", "mpeg4", {}),
    ("matroska", "libx264", {"g": "5", "x264-params": "open-gop=1:bframes=2"}),
    ("webm", "libvpx-vp9", {}),
    ("avi", "mpeg4", {"bf": "2", "g": "6"}),
    ("mpegts", "libx264", {"g": "5"}),
    ("flv", "flv1", {}),
    ("asf", "wmv2", {}),
]


def animation(format: str, durations: list[int] | int = 100) -> bytes:
    first, *rest = pictures()
    out = io.BytesIO()
    lossless = {"lossless": True} if format == "WEBP" else {}
    first.save(out, format, save_all=True, append_images=rest, duration=durations, **lossless)
    return out.getvalue()


@pytest.mark.parametrize(("container", "codec", "options"), FILMS, ids=[f"{c}-{k}" for c, k, _ in FILMS])
def test_frames_are_spread_evenly_over_a_film(container: str, codec: str, options: dict[str, str]) -> None:
    data = film(container, codec, options=options)
    assert shown(decode_video(data, LIMITS, frames=FRAMES)) == list(range(FRAMES))
    assert shown(decode_video(data, LIMITS, frames=5)) == [0, 5, 10, 15, 20]
    assert shown(decode_video(data, LIMITS, frames=4)) == [0, 7, 13, 20]
    assert shown(decode_video(data, LIMITS, frames=1)) == [10]
    assert shown(decode_video(data, LIMITS, frames=2 * FRAMES - 1))[:4] == [0, 1, 1, 2]
    # 2.1 seconds at 10 a second: half a second from 0, 0.8 and 1.6 s on
    assert shown(decode_video(data, LIMITS, frames=2, clips=3, seconds=0.5)) == [0, 4, 8, 12, 16, 20]


def test_every_chosen_frame_is_the_one_of_a_full_decoding() -> None:
    import av

    data = film("mpeg", "mpeg2video", rate=25, options={"bf": "2", "g": "6"})
    with av.open(io.BytesIO(data)) as file:
        whole = [np.asarray(frame.to_image()) for frame in file.decode(video=0)]
    for count in (1, 2, 3, 7, FRAMES):
        chosen = place([Fraction(i, 25) for i in range(FRAMES)], Fraction(FRAMES, 25), count, 1, None)
        found = decode_video(data, LIMITS, frames=count)
        assert all(np.array_equal(a, whole[i]) for a, i in zip(found, chosen, strict=True))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_animations_need_no_ffmpeg(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    data = animation(format)
    assert shown(decode_video(data, LIMITS, frames=5)) == [0, 5, 10, 15, 20]
    assert shown(decode_video(data, LIMITS, frames=2, clips=3, seconds=0.5)) == [0, 4, 8, 12, 16, 20]
    with pytest.raises(MediaError, match=r"pip install 'mmllm\[video\]'"):
        decode_video(b"\0\0\0\x18ftypisom" + bytes(20), LIMITS, frames=1)


def test_stretches_go_by_time_not_by_number() -> None:
    slow = animation(
        "GIF", [1000] * 3 + [100] * (FRAMES - 3)
    )  # three seconds with three frames, then 1.8 with eighteen
    assert shown(decode_video(slow, LIMITS, frames=2, clips=2, seconds=1.0)) == [0, 0, 11, 20]
    uneven = film(count=6, times=[0, 4, 5, 6, 20, 21])
    assert shown(decode_video(uneven, LIMITS, frames=2, seconds=0.6)) == [0, 2]


def test_transparent_animations_lie_on_white() -> None:
    out = io.BytesIO()
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(out, "PNG")
    (picture,) = decode_video(out.getvalue(), LIMITS, frames=1)
    assert picture.mode == "RGB"
    assert picture.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotation_is_applied(degrees: int, mirrored: bool) -> None:
    """The bright corner is where the stored picture's goes when it is turned counter-clockwise, then mirrored."""
    (found,) = decode_video(film(rotation=(degrees, mirrored)), LIMITS, frames=1)
    expected = pictures()[10].rotate(degrees, expand=True)
    if mirrored:
        expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert found.size == expected.size
    assert np.abs(np.asarray(found).astype(int) - np.asarray(expected)).mean() < 4


def test_one_frame_is_a_clip() -> None:
    assert shown(decode_video(film(count=1), LIMITS, frames=3, clips=2, seconds=2.0)) == [0] * 6


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (sound_file, "no moving pictures, only sound"),
        (b"\xff\xd8\xff\xe0 jpeg", "a JPEG picture is not opened as a clip"),
        (b"#EXTM3U\nfile:///etc/passwd", "a playlist is not opened"),
        (b"<html>", "HTML"),
        (b"\0\0\0\x18ftypavif" + bytes(40), "a file of another kind"),
        (b"\0\0\0\x18ftypisom" + bytes(40), "truncated or damaged"),
        (b"GIF89a", "truncated or damaged"),
    ],
)
def test_what_is_no_clip_is_refused(data: object, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        decode_video(data() if callable(data) else data, LIMITS, frames=2)  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.9])
@pytest.mark.parametrize(("container", "codec"), [("mp4", "libx264"), ("avi", "mpeg4")])
def test_truncated_films_are_refused(container: str, codec: str, share: float) -> None:
    data = film(container, codec, options={"movflags": "faststart"})
    with pytest.raises(MediaError):
        decode_video(data[: int(share * len(data))], LIMITS, frames=5)


def test_a_frame_count_that_lies_is_noticed_or_ignored() -> None:
    data = film("avi", "mpeg4", count=10)
    at = data.index(b"strh") + 8 + 32  # dwLength of the stream header
    assert int.from_bytes(data[at : at + 4], "little") == 10
    with pytest.raises(MediaError, match=r"truncated: 10 of 4,000,000 frames"):
        decode_video(data[:at] + (4_000_000).to_bytes(4, "little") + data[at + 4 :], LIMITS, frames=3)
    less = data[:at] + (2).to_bytes(4, "little") + data[at + 4 :]
    assert shown(decode_video(less, LIMITS, frames=2)) == [0, 9]


@pytest.mark.parametrize(
    ("limits", "frames", "message"),
    [
        ({"max_bytes": 100}, 2, "max_bytes"),
        ({"max_pixels": 64 * 48 - 1}, 2, "frames are 64x48 pixels"),
        ({"max_seconds": 2.0}, 2, "max_seconds"),
        ({"max_frames": 20}, 2, "more than 20 frames"),
        ({}, 10**9, "possible are 1 to 108,000"),
        ({}, 0, "possible are 1 to"),
        ({"max_pixels": 64 * 48}, 9, "9 frames to keep"),
    ],
)
def test_limits(limits: dict[str, float], frames: int, message: str) -> None:
    for data in (film(), animation("GIF")):
        with pytest.raises(MediaError, match=message):
            decode_video(data, Limits(**limits), frames=frames)  # type: ignore[arg-type]


def test_broken_films_in_a_bounded_process() -> None:
    """Bytes changed at random, in every container: pictures or a ``MediaError``, in little memory and time."""
    script = Path(__file__).with_name("decode_films.py")
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-500:] + run.stderr[-2000:]
    outcomes = json.loads(run.stdout)
    assert outcomes["refused"] > 20
    assert outcomes["decoded"] > 20


def test_real_clips() -> None:
    pack = DATA / "video-clips" / "clips.zip"
    if not pack.is_file():
        pytest.skip(f"no video-clips in {DATA}; name its folder in MMLLM_DATA")
    rows = [json.loads(line) for line in pack.with_name("manifest.jsonl").read_text().splitlines()]
    with zipfile.ZipFile(pack) as files:
        for row in rows:
            found = decode_video(files.read(row["file"]), LIMITS, frames=3)
            assert found[0].size == (row["streams"][0]["width"], row["streams"][0]["height"])
            assert len(found) == 3
            with pytest.raises(MediaError, match="more than"):
                decode_video(files.read(row["file"]), Limits(max_frames=row["decoded_video_frames"] - 1), frames=3)
