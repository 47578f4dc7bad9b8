"""A tiny system with pictures, sounds and text, and data for it, as a config file on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from mmllm.config.base import BuildContext
from mmllm.config.load import load
from mmllm.config.run import RunConfig
from mmllm.processing.batch import Batch
from mmllm.training import checkpoint
from mmllm.training.loop import SummedLoss

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}
MODEL: dict[str, Any] = {
    "inputs": {
        "image": {
            "encoder": {
                "kind": "clip",
                "architecture": {
                    "hidden_size": 16,
                    "intermediate_size": 32,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "image_size": 32,
                    "patch_size": 16,
                },
            },
            "projector": {"kind": "mlp", "depth": 2},
        },
        "audio": {
            "encoder": {
                "kind": "whisper",
                "architecture": {
                    "d_model": 16,
                    "encoder_layers": 1,
                    "encoder_attention_heads": 2,
                    "encoder_ffn_dim": 32,
                    "num_mel_bins": 16,
                    "max_source_positions": 10,
                },
            },
            "projector": {"kind": "linear"},
            "markers": True,
        },
    },
    "backbone": {
        "kind": "causal_lm",
        "chat_template": "chatml",
        "architecture": {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": 272,
        },
        "adapter": {"kind": "lora", "rank": 2, "alpha": 4, "dropout": 0.1},
    },
}


def write_data(folder: Path, count: int = 17) -> Path:
    """``data.jsonl`` with ``count`` samples s00, s01, …: in turn a picture, a sound, text alone; replies of unequal
    length.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = list(COLOURS)
    for name, colour in COLOURS.items():
        Image.new("RGB", (32, 32), colour).save(folder / f"{name}.png")
    for pitch in (300, 900):
        wave = 0.3 * np.sin(2 * np.pi * pitch * np.arange(1600) / 16000)
        soundfile.write(folder / f"{pitch}.wav", wave.astype(np.float32), 16000)
    rows = []
    for i in range(count):
        name, pitch = names[i // 3 % 3], (300, 900)[i % 2]
        content: list[dict[str, str]] = [
            [{"type": "image", "path": f"{name}.png"}, {"type": "text", "text": "Colour?"}],
            [{"type": "audio", "path": f"{pitch}.wav"}, {"type": "text", "text": "Pitch?"}],
            [{"type": "text", "text": f"Say {i}"}],
        ][i % 3]
        reply = [f"It is {name}.", f"{pitch} Hz", "yes " * (i % 4 + 1)][i % 3]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": reply}]
        rows.append({"id": f"s{i:02d}", "messages": messages})
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def stage(name: str = "align", **changes: Any) -> dict[str, Any]:
    """A stage that trains the projectors and marker tokens for two epochs of 17 samples in batches of 4."""
    return {
        "name": name,
        "train": ["inputs.*.projector", "backbone.new_tokens"],
        "lr": 0.01,
        "data": [{"reader": {"kind": "messages", "path": "data.jsonl"}}],
        "epochs": 2,
        "batch_size": 4,
        "micro_batch_size": 2,
        "samples": 0,
        **changes,
    }


def tree(folder: Path, *stages: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A configuration as nested mappings, with its run directory in ``folder``."""
    chosen = list(stages) or [stage()]
    return {"model": MODEL, "stages": chosen, "output": str(folder / "run"), "trackers": [], **changes}


def write_config(folder: Path, *stages: dict[str, Any], **changes: Any) -> Path:
    """Data and ``config.yaml`` in ``folder``."""
    write_data(folder)
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(tree(folder, *stages, **changes), sort_keys=False), encoding="utf-8")
    return file


def system(folder: Path, *stages: dict[str, Any], **changes: Any) -> tuple[RunConfig, BuildContext]:
    """The same, loaded."""
    return load(write_config(folder, *stages, **changes)), BuildContext(root=folder)


def rows(folder: Path, key: str = "loss") -> list[dict[str, Any]]:
    """The rows of a run's metrics that have ``key``; ``folder`` is what ``system`` was given."""
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if key in row]


class Killed(BaseException):
    """Stands for a power cut: nothing in the code catches it."""


def kill_after(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """Let the process 'die' in the ``calls``-th forward pass (micro-batch) of the run."""
    forward, count = SummedLoss.forward, 0

    def counting(self: SummedLoss, batch: Batch) -> dict[str, Tensor]:
        nonlocal count
        count += 1
        if count == calls:
            raise Killed
        return forward(self, batch)

    monkeypatch.setattr(SummedLoss, "forward", counting)


def final_state(run: Path) -> dict[str, bytes]:
    """All weights and optimizer tensors at the end of a run, as bytes; ``run`` is its folder."""
    newest = checkpoint.checkpoints(run)[-1]
    files = [*newest.rglob("*.safetensors"), *(run / "final").rglob("*.safetensors")]
    return {
        f"{file.relative_to(run)}:{name}": tensor.numpy().tobytes()
        for file in files
        for name, tensor in load_file(file).items()
    }


def metrics(run: Path) -> list[dict[str, Any]]:
    """All rows that a run has logged, sample ids included, without what depends on the clock."""
    files = (run / "metrics.jsonl", run / "samples.jsonl")
    found = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in found]


def step_ids(run: Path) -> list[list[str]]:
    """The sample ids of every step, as logged."""
    return [json.loads(line)["ids"] for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
