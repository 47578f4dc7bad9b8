"""training/pretrain.py and training/instruct.py, run as a user runs them."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent / "training"))
import systems

import mmllm

SCRIPTS = Path(__file__).parent.parent.parent / "training"
STAGES = (systems.stage(epochs=1), systems.stage("instruct", train=["backbone.adapter"], epochs=1))


def run(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    runpy.run_path(str(SCRIPTS / script), run_name="__main__")


def adapter_b(folder: Path) -> list[bool]:
    """For each of the adapter's B matrices, which start at zero, whether it has left zero."""
    tensors = load_file(folder / "final" / "adapter" / "adapter_model.safetensors")
    return [bool(tensor.any()) for name, tensor in tensors.items() if "lora_B" in name]


def test_pretrain_then_instruct_gives_a_model_that_talks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = systems.write_config(tmp_path, *STAGES)
    run(monkeypatch, "pretrain.py", config, "keep_last=3")
    folder = tmp_path / "run"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["0-align-00000005"]
    assert not any(adapter_b(folder)), "pretraining does not touch the adapter"
    run(monkeypatch, "instruct.py", config, "keep_last=3")
    assert all(adapter_b(folder))
    assert isinstance(mmllm.load(folder).chat([{"role": "user", "content": "Say 1"}], max_new_tokens=3), str)
    text = (folder / "run.md").read_text(encoding="utf-8")
    assert "Stage `align`" in text
    assert "Stage `instruct`" in text


def test_instruct_from_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = systems.write_config(tmp_path, *STAGES)
    run(monkeypatch, "pretrain.py", config, "stages.align.max_steps=1")
    other = tmp_path / "other"
    run(
        monkeypatch, "instruct.py", config, f"output={other}", "--from", tmp_path / "run", "stages.instruct.max_steps=1"
    )
    assert all(adapter_b(other))
    assert "Stage `align`" not in (other / "run.md").read_text(encoding="utf-8")


def test_instruct_without_pretraining_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = systems.write_config(tmp_path, *STAGES)
    with pytest.raises(SystemExit, match=r"no checkpoint in .*pretrain\.py first"):
        run(monkeypatch, "instruct.py", config)


def test_a_wrong_config_ends_with_its_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = systems.write_config(tmp_path, *STAGES)
    with pytest.raises(SystemExit, match="learning_rate"):
        run(monkeypatch, "pretrain.py", config, "stages.align.learning_rate=1")
