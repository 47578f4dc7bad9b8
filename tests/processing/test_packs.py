"""Hundreds of rare, broken and hostile files, where the packs ``odd-images`` and ``odd-audio`` are at hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("MMLLM_DATA", REPOSITORY.parent / "shared" / "data"))
EVERYDAY = {"PNG", "JPEG", "MPO", "GIF", "BMP", "WEBP", "AVIF", "JPEG2000", "PPM", "TGA", "ICO"}


def decoded(kind: str, folder: str) -> dict[str, tuple[str, str, float, float]]:
    pack = next((DATA / folder).glob("*.zip"), None)
    if pack is None:
        pytest.skip(f"no {folder} in {DATA}; name its folder in MMLLM_DATA")
    script = Path(__file__).with_name("decode_pack.py")
    run = subprocess.run([sys.executable, str(script), kind, str(pack)], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-500:] + run.stderr[-2000:]
    return {name: tuple(rest) for name, *rest in map(json.loads, run.stdout.splitlines())}


def manifest(folder: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (DATA / folder / "manifest.jsonl").read_text().splitlines()]


def check(results: dict[str, tuple[str, str, float, float]]) -> None:
    for name, (outcome, detail, seconds, growth) in results.items():
        assert outcome in ("equal", "refused"), (name, outcome, detail)
        assert seconds < 10, (name, seconds)
        assert growth < 300, (name, growth)  # MiB


def test_odd_images_equal_the_reference_or_are_refused() -> None:
    results = decoded("image", "odd-images")
    check(results)
    for row in manifest("odd-images"):
        if row["loads"] is True and row["format"] in EVERYDAY:
            assert results[str(row["file"])][0] == "equal", (row, results[str(row["file"])])


def test_odd_sounds_equal_the_reference_or_are_refused() -> None:
    results = decoded("audio", "odd-audio")
    check(results)
    for row in manifest("odd-audio"):
        if row["sf_ok"] and row["frames"]:
            assert results[str(row["file"])][0] == "equal", (row, results[str(row["file"])])
