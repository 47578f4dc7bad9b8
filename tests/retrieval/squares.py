"""A tiny system that answers the name of a colour with a square of it, and its data, as a config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from mmllm.config.load import parse
from mmllm.config.run import RunConfig

COLOURS = ("red", "lime", "blue", "yellow", "black", "white")
OUTPUT: dict[str, Any] = {
    "signal_tokens": 2,
    "projector": {"kind": "mlp"},
    "generator": {"kind": "stable_diffusion", "pretrained": "x"},
    "retrieval": {"dim": 8},
    "decision": {"dropout": 0.1},
}


def write_squares(folder: Path, count: int = 6, text_every: int = 0) -> Path:
    """``data.jsonl`` with ``count`` samples; every ``text_every``-th has no picture. Black and white are to be retrieved."""
    (folder / "squares").mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        colour = COLOURS[i % len(COLOURS)]
        Image.new("RGB", (32, 32), colour).save(folder / "squares" / f"{colour}.png")
        source = "retrieved" if colour in ("black", "white") else "generated"
        shown = {"type": "image", "path": f"squares/{colour}.png", "caption": colour, "source": source}
        answer: Any = "No." if text_every and i % text_every == text_every - 1 else [shown]
        turns = [{"role": "user", "content": f"draw {colour}"}, {"role": "assistant", "content": answer}]
        rows.append(json.dumps({"id": f"s{i}", "messages": turns}))
    (folder / "data.jsonl").write_text("\n".join(rows) + "\n")
    return folder / "data.jsonl"


def stage(name: str = "align", **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "train": ["backbone.new_tokens", "outputs.image.projector", "outputs.image.retrieval"],
        "lr": 1e-2,
        "data": ["data.jsonl"],
        "objectives": {"text": 1.0, "condition": 0.1, "contrastive": 1.0},
        "batch_size": 6,
        "micro_batch_size": 6,
        "samples": 0,
        **changes,
    }


def system(folder: Path, *stages: dict[str, Any], output: dict[str, Any] | None = None) -> RunConfig:
    """The configuration, shrunken; its data file must be ``data.jsonl`` beside it."""
    encoder = {"kind": "clip", "pretrained": "openai/clip-vit-base-patch32", "select_layer": "pooled"}
    tree = {
        "output": str(folder / "run"),
        "trackers": [],
        "model": {
            "inputs": {"image": {"encoder": encoder, "projector": {"kind": "linear", "expand": 2}}},
            "backbone": {"kind": "causal_lm", "pretrained": "x"},
            "outputs": {"image": OUTPUT | (output or {})},
        },
        "stages": list(stages) or [stage()],
    }
    config = parse(tree)
    model = config.model.tiny()
    # With transformers' usual 0.02 two random layers hardly tell one word from another.
    architecture = {**model.backbone.model_dump()["architecture"], "initializer_range": 0.2}
    backbone = model.backbone.model_copy(update={"architecture": architecture})
    return config.model_copy(update={"model": model.model_copy(update={"backbone": backbone})})
