"""Tar shards as other programs write them, and hostile ones."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from data_rows import row
from PIL import Image


def picture(shade: int, format: str = "PNG") -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.full((6, 6, 3), shade, np.uint8)).save(content, format)
    return content.getvalue()


def tar(path: Path, members: Iterable[tuple[str, bytes]], format: int = tarfile.GNU_FORMAT, **options: Any) -> Path:
    """An archive with regular files, as ``tarfile`` writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format, **options) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def odd(path: Path, name: str, change: Callable[[tarfile.TarInfo], None]) -> Path:
    """An archive with one good sample and one member that is something else than a file."""
    tar(path, sample("a", 1))
    with tarfile.open(path, "a") as archive:
        info = tarfile.TarInfo(name)
        change(info)
        archive.addfile(info)
    return path


def sample(key: str, shade: int, **extra: Any) -> list[tuple[str, bytes]]:
    """A row with one picture, as ``mmllm data shard`` names them."""
    content = [{"type": "image", "path": f"{key}.0.png"}, {"type": "text", "text": "Which shade?"}]
    data = json.dumps(row(f"id-{key}", content, f"{shade}", **extra)).encode()  # type: ignore[arg-type]
    return [(f"{key}.json", data), (f"{key}.0.png", picture(shade))]


def shards(folder: Path, count: int, each: int) -> list[Path]:
    """``count`` archives of ``each`` samples; sample n of shard s has the id ``id-s_n``."""
    return [
        tar(folder / f"{s:03d}.tar", [member for n in range(each) for member in sample(f"{s}_{n}", n)])
        for s in range(count)
    ]
