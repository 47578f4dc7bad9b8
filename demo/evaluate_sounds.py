"""Score what the assistant lets be heard: is it what was asked for?

    python demo/evaluate_sounds.py --model runs/embedded/run --judge runs/embedded/judge.safetensors --output runs/embedded/scores

Two in five wishes are digits; of sounds there are as many of every kind. Sequences of digits and many of the sounds are held
out from every training (`sound_wishes.test_wish`), the wordings of all requests are. A classifier trained on true sounds
alone (`sound_judge`) hears the sounds. Reported, each with its 95 % interval:

* `judge`: the classifier on true sounds of the same wishes, from recordings that it was not trained on;
* `ceiling`: the generator driven by its own text encoder; `assistant`: asked for the same, in wordings never trained on;
  `ratio`: the second over the first;
* `one digit`, `several digits` in their order, `kind` of sound, all `facts of a sound`, `all`; and every kind by its name;
* `words`: whether the reply says what was asked for; `speed`: seconds of one request with one sound;
* `failures`: what was asked for and what was heard.

Writes `sounds.json`, and the first sounds of both as `sounds/*.flac`.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from drawing_facts import ratio, summary
from drawing_speed import speed
from drawing_trials import from_captions
from evaluate_drawing import generator_of, timed
from sound_judge import Judge, in_words, load
from sound_trials import facts, hear, held_out_sounds, played
from sound_wishes import SoundWish, Voices, caption, perform
from sounds import SAMPLE_RATE

from mmllm.generators.base import Sound

KEPT = 20  # sounds written to files


def judged(judge: Judge, wanted: list[SoundWish], sounds: list[Sound]) -> list[dict[str, bool]]:
    return [facts(wish, heard) for wish, heard in zip(wanted, hear(judge, sounds), strict=True)]


def keep(sounds: list[Sound], folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, sound in enumerate(sounds[:KEPT]):
        sound.save(folder / f"{name}-{index:02d}.flac")


def score_assistant(
    assistant: Any, judge: Judge, wanted: list[SoundWish], best: list[dict[str, bool]], options: Any
) -> dict[str, Any]:
    """All scores that need an assistant; ``best`` is what the generator reaches on its own."""
    report: dict[str, Any] = {}
    made = timed("assistant", lambda: played(assistant, wanted, options.seed, judge), report)
    found = [one.facts for one in made]
    report["assistant"], report["ratio"] = summary(found), ratio(found, best)
    report["words"] = summary([{"caption": caption(one.wish) in one.words} for one in made])
    requests = [one.request for one in made[: options.timed + 1]]
    report["speed"] = timed("speed", lambda: speed(assistant, requests, options.seed, "audio"), report)
    report["failures"] = [
        {"asked": one.request, "reply": one.words, "heard": in_words(one.heard or {}), "wrong": one.wrong}
        for one in made
        if not one.facts["all"]
    ]
    keep([one.sound for one in made if one.sound is not None], options.output / "sounds", "assistant")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="an assistant, or a diffusers folder: the ceiling alone")
    parser.add_argument("--judge", type=Path, required=True, help="weights written by sound_judge.py")
    parser.add_argument("--fsdd", type=Path, help="folder written by training/prepare_fsdd.py, to judge the judge")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--timed", type=int, default=10, help="requests whose seconds are taken")
    parser.add_argument("--steps", type=int, default=20, help="of a diffusers folder")
    parser.add_argument("--guidance", type=float, default=2.0, help="of a diffusers folder")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    judge = load(arguments.judge)
    wanted = held_out_sounds(arguments.count, arguments.seed)
    report: dict[str, Any] = {}
    if arguments.fsdd:
        voices = Voices(arguments.fsdd, "validation")
        rng = random.Random(f"sounds-true-{arguments.seed}")
        true = [Sound(perform(wish, rng, voices), SAMPLE_RATE) for wish in wanted]
        report["judge"] = summary(judged(judge, wanted, true))
    assistant = None
    if (Path(arguments.model) / "model_index.json").exists():
        from mmllm.config.base import BuildContext
        from mmllm.generators.audio import AudioDiffusionConfig

        folder = str(Path(arguments.model).resolve())
        config = AudioDiffusionConfig(pretrained=folder, steps=arguments.steps, guidance=arguments.guidance)
        generator: Any = config.build(BuildContext())
    else:
        import mmllm

        assistant = mmllm.load(arguments.model)
        generator = generator_of(assistant, arguments.model, "audio")
    captions = [caption(wish) for wish in wanted]
    sounds = timed("ceiling", lambda: from_captions(generator, captions, arguments.seed), report)
    best = judged(judge, wanted, sounds)
    report["ceiling"] = summary(best)
    keep(sounds, arguments.output / "sounds", "ceiling")
    if assistant is not None:
        scores = score_assistant(assistant, judge, wanted, best, arguments)
        report |= {**scores, "seconds": report["seconds"] | scores["seconds"]}
    for name, value in report.items():
        print(name, json.dumps(value if name != "failures" else len(value)))
    (arguments.output / "sounds.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
