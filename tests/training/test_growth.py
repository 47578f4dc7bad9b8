"""A trained assistant that is given more to write with, and goes on from what it has learned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from test_outputs import system

import mmllm
from mmllm.config.load import parse
from mmllm.config.run import RunConfig
from mmllm.errors import CheckpointError
from mmllm.training.growth import rows_of
from mmllm.training.run import train

SPEAKS = {
    "projector": {"kind": "tiny_transformer", "num_layers": 1, "hidden_dim": 16, "num_heads": 2},
    "generator": {"kind": "audio_diffusion", "pretrained": "y"},
    "signal_tokens": 3,
}


def with_sound(config: RunConfig, folder: Path) -> RunConfig:
    """The same system with a second output, whose tokens come before those of the first."""
    tree = yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))
    tree["model"]["outputs"] = {"audio": SPEAKS, **tree["model"]["outputs"]}
    tree |= {"output": str(folder)}
    tree["stages"][0] |= {"train": ["outputs.image.*"], "objectives": {"condition": 1.0}, "max_steps": 1}
    grown = parse(tree)
    sound = grown.model.outputs["audio"]
    tiny = sound.model_copy(update={"generator": sound.generator.tiny()})
    outputs = {"audio": tiny, "image": grown.model.outputs["image"]}
    return grown.model_copy(update={"model": grown.model.model_copy(update={"outputs": outputs})})


def test_a_second_output_leaves_what_the_first_has_learned(tmp_path: Path) -> None:
    first = system(tmp_path, max_steps=3)
    before = mmllm.load(train(first)).model
    after = mmllm.load(train(with_sound(first, tmp_path / "grown"), start_from=tmp_path / "run")).model
    old, new = before.backbone.new_tokens, after.backbone.new_tokens
    assert old is not None
    assert new is not None
    assert old.head is not None
    assert new.head is not None
    assert (len(old.weight), len(new.weight)) == (2, 5)
    assert torch.equal(new.weight[3:], old.weight)
    assert torch.equal(new.head[3:], old.head)
    assert not torch.equal(new.weight[:2], old.weight), "the tokens of the sounds are new"


def test_an_output_cannot_be_taken_away(tmp_path: Path) -> None:
    first = system(tmp_path, max_steps=1)
    train(with_sound(first, tmp_path / "both"))
    with pytest.raises(CheckpointError, match=r"holds outputs\.audio\.generator, outputs\.audio\.projector, but"):
        train(first, start_from=tmp_path / "both")


def test_rows_are_named_by_what_they_stand_for() -> None:
    tokens = {
        "new_tokens": {
            "image": {"placeholder": 108, "markers": [106, 107]},
            "audio": {"placeholder": 109, "markers": None},
        },
        "signal_tokens": {
            "image": {"first": 100, "rows": 2, "group": 2},
            "audio": {"first": 102, "rows": 4, "group": 9},
        },
    }
    rows = rows_of(tokens, 100)
    assert rows["signal", "image", 1] == 1
    assert rows["signal", "audio", 0] == 2
    assert rows["marker", "image", 1] == 7
    assert sorted(rows.values()) == list(range(8)), "placeholders have no row"


def test_tokens_that_were_trained_are_never_dropped(tmp_path: Path) -> None:
    first = system(tmp_path, max_steps=1)
    train(first)
    outputs = {"image": first.model.outputs["image"].model_copy(update={"signal_tokens": 1})}
    update = {"output": str(tmp_path / "fewer"), "model": first.model.model_copy(update={"outputs": outputs})}
    with pytest.raises(CheckpointError, match="no place for new tokens that were trained: signal 1 of image"):
        train(first.model_copy(update=update), start_from=tmp_path / "run")


def test_ids_that_were_written_one_by_one_are_read() -> None:
    tokens = {"new_tokens": {}, "signal_tokens": {"image": [100, 101]}}
    assert rows_of(tokens, 100) == {("signal", "image", 0): 0, ("signal", "image", 1): 1}
