"""A whole training run: its folder, its stages in order, and what it resumes from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mmllm.config.base import BuildContext, suggest
from mmllm.config.contradictions import contradictions, matching, with_lengths
from mmllm.config.load import dump
from mmllm.config.run import RunConfig, StageConfig
from mmllm.errors import ConfigError, TrainingError
from mmllm.model import MultimodalLM
from mmllm.processing.processor import Processor
from mmllm.training import checkpoint, resuming, sharding
from mmllm.training.caching import open_room
from mmllm.training.micro_batches import batching_of
from mmllm.training.records import record_start
from mmllm.training.references import check_references, pinned
from mmllm.training.report import Reporter, check_trackers, duration, write_summary
from mmllm.training.saving import Saver
from mmllm.training.stage_run import Run, StageRun
from mmllm.training.stages import set_dtypes

if TYPE_CHECKING:
    from accelerate import Accelerator


def train(
    config: RunConfig,
    context: BuildContext | None = None,
    *,
    resume: bool = False,
    stages: Sequence[str] | None = None,
    start_from: Path | None = None,
) -> Path:
    """Train the stages of ``config`` (all, or those named) in order and return the folder of the final model.

    ``resume`` goes on from the newest checkpoint in ``config.output``, bit for bit on the CPU; without any it starts
    anew. ``start_from`` is a checkpoint, final model or run folder whose parts are loaded first. A SIGTERM or SIGINT
    finishes the step, saves, and raises ``SystemExit`` with code 143 or 130. Raises ``ConfigError``, ``DataError``,
    ``TrainingError`` and ``CheckpointError``.
    """
    context = context or BuildContext()
    config = with_lengths(config, context)
    chosen = select_stages(config, stages)
    run = open_run(config, context, chosen, resume=resume, start_from=start_from)
    for stage in chosen:
        train_stage(run, stage)
    return finish(run)


def select_stages(config: RunConfig, names: Sequence[str] | None = None) -> list[StageConfig]:
    """The named stages in the configuration's order, or all. Raises ``TrainingError`` for unknown names."""
    known = [stage.name for stage in config.stages]
    for name in names or ():
        if name not in known:
            raise TrainingError(f"no stage {name!r}; the stages are {', '.join(known)}{suggest(name, known)}")
    chosen = [stage for stage in config.stages if names is None or stage.name in names]
    if not chosen:
        raise TrainingError("no stage to train; the configuration needs at least one under `stages`")
    return chosen


def open_run(
    config: RunConfig,
    context: BuildContext,
    chosen: Sequence[StageConfig],
    *,
    resume: bool = False,
    start_from: Path | None = None,
) -> Run:
    """Build model and processor, load what the run goes on from, make the run folder. Arguments as for ``train``."""
    folder = Path(config.output)
    newest = resuming.newest(folder, config, context, chosen) if resume else None
    if newest is not None:
        check_references(newest)
        config = pinned(config, newest)
    if not resume:
        resuming.refuse_overwriting(folder, chosen)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"output: cannot make the folder {folder} ({error.strerror}); choose another") from error
    accelerator = _accelerator(config, folder)
    # Random weights (projectors, adapters) are the same on every process and in every run with this seed.
    torch.manual_seed(config.seed)
    processor = Processor.from_config(config.model, context)
    model = MultimodalLM.from_config(config.model, context)
    if problems := contradictions(config, context, model.parts()):
        raise ConfigError(problems)
    set_dtypes(
        model, matching(chain.from_iterable(stage.train for stage in config.stages), model.parts()), config.precision
    )
    if config.compile:
        model.backbone.compile_layers()
    if config.short_cuts:
        model.backbone.take_short_cuts()
    keep_text_conditions(config, model, folder, accelerator.num_processes)
    saver = Saver(asynchronous=config.save_async)
    run = Run(config, context, accelerator, model, processor, folder, Reporter(accelerator, folder), saver)
    run.room = open_room(config, folder, accelerator.num_processes)
    source = newest or start_from
    if source is not None:
        source = source / "final" if (source / "final").is_dir() else source
        run.trained = checkpoint.load_parts(model, source, processor if newest is None else None)
        run.reporter.say(f"weights from {source}")
    if accelerator.is_fsdp2:
        run.batching = {stage.name: batching_of(stage, model) for stage in chosen}
        sharding.shard(model, accelerator)
    if newest is not None:
        run.position = checkpoint.read_position(newest)
    if accelerator.is_main_process:
        (folder / "config.yaml").write_text(dump(checkpoint.absolute(config, context)), encoding="utf-8")
        record_start(folder, accelerator, config, source)
    run.reporter.rewind(resuming.rows_to_keep(config, chosen, run.position))
    accelerator.init_trackers("mmllm")
    accelerator.wait_for_everyone()
    return run


