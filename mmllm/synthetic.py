"""Made-up media and conversations of any mixture of modalities: what a dry run and the tests train on.

The media are noise, so nothing can be learned from them but the data itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

WORDS = ("yes", "no", "a cat")


@dataclass(frozen=True)
class Maker:
    """How a file of one kind of media is made: ``write(path, seed)``."""

    suffix: str
    write: Callable[[Path, int], None]


def picture(path: Path, seed: int) -> None:
    """Noise of 40 x 24 pixels."""
    from PIL import Image

    Image.fromarray(_bytes(seed, (24, 40, 3))).save(path)


def sound(path: Path, seed: int) -> None:
    """Half a second of noise at 16 kHz."""
    import soundfile

    noise = np.random.default_rng(seed).normal(0, 0.1, 8000).astype(np.float32)
    soundfile.write(path, noise, 16_000)


def clip(path: Path, seed: int) -> None:
    """Six frames of 40 x 24 pixels, 0.4 s each."""
    from PIL import Image

    first, *rest = (Image.fromarray(frame) for frame in _bytes(seed, (6, 24, 40, 3)))
    first.save(path, save_all=True, append_images=rest, duration=400)


def points(path: Path, seed: int) -> None:
    """A hundred points with colours."""
    np.save(path, np.random.default_rng(seed).random((100, 6), dtype=np.float32))


def _bytes(seed: int, shape: tuple[int, ...]) -> Any:
    return np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8)


# By the name of the decoder that opens them (`Preprocessor.media`, `Target.media`): a kind of media that mmllm learns to
# decode gets its line here, and every dry run can use it.
MAKERS: dict[str, Maker] = {
    "image": Maker("png", picture),
    "audio": Maker("wav", sound),
    "video": Maker("gif", clip),
    "point_cloud": Maker("npy", points),
}


def write_medium(folder: Path, name: str, media: str, index: int) -> str:
    """Make the ``index``-th file of the modality ``name`` in ``folder``; its file name. Raises ``KeyError`` where no file
    can be made for the kind of ``media``.
    """
    maker = MAKERS[media]
    file = f"{name}{index}.{maker.suffix}"
    maker.write(folder / file, index)
    return file


def write_conversations(folder: Path, inputs: Mapping[str, str], outputs: Mapping[str, str], count: int = 4) -> Path:
    """``data.jsonl`` of ``count`` samples: a question with one medium of each input, answered with a word and one medium
    of each output. ``inputs`` and ``outputs`` map a modality's name to the kind of its media.

    Every medium that is made has a caption, a file, and in turn one of both sources, so that all objectives have terms.
    """
    rows: list[dict[str, Any]] = []
    for i in range(count):
        files = {name: write_medium(folder, name, media, i) for name, media in {**inputs, **outputs}.items()}
        word = WORDS[i % len(WORDS)]
        told = {"caption": f"a {word}", "source": ("generated", "retrieved")[i % 2]}
        seen = [{"type": name, "path": files[name]} for name in inputs]
        made = [{"type": name, "path": files[name], **told} for name in outputs]
        question = {"role": "user", "content": [*seen, {"type": "text", "text": "what?"}]}
        answer = {"role": "assistant", "content": [{"type": "text", "text": word}, *made] if made else word}
        rows.append({"id": str(i), "messages": [question, answer]})
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
