"""Is it drawn, or remembered? The nearest pictures and captions among those that the picture generator was trained on.

The trainings draw their pictures on the fly from a seed, so any number of them can be drawn again. Distances are root mean
square differences over pixels and channels, from 0 to 255.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from drawings import SIDE, Wish, caption, training_round
from PIL import Image
from scene_model import Scene, render
from train_image_generator import BANK

CHUNK = 1024  # training pictures compared at a time


@dataclass(frozen=True)
class Neighbour:
    """A training picture and what was asked for there. ``measure`` is the distance of its pixels, or the share of facts that
    its caption has in common, as it was looked for.
    """

    wish: Wish
    scene: Scene
    measure: float

    def picture(self) -> Image.Image:
        return render(self.scene)


class TrainingDrawings:
    """The first ``count`` pictures and captions of the training of the picture generator with ``seed``."""

    def __init__(self, count: int, seed: int) -> None:
        found: list[tuple[Wish, Scene]] = []
        number = 0
        while len(found) < count:
            found += training_round(seed, number, BANK // 3 if number else BANK)
            number += 1
        self.drawn = found[:count]
        self.facts = [facts_of(wish) for wish, _ in self.drawn]
        self.captions = {caption(wish) for wish, _ in self.drawn}

    def by_pixels(self, pictures: list[Image.Image]) -> list[Neighbour]:
        """The nearest training picture of each; pictures of another size are scaled to that of the training."""
        queries = np.stack([values(picture.resize((SIDE, SIDE))) for picture in pictures])
        square = np.square(queries).sum(1)
        best, index = np.full(len(queries), np.inf), np.zeros(len(queries), dtype=int)
        for start in range(0, len(self.drawn), CHUNK):
            chunk = np.stack([values(render(scene)) for _, scene in self.drawn[start : start + CHUNK]])
            squares = square[:, None] - 2 * queries @ chunk.T + np.square(chunk).sum(1)
            nearest = squares.argmin(1)
            closer = squares[np.arange(len(queries)), nearest] < best
            best = np.where(closer, squares.min(1), best)
            index = np.where(closer, start + nearest, index)
        return [
            Neighbour(*self.drawn[k], distance(query, self.drawn[k][1]))
            for query, k in zip(queries, index, strict=True)
        ]

    def by_facts(self, wish: Wish) -> Neighbour:
        """The training picture whose caption says the most alike: facts in both captions over facts in one of them."""
        wanted = facts_of(wish)
        shares = [len(wanted & said) / len(wanted | said) for said in self.facts]
        best = max(range(len(shares)), key=shares.__getitem__)
        return Neighbour(*self.drawn[best], shares[best])


def values(picture: Image.Image) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.asarray(picture.convert("RGB"), dtype=np.float32).reshape(-1)


def distance(query: np.ndarray[Any, np.dtype[np.float32]], scene: Scene) -> float:
    return math.sqrt(float(np.square(query - values(render(scene))).mean()))


def facts_of(wish: Wish) -> frozenset[tuple[Any, ...]]:
    """All that a wish says, in whatever order; "a right of b" is "b left of a"."""
    said: set[tuple[Any, ...]] = {("background", wish.background)}
    for group in wish.groups:
        said |= {("kind", group.color, group.shape), ("count", group.color, group.shape, group.count)}
        if group.place:
            said.add(("place", group.color, group.shape, group.place))
    if wish.relation:
        pair = tuple((group.color, group.shape) for group in wish.groups)
        mirrored = {"right of": "left of", "below": "above"}
        name = mirrored.get(wish.relation, wish.relation)
        said.add((name, *(pair if name == wish.relation else pair[::-1])))
    return frozenset(said)


def spread(distances: Iterable[float]) -> dict[str, Any]:
    listed = list(distances)
    return {"n": len(listed), "median": round(median(listed), 2), "smallest": round(min(listed), 2)}


def nearness(
    training: TrainingDrawings, wanted: list[Wish], pictures: list[Image.Image], true: list[Image.Image]
) -> dict[str, Any]:
    """How near ``pictures`` come to those of the training; beside them ``true`` pictures of the same ``wanted``, which nobody
    can have remembered. And how many wishes a training caption asks for, in the same words or in others.
    """
    return {
        "searched": len(training.drawn),
        "pictures made": spread(near.measure for near in training.by_pixels(pictures)) if pictures else None,
        "true pictures": spread(near.measure for near in training.by_pixels(true)),
        "captions that occur": sum(caption(wish) in training.captions for wish in wanted),
        "captions that occur in other words": sum(
            training.by_facts(wish).measure == 1.0 and caption(wish) not in training.captions for wish in wanted
        ),
    }
