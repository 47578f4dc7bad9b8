"""Every configuration that ships can be rehearsed: no stage, and no conversation, ends in a note that it could not be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmllm.cli import CONFIG_FOLDERS
from mmllm.config.base import BuildContext
from mmllm.config.load import load
from mmllm.config.run import RunConfig
from mmllm.plan import Setting, make_plan
from mmllm.plan.measure import Costs

CONFIGS = sorted(CONFIG_FOLDERS[1].rglob("*.yaml"))


def traits(tree: Any, key: str = "") -> Iterator[str]:
    """What sets a configuration apart: kinds of parts, families of models, objectives, and what is switched on."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            if name in ("kind", "model_type", "gradient_checkpointing"):
                yield f"{key}.{name} {value}"
            elif name in ("fusion", "alignment", "prompt", "retrieval", "decision", "quantize") and value is not None:
                yield name
            elif name == "objectives":
                yield from (f"objective {objective}" for objective in value)
            yield from traits(value, name)
    elif isinstance(tree, list):
        for value in tree:
            yield from traits(value, key)


def cover(configs: dict[Path, RunConfig]) -> list[Path]:
    """A few of ``configs`` that have every trait of all, greedily."""
    own = {path: set(traits(config.model_dump(mode="json"))) for path, config in configs.items()}
    missing, chosen = set().union(*own.values()), list[Path]()
    while missing:
        chosen.append(max(own, key=lambda path: len(own[path] & missing)))
        missing -= own[chosen[-1]]
    return chosen


def rehearse(config: RunConfig, root: Path, **setting: Any) -> Costs:
    costs = make_plan(config, BuildContext(root=root), Setting(**setting), costs=True).costs
    assert costs is not None
    assert [note for note in costs.notes if "could not be rehearsed" in note] == []
    assert [*costs.stages] == [stage.name for stage in config.stages]
    assert costs.inference is not None
    assert all(cost.memory.peak > 0 and cost.flops > 0 for cost in costs.stages.values())
    return costs


def test_every_kind_of_part_can_be_rehearsed_in_its_tiny_version() -> None:
    configs = {path: load(path) for path in CONFIGS}
    chosen = cover(configs)
    assert len(chosen) < len(CONFIGS) / 2
    for path in chosen:
        try:
            rehearse(configs[path].model_copy(update={"model": configs[path].model.tiny()}), path.parent, length=256)
        except Exception as error:
            error.add_note(f"in {path.stem}")
            raise


@pytest.mark.slow  # ten seconds each
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_can_be_rehearsed(path: Path) -> None:
    rehearse(load(path), path.parent)
