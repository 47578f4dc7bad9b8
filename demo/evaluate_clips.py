"""Score what the assistant animates: do the clips show what was asked for?

    python demo/evaluate_clips.py --model runs/embedded/clips --output runs/embedded/scores --count 300

Motions are held out from every training. `clip_parser` reads the clips. Reported, each with its 95 % interval:

* `ceiling`: the generator driven by its own text encoder; `assistant`: asked for the same, in wordings never trained on;
  `ratio`: the second over the first;
* `direction` (the move: which way, back or not, growing, shrinking), `shape`, `color`, `background`, `pace`, `alone` (one shape
  and no other in every frame), `direction and shape` together, `all` of them;
* `words`: whether the reply says what is seen; `speed`: seconds of one request with one clip; `failures`: what was asked for and
  what was read back.

Writes `clips.json`, and the frames of the first clips, a row each, as `clips-ceiling.png` and `clips-assistant.png`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from clip_trials import Animated, animated, facts, held_out_motions, read, read_back
from drawing_facts import ratio, summary, wrong
from drawing_speed import speed
from drawing_trials import from_captions
from evaluate_drawing import generator_of, sheet, timed
from moving import FRAMES, FRAMES_PER_SECOND, Motion, caption

from mmllm.generators.base import Clip


def failures(made: list[Animated]) -> list[dict[str, str]]:
    return [
        {"asked": one.request, "reply": one.words, "read": read_back(one.parsed), "wrong": wrong(one.facts)}
        for one in made
        if not one.facts["all"]
    ]


def score_assistant(
    assistant: Any, wanted: list[Motion], best: list[dict[str, bool]], options: argparse.Namespace
) -> dict[str, Any]:
    """All scores that need an assistant; ``best`` is what the generator reaches on its own."""
    report: dict[str, Any] = {}
    made = timed("assistant", lambda: animated(assistant, wanted, options.seed), report)
    found = [one.facts for one in made]
    report["assistant"], report["ratio"] = summary(found), ratio(found, best)
    report["words"] = summary([{"caption": caption(one.motion) in one.words} for one in made])
    requests = [one.request for one in made[: options.timed + 1]]
    report["speed"] = timed("speed", lambda: speed(assistant, requests, options.seed, "video"), report)
    report["failures"] = failures(made)
    show([one.clip for one in made if one.clip is not None], options.output / "clips-assistant.png")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="an assistant, or a diffusers folder: the ceiling alone")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--timed", type=int, default=10, help="requests whose seconds are taken")
    parser.add_argument("--steps", type=int, default=20, help="of a diffusers folder")
    parser.add_argument("--guidance", type=float, default=2.5, help="of a diffusers folder")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    seed = arguments.seed
    wanted = held_out_motions(arguments.count, seed)
    report: dict[str, Any] = {}
    assistant = None
    if (Path(arguments.model) / "model_index.json").exists():
        generator = load(Path(arguments.model), arguments.steps, arguments.guidance)
    else:
        import mmllm

        assistant = mmllm.load(arguments.model)
        generator = generator_of(assistant, arguments.model, "video")
    clips = timed("ceiling", lambda: from_captions(generator, [caption(motion) for motion in wanted], seed), report)
    best = [facts(motion, read(clip)) for motion, clip in zip(wanted, clips, strict=True)]
    report["ceiling"] = summary(best)
    show(clips, arguments.output / "clips-ceiling.png")
    if assistant is not None:
        scores = score_assistant(assistant, wanted, best, arguments)
        report = {"ceiling": report["ceiling"], **scores, "seconds": report["seconds"] | scores["seconds"]}
    for name, value in report.items():
        print(name, json.dumps(value if name != "failures" else len(value)))
    (arguments.output / "clips.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def load(folder: Path, steps: int, guidance: float) -> Any:
    """The clip generator of a diffusers folder, as the library builds it."""
    from mmllm.config.base import BuildContext
    from mmllm.generators.video import VideoDiffusionConfig

    return VideoDiffusionConfig(
        pretrained=str(folder.resolve()),
        steps=steps,
        guidance=guidance,
        seed=0,
        num_frames=FRAMES,
        frames_per_second=FRAMES_PER_SECOND,
    ).build(BuildContext())


def show(clips: list[Clip], path: Path, most: int = 20) -> None:
    """A picture of the first clips, the frames of each in a row."""
    if clips:
        sheet([frame for clip in clips[:most] for frame in clip.frames], columns=len(clips[0].frames)).save(path)


if __name__ == "__main__":
    main()
