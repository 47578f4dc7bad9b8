"""Films whose frames are known: every frame has a grey of its own, and a bright top left corner."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

FRAMES, WIDTH, HEIGHT = 21, 64, 48
STEP = 10


def grey(index: int) -> int:
    return 20 + STEP * index


def pictures(count: int = FRAMES, size: tuple[int, int] = (WIDTH, HEIGHT)) -> list[Image.Image]:
    made = []
    for index in range(count):
        picture = Image.new("RGB", size, (grey(index),) * 3)
        picture.paste((255, 255, 255), (0, 0, size[0] // 4, size[1] // 4))
        made.append(picture)
    return made


def film(
    container: str = "mp4",
    codec: str = "libx264",
    *,
    count: int = FRAMES,
    rotation: tuple[int, bool] | None = None,
    options: dict[str, str] | None = None,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    rate: int = 10,
    times: list[int] | None = None,
) -> bytes:
    """Encoded bytes; ``rotation`` is (degrees counter-clockwise, mirrored), ``times`` are in frames at ``rate``."""
    import av

    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        stream: Any = file.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = *size, "yuv420p", 4_000_000
        if rotation is not None:
            stream.set_display_rotation(rotation[0], hflip=rotation[1])
        for index, picture in enumerate(pictures(count, size)):
            frame = av.VideoFrame.from_image(picture)
            frame.pts = index if times is None else times[index]
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return out.getvalue()


def sound_file() -> bytes:
    """An MP4 without pictures."""
    import av

    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        stream: Any = file.add_stream("aac", rate=16_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return out.getvalue()


def shown(decoded: list[Image.Image]) -> list[int]:
    """Which frame each picture is, told by the grey of its middle."""
    return [round((float(np.asarray(p)[p.height // 2 :, p.width // 2 :].mean()) - 20) / STEP) for p in decoded]
