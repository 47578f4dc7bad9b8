"""A tiny BLIP-2 with its first stage, and captioned pictures that are made for it: two bars, each of a colour and a length."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageDraw

from mmllm.config.base import BuildContext
from mmllm.config.load import load
from mmllm.config.run import RunConfig

COLOURS = {
    "red": (230, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 230),
    "white": (250, 250, 250), "yellow": (220, 220, 20), "pink": (230, 30, 230),
}  # fmt: skip
PROJECTOR: dict[str, Any] = {
    "kind": "qformer", "num_queries": 4, "num_layers": 2, "hidden_dim": 32, "num_heads": 4, "ff_mult": 2, "norm": True,
}  # fmt: skip
# The text side reads letters; a name of a colour is known by its first one.
ALIGNMENT: dict[str, Any] = {
    "kind": "blip2", "dim": 16, "tokenizer": None, "vocab_size": 141, "max_length": 6, "max_positions": 6,
}  # fmt: skip
MODEL: dict[str, Any] = {
    "inputs": {
        "image": {
            "encoder": {
                "kind": "clip",
                "architecture": {
                    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                    "image_size": 32, "patch_size": 16,
                },
                "select_layer": -1,
            },
            "projector": PROJECTOR,
            "alignment": ALIGNMENT,
        },
    },
    "backbone": {
        "kind": "causal_lm",
        "chat_template": "chatml",
        "architecture": {
            "model_type": "llama", "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 272,
        },
    },
}  # fmt: skip


def write_pictures(folder: Path, count: int, seed: int = 0, text_every: int = 0, name: str = "data") -> Path:
    """``<name>.jsonl`` with ``count`` pictures of two bars and captions like ``r g``, in turn all 36; every
    ``text_every``-th sample is text alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kinds = [(a, b) for a in COLOURS for b in COLOURS]
    random.Random(seed).shuffle(kinds)
    rows = []
    for i in range(count):
        bars = kinds[i % len(kinds)]
        caption = " ".join(colour[0] for colour in bars)
        if text_every and i % text_every == text_every - 1:
            content: Any = f"Say {caption}"
        else:
            picture = Image.new("RGB", (32, 32))
            for row, colour in enumerate(bars):
                place = (0, 2 + 16 * row, random.Random(f"{seed} {i} {row}").randint(20, 31), 13 + 16 * row)
                ImageDraw.Draw(picture).rectangle(place, fill=COLOURS[colour])
            picture.save(folder / f"{name}{i}.png")
            content = [{"type": "image", "path": f"{name}{i}.png"}]
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": caption}]
        rows.append(json.dumps({"id": f"{name}{i}", "messages": turns}) + "\n")
    file = folder / f"{name}.jsonl"
    file.write_text("".join(rows))
    return file


def first(**changes: Any) -> dict[str, Any]:
    """BLIP-2's first stage."""
    return {
        "name": "align",
        "train": ["inputs.image.projector.without.language_projection", "inputs.image.alignment"],
        "objectives": {"itc": 1.0, "itm": 1.0, "itg": 1.0},
        "lr": 3e-3,
        "data": ["data.jsonl"],
        "epochs": 2,
        "batch_size": 4,
        "micro_batch_size": 4,
        **changes,
    }


def second(**changes: Any) -> dict[str, Any]:
    return first(name="generate", train=["inputs.image.projector"], objectives={"text": 1.0}, samples=0, **changes)


def system(folder: Path, *stages: dict[str, Any], **changes: Any) -> tuple[RunConfig, BuildContext]:
    """The configuration, written to ``folder``; its data file must be ``data.jsonl`` beside it."""
    tree = {
        "model": MODEL,
        "stages": list(stages) or [first()],
        "output": str(folder / "run"),
        "trackers": [],
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return load(folder / "config.yaml"), BuildContext(root=folder)
