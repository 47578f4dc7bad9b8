"""One stage of a run: freeze, train, evaluate, save."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

from mmllm.config.base import BuildContext
from mmllm.config.pieces import split
from mmllm.config.run import Batching, RunConfig, StageConfig
from mmllm.data.dataset import SkipLog, open_stage
from mmllm.data.mixture import StageData
from mmllm.errors import CheckpointError, TrainingError
from mmllm.model import MultimodalLM
from mmllm.processing.captions import caption_readers
from mmllm.processing.processor import Processor
from mmllm.training import checkpoint, sharding
from mmllm.training.batches import EvalDataset, StepDataset, loader
from mmllm.training.checkpoint import Position
from mmllm.training.loop import StepResult, SummedLoss, evaluate, run_steps
from mmllm.training.micro_batches import batching_of
from mmllm.training.optimizer import build_optimizer
from mmllm.training.preview import sample_replies
from mmllm.training.references import stored_parts
from mmllm.training.report import DRAW_EVERY, Reporter, table, write_summary
from mmllm.training.stages import FrozenSnapshot, check_finite, check_modalities, freeze, part_rows, resolve

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)


@dataclass
class Run:
    """What the stages of a run share. ``trained`` names the parts trained so far, ``position`` is where the run
    resumes.
    """

    config: RunConfig
    context: BuildContext
    accelerator: Accelerator
    model: MultimodalLM
    processor: Processor
    folder: Path
    reporter: Reporter
    trained: list[str] = field(default_factory=list)
    position: Position | None = None
    batching: dict[str, Batching] = field(
        default_factory=dict
    )  # of a sharded run's stages: found out before it is shared out

    @property
    def stored(self) -> list[str]:
        """The parts that a checkpoint of the run holds."""
        return stored_parts(self.model, self.config.model, self.context, self.trained)


class StageRun:
    """One stage at work. Building it freezes the model, makes the optimizer and restores a resumed stage's state."""

    def __init__(self, run: Run, stage: StageConfig) -> None:
        self.shared, self.stage = run, stage
        self.index = [s.name for s in run.config.stages].index(stage.name)
        accelerator, model = run.accelerator, run.model
        self.data = open_stage(stage, run.config.seed, run.context)
        self.parts = resolve(stage, model.parts())
        check_modalities(stage, self.parts, self.data)
        freeze(model, self.parts, gradient_checkpointing=stage.gradient_checkpointing)
        rank, world = accelerator.process_index, accelerator.num_processes
        processor = run.processor.reading_targets(
            "denoise" in stage.objectives, shown="contrastive" in stage.objectives
        )
        if stage.reads_captions:
            processor = processor.reading_captions(caption_readers(run.config.model, run.context))
        batching = run.batching[stage.name] if accelerator.is_fsdp2 else batching_of(stage, model)
        self.steps = StepDataset(self.data, processor, stage, rank=rank, world=world, batching=batching)
        self.eval_data = StageData(stage.eval_data, run.config.seed, run.context) if stage.eval_data else None
        if self.eval_data is not None:
            self.eval_set = EvalDataset(self.eval_data, processor, stage, rank=rank, world=world, batching=batching)
        optimizer = build_optimizer(model, self.parts, stage.optimizer)
        rows = model.backbone.new_tokens
        if rows is not None and any(part.name == "backbone.new_tokens" for part in self.parts):
            optimizer.register_step_post_hook(lambda *_: rows.keep_norms(*model.backbone.tables()))
        loss = SummedLoss(model, stage.objectives)
        if accelerator.is_fsdp2:  # the model is shared out already, and stays so from stage to stage
            self.wrapped, self.optimizer = loss, accelerator.prepare_optimizer(optimizer)
        else:
            self.wrapped, self.optimizer = accelerator.prepare(loss, optimizer)
        self.done, self.stopped = 0, False
        self.due, self.without_loss = False, 0  # a save is due; steps in a row until now without a finite loss
        if run.position is not None and run.position.stage == stage.name:
            self._restore(run.position)
        names = dict.fromkeys([*run.trained, *(part.name for part in self.parts)])
        whole = [name for name in model.parts() if name in names]
        run.trained = whole + [name for name in names if split(name)[0] not in whole]
        self.clock = time.monotonic()

    def run(self) -> None:
        """All remaining steps, then the checkpoint of the stage's end. Raises ``SystemExit`` after a signal."""
        run, stage, accelerator = self.shared, self.stage, self.shared.accelerator
        self._announce()
        # Of a model that is shared out each process looks at its share.
        snapshot = FrozenSnapshot(run.model) if accelerator.is_main_process or accelerator.is_fsdp2 else None
        with StopSignals() as stopping, run.reporter.stage(stage.name, self.done, len(self.steps)):
            run_steps(
                accelerator,
                self.wrapped,
                self.optimizer,
                self.parts,
                stage,
                loader(self.steps, range(self.done, len(self.steps)), stage.num_workers),
                total=len(self.steps),
                seed=run.config.seed,
                skips=SkipLog(),
                stopping=stopping,
                after=self._after,
            )
        if snapshot is not None:
            snapshot.check(run.model)
        if self.done == len(self.steps):
            if self.without_loss > 1:  # one may be the last batch's fault, and its step was not made
                raise TrainingError(
                    f"stage {stage.name!r} ended with {self.without_loss} steps in a row without a finite loss; nothing "
                    "was saved. Checkpoints written before are untouched; lower the rate, or look at the logged samples"
                )
            with self._gathered():
                self._save(stage_done=True)
        if self.stopped:
            accelerator.end_training()
            raise SystemExit(stopping.exit_code)
        if stage.gradient_checkpointing:
            run.model.backbone.model.gradient_checkpointing_disable()  # type: ignore[operator]
        accelerator.free_memory()  # forgets this stage's optimizer

    def _after(self, result: StepResult, stop: bool) -> None:
        stage, self.done, self.stopped = self.stage, result.step, stop
        now = time.monotonic()
        self.shared.reporter.step(stage.name, {**asdict(result), "seconds": round(now - self.clock, 4)})
        last = self.done == len(self.steps)
        if last or (stage.eval_every and self.done % stage.eval_every == 0):
            self._evaluate()
        self.due |= stop or bool(stage.save_every and self.done % stage.save_every == 0)
        self.without_loss = 0 if math.isfinite(result.loss) else self.without_loss + 1
        if self.due and not last:
            # Weights that give no finite loss may be beyond repair: the checkpoint waits for a step that learned.
            if result.updated:
                with self._gathered():
                    self._save(stage_done=False)
            elif stop:
                log.warning("step %d learned nothing, so it was not saved; --resume goes on before it", self.done)
        self.clock = time.monotonic()

    def _evaluate(self) -> None:
        run, stage = self.shared, self.stage
        row: dict[str, Any] = {"step": self.done}
        if self.eval_data is not None:
            batches = loader(self.eval_set, range(len(self.eval_set)), stage.num_workers)
            means = evaluate(run.accelerator, SummedLoss(run.model, stage.objectives), batches)
            row["eval_loss"] = sum(weight * means[name] for name, weight in stage.objectives.items())
            row["eval_losses"] = means
        sharded = run.accelerator.is_fsdp2
        if stage.samples and stage.answers and (run.accelerator.is_main_process or sharded):
            with run.accelerator.autocast(), sharding.at_hand(run.model):
                row["replies"] = sample_replies(run.model, run.processor, self.eval_data or self.data, stage.samples)
        run.reporter.evaluation(stage.name, row)

    def _save(self, *, stage_done: bool) -> None:
        run, accelerator = self.shared, self.shared.accelerator
        check_finite(self.parts)
        self.due = False
        if accelerator.is_main_process:
            scaler = {} if accelerator.scaler is None else accelerator.scaler.state_dict()
            position = Position(self.stage.name, self.done, stage_done, self.data.fingerprint(), scaler)
            folder = run.folder / "checkpoints" / checkpoint.checkpoint_name(self.index, self.stage.name, self.done)
            checkpoint.save(
                folder,
                run.model,
                run.processor,
                run.config,
                run.context,
                run.trained,
                position=position,
                optimizer=self.optimizer.optimizer,
            )
            checkpoint.remove_old(run.folder, run.config.keep_last)
            write_summary(run.folder, run.reporter.metrics.rows(), accelerator, run.config)
            run.reporter.draw(DRAW_EVERY)
        accelerator.wait_for_everyone()

    def _gathered(self) -> AbstractContextManager[None]:
        """While this lasts, what a checkpoint holds is whole on the main process."""
        run = self.shared
        keep = run.accelerator.is_main_process
        return sharding.gathered(run.model, run.stored, self.optimizer.optimizer, keep=keep)

    def _restore(self, position: Position) -> None:
        run = self.shared
        if position.data != self.data.fingerprint():
            raise CheckpointError(
                f"stage {self.stage.name!r}: its data files are not the checkpoint's (content, rows or weights differ); "
                "bring them back to resume, or start a new run from the checkpoint's weights"
            )
        name = checkpoint.checkpoint_name(self.index, position.stage, position.step)
        checkpoint.load_optimizer(
            self.optimizer.optimizer, run.folder / "checkpoints" / name / "state" / "optimizer.safetensors"
        )
        if position.scaler and run.accelerator.scaler is not None:
            run.accelerator.scaler.load_state_dict(position.scaler)
        self.done = position.step

    def _announce(self) -> None:
        rows = part_rows(self.shared.model, self.parts)
        reporter = self.shared.reporter
        reporter.say(table(rows))
        sources = [
            f"{len(opened):,} samples, weight {source.weight:g}: "
            f"{source.reader.kind} {source.reader.model_dump(exclude={'kind'}, exclude_none=True)}"
            for source, opened in zip(self.stage.data, self.data.tables, strict=True)
        ]
        plan = f"{len(self.steps)} steps in {len(self.steps.ends)} epoch(s)"
        reporter.say(
            f"stage {self.stage.name}: {plan}, batches of {self.stage.batch_size} samples, {self.steps.batching}"
        )
        if self.done == 0:
            reporter.begin(self.stage.name, {"step": 0, "parts": rows, "data": sources, "total": len(self.steps)})


class StopSignals:
    """Turns SIGTERM and SIGINT into a question that the loop asks after every step; a second SIGINT stops at once.

    Signals can only be caught in Python's main thread; elsewhere they keep their usual effect.
    """

    def __init__(self) -> None:
        self._caught: int | None = None
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        return self._caught is not None

    @property
    def exit_code(self) -> int:
        """128 + signal, as shells report it. A process that stops with the others, without a signal of its own: as
        SIGTERM.
        """
        return 128 + (self._caught or signal.SIGTERM)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._catch) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, _frame: FrameType | None) -> None:
        if self._caught is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._caught = number
