"""What statements speak of: blocks with colour, shape, size, touched walls and level, and tests on lists of them.

A quantifier is an interval (low, high) of counts; a noun phrase is a test of one block; a counted phrase or a box
property is a test of the blocks of a box, from the base to the top; a statement is a test of the three boxes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from scene_model import Scene, box_items, gap, size_name, walls

MANY = 99


@dataclass(frozen=True)
class Block:
    """A shape as the sentences see it; ``level`` 0 is the base of a tower, ``near`` the walls within a pixel."""

    color: str
    shape: str
    size: str
    walls: frozenset[str]
    near: frozenset[str]
    level: int
    height: int
    box: int
    colors: tuple[str, ...]  # of the whole box, from the base to the top
    friends: frozenset[str]  # colours of the blocks this one touches


def view(scene: Scene) -> list[list[Block]]:
    """The three lists of blocks of a scatter or tower scene."""
    result = []
    for index, items in enumerate(box_items(scene)):
        x0 = scene.boxes[index][0]
        colors = tuple(i.color for i in items)
        blocks = []
        for level, i in enumerate(items):
            distance = {"left": i.x - x0, "top": i.y, "right": x0 + 100 - i.x - i.size, "bottom": 100 - i.y - i.size}
            near = frozenset(side for side, d in distance.items() if d <= 1)
            friends = frozenset(o.color for o in items if o is not i and gap(i, o) <= 1)
            touched = frozenset(walls(scene, i))
            size = size_name(scene, i)
            blocks.append(Block(i.color, i.shape, size, touched, near, level, len(items), index, colors, friends))
        result.append(blocks)
    return result


Blocks = list[Block]


def everything(world: list[Blocks]) -> Blocks:
    return [b for box in world for b in box]


def counts(q: tuple[int, int], p: Callable[[Block], bool]) -> Callable[[Blocks], bool]:
    return lambda blocks: q[0] <= sum(map(p, blocks)) <= q[1]


def boxes_where(q: tuple[int, int], *props: Callable[[Blocks], bool]) -> Callable[[list[Blocks]], bool]:
    return lambda world: q[0] <= sum(all(p(box) for p in props) for box in world) <= q[1]


def all_of(*props: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda x: all(p(x) for p in props)


def anything(_: Any) -> bool:
    return True


def runs(p: Callable[[Block], bool], q: tuple[int, int]) -> Callable[[Blocks], bool]:
    """The longest run of neighbours in a tower that satisfy ``p`` has a length in ``q``."""

    def longest(blocks: Blocks) -> bool:
        best = now = 0
        for block in blocks:
            now = now + 1 if p(block) else 0
            best = max(best, now)
        return q[0] <= best <= q[1]

    return longest


def sharing(blocks: Blocks, p: Callable[[Block], bool], q: tuple[int, int], trait: Callable[[Block], str]) -> bool:
    """``q`` of the blocks that satisfy ``p`` share a trait."""
    values = [trait(b) for b in blocks if p(b)]
    return any(q[0] <= values.count(v) <= q[1] for v in set(values))


def above(test: Callable[[Block], bool]) -> Callable[[Block], bool]:
    """Directly on top of a block that passes: labels say that "above" and "over" mean this too."""
    return lambda b: b.level > 0 and test(painted(b, b.colors[b.level - 1]))


def below(test: Callable[[Block], bool]) -> Callable[[Block], bool]:
    return lambda b: b.level + 1 < b.height and test(painted(b, b.colors[b.level + 1]))


def painted(b: Block, color: str) -> Block:
    """A neighbour of ``b`` in its tower, of which only the colour matters."""
    return replace(b, color=color)


def colors_are(*colors: Callable[[Block], bool]) -> Callable[[Blocks], bool]:
    """Every block has one of the colours, and every colour occurs."""
    return lambda blocks: all(any(c(b) for c in colors) for b in blocks) and all(any(map(c, blocks)) for c in colors)


def distinct(q: tuple[int, int], trait: Callable[[Block], str]) -> Callable[[Blocks], bool]:
    return lambda blocks: q[0] <= len({trait(b) for b in blocks}) <= q[1]


def color_of(b: Block) -> str:
    return b.color


def shape_of(b: Block) -> str:
    return b.shape


def exact(n: int) -> tuple[int, int]:
    return n, n


def named(name: str) -> Callable[[Block], bool]:
    return lambda b: name in (b.color, b.shape, b.size)


def share(world: list[Blocks], q: tuple[int, int], trait: Callable[[Blocks], Any]) -> bool:
    values = [trait(box) for box in world if box]
    return any(q[0] <= values.count(v) <= q[1] for v in values)


def tower_of(b: Block) -> Blocks:
    return [replace(b, color=c, level=k) for k, c in enumerate(b.colors)]