def train_stage(run: Run, stage: StageConfig, until: int | None = None) -> None:
    """Train one stage from the run's present weights and leave a checkpoint at its end. A stage already done is passed
    over. With ``until`` it ends behind that step, if that is earlier.
    """
    if resuming.is_done(run.config, run.position, stage):
        run.reporter.say(f"stage {stage.name}: done already")
        return
    try:
        StageRun(run, stage).run(until)
    finally:
        run.saver.wait()


def finish(run: Run) -> Path:
    """Write the final model, ``loss.png`` and ``run.md``, close the trackers; returns the final model's folder."""
    final, main = run.folder / "final", run.accelerator.is_main_process
    with sharding.gathered(run.model, run.stored, keep=main):
        if main:
            checkpoint.save(final, run.model, run.processor, run.config, run.context, run.trained)
    if main:
        seconds = write_summary(run.folder, run.reporter.metrics.rows(), run.accelerator, run.config)
        run.reporter.draw()
        run.reporter.say(f"trained in {duration(seconds)}; the model is in {final}, see {run.folder / 'run.md'}")
    run.accelerator.wait_for_everyone()
    run.accelerator.end_training()
    return final


def keep_text_conditions(config: RunConfig, model: MultimodalLM, folder: Path, processes: int) -> None:
    """Let the model take text conditions from the run's cache, if any stage asks for them."""
    if config.cache is None or not any("condition" in stage.objectives for stage in config.stages):
        return
    place = Path(config.cache.folder or folder / "conditions")
    try:
        model.keep_text_conditions(place, int(config.cache.gigabytes * 1e9), processes)
    except OSError as error:
        raise TrainingError(
            f"cache.folder: cannot use {place} ({error.strerror}); choose another, or `null`"
        ) from error


def _accelerator(config: RunConfig, folder: Path) -> Accelerator:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType, ProjectConfiguration

    check_trackers(config.trackers)
    sharded = sharding.asked_for()
    # The precision is global in accelerate; an earlier run of this Python process must not decide it for this one.
    AcceleratorState._reset_state()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    accelerator = Accelerator(
        # Without this accelerate forms no group of CPU processes, and each would train the whole run for itself.
        cpu=world > 1 and not torch.accelerator.is_available(),
        mixed_precision="no" if config.precision == "fp32" else config.precision,
        log_with=list(config.trackers) or None,
        project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "trackers")),
    )
    if sharded:
        sharding.tell(accelerator)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise TrainingError(
            "the launcher asks for DeepSpeed, whose engine takes optimizer steps by itself, also those that a gradient that is "
            "not finite should prevent; FSDP2 shares out the same (training/launch/fsdp2.yaml)"
        )
    if config.precision == "fp16" and accelerator.device.type == "cpu":
        raise TrainingError("precision fp16 needs a GPU; use bf16 or fp32 on the CPU")
    if accelerator.num_processes == 1 and "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:
        # What `accelerate launch --num_processes 2` leaves on a machine without GPUs: the port of a group of one.
        raise TrainingError(
            "a launcher was asked for several processes but started one; on CPUs use `accelerate launch --multi_gpu`, or "
            "torchrun --nproc_per_node"
        )
    return accelerator
