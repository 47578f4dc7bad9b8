"""Read a clip back from its pixels: which shape, in which colour, how it moves. Shares no code with what animates it.

`picture_parser` reads every frame; shape, colour and background are what most frames show. The move follows from where the
shape is and how large: both are fitted to what a move means, not to how it is drawn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from picture_parser import Found, parse

# All as shares of the picture's side.
STILL = 0.08  # the shape has not moved
SLOW = 0.34  # straight moves of less are slow
ASTRAY = 0.08  # a straight path may go back, or aside, by so much
GROWN = 1.4  # how many times larger (in length) the shape is at the end


@dataclass(frozen=True)
class ParsedClip:
    """``move`` is "left", "left and back", …, "growing", "shrinking", or "still" or "unclear"; ``pace`` "slowly", "quickly" or
    "" where nothing goes straight. ``alone``: exactly one shape in every frame.
    """

    shape: str
    color: str
    background: str
    move: str
    pace: str
    alone: bool


def parse_clip(frames: Sequence[np.ndarray]) -> ParsedClip:
    """``frames`` are RGB, uint8 ``(H, W, 3)``."""
    parsed = [parse(frame) for frame in frames]
    found = [max(one.shapes, key=lambda shape: shape.area, default=None) for one in parsed]
    seen = [shape for shape in found if shape is not None]
    background = most([(one.background, 1.0) for one in parsed])
    if len(seen) < len(frames):
        return ParsedClip("", "", background, "unclear", "", False)
    shape = most([(one.shape, one.area) for one in seen])
    color = most([(one.color, one.area) for one in seen])
    move, pace = motion(seen)
    return ParsedClip(shape, color, background, move, pace, all(len(one.shapes) == 1 for one in parsed))


def most(votes: list[tuple[str, float]]) -> str:
    counted: Counter[str] = Counter()
    for name, weight in votes:
        counted[name] += weight  # type: ignore[assignment]
    return counted.most_common(1)[0][0]


def motion(shapes: Sequence[Found]) -> tuple[str, str]:
    """The move and the pace of one shape through the frames."""
    lengths = np.sqrt([shape.area for shape in shapes])
    ends = lengths[-2:].mean() / lengths[:2].mean()
    places = np.array([(shape.x, shape.y) for shape in shapes])
    places = places - places[0]
    farthest = places[np.abs(places).max(axis=1).argmax()]
    axis = int(np.abs(farthest).argmax())
    along, aside = places[:, axis], places[:, 1 - axis]
    reach = float(along[np.abs(along).argmax()])
    if abs(reach) < STILL:
        return ("growing" if ends > GROWN else "shrinking" if ends < 1 / GROWN else "still"), ""
    way = (("left", "right"), ("up", "down"))[axis][int(reach > 0)]
    along, turn = along * np.sign(reach), int(np.abs(along).argmax())
    strayed = max(np.abs(aside).max(), -steps(along[: turn + 1]).min(initial=0.0))
    if strayed > ASTRAY or not 1 / GROWN < ends < GROWN:
        return "unclear", ""
    if along[-1] > 0.75 * along[turn]:
        return way, "slowly" if along[-1] < SLOW else "quickly"
    returned = along[-1] < 0.35 * along[turn] and steps(along[turn:]).max(initial=0.0) < ASTRAY
    return (f"{way} and back" if returned else "unclear"), ""


def steps(places: np.ndarray) -> np.ndarray:
    return np.diff(places)
