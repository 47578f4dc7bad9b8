"""Read a drawing back from its pixels: which shapes, in which colours, where. Shares no code with what draws them.

A shape is a connected patch that differs from the background. How much of each pixel it covers follows from the mixture
of its colour with the background's; its name follows from the profile of that coverage, row by row.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

COLORS = {
    "red": (220, 40, 40), "green": (40, 160, 60), "blue": (30, 90, 220), "yellow": (250, 220, 30),
    "black": (15, 15, 15), "white": (248, 248, 248), "orange": (245, 140, 30), "purple": (140, 60, 180),
}  # fmt: skip
BACKGROUNDS = {"white": (255, 255, 255), "grey": (128, 128, 128), "black": (10, 10, 15)}
DIFFERENT = 50.0  # distance in RGB from the background that makes a pixel part of a shape
SMALLEST = 14.0  # pixels; the area of the smallest drawn shape, a star, is 33


@dataclass(frozen=True)
class Found:
    """A shape; ``x`` and ``y`` are its centre as shares of the picture's sides, ``area`` its share of the picture."""

    shape: str
    color: str
    x: float
    y: float
    area: float


@dataclass(frozen=True)
class Parsed:
    background: str
    shapes: tuple[Found, ...]

    def kinds(self) -> Counter[tuple[str, str]]:
        return Counter((found.color, found.shape) for found in self.shapes)


def nearest(rgb: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float(np.square(rgb - np.asarray(palette[name])).sum()))


def parse(picture: np.ndarray) -> Parsed:
    """``picture`` is RGB, uint8 ``(H, W, 3)``."""
    image = picture.astype(np.float64)
    height, width, _ = image.shape
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    background = np.median(border, axis=0)
    distance = np.sqrt(np.square(image - background).sum(-1))
    labels, _ = ndimage.label(distance > DIFFERENT, structure=np.ones((3, 3)))
    shapes = []
    for index, window in enumerate(ndimage.find_objects(labels), start=1):
        inside = labels[window] == index
        # A wider window, so that the faint rim counts for the coverage.
        rows = slice(max(0, window[0].start - 1), window[0].stop + 1)
        columns = slice(max(0, window[1].start - 1), window[1].stop + 1)
        values = image[window][inside]
        strength = distance[window][inside]
        color = np.median(values[strength >= np.quantile(strength, 0.6)], axis=0)
        other = (labels[rows, columns] != 0) & (labels[rows, columns] != index)
        coverage = (image[rows, columns] - background) @ (color - background) / np.square(color - background).sum()
        coverage = np.clip(np.where(other, 0.0, coverage), 0.0, 1.0)
        if coverage.sum() < SMALLEST:
            continue
        y, x = ndimage.center_of_mass(coverage)
        shapes.append(
            Found(
                shape_of(coverage), nearest(color, COLORS),
                (columns.start + x + 0.5) / width, (rows.start + y + 0.5) / height,
                float(coverage.sum()) / (height * width),
            )
        )  # fmt: skip
    return Parsed(nearest(background, BACKGROUNDS), tuple(shapes))


def shape_of(coverage: np.ndarray) -> str:
    """The name of a shape from how much of each pixel it covers, ``(H, W)`` in [0, 1]."""
    return min(PROFILES, key=lambda name: float(np.square(profile(coverage) - PROFILES[name]).sum()))


def profile(coverage: np.ndarray) -> np.ndarray:
    """Where a shape's area lies: the share of each of 5 x 5 fields of its extent that it covers, ``(25,)``."""
    y0, y1 = extent(coverage.max(axis=1))
    x0, x1 = extent(coverage.max(axis=0))
    total = np.pad(coverage.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    sums = ndimage.map_coordinates(
        total, np.meshgrid(np.linspace(y0, y1, 6), np.linspace(x0, x1, 6), indexing="ij"), order=1, mode="nearest"
    )
    fields = np.diff(np.diff(sums, axis=0), axis=1) / max((y1 - y0) * (x1 - x0) / 25, 1e-9)
    return np.asarray(fields.ravel())


def extent(strongest: np.ndarray) -> tuple[float, float]:
    """First and last edge of what is covered, with the outermost pixels counted by their coverage."""
    inside = np.flatnonzero(strongest > 0.5)
    first, last = int(inside[0]), int(inside[-1]) + 1
    before = strongest[first - 1] if first > 0 else 0.0
    after = strongest[last] if last < len(strongest) else 0.0
    return first - float(before), last + float(after)


def _ideal(name: str, fine: int = 200) -> np.ndarray:
    """The profile of a geometric figure in the unit square."""
    u, v = np.meshgrid(*(2 * [(np.arange(fine) + 0.5) / fine]))
    dx, dy = u - 0.5, v - 0.5
    if name == "star":  # five points at the top: inside where the radius is under that of the edge in this direction
        angle = np.abs((np.arctan2(dx, -dy) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
        tip, notch = np.array([0.5, 0.0]), 0.2 * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
        edge = notch - tip
        reach = (tip[0] * edge[1] - tip[1] * edge[0]) / (np.cos(angle) * edge[1] - np.sin(angle) * edge[0])
        inside = np.hypot(dx, dy) <= reach
    else:
        inside = {
            "circle": np.hypot(dx, dy) <= 0.5,
            "square": np.ones_like(u, dtype=bool),
            "triangle": np.abs(dx) <= v / 2,
            "diamond": np.abs(dx) + np.abs(dy) <= 0.5,
            "cross": (np.abs(dx) <= 0.16) | (np.abs(dy) <= 0.16),
        }[name]
    return profile(inside.astype(np.float64))


PROFILES: dict[str, np.ndarray] = {}
PROFILES.update({name: _ideal(name) for name in ("circle", "square", "triangle", "star", "cross", "diamond")})
