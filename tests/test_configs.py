"""Every shipped configuration runs from end to end in its tiny version: what `mmllm train CONFIG --dry-run` does."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from mmllm.cli import CONFIG_FOLDERS
from mmllm.config.load import load
from mmllm.dry_run import STEPS, dry_run

CONFIGS = sorted(CONFIG_FOLDERS[1].rglob("*.yaml"))
LEAST = 69  # how many configurations ship; raise it with each that is added


def test_all_configurations_are_found() -> None:
    assert len(CONFIGS) >= LEAST


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_configuration_trains_saves_resumes_loads_and_answers(path: Path, tmp_path: Path) -> None:
    config = load(path)
    done = dry_run(config, tmp_path, lambda line: None)
    assert done.assistant.modalities == tuple(config.model.inputs)
    assert [*done.losses] == [stage.name for stage in config.stages]
    assert all(len(losses) == STEPS and all(map(math.isfinite, losses)) for losses in done.losses.values())
    assert done.files >= 5  # weights, optimizer, position, tokenizer, references
    assert isinstance(done.reply, str)
    assert [*done.media] == [*config.model.outputs]
    assert all(medium.result(0) is not None and medium.source == "generated" for medium in done.media.values())
    assert [*done.found] == [name for name, output in config.model.outputs.items() if output.retrieval is not None]
    assert all(medium.result(0) is not None and medium.source == "retrieved" for medium in done.found.values())
    assert all(Path(stage.data[0].reader.path) == tmp_path / "data.jsonl" for stage in done.config.stages)  # type: ignore[attr-defined]
