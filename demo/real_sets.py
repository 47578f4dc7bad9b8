"""The real sets as samples of the embedded assistant's training, and what all samples are made with."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import dialogues
import numpy as np
import soundfile
import soxr
from dialogues import Exchange
from PIL import Image
from sounds import SAMPLE_RATE

Row = dict[str, Any]
Part = dict[str, str]
SHARD = 250  # samples made by one task of the worker pool; also the number of files in one media folder


class Writer:
    """Where one task puts its media; paths are relative to the output folder."""

    def __init__(self, output: Path, name: str) -> None:
        self.output, self.name, self.count = output, name, 0

    def _next(self, folder: str, suffix: str) -> Path:
        (self.output / folder / self.name).mkdir(parents=True, exist_ok=True)
        self.count += 1
        return Path(folder) / self.name / f"{self.count:05d}{suffix}"

    def image(self, picture: Image.Image) -> Part:
        path = self._next("images", ".png")
        picture.save(self.output / path, compress_level=1)
        return {"type": "image", "path": path.as_posix()}

    def video(self, frames: list[Image.Image], frames_per_second: float) -> Part:
        path = self._next("videos", ".png")  # an animated PNG: exact, and Pillow alone can read it
        duration = round(1000 / frames_per_second)
        frames[0].save(self.output / path, save_all=True, append_images=frames[1:], duration=duration, loop=0)
        return {"type": "video", "path": path.as_posix()}

    def audio(self, samples: np.ndarray) -> Part:
        path = self._next("audio", ".flac")
        soundfile.write(self.output / path, samples, SAMPLE_RATE, subtype="PCM_16")
        return {"type": "audio", "path": path.as_posix()}


def conversation(media: list[Part], exchanges: list[Exchange], rng: random.Random, system: float = 0.15) -> list[Row]:
    """Messages with the media in the first question: before its words, or (rarely) after them."""
    messages: list[Row] = list(dialogues.to_messages(exchanges, rng, system))
    first = next(message for message in messages if message["role"] == "user")
    words = [{"type": "text", "text": first["content"]}]
    first["content"] = [*media, *words] if rng.random() < 0.92 else [*words, *media]
    return messages


def read_rows(folder: Path, split: str) -> list[Row]:
    """The rows of a prepared set; none when the folder has no such split."""
    path = folder / f"{split}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def parts_of(row: Row) -> tuple[str, str, str]:
    """(media path, question, answer) of a one-turn row."""
    media, words = row["messages"][0]["content"]
    reply = row["messages"][1]["content"]
    return media["path"], words["text"], reply if isinstance(reply, str) else reply[0]["text"]


def read_wave(path: Path) -> np.ndarray:
    """A sound file as float32 (T,) at SAMPLE_RATE."""
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return np.asarray(soxr.resample(samples.mean(axis=1), rate, SAMPLE_RATE), dtype=np.float32)


def permuted(picture: Image.Image, order: tuple[int, ...]) -> Image.Image:
    """An NLVR picture (400x100, boxes at x = 0, 150, 300) with its boxes in another order; the truth stays."""
    moved = picture.copy()
    for target, source in enumerate(order):
        moved.paste(picture.crop((150 * source, 0, 150 * source + 100, 100)), (150 * target, 0))
    return moved


def nlvr_rows(folder: Path, output: Path, rng: random.Random, orders: int) -> list[Row]:
    """NLVR's training rows, each with `orders` of the six orders of its boxes."""
    rows = []
    writers: dict[int, Writer] = {}
    for index, row in enumerate(read_rows(folder, "train")):
        path, question, reply = parts_of(row)
        writer = writers.setdefault(index // SHARD, Writer(output, f"nlvr-{index // SHARD:03d}"))
        with Image.open(folder / path) as image:
            picture = image.convert("RGB")
        for order in rng.sample(list(itertools.permutations(range(3))), orders):
            media = [writer.image(permuted(picture, order))]
            rows.append({"messages": conversation(media, [(question, reply)], rng, 0.0)})
    return rows


def sound_rows(folder: Path, output: Path, rng: random.Random, copies: int, crop: float) -> list[Row]:
    """The training rows of a sound set, `copies` times each: other loudness, other silence around, cut by up to `crop`."""
    writer = Writer(output, folder.name)
    rows = []
    for row in read_rows(folder, "train"):
        path, question, reply = parts_of(row)
        clip = read_wave(folder / path)
        for copy in range(copies):
            changed = clip
            if copy:  # the first copy is the clip as it is
                start = int(rng.uniform(0, crop) * len(clip))
                changed = clip[start : len(clip) - int(rng.uniform(0, crop) * (len(clip) - start))]
                silence = [np.zeros(int(rng.uniform(0, 0.25) * SAMPLE_RATE), np.float32) for _ in range(2)]
                changed = np.concatenate([silence[0], changed, silence[1]])
                changed = changed / max(1e-4, float(np.abs(changed).max())) * rng.uniform(0.1, 0.95)
            rows.append({"messages": conversation([writer.audio(changed)], [(question, reply)], rng, 0.0)})
    return rows
