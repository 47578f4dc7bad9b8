"""Batches for ``train_clip.py``: scenes as patches, captions as word ids, and the contents of every patch."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from scene_model import COLORS, SHAPES, SIZES, Scene, render, sample_scene, size_name, walls
from scene_text import NUMBERS, part_captions, summary
from torch import Tensor

from mmllm.encoders.vit import fit_grid, patchify, resize_to_grid

PATCH, MAX_PATCHES = 20, 100
SIDES = ("left", "top", "right", "bottom")
JOINT = len(COLORS) * len(SHAPES) * len(SIZES)
GROUNDING_SIZE = JOINT + len(COLORS) + len(SHAPES) + len(SIZES) + len(SIDES) + 1  # the last: more than one centre
PAD, START = 0, 1


class Words:
    """A word list for the captions: ``<pad>``, ``<start>``, the words, and ``<end>`` with the largest id."""

    def __init__(self, words: list[str], context: int) -> None:
        self.words, self.context = words, context
        self.ids = {w: i for i, w in enumerate(words)}

    @classmethod
    def from_scenes(cls, context: int) -> Words:
        rng = random.Random(0)
        found = set(NUMBERS)  # the largest counts are too rare to meet by chance
        for _ in range(4000):
            scene = sample_scene(rng)
            for text in [summary(scene), *part_captions(scene, rng, 4)]:
                found.update(split(text))
        return cls(["<pad>", "<start>", *sorted(found), "<end>"], context)

    def encode(self, text: str) -> list[int]:
        """Ids with start and end. Words beyond the context or outside the list are dropped, the end is kept."""
        return [START, *[self.ids[w] for w in split(text) if w in self.ids][: self.context - 2], len(self.words) - 1]

    def decode(self, ids: list[int]) -> list[str]:
        return [self.words[i] for i in ids if START < i < len(self.words) - 1]


def split(text: str) -> list[str]:
    return re.findall(r"[\w-]+|[:,;]", text)


def to_patches(image: Image.Image) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], tuple[int, int]]:
    """RGB picture -> uint8 patches (S, 3*p*p) and its grid (rows, cols)."""
    rows, cols = fit_grid(*image.size, PATCH, MAX_PATCHES)
    pixels = np.asarray(resize_to_grid(image, rows, cols, PATCH)).transpose(2, 0, 1)
    return patchify(torch.from_numpy(np.ascontiguousarray(pixels)), PATCH).numpy(), (rows, cols)


def ground(scene: Scene, grid: tuple[int, int]) -> list[tuple[int, int]]:
    """(patch, label) pairs: what the shapes whose centre lies in a patch are, and which walls they touch."""
    rows, cols = grid
    found: list[tuple[int, int]] = []
    taken: set[int] = set()
    for item in scene.items:
        row = min(rows - 1, int((item.y + item.size / 2) / scene.height * rows))
        patch = row * cols + min(cols - 1, int((item.x + item.size / 2) / scene.width * cols))
        color, shape = list(COLORS).index(item.color), SHAPES.index(item.shape)
        size, label = SIZES.index(size_name(scene, item)), JOINT
        labels = [(color * len(SHAPES) + shape) * len(SIZES) + size]
        for value, length in ((color, len(COLORS)), (shape, len(SHAPES)), (size, len(SIZES))):
            labels.append(label + value)
            label += length
        if scene.kind != "canvas":
            labels += [label + SIDES.index(side) for side in walls(scene, item)]
        if patch in taken:
            labels.append(GROUNDING_SIZE - 1)
        taken.add(patch)
        found += [(patch, value) for value in labels]
    return found


def collate(scenes: list[Scene], captions: list[list[str]], words: Words) -> dict[str, Tensor]:
    """patches (N, S, 1200) uint8, grids (N, 2), text (N, K, L) ids, grounding (N, S, GROUNDING_SIZE) uint8."""
    pictures = [to_patches(render(scene)) for scene in scenes]
    length = max(len(p) for p, _ in pictures)
    patches = np.zeros((len(scenes), length, 3 * PATCH * PATCH), np.uint8)
    grounding = np.zeros((len(scenes), length, GROUNDING_SIZE), np.uint8)
    ids = [[words.encode(text) for text in texts] for texts in captions]
    longest = max(len(i) for rows in ids for i in rows)
    text = np.full((len(scenes), len(ids[0]), longest), PAD, np.int64)
    for n, (scene, (pixels, grid)) in enumerate(zip(scenes, pictures, strict=True)):
        patches[n, : len(pixels)] = pixels
        for patch, label in ground(scene, grid):
            grounding[n, patch, label] = 1
        for k, row in enumerate(ids[n]):
            text[n, k, : len(row)] = row
    return {
        "patches": torch.from_numpy(patches),
        "grids": torch.tensor([grid for _, grid in pictures]),
        "text": torch.from_numpy(text),
        "grounding": torch.from_numpy(grounding),
    }


KINDS = (("scatter", 0.28), ("tower", 0.05), ("canvas", 0.27), ("crowd", 0.4))  # canvases take longest to learn


def make_batch(rng: random.Random, size: int, captions: int, words: Words) -> dict[str, Tensor]:
    kinds = rng.choices([k for k, _ in KINDS], [w for _, w in KINDS], k=size)
    scenes = [sample_scene(rng, kind) for kind in kinds]
    return collate(scenes, [[summary(s), *part_captions(s, rng, captions - 1)] for s in scenes], words)


class _Stream(torch.utils.data.IterableDataset[dict[str, Tensor]]):
    def __init__(self, seed: int, size: int, captions: int, words: Words) -> None:
        self.settings = (seed, size, captions, words)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        seed, size, captions, words = self.settings
        info = torch.utils.data.get_worker_info()
        rng = random.Random(f"clip-{seed}-{info.id if info else 0}")
        while True:
            yield make_batch(rng, size, captions, words)


def scene_stream(seed: int, size: int, captions: int, words: Words, workers: int) -> Iterator[dict[str, Tensor]]:
    """Batches without end, rendered by ``workers`` processes (0: in this one); the seed fixes their content."""
    loader = torch.utils.data.DataLoader(_Stream(seed, size, captions, words), batch_size=None, num_workers=workers)
    return iter(loader)
