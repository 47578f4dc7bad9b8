"""Makes the small data of ``configs/examples``: a few pictures and sounds with captions and questions.

python demo/example_data.py configs/examples/data
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import scenes
import soundfile
import sounds

PICTURES, SOUNDS = 32, 12


def main(folder: Path) -> None:
    (folder / "media").mkdir(parents=True, exist_ok=True)
    align, instruct = [], []
    for i in range(PICTURES):
        rng = random.Random(i)
        scene = scenes.sample_scene(rng, kind="canvas")
        part = {"type": "image", "path": f"media/picture-{i:02d}.png"}
        scenes.render(scene).save(folder / part["path"], optimize=True)
        align.append(dialogue(f"picture-{i}", part, [("Describe the picture.", scenes.caption(scene, rng))]))
        instruct.append(dialogue(f"picture-{i}", part, [(q, a) for _, q, a in scenes.questions(scene, rng, 3)]))
    for i in range(SOUNDS):
        generator = np.random.default_rng(i)
        sound = sounds.sample_sound(generator)
        part = {"type": "audio", "path": f"media/sound-{i:02d}.ogg"}
        soundfile.write(folder / part["path"], sounds.synthesize(sound, generator), 16_000)
        align.append(dialogue(f"sound-{i}", part, [("Describe the sound.", sounds.caption(sound, generator))]))
        instruct.append(dialogue(f"sound-{i}", part, [(q, a) for _, q, a in sounds.questions(sound, generator, 2)]))
    for name, rows in (("align", align), ("instruct", instruct)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def dialogue(id: str, part: dict[str, str], turns: list[tuple[str, str]]) -> dict[str, Any]:
    """A conversation about one media item, shown in the first turn."""
    messages: list[dict[str, Any]] = []
    for question, answer in turns:
        media = [part] if not messages else []
        messages.append({"role": "user", "content": [*media, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return {"id": id, "messages": messages}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
