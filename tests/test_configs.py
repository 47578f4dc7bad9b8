"""Every shipped configuration runs: shrunken with `tiny()` parts and synthetic data, all stages, saved, loaded, chatting."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from mmllm.assistant import load as load_assistant
from mmllm.cli import CONFIG_FOLDERS
from mmllm.config.base import BuildContext
from mmllm.config.load import dump, load
from mmllm.config.run import DataSource, RunConfig
from mmllm.making import Maker
from mmllm.retrieval import build_index
from mmllm.training.run import train

CONFIGS = sorted(CONFIG_FOLDERS[1].rglob("*.yaml"))
LEAST = 15  # how many configurations ship; raise it with each that is added


def picture(path: Path, seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 255, (24, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


def sound(path: Path, seed: int) -> None:
    noise = np.random.default_rng(seed).normal(0, 0.1, 8000).astype(np.float32)
    soundfile.write(path, noise, 16_000)


def clip(path: Path, seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 255, (6, 24, 40, 3), dtype=np.uint8)
    first, *rest = (Image.fromarray(frame) for frame in noise)
    first.save(path, save_all=True, append_images=rest, duration=400)


MAKERS = {"image": (picture, "png"), "audio": (sound, "wav"), "video": (clip, "gif"), "depth": (picture, "png")}


def synthetic_data(folder: Path, modalities: list[str], made: list[str]) -> Path:
    """Questions with one medium of each modality, answered with a word and one of each that the assistant makes."""
    rows: list[dict[str, Any]] = []
    for i in range(4):
        for modality in {*modalities, *made}:
            make, suffix = MAKERS[modality]
            make(folder / f"{modality}{i}.{suffix}", i)
        parts = [{"type": modality, "path": f"{modality}{i}.{MAKERS[modality][1]}"} for modality in modalities]
        word = random.Random(i).choice(["yes", "no", "a cat"])
        told = {"caption": f"a {word}", "source": ("generated", "retrieved")[i % 2]}
        shown = [{"type": m, "path": f"{m}{i}.{MAKERS[m][1]}", **told} for m in made]
        reply = [{"type": "text", "text": word}, *shown] if shown else word
        content = [*parts, {"type": "text", "text": "what?"}]
        rows.append(
            {"id": str(i), "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": reply}]}
        )
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def shrink(config: RunConfig, folder: Path) -> RunConfig:
    data = synthetic_data(folder, list(config.model.inputs), list(config.model.outputs))
    source = DataSource.model_validate(str(data))
    few = {"data": [source], "eval_data": [], "epochs": None, "max_steps": 2, "batch_size": 2, "micro_batch_size": 2}
    stages = [
        stage.model_copy(update={**few, "max_length": 4096, "num_workers": 0, "samples": 1}) for stage in config.stages
    ]
    return config.model_copy(
        update={
            "model": config.model.tiny(),
            "stages": stages,
            "output": str(folder / "run"),
            "precision": "fp32",
            "trackers": [],
        }
    )


def test_all_configurations_are_found() -> None:
    assert len(CONFIGS) >= LEAST


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_configuration_trains_saves_loads_and_answers(path: Path, tmp_path: Path) -> None:
    config = shrink(load(path), tmp_path)
    again = tmp_path / "again.yaml"
    again.write_text(dump(config))
    assert load(again) == config
    run = train(config, BuildContext(root=tmp_path))
    torch.manual_seed(1)
    assistant = load_assistant(run)
    assert assistant.modalities == tuple(config.model.inputs)
    content = [{"type": name, "path": str(tmp_path / f"{name}0.{MAKERS[name][1]}")} for name in config.model.inputs]
    reply = assistant.chat(
        [{"role": "user", "content": [*content, {"type": "text", "text": "what?"}]}], max_new_tokens=4
    )
    assert isinstance(reply, str)
    for name, output in config.model.outputs.items():
        group = assistant.processor.signals[name]
        ids = group.ids
        signals = group.told(ids, torch.randn(len(ids), assistant.model.backbone.hidden_dim))  # states, or codes
        options = {} if group.group.free else {name: {"steps": 1}}
        assert Maker(assistant.model, options).make(name, signals).result(300) is not None
        if output.retrieval is not None:
            (tmp_path / "index.jsonl").write_text("".join(f'"{p.name}"\n' for p in tmp_path.glob(f"{name}*.*")))
            index = build_index(assistant.model, assistant.processor, tmp_path / "index.jsonl", name)
            index.save(tmp_path / "index")
            assistant.use_index(tmp_path / "index", "retrieve")
            found = Maker(assistant.model, options, retrieval=assistant.retrieval).make(name, signals)
            assert found.source == "retrieved"
            assert found.result(300) is not None
