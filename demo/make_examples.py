"""Draw the example pictures and sounds that the chat demo offers (a few kilobytes each, made here, free to use).

python demo/make_examples.py        # writes mmllm/assets/examples/
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import soundfile
from scene_model import COLORS
from scenes import Item, Scene, render, sample_scene
from sounds import SAMPLE_RATE, Sound, synthesize

FOLDER = Path(__file__).parents[1] / "mmllm" / "assets" / "examples"


def shape(name: str, color: str, size: int, x: int, y: int) -> Item:
    return Item(name, color, size, x, y, COLORS[color])


def picture(background: tuple[int, int, int], *items: Item) -> Scene:
    return Scene("canvas", 360, 240, background, ((0, 0, 360, 240),), items)


# In the sizes that the scenes have (CANVAS_FRACTIONS): the assistant has seen no others.
SHAPES = picture(
    (245, 235, 215),
    shape("circle", "red", 49, 56, 52),
    shape("star", "blue", 49, 252, 44),
    shape("triangle", "green", 32, 176, 150),
    shape("square", "purple", 32, 288, 164),
    shape("circle", "orange", 18, 78, 172),
)


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    render(SHAPES).save(FOLDER / "shapes.png", optimize=True)
    render(sample_scene(random.Random(0), "scatter")).save(FOLDER / "boxes.png", optimize=True)
    sounds = {
        "beeps.wav": Sound("beeps", loudness="loud", count=3, pitch="high"),
        "bell_then_siren.wav": Sound("sequence", parts=("bell", "siren")),
    }
    for name, sound in sounds.items():
        samples = synthesize(sound, np.random.default_rng(0))
        soundfile.write(FOLDER / name, samples, SAMPLE_RATE, subtype="PCM_16")


if __name__ == "__main__":
    main()
