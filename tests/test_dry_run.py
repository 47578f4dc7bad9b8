"""`mmllm train CONFIG --dry-run`: what it shrinks, what it leaves alone, and that it notices what does not work."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from mmllm.cli import main
from mmllm.config.base import BuildContext
from mmllm.config.load import parse
from mmllm.config.run import RunConfig
from mmllm.dry_run import dry_run, shrink
from mmllm.errors import ConfigError, TrainingError
from mmllm.model import MultimodalLM
from mmllm.projectors.mlp_module import MLPProjector
from mmllm.synthetic import MAKERS, Maker

TREE: dict[str, Any] = {
    "model": {
        "inputs": {
            "image": {
                "encoder": {"kind": "vit", "pretrained": "google/vit-base-patch16-224"},
                "projector": {"kind": "mlp"},
            }
        },
        "backbone": {
            "kind": "causal_lm",
            "pretrained": "somebody/large",
            "architecture": {"model_type": "llama", "num_hidden_layers": 32},
            "adapter": {"kind": "lora"},
        },
    },
    "stages": [
        {
            "name": "align",
            "train": ["inputs.*.projector"],
            "lr": 1e-3,
            "data": ["nowhere.jsonl"],
            "eval_data": ["nowhere-else.jsonl"],
            "batch_size": 256,
        }
    ],
    "output": "runs/mine",
    "compile": True,
    "precision": "fp16",
}


def config(**changes: Any) -> RunConfig:
    return parse({**TREE, **changes})


def stage(**changes: Any) -> dict[str, Any]:
    return {**TREE["stages"][0], **changes}


def test_the_command_runs_everything_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(Path(tempfile.gettempdir()).glob("mmllm-dry-run-*"))
    Path("my.yaml").write_text(yaml.safe_dump(TREE))
    assert main(["train", "my.yaml", "--dry-run"]) == 0
    told = capsys.readouterr().out
    for word in ("build", "stage align", "save", "resume", "answer", "loss", "inputs.image.projector", "bit for bit"):
        assert word in told
    assert "Nothing of yours was touched" in told
    assert [p.name for p in tmp_path.iterdir()] == ["my.yaml"]
    assert set(Path(tempfile.gettempdir()).glob("mmllm-dry-run-*")) <= before


def test_what_it_wrote_can_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, kept = tmp_path / "my.yaml", tmp_path / "kept"
    file.write_text(yaml.safe_dump(TREE))
    assert main(["train", str(file), "--dry-run", "--keep", str(kept)]) == 0
    assert {"data.jsonl", "dry-run.yaml", "run", "train.log"} <= {p.name for p in kept.iterdir()}
    assert (kept / "run" / "final" / "manifest.json").is_file()
    assert str(kept) in capsys.readouterr().out
    before = sorted(kept.rglob("*"))
    assert main(["train", str(file), "--dry-run", "--keep", str(kept)]) == 1
    assert "not an empty folder" in capsys.readouterr().err
    assert main(["train", str(file), "--keep", str(tmp_path / "other")]) == 2
    assert "--keep" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", str(file), "--dry-run"]) == 1
    assert "one process" in capsys.readouterr().err
    assert sorted(kept.rglob("*")) == before


@pytest.mark.parametrize(
    ("change", "code", "text"),
    [
        ({"stages": []}, 1, "no stage to train"),
        ({"stages": [stage(train=["outputs.*"])]}, 2, "stages.0.train.0: 'outputs.*' matches no part"),
        ({"stages": [stage(objectives={"contrastive": 1.0})]}, 2, "no output has a retrieval head"),
    ],
)
def test_faults_have_the_exit_codes_of_other_commands(
    change: dict[str, Any], code: int, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my.yaml").write_text(yaml.safe_dump({**TREE, **change}))
    assert main(["train", str(tmp_path / "my.yaml"), "--dry-run"]) == code
    assert text in capsys.readouterr().err


def test_only_what_costs_is_changed(tmp_path: Path) -> None:
    optimizer = {"schedule": "linear", "weight_decay": 0.1}
    whole = config(
        stages=[
            stage(gradient_checkpointing=True, optimizer=optimizer),
            stage(name="second", part_lr={"inputs.*": 0.5}),
        ],
        cache={"folder": "../shared"},
    )
    small = shrink(whole, tmp_path)
    assert small.model.backbone.pretrained is None  # type: ignore[attr-defined]
    assert (small.compile, small.precision, small.seed) == (False, "bf16", whole.seed)
    assert small.cache is not None
    assert small.cache.folder is None
    assert Path(small.output).is_relative_to(tmp_path)
    for before, after in zip(whole.stages, small.stages, strict=True):
        same = ("name", "train", "lr", "part_lr", "objectives", "optimizer", "gradient_checkpointing")
        assert all(getattr(before, key) == getattr(after, key) for key in same)
        assert after.max_steps == 2
        assert after.data == after.eval_data
    assert shrink(config(cache=None), tmp_path).cache is None


def test_layers_become_those_of_the_tiny_part(tmp_path: Path) -> None:
    rates = {"backbone.layers.0-9": 1e-5, "backbone.layers.30-31": 1e-4, "inputs.*": 1e-3}
    train = ["inputs.*.projector", "backbone.layers.10-29", "backbone.layers.0-9", "backbone.layers.30-31"]
    (small,) = shrink(config(stages=[stage(train=train, part_lr=rates)]), tmp_path).stages
    # Two layers are there: the first of the three pieces is dropped, the others keep their order and rates.
    assert small.train == ["inputs.*.projector", "backbone.layers.0", "backbone.layers.1"]
    assert small.part_lr == {"backbone.layers.1": 1e-4, "inputs.*": 1e-3}
    parts = MultimodalLM.from_config(config().model.tiny(), BuildContext()).parts()
    assert "layers.1." in "".join(parts["backbone"])


class Forgetful(MLPProjector):
    """Counts its calls, and forgets the count when it is saved."""

    calls = 0

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        outputs, mask = super().forward(features, mask)
        return outputs * self.calls, mask


def test_a_resumed_run_that_differs_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmllm.projectors.mlp_module.MLPProjector", Forgetful)
    with pytest.raises(
        TrainingError, match=r"ended with other values than the uninterrupted one in parts\.safetensors"
    ):
        dry_run(config(), tmp_path, print)


def test_a_foreign_error_names_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: MLPProjector, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return features @ torch.ones(3, 5), mask

    monkeypatch.setattr(MLPProjector, "forward", broken)
    with pytest.raises(RuntimeError) as caught:
        dry_run(config(), tmp_path, lambda line: None)
    assert caught.value.__notes__ == ["in the dry run's step 'stage align'"]


def test_media_are_made_by_their_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {"depth": {"encoder": {"kind": "imagebind", "modality": "imu"}, "projector": {"kind": "linear"}}}
    tree = {**TREE["model"], "inputs": inputs}
    with pytest.raises(ConfigError, match=r"model\.inputs\.depth: no files of 'imu' can be made up"):
        shrink(config(model=tree), tmp_path)
    monkeypatch.setitem(MAKERS, "imu", Maker("csv", lambda path, seed: path.write_text(str(seed)) and None))
    shrink(config(model=tree), tmp_path)
    assert (tmp_path / "depth3.csv").read_text() == "3"
