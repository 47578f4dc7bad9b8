"""Score what the assistant animates: do the clips show what was asked for?

    python demo/evaluate_clips.py --model runs/embedded/clips --output runs/embedded/scores --count 300

Motions are held out from every training. `clip_parser` reads the clips. Reported, each with its 95 % interval:

* `ceiling`: the generator driven by its own text encoder; `assistant`: asked for the same, in wordings never trained on;
  `ratio`: the second over the first;
* `direction` (the move: which way, back or not, growing, shrinking), `shape`, `color`, `background`, `pace`, `alone` (one shape
  and no other in every frame), `direction and shape` together, `all` of them.

Writes `clips.json`, and the frames of the first clips, a row each, as `clips-ceiling.png` and `clips-assistant.png`.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from clip_parser import ParsedClip, parse_clip
from drawing_facts import ratio, summary
from drawing_trials import from_captions, replies, user
from evaluate_drawing import sheet, timed
from moving import FRAMES, FRAMES_PER_SECOND, Motion, caption, motions
from moving_talk import request

from mmllm.generators.base import Clip


def facts(motion: Motion, parsed: ParsedClip) -> dict[str, bool]:
    """Which of the motion's facts hold in a clip; only those that the motion has."""
    found = {
        "direction": parsed.move == motion.move,
        "shape": parsed.shape == motion.shape,
        "color": parsed.color == motion.color,
        "background": parsed.background == motion.background,
        "alone": parsed.alone,
    }
    if motion.pace:
        found["pace"] = parsed.pace == motion.pace
    return {**found, "direction and shape": found["direction"] and found["shape"], "all": all(found.values())}


def judged(motion: Motion, clip: Clip | None) -> dict[str, bool]:
    """The facts of a clip; all of them wrong where there is none."""
    if clip is None:
        return dict.fromkeys(facts(motion, ParsedClip("", "", "", "unclear", "", False)), False)
    return facts(motion, parse_clip([np.asarray(frame.convert("RGB")) for frame in clip.frames]))


def clip_of(reply: Any) -> Clip | None:
    """The clip of a reply that has just one medium."""
    return reply.media[0].result() if [media.type for media in reply.media] == ["video"] else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="an assistant, or a diffusers folder: the ceiling alone")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--steps", type=int, default=20, help="of a diffusers folder")
    parser.add_argument("--guidance", type=float, default=2.5, help="of a diffusers folder")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    seed = arguments.seed
    rng = random.Random(f"clips-test-{seed}")
    wanted = [motions(rng, test=True) for _ in range(arguments.count)]
    report: dict[str, Any] = {}
    assistant = None
    if (Path(arguments.model) / "model_index.json").exists():
        generator = load(Path(arguments.model), arguments.steps, arguments.guidance)
    else:
        import mmllm

        assistant = mmllm.load(arguments.model)
        generator = assistant.model.outputs["video"].frozen()
    clips = timed("ceiling", lambda: from_captions(generator, [caption(motion) for motion in wanted], seed), report)
    best = [judged(motion, clip) for motion, clip in zip(wanted, clips, strict=True)]
    report["ceiling"] = summary(best)
    show(clips, arguments.output / "clips-ceiling.png")
    if assistant is not None:
        asked = [[user(request(motion, rng, unseen=True)[0])] for motion in wanted]
        said = timed("assistant", lambda: replies(assistant, asked, seed), report)
        made = [clip_of(reply) for reply in said]
        found = [judged(motion, clip) for motion, clip in zip(wanted, made, strict=True)]
        report["assistant"], report["ratio"] = summary(found), ratio(found, best)
        right = [caption(motion) in reply for motion, reply in zip(wanted, said, strict=True)]
        report["words"] = summary([{"caption": value} for value in right])
        show([clip for clip in made if clip is not None], arguments.output / "clips-assistant.png")
    for name, found in report.items():
        print(name, json.dumps(found))
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
