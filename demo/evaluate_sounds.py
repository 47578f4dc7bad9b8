"""Score what the assistant lets be heard: is it what was asked for?

    python demo/evaluate_sounds.py --model runs/embedded/run --judge runs/embedded/judge.safetensors --output runs/embedded/scores

Three in ten wishes are single digits, the others are held out from every training. A classifier trained on true sounds
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

import numpy as np
import sound_judge
from drawing_facts import ratio, summary, wrong
from drawing_speed import speed
from drawing_trials import from_captions, replies, user
from evaluate_drawing import timed
from sound_talk import request
from sound_wishes import SoundWish, Voices, caption, perform, test_wish

from mmllm.generators.base import Sound

NOTHING = Sound(np.zeros(1, np.float32), 16_000)  # in the place of a sound that was not made
KEPT = 20  # sounds written to files


def judged(judge: sound_judge.Judge, wanted: list[SoundWish], sounds: list[Any]) -> list[dict[str, bool]]:
    """Which facts of each wish are heard; a kind of sound also under its own name."""
    results = []
    for wish, heard in zip(wanted, sound_judge.heard_in(judge, sounds), strict=True):
        found = sound_judge.right(wish, heard)
        results.append(found if wish.sound is None else {**found, wish.sound.kind: found["kind"]})
    return results


def sound_of(reply: Any) -> Sound | None:
    """The sound of a reply that has just one medium."""
    made = reply.media[0].result() if [media.type for media in reply.media] == ["audio"] else None
    return made if isinstance(made, Sound) else None


def keep(sounds: list[Sound], folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, sound in enumerate(sounds[:KEPT]):
        sound.save(folder / f"{name}-{index:02d}.flac")


def score_assistant(
    assistant: Any, judge: sound_judge.Judge, wanted: list[SoundWish], best: list[dict[str, bool]], options: Any
) -> dict[str, Any]:
    """All scores that need an assistant; ``best`` is what the generator reaches on its own."""
    report: dict[str, Any] = {}
    rng = random.Random(f"sounds-words-{options.seed}")
    asked = [request(wish, rng, unseen=True)[0] for wish in wanted]
    said = timed("assistant", lambda: replies(assistant, [[user(text)] for text in asked], options.seed), report)
    made = [sound_of(reply) or NOTHING for reply in said]
    found = judged(judge, wanted, [sound.samples for sound in made])
    report["assistant"], report["ratio"] = summary(found), ratio(found, best)
    report["words"] = summary([{"caption": caption(wish) in reply} for wish, reply in zip(wanted, said, strict=True)])
    report["speed"] = timed("speed", lambda: speed(assistant, asked[: options.timed + 1], options.seed), report)
    heard = sound_judge.heard_in(judge, [sound.samples for sound in made])
    report["failures"] = [
        {"asked": text, "reply": str(reply), "heard": sound_judge.in_words(facts), "wrong": wrong(result)}
        for text, reply, facts, result in zip(asked, said, heard, found, strict=True)
        if not result["all"]
    ]
    keep(made, options.output / "sounds", "assistant")
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
    judge = sound_judge.load(arguments.judge)
    rng = random.Random(f"sounds-test-{arguments.seed}")
    wanted = [test_wish(rng) for _ in range(arguments.count)]
    report: dict[str, Any] = {}
    if arguments.fsdd:
        voices = Voices(arguments.fsdd, "validation")
        report["judge"] = summary(judged(judge, wanted, [perform(wish, rng, voices) for wish in wanted]))
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
        if "audio" not in assistant.makes:
            makes = ", ".join(assistant.makes) or "text alone"
            raise SystemExit(f"{arguments.model} makes {makes}: there are no sounds to score")
        generator = assistant.model.outputs["audio"].frozen()
    captions = [caption(wish) for wish in wanted]
    sounds = timed("ceiling", lambda: from_captions(generator, captions, arguments.seed), report)
    best = judged(judge, wanted, [sound.samples for sound in sounds])
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
