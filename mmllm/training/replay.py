"""``mmllm train CONFIG --replay STEP``: one logged step once more, and whether it comes out as it did."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

from mmllm.config.base import BuildContext
from mmllm.config.contradictions import with_lengths
from mmllm.config.load import load
from mmllm.config.run import RunConfig, StageConfig
from mmllm.errors import CheckpointError, TrainingError
from mmllm.training import checkpoint, resuming
from mmllm.training.checkpoint import Position
from mmllm.training.records import environment, starts
from mmllm.training.references import file_hash, pinned
from mmllm.training.report import StepLog
from mmllm.training.run import open_run, train_stage

COMPARED = ("loss", "losses", "grad_norm", "tokens", "ids")
# What bit-equality on the CPU depends on. Elsewhere numbers are compared to `ROUNDING`, relative.
SAME = ("platform", "threads", "processes", "device", "packages")
ROUNDING = 1e-3
Place = tuple[StageConfig, int]


def run_replay(config: RunConfig, context: BuildContext, step: str) -> int:
    """Compute ``step`` of the finished, stopped or running run in ``config.output`` again, from the newest checkpoint before it
    or from the start, print loss, gradient norm and sample ids beside the logged ones; 0 when they agree, 1 when not.

    ``step`` is ``STAGE:STEP`` as in ``metrics.jsonl``, or a number that counts the steps of all stages. Only a hidden folder
    is written to the run's, and removed. On the CPU, with the versions, threads and processes of the logged run, all bits
    must agree. Raises ``TrainingError`` for a step that was not logged, ``CheckpointError`` for another configuration.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TrainingError("a step is replayed by one process, whatever the run had; start it without a launcher")
    config = with_lengths(config, context)
    folder = Path(config.output)
    stage, number = find_step(config, folder, step)
    logged = _row(folder, stage.name, number)
    _same_configuration(config, context, folder, stage)
    source = _newest_before(config, folder, stage, number)
    again = folder / f".replay-{stage.name}-{number}"
    shutil.rmtree(again, ignore_errors=True)
    try:
        (again / "checkpoints").mkdir(parents=True)
        if source is not None:
            (again / "checkpoints" / source.name).symlink_to(source.absolute(), target_is_directory=True)
        found, exact = _repeat(config, context, folder, again, (stage, number), source)
        print(f"step {number} of stage {stage.name}, from {source.name if source else 'the start of the run'}")
        return _compare(logged, found, exact=exact)
    finally:
        shutil.rmtree(again, ignore_errors=True)


def find_step(config: RunConfig, folder: Path, step: str) -> Place:
    """The stage and its step that ``step`` means. Raises ``TrainingError`` when there is none in the run's log."""
    name, colon, number = step.rpartition(":")
    stages = {stage.name: stage for stage in config.stages}
    done = dict.fromkeys(stages, 0)
    for row, _ in StepLog(folder / "metrics.jsonl").lines():
        if "loss" in row and row["stage"] in done:
            done[row["stage"]] = max(done[row["stage"]], row["step"])
    if number.isdecimal() and (not colon or name in stages):
        left = int(number)
        for stage in [stages[name]] if colon else stages.values():
            if 1 <= left <= done[stage.name]:
                return stage, left
            left -= done[stage.name]
    logged = ", ".join(f"{stage}:1 to {stage}:{count}" for stage, count in done.items() if count) or "none"
    raise TrainingError(f"--replay {step}: not a step that {folder} has logged; those are {logged}")


def _row(folder: Path, stage: str, step: int) -> dict[str, Any]:
    """What the run's logs say of a step."""
    found: dict[str, Any] = {}
    for file, key in (("metrics.jsonl", "loss"), ("samples.jsonl", "ids")):
        for row, _ in StepLog(folder / file).lines():
            if key in row and (row["stage"], row["step"]) == (stage, step):
                found |= row
    if missing := [name for name in COMPARED if name not in found]:
        raise TrainingError(f"{folder}: the log of step {step} of stage {stage!r} lacks {', '.join(missing)}")
    return found


