"""What the embedded assistant animates: one shape that moves, grows or shrinks. Every fact of a clip is known.

A `Motion` says what must be seen and nothing else; `caption` puts it into words, `animate` draws one of the many clips that
fulfil it: `FRAMES` pictures of `SIDE` x `SIDE` pixels, the whole path inside the picture and about its middle.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

import numpy as np
from drawings import BACKGROUNDS, HELD_OUT_EVERY
from PIL import Image
from scene_model import COLORS, SHAPES, Item, Scene, render

SIDE = 64
FRAMES = 8
FRAMES_PER_SECOND = 4.0
SIZES = (22, 24)  # pixels of a shape, from and to
SMALL, BIG = (12, 14), (27, 29)  # between them it grows and shrinks
# Pixels from the first frame to the last. Without a word for the pace it is one between: any is right.
TRAVEL = {"slowly": (12, 15), "": (20, 23), "quickly": (28, 33)}
TRAVEL_AND_BACK = (26, 30)  # pixels to the turning point
ASIDE = 1.5  # pixels between the middle of the picture and that of the path
FINER = 2  # positions and sizes are multiples of 1 / FINER pixels
PACES = ("", "slowly", "quickly")  # without a word any of them is right
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
WAYS = {"left": "to the left", "right": "to the right", "up": "upwards", "down": "downwards"}
MOVES = (*DIRECTIONS, *(f"{way} and back" for way in DIRECTIONS), "growing", "shrinking")


@dataclass(frozen=True)
class Motion:
    """``move`` is one of MOVES; only straight ones may have a ``pace``, one of PACES."""

    shape: str
    color: str
    move: str
    pace: str = ""
    background: str = "white"


def sample_motion(rng: random.Random) -> Motion:
    """Any motion; seven of ten go straight in one direction."""
    background = rng.choices(tuple(BACKGROUNDS), (6, 2, 2))[0]
    color = rng.choice([name for name in COLORS if name != background])
    move = rng.choice(MOVES[:4]) if rng.random() < 0.7 else rng.choice(MOVES[4:])
    pace = rng.choices(PACES, (4, 3, 3))[0] if move in DIRECTIONS else ""
    return Motion(rng.choice(SHAPES), color, move, pace, background)


def moving(move: str, pace: str = "") -> str:
    """The words for a move, e.g. "moving quickly to the right", "moving upwards and back", "growing"."""
    way, back, _ = move.partition(" and back")
    if way not in WAYS:
        return move
    return " ".join(word for word in ("moving", pace, WAYS[way] + back) if word)


def caption(motion: Motion) -> str:
    """The motion in words, e.g. "a red circle moving quickly to the right on a black background"."""
    article = "an" if motion.color[0] in "aeiou" else "a"
    text = f"{article} {motion.color} {motion.shape} {moving(motion.move, motion.pace)}"
    return text if motion.background == "white" else f"{text} on a {motion.background} background"


def held_out(motion: Motion) -> bool:
    """Whether this motion is for the test only."""
    return int(hashlib.sha256(caption(motion).encode()).hexdigest(), 16) % HELD_OUT_EVERY == 0


def motions(rng: random.Random, test: bool) -> Motion:
    """A motion of the training side or of the test side."""
    while held_out(motion := sample_motion(rng)) != test:
        pass
    return motion


def path(motion: Motion, rng: random.Random) -> np.ndarray:
    """One way to fulfil the motion: centre and size in every frame, ``(FRAMES, 3)`` of x, y, size in pixels.

    The path lies about the middle of the picture. Anywhere in it would do as well, but a generator that has to choose a place
    learns slowly that all frames must agree on it.
    """
    time = np.linspace(0, 1, FRAMES)
    if motion.move in ("growing", "shrinking"):
        first, last = rng.uniform(*SMALL), rng.uniform(*BIG)
        sizes = first + (last - first) * (time if motion.move == "growing" else 1 - time)
        travel, shares, step = 0.0, np.zeros(FRAMES), (0, 0)
    else:
        way, back, _ = motion.move.partition(" and back")
        travel, step = rng.uniform(*(TRAVEL_AND_BACK if back else TRAVEL[motion.pace])), DIRECTIONS[way]
        # The turning point is a frame, so that no two frames in a row are the same.
        shares = np.interp(time, [0, 4 / 7, 1], [0, 1, 0]) if back else time
        sizes = np.full(FRAMES, rng.uniform(*SIZES))
    columns = [SIDE / 2 + rng.uniform(-ASIDE, ASIDE) + axis * travel * (shares - 0.5 * shares.max()) for axis in step]
    return np.stack([*columns, sizes], axis=1)


def picture(shapes: list[tuple[str, str, float, float, float]], background: str) -> Image.Image:
    """Shapes (name, colour, centre x and y, size in pixels) on a background, with smooth edges, SIDE x SIDE."""
    items = []
    for shape, color, x, y, size in shapes:
        fine = round(size * FINER)
        items.append(Item(shape, color, fine, round(x * FINER - fine / 2), round(y * FINER - fine / 2), COLORS[color]))
    side = SIDE * FINER
    return render(Scene("canvas", side, side, BACKGROUNDS[background], ((0, 0, side, side),), tuple(items))).reduce(
        FINER
    )


def animate(motion: Motion, rng: random.Random) -> list[Image.Image]:
    """One of the clips that fulfil the motion, as FRAMES pictures."""
    return [picture([(motion.shape, motion.color, *row)], motion.background) for row in path(motion, rng)]
