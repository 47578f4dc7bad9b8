"""Questions about scenes with short exact answers.

Answer vocabulary: ``yes``, ``no``; digit words ``zero`` to ``twenty-four``; the colours and shapes of
:mod:`scene_model`; places ``top left``, ``top``, ``top right``, ``left``, ``center``, ``right``, ``bottom left``,
``bottom``, ``bottom right``; ``left``/``right``/``above``/``below``; boxes ``left``, ``middle``, ``right``; sizes
``small``, ``medium``, ``big``; comparison answers ``same`` or one of the two things compared (``red``, ``circles``,
``the red star``). Questions whose answer is not clear-cut are never asked: a place within 4 % of a border between
thirds, a "which" with a tie, a "the" without a unique referent.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

from scene_model import BOX_COLORS, BOX_NAMES, BOX_SHAPES, COLORS, SHAPES, Item, Scene, box_items, size_name, walls
from scene_text import NUMBERS, place

Question = tuple[str, str, str]  # type, question, answer
TYPES = ("count", "color", "shape", "size", "position", "comparison", "existence", "touch", "tower", "box")


def questions(scene: Scene, rng: random.Random, count: int) -> list[Question]:
    """``count`` questions of varied types that suit the scene, drawn independently; fewer never."""
    found: list[Question] = []
    while len(found) < count:
        maker = rng.choice(_MAKERS[scene.kind])
        made = maker(scene, rng)
        if made is not None:
            found.append(made)
    return found


def _words(scene: Scene) -> tuple[list[str], list[str]]:
    """The colours and shapes that a question about such a scene may name."""
    if scene.kind == "canvas":
        return list(COLORS), list(SHAPES)
    return list(BOX_COLORS), list(BOX_SHAPES) if scene.kind == "scatter" else ["square"]


def _unique(scene: Scene, rng: random.Random) -> tuple[Item, str] | None:
    """An item and a name that only it answers to: "red star", "star" or "big circle"."""
    items = list(scene.items)
    rng.shuffle(items)
    for item in items:
        size = size_name(scene, item)
        names = [
            (f"{item.color} {item.shape}", [i for i in items if (i.color, i.shape) == (item.color, item.shape)]),
            (item.shape, [i for i in items if i.shape == item.shape]),
            (f"{size} {item.shape}", [i for i in items if i.shape == item.shape and size_name(scene, i) == size]),
            (f"{size} {item.color} {item.shape}",
             [i for i in items if (i.color, i.shape) == (item.color, item.shape) and size_name(scene, i) == size]),
        ]  # fmt: skip
        rng.shuffle(names)
        for name, same in names:
            if len(same) == 1:
                return item, name
    return None


def _group(scene: Scene, rng: random.Random) -> tuple[str, Callable[[Item], bool]]:
    """A kind of item named in the plural, usually one that occurs: "circles", "red items", "red circles"."""
    colors, shapes = _words(scene)
    some = rng.choice(scene.items)
    color = some.color if rng.random() < 0.75 else rng.choice(colors)
    shape = some.shape if rng.random() < 0.75 else rng.choice(shapes)
    noun = "blocks" if scene.kind == "tower" else rng.choice(("items", "things", "shapes", "objects"))
    choice = rng.random() if scene.kind != "tower" else 0.5
    if choice < 0.15:
        return noun, lambda i: True
    if choice < 0.4:
        return shape + ("es" if shape == "cross" else "s"), lambda i: i.shape == shape
    if choice < 0.7:
        return f"{color} {noun}", lambda i: i.color == color
    return f"{color} {shape}{'es' if shape == 'cross' else 's'}", lambda i: (i.color, i.shape) == (color, shape)


def _one(name: str) -> str:
    """Plural to singular: "red crosses" -> "red cross"."""
    return name[:-2] if name.endswith("sses") else name[:-1]


def _count(scene: Scene, rng: random.Random) -> Question | None:
    name, test = _group(scene, rng)
    number = NUMBERS[sum(map(test, scene.items))]
    forms = ("How many {} are there?", "How many {} do you see?", "How many {} are in the picture?", "Count the {}.",
             "What is the number of {}?", "How many {} can you see?")  # fmt: skip
    return "count", rng.choice(forms).format(name), number


def _box_count(scene: Scene, rng: random.Random) -> Question | None:
    name, test = _group(scene, rng)
    index = rng.randrange(3)
    number = NUMBERS[sum(map(test, box_items(scene)[index]))]
    forms = (
        "How many {} are in the {} box?",
        "How many {} does the {} box have?",
        "How many {} do you see in the {} box?",
    )
    return "count", rng.choice(forms).format(name, BOX_NAMES[index]), number


def _color(scene: Scene, rng: random.Random) -> Question | None:
    options = []
    for item in scene.items:
        size = size_name(scene, item)
        if sum(i.shape == item.shape for i in scene.items) == 1:
            options.append((item.shape, item.color))
        if sum(i.shape == item.shape and size_name(scene, i) == size for i in scene.items) == 1:
            options.append((f"{size} {item.shape}", item.color))
    if len(scene.items) == 1:
        options.append((rng.choice(("shape", "object")), scene.items[0].color))
    if not options:
        return None
    name, color = rng.choice(options)
    forms = (
        "What color is the {}?",
        "What colour is the {}?",
        "Which color does the {} have?",
        "The {} has what color?",
    )
    return "color", rng.choice(forms).format(name), color


def _shape(scene: Scene, rng: random.Random) -> Question | None:
    options = []
    for item in scene.items:
        size = size_name(scene, item)
        if sum(i.color == item.color for i in scene.items) == 1:
            options.append((item.color, item.shape))
        if sum(i.color == item.color and size_name(scene, i) == size for i in scene.items) == 1:
            options.append((f"{size} {item.color}", item.shape))
    if not options:
        return None
    name, shape = rng.choice(options)
    forms = (
        "What shape is the {} item?",
        "What is the shape of the {} object?",
        "Which shape is {}?",
        "What is the {} thing?",
    )
    return "shape", rng.choice(forms).format(name), shape


def _size(scene: Scene, rng: random.Random) -> Question | None:
    options = [
        (f"{i.color} {i.shape}", size_name(scene, i))
        for i in scene.items
        if sum((o.color, o.shape) == (i.color, i.shape) for o in scene.items) == 1
    ]
    if not options:
        return None
    name, size = rng.choice(options)
    forms = ("What size is the {}?", "How big is the {}: small, medium or big?", "Is the {} small, medium or big?")
    return "size", rng.choice(forms).format(name), size


def _clear(scene: Scene, item: Item) -> bool:
    """Whether the centre is well inside its third of the picture, both ways."""
    fractions = (item.x + item.size / 2) / scene.width, (item.y + item.size / 2) / scene.height
    return all(abs(f - border) > 0.04 for f in fractions for border in (1 / 3, 2 / 3))


def _where(scene: Scene, rng: random.Random) -> Question | None:
    found = _unique(scene, rng)
    if found is None or not _clear(scene, found[0]):
        return None
    forms = (
        "Where is the {}?",
        "Where in the picture is the {}?",
        "In which part of the picture is the {}?",
        "Where do you see the {}?",
    )
    return "position", rng.choice(forms).format(found[1]), place(scene, found[0])


def _which_box(scene: Scene, rng: random.Random) -> Question | None:
    found = _unique(scene, rng)
    if found is None:
        return None
    index = next(k for k, items in enumerate(box_items(scene)) if found[0] in items)
    forms = ("Which box has the {}?", "In which box is the {}?", "Which box contains the {}?")
    return "position", rng.choice(forms).format(found[1]), BOX_NAMES[index]


def _relation(scene: Scene, rng: random.Random) -> Question | None:
    first, second = _unique(scene, rng), _unique(scene, rng)
    if first is None or second is None or first[0] == second[0]:
        return None
    a, b = first[0], second[0]
    dx = (a.x + a.size / 2 - b.x - b.size / 2) / scene.width
    dy = (a.y + a.size / 2 - b.y - b.size / 2) / scene.height
    along, margin = rng.choice((("x", dx), ("y", dy)))
    if abs(margin) < 0.12:
        return None
    words = ("left of", "right of") if along == "x" else ("above", "below")
    truth = words[margin > 0]
    if rng.random() < 0.4:
        sides = "to the left or to the right of" if along == "x" else "above or below"
        return "position", f"Is the {first[1]} {sides} the {second[1]}?", truth.split()[0]
    asked = rng.choice(words)
    return "position", f"Is the {first[1]} {asked} the {second[1]}?", "yes" if asked == truth else "no"


def _bigger(scene: Scene, rng: random.Random) -> Question | None:
    first, second = _unique(scene, rng), _unique(scene, rng)
    if first is None or second is None:
        return None
    a, b = size_name(scene, first[0]), size_name(scene, second[0])
    if a == b or any(n in first[1] + second[1] for n in ("small", "medium", "big")):
        return None
    word = rng.choice(("bigger", "larger", "smaller"))
    more = (first[0].size > second[0].size) != (word == "smaller")
    if rng.random() < 0.5:
        return "comparison", f"Is the {first[1]} {word} than the {second[1]}?", "yes" if more else "no"
    return "comparison", f"Which is {word}, the {first[1]} or the {second[1]}?", f"the {(first if more else second)[1]}"


def _more(scene: Scene, rng: random.Random) -> Question | None:
    colors, shapes = _words(scene)
    seen = (
        [i.color for i in scene.items]
        if rng.random() < 0.5 or scene.kind == "tower"
        else [i.shape for i in scene.items]
    )
    values = colors if seen[0] in colors else shapes
    counts = Counter(seen)
    first = rng.choice(seen)
    second = rng.choice(seen if len(counts) > 1 and rng.random() < 0.7 else values)
    if first == second:
        return None
    noun = "blocks" if scene.kind == "tower" else "items"
    plural = ["crosses" if v == "cross" else v + "s" if v in shapes else f"{v} {noun}" for v in (first, second)]
    difference = counts[first] - counts[second]
    style = rng.random()
    if style < 0.35:
        word = rng.choice(("more", "fewer"))
        truth = difference > 0 if word == "more" else difference < 0
        return "comparison", f"Are there {word} {plural[0]} than {plural[1]}?", "yes" if truth else "no"
    if style < 0.5:
        return "comparison", f"Are there as many {plural[0]} as {plural[1]}?", "yes" if difference == 0 else "no"
    answer = "same" if difference == 0 else plural[0 if difference > 0 else 1]
    return (
        "comparison",
        rng.choice(("Are there more {} or more {}?", "Which are there more of, {} or {}?")).format(*plural),
        answer,
    )


def _exists(scene: Scene, rng: random.Random) -> Question | None:
    wanted = rng.random() < 0.5
    for _ in range(20):
        name, test = _group(scene, rng)
        if any(map(test, scene.items)) == wanted:
            article = "an" if name[0] in "aeio" else "a"
            forms = (f"Is there {article} {_one(name)}?", f"Do you see {article} {_one(name)}?",
                     f"Are there any {name}?",
                     f"Is there {article} {_one(name)} in the picture?", f"Can you see any {name}?")  # fmt: skip
            return "existence", rng.choice(forms), "yes" if wanted else "no"
    return None


def _exists_in_box(scene: Scene, rng: random.Random) -> Question | None:
    wanted, index = rng.random() < 0.5, rng.randrange(3)
    for _ in range(20):
        name, test = _group(scene, rng)
        if any(map(test, box_items(scene)[index])) == wanted:
            article = "an" if name[0] in "aeio" else "a"
            where = f"in the {BOX_NAMES[index]} box"
            forms = (f"Is there {article} {_one(name)} {where}?", f"Are there any {name} {where}?")
            return "existence", rng.choice(forms), "yes" if wanted else "no"
    return None


def _most(scene: Scene, rng: random.Random) -> Question | None:
    name, test = _group(scene, rng)
    counts = [sum(map(test, items)) for items in box_items(scene)]
    word = rng.choice(("most", "most", "fewest"))
    best = max(counts) if word == "most" else min(counts)
    if counts.count(best) != 1:
        return None
    return "box", f"Which box has the {word} {name}?", BOX_NAMES[counts.index(best)]


def _touch(scene: Scene, rng: random.Random) -> Question | None:
    side = rng.choice(("left", "right", "right", "bottom", "bottom", "top", None))
    name, test = _group(scene, rng)
    touched = [i for i in scene.items if test(i) and (side in walls(scene, i) if side else walls(scene, i))]
    wall = f"the {side} wall" if side else "a wall"
    if rng.random() < 0.5:
        number = NUMBERS[len(touched)]
        return (
            "touch",
            rng.choice((f"How many {name} touch {wall}?", f"How many {name} are touching {wall} of their box?")),
            number,
        )
    article = "an" if name[0] in "aeio" else "a"
    forms = (
        f"Does {article} {_one(name)} touch {wall}?",
        f"Is {article} {_one(name)} touching {wall}?",
        f"Do any {name} touch {wall}?",
    )
    return "touch", rng.choice(forms), "yes" if touched else "no"


def _height(scene: Scene, rng: random.Random) -> Question | None:
    heights = [len(items) for items in box_items(scene)]
    index = rng.randrange(3)
    if rng.random() < 0.6:
        forms = (
            "How many blocks does the {} tower have?",
            "How high is the {} tower?",
            "How many blocks are in the {} tower?",
        )
        return "tower", rng.choice(forms).format(BOX_NAMES[index]), NUMBERS[heights[index]]
    word = rng.choice(("tallest", "shortest"))
    best = max(heights) if word == "tallest" else min(heights)
    if heights.count(best) != 1:
        return None
    return "tower", f"Which tower is the {word}?", BOX_NAMES[heights.index(best)]


def _level(scene: Scene, rng: random.Random) -> Question | None:
    index = rng.randrange(3)
    items = box_items(scene)[index]
    level, names = rng.choice(
        ((0, ("base", "bottom", "lowest")), (-1, ("top", "highest")), (1, ("second",)), (2, ("third",)))
    )
    if level >= len(items):
        return None
    forms = ("What color is the {} block of the {} tower?", "Which color is the {} block of the {} tower?")
    ending = " (from the base)" if level > 0 else ""
    question = rng.choice(forms).format(rng.choice(names), BOX_NAMES[index])
    return "tower", question.replace("?", f"{ending}?"), items[level].color


_MAKERS = {
    "canvas": (
        _count,
        _count,
        _color,
        _shape,
        _size,
        _where,
        _where,
        _relation,
        _relation,
        _bigger,
        _more,
        _exists,
        _exists,
    ),
    "scatter": (
        _count,
        _count,
        _box_count,
        _box_count,
        _color,
        _shape,
        _which_box,
        _more,
        _exists,
        _exists_in_box,
        _most,
        _touch,
        _touch,
    ),
    "tower": (_count, _box_count, _more, _exists, _exists_in_box, _most, _height, _level, _level),
}
