"""A model with a fused encoder: frozen encoders are in its checkpoints by reference, each with a hash of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import systems
import torch
import yaml
from safetensors.torch import load_file, save_file

import mmllm
from mmllm.config.base import BuildContext
from mmllm.config.load import load
from mmllm.encoders.vision_transformer import VitConfig
from mmllm.errors import CheckpointError
from mmllm.training import checkpoint
from mmllm.training.run import train

NUMBERS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}
KINDS = {
    "first": {"model_type": "vit", "intermediate_size": 16, "patch_size": 8},
    "second": {"model_type": "dinov2", "patch_size": 16},
}


def test_each_encoder_is_kept_by_reference(tmp_path: Path) -> None:
    stage = systems.stage(train=["inputs.*.projector"], epochs=None, max_steps=1, batch_size=6)
    systems.write_config(tmp_path, stage)
    states = {}
    for name, kind in KINDS.items():
        model = VitConfig(architecture=NUMBERS | kind).build(BuildContext(weights=False)).model
        model.save_pretrained(tmp_path / name)
        states[name] = model.state_dict()
    encoders = {name: {"kind": "vit", "pretrained": f"./{name}", "select_layer": -2} for name in KINDS}
    tree = yaml.safe_load((tmp_path / "config.yaml").read_text())
    tree["model"]["inputs"]["image"]["encoder"] = {"kind": "fused", "encoders": encoders}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    train(load(tmp_path / "config.yaml"), BuildContext(root=tmp_path))
    final = tmp_path / "run" / "final"
    references = checkpoint.read_json(final / "references.json")
    where = "inputs.image.encoder.encoders"
    assert {path: entry["pretrained"] for path, entry in references.items()} == {
        f"{where}.{name}": str(tmp_path / name) for name in KINDS
    }
    assert not [name for name in load_file(final / "parts.safetensors") if ".image.encoder." in name]
    encoder = mmllm.load(final, device="cpu").model.inputs["image"].encoder
    assert list(encoder.encoders) == list(KINDS)  # the order is that of the features
    for name in KINDS:
        loaded = encoder.encoders[name].model.state_dict()
        assert 0 < len(loaded) < len(states[name])  # without the last block
        assert all(torch.equal(value, states[name][key]) for key, value in loaded.items())
    weights = tmp_path / "second" / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"second no longer holds the weights of inputs.image.encoder.encoders.second"
    ):
        mmllm.load(final, device="cpu")
    shutil.rmtree(tmp_path / "first")
    with pytest.raises(CheckpointError, match=r"encoders.first should be at .*first, but nothing is there"):
        mmllm.load(final, device="cpu")
