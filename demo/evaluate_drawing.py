"""Score what the assistant draws: do the pictures show what was asked for?

    python demo/evaluate_drawing.py --model runs/embedded/run --output runs/embedded/scores --count 300

Wishes are held out from every training. `picture_parser` reads the pictures. Reported, each with its 95 % interval:

* `ceiling`: the generator driven by its own text encoder; `assistant`: asked for the same, in wordings never trained on;
* `kinds` (exactly the shapes asked for: count, colour, shape), `places`, `relations`, `background`, `all` of them;
* `cycle`: the assistant describes its own picture; the kinds in its words against those asked for;
* `decision`: of mixed requests, how many are answered in the right modality; `leaks`: signs of signal tokens in a text.

Writes `drawing.json`, and the first pictures of both as `ceiling.png` and `assistant.png`.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dialogues
import numpy as np
import text_worlds
from drawing_talk import request
from drawings import PLACES, Wish, caption, wishes
from picture_parser import Parsed, parse
from PIL import Image

from mmllm.evaluation import wilson

BATCH = 25


def facts(wish: Wish, parsed: Parsed) -> dict[str, bool]:
    """Which of the wish's facts hold in a picture; only those that the wish has."""
    wanted: Counter[tuple[str, str]] = Counter()
    for group in wish.groups:
        wanted[group.color, group.shape] += group.count
    found = {"kinds": parsed.kinds() == wanted, "background": parsed.background == wish.background}
    middles = {(shape.color, shape.shape): (shape.x, shape.y) for shape in parsed.shapes}
    if any(group.place for group in wish.groups):
        found["places"] = all(
            (group.color, group.shape) in middles and third(*middles[group.color, group.shape]) == group.place
            for group in wish.groups
        )
    if wish.relation:
        pair = [middles.get((group.color, group.shape)) for group in wish.groups]
        found["relations"] = None not in pair and related(wish.relation, *pair)  # type: ignore[arg-type]
    found["all"] = all(found.values())
    return found


def third(x: float, y: float) -> str:
    """The place of a centre, given as shares of the sides."""
    return PLACES[3 * min(2, int(3 * y)) + min(2, int(3 * x))]


def related(relation: str, first: tuple[float, float], second: tuple[float, float]) -> bool:
    gap = {"left of": second[0] - first[0], "right of": first[0] - second[0]}
    gap |= {"above": second[1] - first[1], "below": first[1] - second[1]}
    return gap[relation] > 0


def summary(results: list[dict[str, bool]]) -> dict[str, Any]:
    """{fact: {"n", "share", "interval"}}."""
    names = sorted({name for result in results for name in result})
    counted = {name: [result[name] for result in results if name in result] for name in names}
    return {
        name: {"n": len(v), "share": sum(v) / len(v), "interval": wilson(sum(v) / len(v), len(v))}
        for name, v in counted.items()
    }


def ceiling(generator: Any, wanted: list[Wish]) -> list[Image.Image]:
    """The generator's pictures from its own text condition."""
    pictures: list[Image.Image] = []
    for start in range(0, len(wanted), BATCH):
        condition = generator.encode_text([caption(wish) for wish in wanted[start : start + BATCH]])
        pictures += generator.generate(condition)
    return pictures


def drawn(assistant: Any, wanted: list[Wish], rng: random.Random) -> list[tuple[str, Image.Image | None]]:
    """The assistant's replies to requests in held-out wordings: text, and the picture if there is just one."""
    found = []
    for start in range(0, len(wanted), BATCH):
        asked = [request(wish, rng, unseen=True)[0] for wish in wanted[start : start + BATCH]]
        for reply in assistant.generate([[{"role": "user", "content": text}] for text in asked], max_new_tokens=96):
            found.append((str(reply), reply.media[0].result() if len(reply.media) == 1 else None))
    return found


