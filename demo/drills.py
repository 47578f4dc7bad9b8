"""Drills: tiny exercises in reading, finding, counting and comparing words of a short list.

A small language model learns to look things up in its context in a sudden step, and it takes that step much sooner on
short, dense exercises than on whole scenes. So training begins with many drills and with thinned-out scenes (`thinned`).
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections import Counter
from collections.abc import Sequence

from dialogues import Exchange
from scene_model import COLORS, SHAPES, SIZES, Scene, box_items
from scene_text import NUMBERS

_SETS = (tuple(COLORS), SHAPES, SIZES, NUMBERS[:10], ("top", "bottom", "left", "right", "center", "middle"))


def drill(rng: random.Random, longest: int) -> tuple[list[str], list[Exchange]]:
    """A list of 2 to `longest` items (one or two words each) and exercises about it."""
    words = [
        word
        for chosen in rng.sample(_SETS, rng.randint(1, 3))
        for word in rng.sample(chosen, min(len(chosen), rng.randint(2, 4)))
    ]
    pairs = rng.random() < 0.5
    size = rng.randint(2, longest)
    if pairs:
        items = [f"{rng.choice(tuple(COLORS)[:5])} {rng.choice(SHAPES)}" for _ in range(size)]
    else:
        items = [rng.choice(words) for _ in range(size)]
    exchanges: list[Exchange] = [("Say all.", ", ".join(items)), ("First?", items[0]), ("Last?", items[-1])]
    exchanges.append(("How many?", NUMBERS[len(items)]))
    counts = Counter(word for item in items for word in item.split())
    seen = list(counts)
    for word in rng.sample(seen, min(3, len(seen))):
        exchanges.append((f"How many {word}?", NUMBERS[counts[word]]))
        exchanges.append((f"Is there {word}?", "yes"))
    for word in rng.sample([w for chosen in _SETS[:2] for w in chosen if w not in counts], 2):
        exchanges.append((f"Is there {word}?", "no"))
    single = Counter(items)
    for index, item in enumerate(items[:-1]):
        if single[item] == 1:
            exchanges.append((f"After {item}?", items[index + 1]))
    if pairs:
        for color, shape in (item.split() for item in items):
            if counts[shape] == 1:
                exchanges.append((f"What color is the {shape}?", color))
            if counts[color] == 1:
                exchanges.append((f"What shape is {color}?", shape))
    if len(seen) > 1:
        first, second = rng.sample(seen, 2)
        more = "same" if counts[first] == counts[second] else first if counts[first] > counts[second] else second
        exchanges.append((f"More {first} or {second}?", more))
    exchanges = list(dict(exchanges).items())
    rng.shuffle(exchanges)
    return items, exchanges[:10]


def dense_drill(rng: random.Random, longest: int) -> tuple[list[str], list[Exchange]]:
    """A list of 2 to `longest` items and exercises with long answers, in which every word has to be looked up."""
    sizes, colors, shapes = (rng.sample(words, rng.randint(2, len(words))) for words in (SIZES, tuple(COLORS), SHAPES))
    items = [
        [rng.choice(sizes), rng.choice(colors), rng.choice(shapes)][rng.randrange(2) :]
        for _ in range(rng.randint(2, longest))
    ]
    words = [" ".join(item) for item in items]
    counts = Counter(word for item in items for word in item)
    seen = rng.sample(sorted(counts), len(counts))
    asked = rng.sample([*COLORS, *SHAPES], rng.randint(3, 6))
    exchanges: list[Exchange] = [
        ("Say all.", ", ".join(words)),
        ("Say all colors.", ", ".join(item[-2] for item in items)),
        ("Say all shapes.", ", ".join(item[-1] for item in items)),
        (f"Count {', '.join(seen)}.", ", ".join(f"{word} {NUMBERS[counts[word]]}" for word in seen)),
        (f"Is there {', '.join(asked)}?", ", ".join(f"{w} {'yes' if w in counts else 'no'}" for w in asked)),
    ]
    keys = [item for item in items if counts[item[-1]] == 1]
    if keys:
        rng.shuffle(keys)
        names = ", ".join(item[-1] for item in keys)
        exchanges.append((f"What color is {names}?", ", ".join(f"{item[-1]} {item[-2]}" for item in keys)))
    once = [(a, b) for a, b in itertools.pairwise(words) if words.count(a) == 1]
    if once:
        rng.shuffle(once)
        exchanges.append((f"What follows {', '.join(a for a, _ in once)}?", ", ".join(f"{a} {b}" for a, b in once)))
    for word in rng.sample(seen, min(2, len(seen))):
        having = [text for text, item in zip(words, items, strict=True) if word in item]
        exchanges.append((f"Say the {word}.", ", ".join(having)))
    rng.shuffle(exchanges)
    return words, exchanges[:5]


def tally(scenes: Sequence[Scene], rng: random.Random) -> Exchange:
    """Counts of many words at once, over whole scenes or the boxes of one: a number for every second word of the answer.

    One-word answers teach counting too slowly: after 15 million tokens the model still said four or six for five.
    """
    parts = [list(scene.items) for scene in scenes]
    names = ["first", "second"][: len(parts)]
    if len(scenes) == 1 and scenes[0].kind != "canvas" and rng.random() < 0.6:
        parts, names = box_items(scenes[0]), ["left", "middle", "right"]
    seen = sorted({word for part in parts for item in part for word in (item.color, item.shape)})
    words = rng.sample(seen, min(len(seen), 4)) + rng.sample([*COLORS, *SHAPES], 1)
    if len(parts) > 1 and rng.random() < 0.5:  # one part, many words
        chosen = rng.randrange(len(parts))
        parts, names = [parts[chosen]], [names[chosen]]
        request = f"Count in the {names[0]}: {', '.join(words)}."
    else:
        request = f"Count {', '.join(words)}."
    counts = [Counter(word for item in part for word in (item.color, item.shape)) for part in parts]
    return request, ", ".join(f"{word} {' '.join(NUMBERS[c[word]] for c in counts)}" for word in words)


def thinned(scene: Scene, rng: random.Random, most: int) -> Scene:
    """The scene with at most `most` items per box (towers keep their lowest blocks)."""
    kept = []
    for items in box_items(scene):
        count = rng.randint(1, most)
        kept += items[:count] if scene.kind == "tower" else rng.sample(items, min(count, len(items)))
    return dataclasses.replace(scene, items=tuple(kept))
