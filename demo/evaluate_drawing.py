"""Score what the assistant draws: do the pictures show what was asked for?

    python demo/evaluate_drawing.py --model runs/embedded/run --output runs/embedded/scores --count 300

Wishes are held out from every training. `picture_parser` reads the pictures. Reported, each with its 95 % interval:

* `ceiling`: the generator driven by its own text encoder; `assistant`: asked for the same, in wordings never trained on;
  `ratio`: the second over the first;
* `kinds` (exactly the shapes asked for: count, colour, shape), `places`, `relations`, either as `position`, `background`, `all`
  of them; `by shapes`: all of them, for each number of shapes asked for;
* `changes`: a change asked for in the next turn, to another held-out wish;
* `cycle`: the assistant describes its own picture; the kinds in its words against those asked for and those drawn;
* `decision`: of mixed requests for text and all that the assistant makes, how many are answered in the right modality; `leaks`:
  signs of signal tokens in a text;
* `speed`: seconds of one request with one picture; `meanwhile`: text that arrives while a picture is made;
* `nearest`: how far the pictures are from those of the training; `failures`: what was asked for and what was read back.

Writes `drawing.json`, and the first pictures of both as `ceiling.png` and `assistant.png`.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from decision_trials import decisions
from drawing_facts import facts, kinds, ratio, read, read_back, summary, wrong
from drawing_speed import NAMES, meanwhile, speed
from drawing_trials import Drawn, ceiling, changed, described, drawn, held_out_wishes, told_kinds
from drawings import Wish, caption, place_items
from nearest_drawings import TrainingDrawings, nearness
from PIL import Image
from scene_model import render

Result = dict[str, bool]


def by_shapes(wanted: list[Wish], found: list[Result]) -> dict[str, Any]:
    """The share of pictures with all facts right, for each number of shapes asked for."""
    numbers = [str(kinds(wish).total()) for wish in wanted]
    return summary([{number: result["all"]} for number, result in zip(numbers, found, strict=True)])


def failures(drawings: list[Drawn]) -> list[dict[str, str]]:
    return [
        {"asked": one.request, "reply": one.words, "read": read_back(one.parsed), "wrong": wrong(one.facts)}
        for one in drawings
        if not one.facts["all"]
    ]


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


def generator_of(assistant: Any, name: str, modality: str) -> Any:
    """The assistant's frozen generator. Raises ``SystemExit`` when it has none of this modality."""
    if modality not in assistant.makes:
        makes = ", ".join(assistant.makes) or "text alone"
        raise SystemExit(f"{name} makes {makes}: there are no {NAMES[modality]}s to score")
    return assistant.model.outputs[modality].frozen()


def score_assistant(
    assistant: Any, wanted: list[Wish], best: list[Result], options: argparse.Namespace
) -> dict[str, Any]:
    """All scores that need an assistant; ``best`` is what the generator reaches on its own."""
    report: dict[str, Any] = {}
    made = timed("assistant", lambda: drawn(assistant, wanted, options.seed), report)
    found = [one.facts for one in made]
    report["assistant"], report["ratio"] = summary(found), ratio(found, best)
    report["by shapes"] = by_shapes(wanted, found)
    report["words"] = summary([{"caption": caption(one.wish) in one.words} for one in made])
    folder = options.output / "drawn"
    again = timed(
        "changes", lambda: changed(assistant, made[: options.changes], options.seed, folder / "before"), report
    )
    report["changes"] = summary(change.after.facts for change in again)
    shown = [one for one in made if one.picture is not None]
    pictures = [one.picture for one in shown]
    told = timed("cycle", lambda: described(assistant, pictures, folder), report)
    report["cycle"] = summary(
        {"as asked": told_kinds(text) == kinds(one.wish), "as drawn": told_kinds(text) == one.parsed.kinds()}
        for text, one in zip(told, shown, strict=True)
    )
    right, leaks = timed("decision", lambda: decisions(assistant, options.decisions, options.seed), report)
    report["decision"], report["leaks"] = summary(right), leaks
    requests = [one.request for one in made[: options.timed + 1]]
    report["speed"] = timed("speed", lambda: speed(assistant, requests, options.seed, "image"), report)
    report["meanwhile"] = timed("meanwhile", lambda: meanwhile(assistant, requests[1:], options.seed), report)
    report["nearest"] = timed("nearest", lambda: nearest(wanted, pictures, options), report)
    report["failures"] = failures(made)
    if pictures:
        sheet(pictures[:60]).save(options.output / "assistant.png")
    return report


def nearest(wanted: list[Wish], pictures: list[Image.Image], options: argparse.Namespace) -> dict[str, Any]:
    rng = random.Random(f"drawing-true-{options.seed}")
    true = [render(place_items(wish, rng)) for wish in wanted]
    return nearness(TrainingDrawings(options.searched, options.training_seed), wanted, pictures, true)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="an assistant, or a diffusers folder: the ceiling alone")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--changes", type=int, default=100)
    parser.add_argument("--decisions", type=int, default=500)
    parser.add_argument("--timed", type=int, default=10, help="requests whose seconds are taken")
    parser.add_argument("--searched", type=int, default=20_000, help="training pictures compared with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--training-seed", type=int, default=0, help="that the picture generator was trained with")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    wanted = held_out_wishes(arguments.count, arguments.seed)
    assistant = None
    if (Path(arguments.model) / "model_index.json").exists():
        from mmllm.config.base import BuildContext
        from mmllm.generators.image import StableDiffusionConfig

        config = StableDiffusionConfig(pretrained=str(Path(arguments.model).resolve()), steps=20, guidance=2.5)
        generator = config.build(BuildContext())
    else:
        import mmllm

        assistant = mmllm.load(arguments.model)
        generator = generator_of(assistant, arguments.model, "image")
    report: dict[str, Any] = {}
    pictures = timed("ceiling", lambda: ceiling(generator, wanted, arguments.seed), report)
    best = [facts(wish, read(picture)) for wish, picture in zip(wanted, pictures, strict=True)]
    report["ceiling"] = summary(best)
    sheet(pictures[:60]).save(arguments.output / "ceiling.png")
    if assistant is not None:
        scores = score_assistant(assistant, wanted, best, arguments)
        report = {"ceiling": report["ceiling"], **scores, "seconds": report["seconds"] | scores["seconds"]}
    for name, value in report.items():
        print(name, json.dumps(value if name != "failures" else len(value)))
    (arguments.output / "drawing.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
