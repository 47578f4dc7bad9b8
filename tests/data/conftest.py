"""Small data files and media."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write rows (mappings, or raw lines) as JSON Lines; returns the path."""

    def do(*rows: Any, name: str = "data.jsonl") -> Path:
        lines = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in rows]
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes("".join(f"{line}\n" for line in lines).encode())
        return path

    return do


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """A folder with red.png (40x10), two.png and tone.wav (0.1 s)."""
    Image.new("RGB", (40, 10), "red").save(tmp_path / "red.png")
    Image.new("L", (8, 8), 200).save(tmp_path / "two.png")
    soundfile.write(tmp_path / "tone.wav", np.sin(np.arange(1600) / 5).astype(np.float32), 16000)
    return tmp_path
