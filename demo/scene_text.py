"""Scenes in words: short captions of one part, full captions, and complete descriptions that replace the picture."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable

from scene_model import BOX_NAMES, COLORS, SHAPES, Item, Scene, box_items, gap, size_name, walls

NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty", "twenty-one",
    "twenty-two", "twenty-three", "twenty-four",
)  # fmt: skip


def place(scene: Scene, item: Item) -> str:
    """Where the centre of an item lies in its box, in thirds: top left, top, ..., center, ..., bottom right."""
    x, y, w, h = next(b for b in scene.boxes if b[0] <= item.x < b[0] + b[2] and b[1] <= item.y < b[1] + b[3])
    column = ("left", "", "right")[min(2, int(3 * (item.x + item.size / 2 - x) / w))]
    row = ("top", "", "bottom")[min(2, int(3 * (item.y + item.size / 2 - y) / h))]
    return f"{row} {column}".strip() or "center"


def reading_order(items: Iterable[Item]) -> list[Item]:
    """Left to right by centre, then top to bottom: the order in which texts list the items of a box."""
    return sorted(items, key=lambda i: (i.x + i.size / 2, i.y + i.size / 2))


def plural(count: int, noun: str) -> str:
    ending = "es" if noun.endswith(("s", "x")) else "s"
    return f"{NUMBERS[count]} {noun}{ending if count != 1 else ''}"


def touching(scene: Scene, item: Item) -> str:
    sides = walls(scene, item)
    return f" touching {' and '.join(sides)} wall" if sides else ""


def counted(names: Iterable[str], order: Iterable[str]) -> str:
    """Counts in a fixed order of names: "two black, one yellow"; "nothing" when there are none."""
    counts = Counter(names)
    return ", ".join(f"{NUMBERS[counts[n]]} {n}" for n in order if counts[n]) or "nothing"


def describe_box(scene: Scene, index: int) -> str:
    """Everything in one box of a box scene."""
    items, name = box_items(scene)[index], BOX_NAMES[index]
    if scene.kind == "tower":
        return f"{name} box: tower of {plural(len(items), 'block')}: {', '.join(i.color for i in items)}"
    listed = [
        f"{size_name(scene, i)} {i.color} {i.shape} {place(scene, i)}{touching(scene, i)}" for i in reading_order(items)
    ]
    close = [
        f"{a.color} {a.shape} touching {b.color} {b.shape}"
        for k, a in enumerate(items) for b in items[k + 1 :] if gap(a, b) <= 1
    ]  # fmt: skip
    return f"{name} box: {plural(len(items), 'item')}: " + "; ".join(listed + close)


def describe(scene: Scene) -> str:
    """The complete scene as compact text, one sentence per box: what a language model reads instead of the picture.

    Towers are listed from the base to the top, other items from left to right.
    """
    if scene.kind != "canvas":
        return ". ".join(describe_box(scene, k) for k in range(len(scene.boxes))) + "."
    listed = (f"{size_name(scene, i)} {i.color} {i.shape} {place(scene, i)}" for i in reading_order(scene.items))
    return f"{plural(len(scene.items), 'item')}: " + "; ".join(listed) + "."


def summary(scene: Scene) -> str:
    """The whole picture at a coarse grain: colours per box, or the colours and shapes of a canvas."""
    if scene.kind == "canvas":
        return "picture: " + ", ".join(f"{i.color} {i.shape}" for i in reading_order(scene.items))
    if scene.kind == "tower":
        parts = [
            f"{n} {' '.join(i.color for i in items)}" for n, items in zip(BOX_NAMES, box_items(scene), strict=True)
        ]
        return "towers: " + ", ".join(parts)
    parts = [
        f"{n} {counted((i.color for i in items), COLORS)}" for n, items in zip(BOX_NAMES, box_items(scene), strict=True)
    ]
    return "boxes: " + "; ".join(parts)


def part_captions(scene: Scene, rng: random.Random, count: int) -> list[str]:
    """``count`` short captions, each exact about one part of the scene that its first words name."""
    return [rng.choice(_PARTS[scene.kind])(scene, rng) for _ in range(count)]


def _pick(scene: Scene, rng: random.Random) -> tuple[str, list[Item]]:
    index = rng.randrange(len(scene.boxes))
    return BOX_NAMES[index], box_items(scene)[index]


def _kinds(scene: Scene, rng: random.Random) -> str:
    name, items = _pick(scene, rng)
    return f"{name} box kinds: " + ", ".join(f"{size_name(scene, i)} {i.color} {i.shape}" for i in reading_order(items))


def _places(scene: Scene, rng: random.Random) -> str:
    name, items = _pick(scene, rng)
    return f"{name} box places: " + ", ".join(f"{i.color} {place(scene, i)}" for i in reading_order(items))


def _walls(scene: Scene, rng: random.Random) -> str:
    name, items = _pick(scene, rng)
    touched = [i for i in reading_order(items) if walls(scene, i)]
    listed = (f"{i.color} {i.shape} {' '.join(walls(scene, i))}" for i in touched)
    return f"{name} box walls: " + (", ".join(listed) or "nothing")


def _box_counts(scene: Scene, rng: random.Random) -> str:
    name, items = _pick(scene, rng)
    if rng.random() < 0.5:
        return f"{name} box shapes: {counted((i.shape for i in items), SHAPES)}"
    return f"{name} box colors: {NUMBERS[len(items)]} items, {counted((i.color for i in items), COLORS)}"


def _total_counts(scene: Scene, rng: random.Random) -> str:
    if rng.random() < 0.5:
        return f"all shapes: {counted((i.shape for i in scene.items), SHAPES)}"
    return f"all colors: {NUMBERS[len(scene.items)]} items, {counted((i.color for i in scene.items), COLORS)}"


def _color_counts(scene: Scene, rng: random.Random) -> str:
    color = rng.choice(scene.items).color
    return f"all {color}: {counted((i.shape for i in scene.items if i.color == color), SHAPES)}"


def _wall_counts(scene: Scene, rng: random.Random) -> str:
    touched = [i for i in scene.items if walls(scene, i)]
    return f"all walls: {NUMBERS[len(touched)]} items, {counted((i.color for i in touched), COLORS)}"


def _tower_one(scene: Scene, rng: random.Random) -> str:
    name, items = _pick(scene, rng)
    return f"{name} box tower: {NUMBERS[len(items)]} blocks, {' '.join(i.color for i in items)}"


def _tower_ends(scene: Scene, rng: random.Random) -> str:
    end = rng.choice(("base", "top"))
    return f"towers {end}: " + " ".join(items[0 if end == "base" else -1].color for items in box_items(scene))


def _tower_heights(scene: Scene, rng: random.Random) -> str:
    return "towers heights: " + " ".join(NUMBERS[len(items)] for items in box_items(scene))


def _canvas_kinds(scene: Scene, rng: random.Random) -> str:
    return "picture kinds: " + ", ".join(
        f"{size_name(scene, i)} {i.color} {i.shape}" for i in reading_order(scene.items)
    )


def _canvas_places(scene: Scene, rng: random.Random) -> str:
    return "picture places: " + ", ".join(f"{i.color} {place(scene, i)}" for i in reading_order(scene.items))


def _summary(scene: Scene, rng: random.Random) -> str:
    return summary(scene)


_PARTS = {
    "canvas": (_summary, _canvas_kinds, _canvas_places, _total_counts, _color_counts),
    "scatter": (_kinds, _kinds, _places, _walls, _box_counts, _total_counts, _wall_counts),
    "tower": (_tower_one, _tower_ends, _tower_heights, _total_counts),
}


def caption(scene: Scene, rng: random.Random) -> str:
    """A caption in plain words, sometimes short ("two red stars and one blue circle"), sometimes complete."""
    if rng.random() < 0.4:
        return describe(scene)
    if scene.kind == "tower":
        heights = [NUMBERS[len(items)] for items in box_items(scene)]
        return f"three boxes with towers of {heights[0]}, {heights[1]} and {heights[2]} blocks."
    counts = Counter((i.color, i.shape) for i in scene.items)
    if scene.kind == "scatter":
        return f"three boxes with {counted((i.color for i in scene.items), COLORS)} items."
    listed = [plural(n, f"{color} {shape}") for (color, shape), n in counts.items()]
    return (f"{', '.join(listed[:-1])} and {listed[-1]}" if len(listed) > 1 else listed[0]) + "."