def _same_configuration(config: RunConfig, context: BuildContext, folder: Path, stage: StageConfig) -> None:
    before, now = load(folder / "config.yaml"), checkpoint.absolute(config, context)
    newest = checkpoint.checkpoints(folder)[-1:]
    if newest:
        before, now = pinned(before, newest[0]), pinned(now, newest[0])
    if changed := resuming.changed_keys(before, now, Position(stage.name, 0, False, "", {})):
        raise CheckpointError(
            f"{folder} was trained with another configuration; changed: {', '.join(changed)}. Undo these changes"
        )


def _newest_before(config: RunConfig, folder: Path, stage: StageConfig, step: int) -> Path | None:
    """The newest checkpoint from which ``step`` is still to come."""
    order = [other.name for other in config.stages]
    for path in reversed(checkpoint.checkpoints(folder)):
        position = checkpoint.read_position(path)
        place = order.index(position.stage), position.step
        if place < (order.index(stage.name), step):
            return path
    return None


def _repeat(
    config: RunConfig, context: BuildContext, folder: Path, again: Path, place: Place, source: Path | None
) -> tuple[dict[str, Any], bool]:
    """The row of the step, computed anew in the folder ``again``; and whether all its bits should be the logged ones."""
    stage, number = place
    # Saves matter to what may go back to them only.
    quiet = [
        one.model_copy(
            update={"eval_data": [], "eval_every": None, "samples": 0, "save_every": one.spike and one.save_every}
        )
        for one in config.stages
    ]
    here = {"output": str(again), "trackers": [], "keep_last": 1, "stages": quiet}
    if all(one.spike is None for one in config.stages):
        here["keep_every"] = None
    here_config = config.model_copy(update=here)
    trained = {row["stage"] for row, _ in StepLog(folder / "metrics.jsonl").lines()}
    stages = [one for one in quiet[: config.stages.index(stage) + 1] if one.name in trained]
    begun = starts(folder)
    first = None if source is not None or not begun else begun[0]["weights_from"]
    if first is not None and file_hash(Path(first["path"]) / "manifest.json") != first["manifest_sha256"]:
        raise CheckpointError(f"{first['path']} is not what this run started from: its manifest has changed")
    start_from = None if first is None else Path(first["path"])
    run = open_run(here_config, context, stages, resume=source is not None, start_from=start_from)
    run.reporter.console.quiet = True
    for one in stages:
        train_stage(run, one, until=number if one.name == stage.name else None)
    now = environment(run.accelerator, config)
    same = bool(begun) and all(begun[-1][name] == now[name] for name in SAME)
    # What is cached was computed in the company of other media.
    cached = config.cache is not None and (config.cache.features or config.cache.latents)
    return _row(again, stage.name, number), same and not cached and run.accelerator.device.type == "cpu"


def _compare(logged: dict[str, Any], found: dict[str, Any], *, exact: bool) -> int:
    """Print both; the exit code."""
    differ = 0
    for name in COMPARED:
        equal = json.dumps(logged[name]) == json.dumps(found[name]) or (not exact and _close(logged[name], found[name]))
        differ += not equal
        if equal:
            print(f"  {name:<10} {_text(found[name])}")
        else:
            print(f"  {name:<10} DIFFERS: logged {_text(logged[name])}, now {_text(found[name])}")
    how = (
        "bit for bit"
        if exact
        else f"to {ROUNDING:g} (another machine, device, version or number of threads or processes, or a cache of features)"
    )
    print(f"{differ} of {len(COMPARED)} differ" if differ else f"as logged, {how}")
    return int(differ > 0)


def _close(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_close(one[key], other[key]) for key in one)
    return isinstance(one, float) and isinstance(other, float) and math.isclose(one, other, rel_tol=ROUNDING)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return ", ".join(f"{key} {part!r}" for key, part in value.items()) if isinstance(value, dict) else repr(value)
