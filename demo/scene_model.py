"""Procedural scenes: what is in them, how they are sampled, how they are drawn. Everything is exact by construction.

Three kinds. A *canvas* is one picture of any aspect ratio with 1-8 shapes. *Scatter* and *tower* scenes follow the
pictures of the Natural Language for Visual Reasoning corpus (NLVR; Suhr, Lewis, Yeh, Artzi, ACL 2017): 400x100 pixels,
three 100x100 boxes, with loose shapes or with stacks of squares. Their geometry was measured on that corpus: offsets
are drawn from 0-99 and pushed inside (which is why the right and bottom walls are touched far more often than the
others), boxes around shapes stay at least one pixel apart, blocks of a tower are 20 pixels with a one pixel gap.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from math import cos, pi, sin, sqrt
from typing import Any

import numpy as np
from PIL import Image

Rgb = tuple[int, int, int]

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
BOX_SHAPES = SHAPES[:3]
COLORS: dict[str, Rgb] = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (30, 90, 220),
    "yellow": (250, 220, 30),
    "black": (15, 15, 15),
    "white": (248, 248, 248),
    "orange": (245, 140, 30),
    "purple": (140, 60, 180),
}
BOX_COLORS: dict[str, Rgb] = {"black": (0, 0, 0), "yellow": (255, 255, 0), "blue": (0, 153, 255)}
BACKGROUNDS: tuple[Rgb, ...] = (
    (255, 255, 255), (211, 211, 211), (128, 128, 128), (70, 70, 75), (10, 10, 15),
    (245, 235, 215), (200, 225, 245), (215, 240, 215), (25, 30, 70), (90, 60, 50),
)  # fmt: skip
SIZES = ("small", "medium", "big")
BOX_SIZES = {10: "small", 20: "medium", 30: "big"}
BOX_NAMES = ("left", "middle", "right")
BOXES = ((0, 0, 100, 100), (150, 0, 100, 100), (300, 0, 100, 100))  # x, y, width, height
BOX_GREY, GAP_GREY = (211, 211, 211), (128, 128, 128)
CANVAS_FRACTIONS = {"small": (0.055, 0.065), "medium": (0.10, 0.115), "big": (0.155, 0.17)}  # of sqrt(width * height)
SUPERSAMPLING = 8


@dataclass(frozen=True)
class Item:
    """A shape; ``x``, ``y`` is the top left corner of its ``size`` x ``size`` square, in pixels of the picture."""

    shape: str
    color: str
    size: int
    x: int
    y: int
    rgb: Rgb


@dataclass(frozen=True)
class Scene:
    """``kind`` is canvas, scatter or tower; ``boxes`` are (x, y, width, height), on a canvas one for all of it."""

    kind: str
    width: int
    height: int
    background: Rgb
    boxes: tuple[tuple[int, int, int, int], ...]
    items: tuple[Item, ...]


def sample_scene(rng: random.Random, kind: str | None = None) -> Scene:
    """A scene of the kind asked for: "canvas", "scatter", "tower", "box" (either of the last two) or None (any).

    "crowd" is a canvas of 8-16 shapes; its kind is "canvas" too. It shows a picture encoder more shapes per picture.
    """
    if kind is None:
        kind = rng.choice(("canvas", "box"))
    if kind == "box":
        kind = rng.choice(("scatter", "tower"))
    return {"canvas": _canvas, "crowd": _crowd, "scatter": _scatter, "tower": _tower}[kind](rng)


def scene_from_nlvr(structured: list[list[dict[str, Any]]]) -> Scene:
    """The scene behind an NLVR ``structured_rep``: three lists of x_loc, y_loc, size, type, color."""
    names = {"#0099ff": "blue", "Black": "black", "Yellow": "yellow"}
    items = [
        Item(
            o["type"], names[o["color"]], o["size"], o["x_loc"] + BOXES[i][0], o["y_loc"], BOX_COLORS[names[o["color"]]]
        )
        for i, box in enumerate(structured)
        for o in box
    ]
    stacked = all(o.shape == "square" and o.size == 20 and o.x % 150 == 40 for o in items)
    return Scene("tower" if stacked else "scatter", 400, 100, GAP_GREY, BOXES, tuple(items))


def _scatter(rng: random.Random) -> Scene:
    items: list[Item] = []
    for x0, y0, side, _ in BOXES:
        placed: list[Item] = []
        for _ in range(rng.choices(range(1, 9), (8, 8, 8, 8, 8, 8, 8, 2))[0]):
            color = rng.choice(tuple(BOX_COLORS))
            shape, size = rng.choice(BOX_SHAPES), rng.choice(tuple(BOX_SIZES))
            for _ in range(60):
                x, y = (min(rng.randrange(side), side - size) for _ in range(2))
                item = Item(shape, color, size, x0 + x, y0 + y, BOX_COLORS[color])
                if all(gap(item, other) >= 1 for other in placed):
                    placed.append(item)
                    break
        items += placed
    return Scene("scatter", 400, 100, GAP_GREY, BOXES, tuple(items))


def _tower(rng: random.Random) -> Scene:
    items = []
    palette = rng.choices(tuple(BOX_COLORS), k=rng.choice((1, 2, 3))) if rng.random() < 0.25 else tuple(BOX_COLORS)
    for x0, y0, _, _ in BOXES:
        for level in range(rng.randint(1, 4)):
            color = rng.choice(palette)
            items.append(Item("square", color, 20, x0 + 40, y0 + 80 - 21 * level, BOX_COLORS[color]))
    return Scene("tower", 400, 100, GAP_GREY, BOXES, tuple(items))


def _crowd(rng: random.Random) -> Scene:
    return _canvas(rng, 8, 16)


def _canvas(rng: random.Random, least: int = 1, most: int = 8) -> Scene:
    area, aspect = rng.uniform(180, 360) ** 2, 2 ** rng.uniform(-1.58, 2.0)  # width : height from 1:3 to 4:1
    width, height = round(sqrt(area * aspect)), round(sqrt(area / aspect))
    background = rng.choice(BACKGROUNDS)
    palette = [c for c, rgb in COLORS.items() if _distance(rgb, background) > 110]
    if rng.random() < 0.4:  # few colours, so that counting by colour goes beyond one
        palette = rng.sample(palette, rng.choice((1, 2, 3)))
    shapes = rng.sample(SHAPES, rng.choice((1, 2, 3))) if rng.random() < 0.4 else list(SHAPES)
    margin = max(2, round(0.02 * sqrt(area)))
    placed: list[Item] = []
    for _ in range(rng.randint(least, most)):
        color, shape = rng.choice(palette), rng.choice(shapes)
        base = (0, 153, 255) if color == "blue" and rng.random() < 0.4 else COLORS[color]
        rgb = tuple(min(255, max(0, v + rng.randint(-12, 12))) for v in base)
        for _ in range(40):
            low, high = CANVAS_FRACTIONS[rng.choice(SIZES)]
            size = max(6, round(rng.uniform(low, high) * sqrt(area)))
            x, y = rng.randint(0, width - size), rng.randint(0, height - size)
            item = Item(shape, color, size, x, y, (rgb[0], rgb[1], rgb[2]))
            if all(gap(item, other) >= margin for other in placed):
                placed.append(item)
                break
    return Scene("canvas", width, height, background, ((0, 0, width, height),), tuple(placed))


def _distance(a: Rgb, b: Rgb) -> float:
    return sqrt(sum((p - q) ** 2 for p, q in zip(a, b, strict=True)))


def gap(a: Item, b: Item) -> int:
    """Pixels between the squares around two items, along the axis that separates them; negative when they overlap."""
    return max(a.x - b.x - b.size, b.x - a.x - a.size, a.y - b.y - b.size, b.y - a.y - a.size)


def box_items(scene: Scene) -> list[list[Item]]:
    """The items of each box, in drawing order (towers: from the base to the top)."""
    return [[i for i in scene.items if x <= i.x < x + w and y <= i.y < y + h] for x, y, w, h in scene.boxes]


def size_name(scene: Scene, item: Item) -> str:
    """small, medium or big; on a canvas relative to the picture."""
    if scene.kind != "canvas":
        return BOX_SIZES[item.size]
    fraction = item.size / sqrt(scene.width * scene.height)
    return "small" if fraction < 0.083 else "medium" if fraction < 0.135 else "big"


def walls(scene: Scene, item: Item) -> tuple[str, ...]:
    """Which walls of its box a shape of a box scene touches, among left, top, right, bottom."""
    x, y, w, h = next(b for b in scene.boxes if b[0] <= item.x < b[0] + b[2] and b[1] <= item.y < b[1] + b[3])
    sides = {
        "left": item.x == x,
        "top": item.y == y,
        "right": item.x + item.size == x + w,
        "bottom": item.y + item.size == y + h,
    }
    return tuple(name for name, touched in sides.items() if touched)


def render(scene: Scene) -> Image.Image:
    """Draw the scene as RGB, edges antialiased by area coverage."""
    image = Image.new("RGB", (scene.width, scene.height), scene.background)
    if scene.kind != "canvas":
        for x, y, w, h in scene.boxes:
            image.paste(BOX_GREY, (x, y, x + w, y + h))
    for item in scene.items:
        image.paste(item.rgb, (item.x, item.y), _coverage(item.shape, item.size))
    return image


@lru_cache(maxsize=2048)
def _coverage(shape: str, size: int) -> Image.Image:
    """How much of each pixel the shape covers, 0-255, (size, size): the share of its sample points that are inside."""
    samples = (np.arange(size * SUPERSAMPLING) + 0.5) / (size * SUPERSAMPLING)
    u, v = np.meshgrid(samples, samples)
    if shape == "circle":
        inside = (u - 0.5) ** 2 + (v - 0.5) ** 2 <= 0.25
    elif shape == "square":
        inside = np.ones_like(u, dtype=bool)
    elif shape == "cross":
        inside = (np.abs(u - 0.5) < 0.16) | (np.abs(v - 0.5) < 0.16)
    else:
        inside = np.zeros_like(u, dtype=bool)
        corners = _corners(shape)
        for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
            if y0 != y1:  # even-odd rule: every edge to the right of a point flips it
                inside ^= ((v < y0) != (v < y1)) & (u < x0 + (v - y0) * (x1 - x0) / (y1 - y0))
    share = inside.reshape(size, SUPERSAMPLING, size, SUPERSAMPLING).mean((1, 3))
    return Image.fromarray((255 * share).round().astype(np.uint8))


def _corners(shape: str) -> list[tuple[float, float]]:
    if shape == "triangle":
        return [(0.5, 0.0), (1.0, 1.0), (0.0, 1.0)]
    if shape == "diamond":
        return [(0.5, 0.0), (1.0, 0.5), (0.5, 1.0), (0.0, 0.5)]
    radii = (0.5, 0.2)  # a star alternates between an outer and an inner circle
    return [(0.5 + radii[k % 2] * sin(k * pi / 5), 0.5 - radii[k % 2] * cos(k * pi / 5)) for k in range(10)]
