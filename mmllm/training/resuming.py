"""What a run resumes from, and whether the present configuration may go on with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmllm.config.base import BuildContext
from mmllm.config.load import load as load_config
from mmllm.config.run import RunConfig, StageConfig
from mmllm.errors import CheckpointError, TrainingError
from mmllm.training import checkpoint
from mmllm.training.checkpoint import Position
from mmllm.training.references import pinned

# What may change between a checkpoint and its resumption: where and how often things are written, and how a global
# batch is cut up (which changes rounding and, where trained parts have dropout, its draws; not the loss). Stages that
# have not begun may change altogether.
HARMLESS_RUN = {"output", "trackers", "keep_last", "keep_every", "save_async", "compile", "short_cuts", "cache"}
HARMLESS_STAGE = {
    "eval_data", "eval_every", "save_every", "samples", "num_workers", "max_skipped",
    "batching", "micro_batch_size", "micro_batch_tokens", "micro_batch_media", "gradient_checkpointing",
}  # fmt: skip


def newest(folder: Path, config: RunConfig, context: BuildContext, chosen: Sequence[StageConfig]) -> Path | None:
    """The newest checkpoint of a run folder, verified; None without any.

    Raises ``CheckpointError`` when it is damaged, or naming the keys by which ``config`` differs from its
    configuration.
    """
    found = checkpoint.latest_valid(folder)
    if found is None:
        return None
    position = checkpoint.read_position(found)
    if not position.stage_done and position.stage not in [stage.name for stage in chosen]:
        raise TrainingError(
            f"{found}: stage {position.stage!r} is not finished; resume it before the stages that follow"
        )
    before, now = load_config(found / "config.yaml"), checkpoint.absolute(config, context)
    changed = changed_keys(pinned(before, found), pinned(now, found), position)
    if changed:
        raise CheckpointError(
            f"{found} was made with another configuration; changed: {', '.join(changed)}. Undo these changes, "
            "or start a new run (another `output`) from its weights"
        )
    return found


def changed_keys(old: RunConfig, new: RunConfig, position: Position) -> list[str]:
    """Dotted keys that differ between two configurations and matter to the stages begun until ``position``."""
    before, now = _flat(old, position), _flat(new, position)
    return sorted({key for key, _ in before.items() ^ now.items()})


def is_done(config: RunConfig, position: Position | None, stage: StageConfig) -> bool:
    """Whether ``position`` lies behind ``stage``."""
    if position is None:
        return False
    if position.stage == stage.name:
        return position.stage_done
    names = [s.name for s in config.stages]
    return names.index(stage.name) < names.index(position.stage)


def rows_to_keep(config: RunConfig, chosen: Sequence[StageConfig], position: Position | None) -> dict[str, float]:
    """The last step of each stage whose metrics stay: all of stages done or not trained now."""
    keep: dict[str, float] = {}
    for stage in config.stages:
        if stage not in chosen or is_done(config, position, stage):
            keep[stage.name] = math.inf
    if position is not None:
        keep[position.stage] = position.step
    return keep


def refuse_overwriting(folder: Path, chosen: Sequence[StageConfig]) -> None:
    """Raise ``TrainingError`` when a fresh start would mix with checkpoints of the same stages."""
    names = {stage.name for stage in chosen}
    for path in reversed(checkpoint.checkpoints(folder)):
        if path.name.split("-")[1] in names:
            raise TrainingError(
                f"{folder} already holds {path.name}; resume that run (--resume), or choose another `output`"
            )


def _flat(config: RunConfig, position: Position) -> dict[str, str]:
    """Everything that matters, as ``{dotted key: value}``; stages by name."""
    tree = {key: value for key, value in config.model_dump(mode="json").items() if key not in HARMLESS_RUN | {"stages"}}
    for stage in config.stages:
        tree[f"stages.{stage.name}"] = {
            k: v for k, v in stage.model_dump(mode="json").items() if k not in HARMLESS_STAGE
        }
        if stage.name == position.stage:
            break
    flat: dict[str, str] = {}

    def walk(node: Any, path: str) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else None
        if items is None:
            flat[path] = repr(node)
            return
        for key, value in items:
            walk(value, f"{path}.{key}" if path else str(key))

    walk(tree, "")
    return flat