def described(assistant: Any, pictures: list[Image.Image], folder: Path) -> list[Counter[tuple[str, str]]]:
    """The kinds of shapes in the assistant's descriptions of pictures that it is shown."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = []
    for start in range(0, len(pictures), BATCH):
        asked = []
        for index, picture in enumerate(pictures[start : start + BATCH], start):
            picture.save(folder / f"{index:04d}.png")
            content = [
                {"type": "image", "path": str(folder / f"{index:04d}.png")},
                {"type": "text", "text": "Describe the picture."},
            ]
            asked.append([{"role": "user", "content": content}])
        for text in assistant.generate(asked, max_new_tokens=160):
            listed = str(text).rstrip(".").partition(": ")[2].split("; ")
            words = [item.split() for item in listed]
            kinds.append(Counter((item[1], item[2]) for item in words if len(item) > 2))
    return kinds


def decisions(assistant: Any, count: int, rng: random.Random) -> tuple[list[bool], list[str]]:
    """Whether requests of all kinds are answered in the right modality; texts that look like signal tokens."""
    asked: list[tuple[str, bool]] = []
    while len(asked) < count:
        roll = rng.random()
        if roll < 0.5:
            asked.append((request(wishes(rng, test=True), rng, unseen=rng.random() < 0.5)[0], True))
        elif roll < 0.75:
            asked.append((dialogues.simple_exchange(rng)[0], False))
        else:
            asked.append((rng.choice(text_worlds.question_without_media(rng, []))["content"], False))
    right, leaks = [], []
    for start in range(0, count, BATCH):
        part = asked[start : start + BATCH]
        replies = assistant.generate([[{"role": "user", "content": text}] for text, _ in part], max_new_tokens=96)
        for (_, wanted), reply in zip(part, replies, strict=True):
            right.append(bool(reply.media) == wanted)
            if "<" in reply or "image:" in reply:
                leaks.append(str(reply))
    return right, leaks


def sheet(pictures: list[Image.Image], columns: int = 10) -> Image.Image:
    """Pictures of one size side by side, 4 pixels apart."""
    side = pictures[0].width + 4
    rows = (len(pictures) + columns - 1) // columns
    whole = Image.new("RGB", (columns * side, rows * side), (200, 200, 200))
    for index, picture in enumerate(pictures):
        whole.paste(picture, (index % columns * side + 2, index // columns * side + 2))
    return whole


def timed(what: str, work: Callable[[], Any], report: dict[str, Any]) -> Any:
    begin = time.monotonic()
    result = work()
    report.setdefault("seconds", {})[what] = round(time.monotonic() - begin, 1)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="an assistant, or a diffusers folder: the ceiling alone")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--decisions", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"drawing-test-{arguments.seed}")
    wanted = [wishes(rng, test=True) for _ in range(arguments.count)]
    report: dict[str, Any] = {}
    assistant = None
    if (Path(arguments.model) / "model_index.json").exists():
        from mmllm.config.base import BuildContext
        from mmllm.generators.image import StableDiffusionConfig

        config = StableDiffusionConfig(pretrained=str(Path(arguments.model).resolve()), steps=20, guidance=2.5, seed=0)
        generator = config.build(BuildContext())
    else:
        import mmllm

        assistant = mmllm.load(arguments.model)
        generator = assistant.model.outputs["image"].frozen()
    pictures = timed("ceiling", lambda: ceiling(generator, wanted), report)
    report["ceiling"] = summary([facts(w, parse(np.asarray(p))) for w, p in zip(wanted, pictures, strict=True)])
    sheet(pictures[:60]).save(arguments.output / "ceiling.png")
    if assistant is not None:
        replies = timed("assistant", lambda: drawn(assistant, wanted, rng), report)
        results = [
            facts(w, parse(np.asarray(p))) if p else {"all": False, "kinds": False}
            for w, (_, p) in zip(wanted, replies, strict=True)
        ]
        report["assistant"] = summary(results)
        report["words"] = summary(
            [{"caption": caption(w) in text} for w, (text, _) in zip(wanted, replies, strict=True)]
        )
        made = [(w, p) for w, (_, p) in zip(wanted, replies, strict=True) if p]
        if made:
            sheet([p for _, p in made][:60]).save(arguments.output / "assistant.png")
        told = timed("cycle", lambda: described(assistant, [p for _, p in made], arguments.output / "drawn"), report)
        asked_for = [Counter({(g.color, g.shape): g.count for g in w.groups}) for w, _ in made]
        seen = [parse(np.asarray(p)).kinds() for _, p in made]
        report["cycle"] = summary(
            [{"as asked": t == w, "as drawn": t == s} for t, w, s in zip(told, asked_for, seen, strict=True)]
        )
        right, leaks = timed("decision", lambda: decisions(assistant, arguments.decisions, rng), report)
        report["decision"] = summary([{"right modality": value} for value in right])
        report["leaks"] = leaks
    for name, found in report.items():
        print(name, json.dumps(found))
    (arguments.output / "drawing.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
