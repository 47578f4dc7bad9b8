"""Plain pictures in three colours and the question which one it is: ``data/train.jsonl``."""

import json
import random
from pathlib import Path

from PIL import Image

COLOURS = {"red": (200, 30, 30), "green": (30, 170, 40), "blue": (40, 50, 210)}

if __name__ == "__main__":
    folder, rng, rows = Path("data"), random.Random(0), []
    folder.mkdir(exist_ok=True)
    for i in range(48):
        name = [*COLOURS][i % 3]
        shade = tuple(min(255, max(0, value + rng.randint(-30, 30))) for value in COLOURS[name])
        Image.new("RGB", (rng.randint(16, 64), 32), shade).save(folder / f"{i:02d}-{name}.png")
        asked = [{"type": "image", "path": f"{i:02d}-{name}.png"}, {"type": "text", "text": "Which colour?"}]
        rows.append(
            {"id": str(i), "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": name}]}
        )
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
