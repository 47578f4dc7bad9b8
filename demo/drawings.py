"""What the embedded assistant draws: small scenes asked for in words. Every fact of a drawing is known.

A `Wish` says what must be in the picture and nothing else; `caption` puts it into words, `place_items` draws one of the
many pictures that fulfil it. Drawings are 64 x 64 pixels; shapes lie near the centres of a 3 x 3 grid, so that "at the top
left" is never in doubt.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, replace

from scene_model import COLORS, SHAPES, Item, Rgb, Scene
from scene_text import NUMBERS

SIDE = 64
SIZES = (11, 12)  # pixels of a shape
JITTER = 3  # pixels around the centre of a cell
MOST_ITEMS = 6
BACKGROUNDS: dict[str, Rgb] = {"white": (255, 255, 255), "grey": (128, 128, 128), "black": (10, 10, 15)}
PLACES = (
    "at the top left", "at the top", "at the top right",
    "on the left", "in the middle", "on the right",
    "at the bottom left", "at the bottom", "at the bottom right",
)  # fmt: skip
RELATIONS = ("left of", "right of", "above", "below")
HELD_OUT_EVERY = 12  # one caption of so many is never trained on


@dataclass(frozen=True)
class Group:
    """``count`` shapes of one kind; ``place`` is one of PLACES or "", and only single shapes have one."""

    count: int
    color: str
    shape: str
    place: str = ""

    def words(self) -> str:
        number = NUMBERS[self.count] if self.count > 1 else "an" if self.color[0] in "aeiou" else "a"
        noun = self.shape if self.count == 1 else self.shape + ("es" if self.shape == "cross" else "s")
        return f"{number} {self.color} {noun}" + (f" {self.place}" if self.place else "")


@dataclass(frozen=True)
class Wish:
    """Groups of different kinds; with a ``relation`` there are two single shapes, the first related to the second."""

    groups: tuple[Group, ...]
    relation: str = ""
    background: str = "white"


def sample_wish(rng: random.Random) -> Wish:
    """Any wish, with one to three groups and at most ``MOST_ITEMS`` shapes."""
    background = rng.choices(tuple(BACKGROUNDS), (6, 2, 2))[0]
    colors = [name for name in COLORS if name != background]
    kinds: list[tuple[str, str]] = []
    number = rng.choices((1, 2, 3), (4, 5, 3))[0]
    while len(kinds) < number:
        kind = (rng.choice(colors), rng.choice(SHAPES))
        if kind not in kinds:
            kinds.append(kind)
    if number == 2 and rng.random() < 0.3:
        return Wish(tuple(Group(1, *kind) for kind in kinds), rng.choice(RELATIONS), background)
    if rng.random() < 0.5:
        places = rng.sample(PLACES, number)
        return Wish(tuple(Group(1, *k, place) for k, place in zip(kinds, places, strict=True)), "", background)
    most = MOST_ITEMS if number == 1 else 4 if number == 2 else 2
    counts = [rng.randint(1, most) for _ in kinds]
    while sum(counts) > MOST_ITEMS:
        counts[counts.index(max(counts))] -= 1
    return Wish(tuple(Group(n, *k) for n, k in zip(counts, kinds, strict=True)), "", background)


def caption(wish: Wish) -> str:
    """The wish in words, e.g. "two red circles and a blue square on a black background"."""
    parts = [group.words() for group in wish.groups]
    if wish.relation:
        text = f"{parts[0]} {wish.relation} {parts[1]}"
    else:
        text = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return text if wish.background == "white" else f"{text} on a {wish.background} background"


def held_out(wish: Wish) -> bool:
    """Whether this wish is for the test only, whatever the order of its groups."""
    name = "|".join(sorted(group.words() for group in wish.groups)) + wish.relation + wish.background
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT_EVERY == 0


def wishes(rng: random.Random, test: bool) -> Wish:
    """A wish of the training side or of the test side."""
    while held_out(wish := sample_wish(rng)) != test:
        pass
    return wish


# Columns of one row of the grid for one, two and three shapes.
ROWS: dict[int, tuple[int, ...]] = {1: (1,), 2: (0, 2), 3: (0, 1, 2)}
# The cells of a group that is alone, as on dice.
ALONE = {1: (4,), 2: (3, 5), 3: (3, 4, 5), 4: (0, 2, 6, 8), 5: (0, 2, 4, 6, 8), 6: (0, 1, 2, 6, 7, 8)}
RELATED = {"left of": (3, 5), "right of": (5, 3), "above": (1, 7), "below": (7, 1)}
FREE = (4, 1, 7, 3, 5, 0, 2, 6, 8)  # where shapes without a place go beside some with one


def cells(wish: Wish) -> list[int]:
    """A cell of the grid, row by row from 0 to 8, for every shape of the groups in turn.

    Tidily: equal wishes lie alike, a group alone as on dice, several groups one below the other. Where anything may lie
    anywhere, a denoiser has to agree with itself on what goes where while it still sees only noise, and miscounts.
    """
    counts = [group.count for group in wish.groups]
    if wish.relation:
        return list(RELATED[wish.relation])
    if any(group.place for group in wish.groups):
        taken = [PLACES.index(group.place) for group in wish.groups if group.place]
        free = iter(cell for cell in FREE if cell not in taken)
        return [
            PLACES.index(group.place) if group.place else next(free)
            for group in wish.groups
            for _ in range(group.count)
        ]
    if len(counts) == 1:
        return list(ALONE[counts[0]])
    lines = [
        line for count in counts for line in ([2, count - 2] if count > 3 else [count])
    ]  # four or more in two rows
    if len(lines) > len(ROWS):
        return list(range(sum(counts)))
    rows = (0, 2) if len(lines) == 2 else (0, 1, 2)
    return [3 * row + column for row, line in zip(rows, lines, strict=True) for column in ROWS[line]]


def place_items(wish: Wish, rng: random.Random) -> Scene:
    """One of the pictures that fulfil the wish, as a scene of kind "canvas"."""
    kinds = [group for group in wish.groups for _ in range(group.count)]
    items = []
    for group, cell in zip(kinds, cells(wish), strict=True):
        size = rng.choice(SIZES)
        row, column = divmod(cell, 3)
        x, y = (round((2 * k + 1) * SIDE / 6 - size / 2) + rng.randint(-JITTER, JITTER) for k in (column, row))
        items.append(Item(group.shape, group.color, size, x, y, COLORS[group.color]))
    whole = ((0, 0, SIDE, SIDE),)
    return Scene("canvas", SIDE, SIDE, BACKGROUNDS[wish.background], whole, tuple(items))


def training_round(seed: int, number: int, count: int) -> list[tuple[Wish, Scene]]:
    """What the picture generator's denoiser newly sees in round ``number`` of a training: wishes and their pictures."""
    rng = random.Random(f"drawings-{seed}-{number}")
    wanted = [wishes(rng, test=False) for _ in range(count)]
    return [(wish, place_items(wish, rng)) for wish in wanted]


def recolored(wish: Wish, index: int, color: str) -> Wish:
    """The wish with another colour for one of its groups."""
    groups = list(wish.groups)
    groups[index] = replace(groups[index], color=color)
    return replace(wish, groups=tuple(groups))
