"""One stage of a run: freeze, train, evaluate, save."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Self, cast

from mmllm.cache.store import Room
from mmllm.config.base import BuildContext
from mmllm.config.pieces import split
from mmllm.config.run import Batching, RunConfig, StageConfig
from mmllm.data.dataset import SkipLog, open_stage
from mmllm.data.mixture import StageData
from mmllm.errors import CheckpointError, TrainingError, brief
from mmllm.model import MultimodalLM
from mmllm.processing.captions import caption_readers
from mmllm.processing.processor import Processor
from mmllm.training import checkpoint, sharding
from mmllm.training.batches import EvalDataset, StepDataset, loader
from mmllm.training.caching import close, commit, complete, completed, open_caches
from mmllm.training.checkpoint import Position
from mmllm.training.loop import StepResult, SummedLoss, evaluate, run_steps, total_of
from mmllm.training.micro_batches import batching_of
from mmllm.training.optimizer import build_optimizer
from mmllm.training.preview import sample_replies
from mmllm.training.records import record_data
from mmllm.training.references import stored_parts
from mmllm.training.report import DRAW_EVERY, Reporter, table, write_summary
from mmllm.training.saving import Saver
from mmllm.training.spikes import SpikeWatch
from mmllm.training.stages import FrozenSnapshot, check_finite, check_modalities, freeze, part_rows, resolve

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)


@dataclass
class Run:
    """What the stages of a run share. ``trained`` names the parts trained so far, ``position`` is where the run
    resumes. ``room`` is what is left for the features and latents that it keeps, if it keeps any.
    """

    config: RunConfig
    context: BuildContext
    accelerator: Accelerator
    model: MultimodalLM
    processor: Processor
    folder: Path
    reporter: Reporter
    saver: Saver
    trained: list[str] = field(default_factory=list)
    position: Position | None = None
    room: Room | None = None
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
        self.data = open_stage(stage, run.config.seed, run.context, run.processor)
        self.parts = resolve(stage, model.parts())
        check_modalities(stage, self.parts, self.data)
        freeze(model, self.parts, gradient_checkpointing=stage.gradient_checkpointing)
        rank, world = accelerator.process_index, accelerator.num_processes
        processor = run.processor.reading_targets(
            "denoise" in stage.objectives, shown="contrastive" in stage.objectives
        )
        if stage.reads_captions:
            processor = processor.reading_captions(caption_readers(run.config.model, run.context))
        self.caches = open_caches(run.config, model, processor, accelerator.device.type, run.room)
        self.processor = processor = processor.reading_caches(self.caches)
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
        self.done, self.stopped, self.leapt = 0, False, False
        self.due, self.without_loss = False, 0  # a save is due; steps in a row until now without a finite loss
        if stage.spike is not None and accelerator.is_fsdp2:
            raise TrainingError(
                f"stages.{stage.name}.spike: going back is not possible with shared-out weights; leave it out"
            )
        self.spikes = SpikeWatch(stage.spike)
        self.saved: int | None = None  # the step of the stage's newest checkpoint
        if run.position is not None and run.position.stage == stage.name:
            if run.position.data != self.data.fingerprint():
                raise CheckpointError(
                    f"stage {stage.name!r}: its data files are not the checkpoint's (content, rows or weights differ); "
                    "bring them back to resume, or start a new run from the checkpoint's weights"
                )
            if missing := [p.name for p in self.parts if not {p.name, split(p.name)[0]} & {*run.trained}]:
                raise CheckpointError(f"the checkpoint of stage {stage.name!r} does not hold {', '.join(missing)}")
            self._restore(run.position)
            self.done = run.position.step
        names = dict.fromkeys([*run.trained, *(part.name for part in self.parts)])
        whole = [name for name in model.parts() if name in names]
        run.trained = whole + [name for name in names if split(name)[0] not in whole]
        self.clock = time.monotonic()

    def run(self, until: int | None = None) -> None:
        """All remaining steps, or those up to step ``until``; then the checkpoint of the stage's end. Raises ``SystemExit``
        after a signal.
        """
        run, stage, accelerator = self.shared, self.stage, self.shared.accelerator
        self._announce()
        # Of a model that is shared out each process looks at its share.
        snapshot = FrozenSnapshot(run.model) if accelerator.is_main_process or accelerator.is_fsdp2 else None
        skips, last = SkipLog(stage.max_skipped), len(self.steps) if until is None else until
        with StopSignals() as stopping, run.reporter.stage(stage.name, self.done, len(self.steps)):
            while True:
                with _named_deaths():
                    run_steps(
                        accelerator,
                        self.wrapped,
                        self.optimizer,
                        self.parts,
                        stage,
                        completed(
                            loader(self.steps, range(self.done, last), stage.num_workers), self.processor, self.caches
                        ),
                        total=len(self.steps),
                        seed=run.config.seed,
                        skips=skips,
                        stopping=stopping,
                        after=self._after,
                    )
                if not self.leapt:
                    break
                self._roll_back()
            # A signal may have come behind the last step's question.
            self.stopped = self.stopped or total_of(accelerator, [stopping()])[0] > 0
        close(self.caches, run.reporter, stage.name, self.done)
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
            run.saver.wait()
            accelerator.end_training()
            raise SystemExit(stopping.exit_code)
        if stage.gradient_checkpointing:
            run.model.backbone.model.gradient_checkpointing_disable()  # type: ignore[operator]
        accelerator.free_memory()  # forgets this stage's optimizer

    def _after(self, result: StepResult, stop: bool) -> bool:
        """What comes behind a step; whether the loop ends here."""
        stage, self.done, self.stopped = self.stage, result.step, stop
        # All that a step has put, or nothing: a resumed run then computes the same media together.
        commit(self.caches)
        now = time.monotonic()
        row = asdict(result)
        ids = row.pop("ids")
        self.shared.reporter.step(stage.name, {**row, "seconds": round(now - self.clock, 4)}, ids)
        self.leapt = result.updated and self.spikes(result.loss) and self._can_go_back(stop)
        if self.leapt:
            return True
        last = self.done == len(self.steps)
        if last or (stage.eval_every and self.done % stage.eval_every == 0):
            self._evaluate()
        every = [stage.save_every, self.shared.config.keep_every]
        self.due |= stop or any(self.done % number == 0 for number in every if number)
        self.without_loss = 0 if math.isfinite(result.loss) else self.without_loss + 1
        if self.due and not last:
            # Weights that give no finite loss may be beyond repair: the checkpoint waits for a step that learned.
            if result.updated:
                with self._gathered():
                    self._save(stage_done=False)
            elif stop:
                log.warning("step %d learned nothing, so it was not saved; --resume goes on before it", self.done)
        self.clock = time.monotonic()
        return stop

    def _can_go_back(self, stop: bool) -> bool:
        if self.saved is None:
            log.warning("there is no checkpoint of stage %r to go back to yet, so it goes on", self.stage.name)
        return self.saved is not None and not stop

    def _roll_back(self) -> None:
        """Back to the weights and optimizer of the newest checkpoint; the steps since then are passed over."""
        run, leapt_at = self.shared, self.done
        if run.accelerator.is_main_process:
            run.saver.wait()
        run.accelerator.wait_for_everyone()
        folder = self._checkpoint(cast(int, self.saved))
        checkpoint.load_parts(run.model, folder)
        before = checkpoint.read_position(folder)
        times = self.spikes.rollbacks + 1
        self._restore(before)
        self.spikes.rollbacks = times  # not the checkpoint's: it may be gone back to several times
        self.leapt = self.due = False
        run.reporter.rollback(self.stage.name, leapt_at, before.step)
        if leapt_at == len(self.steps):
            self._evaluate()

    def _evaluate(self) -> None:
        run, stage = self.shared, self.stage
        row: dict[str, Any] = {"step": self.done}
        if self.eval_data is not None:
            read = loader(self.eval_set, range(len(self.eval_set)), stage.num_workers)
            batches = (b if b is None else complete(b, self.processor, self.caches) for b in read)
            means = evaluate(run.accelerator, SummedLoss(run.model, stage.objectives), batches)
            row["eval_loss"] = sum(weight * means[name] for name, weight in stage.objectives.items())
            row["eval_losses"] = means
            commit(self.caches)
        sharded = run.accelerator.is_fsdp2
        if stage.samples and stage.answers and (run.accelerator.is_main_process or sharded):
            with run.accelerator.autocast(), sharding.at_hand(run.model):
                row["replies"] = sample_replies(run.model, run.processor, self.eval_data or self.data, stage.samples)
        run.reporter.evaluation(stage.name, row)

    def _save(self, *, stage_done: bool) -> None:
        run, accelerator = self.shared, self.shared.accelerator
        check_finite(self.parts)
        self.due, self.saved = False, self.done
        if accelerator.is_main_process:
            run.saver.wait()  # before there are two copies in memory
            scaler = {} if accelerator.scaler is None else accelerator.scaler.state_dict()
            data, spikes = self.data.fingerprint(), self.spikes.state()
            pending = checkpoint.prepare(
                self._checkpoint(self.done),
                run.model,
                run.processor,
                run.config,
                run.context,
                run.trained,
                position=Position(self.stage.name, self.done, stage_done, data, scaler, spikes),
                optimizer=self.optimizer.optimizer,
                copy=run.saver.asynchronous,
            )
            keep = run.config.keep_last, run.config.keep_every
            run.saver.commit(pending, lambda: checkpoint.remove_old(run.folder, *keep))
            write_summary(run.folder, run.reporter.metrics.rows(), accelerator, run.config)
            run.reporter.draw(DRAW_EVERY)
        accelerator.wait_for_everyone()

    def _checkpoint(self, step: int) -> Path:
        name = checkpoint.checkpoint_name(self.index, self.stage.name, step)
        return self.shared.folder / "checkpoints" / name

    def _gathered(self) -> AbstractContextManager[None]:
        """While this lasts, what a checkpoint holds is whole on the main process."""
        run = self.shared
        keep = run.accelerator.is_main_process
        return sharding.gathered(run.model, run.stored, self.optimizer.optimizer, keep=keep)

    def _restore(self, position: Position) -> None:
        """Put back what belongs to the weights after ``position.step`` steps, whose checkpoint is there."""
        file = self._checkpoint(position.step) / checkpoint.OPTIMIZER
        checkpoint.load_optimizer(self.optimizer.optimizer, file)
        if position.scaler and self.shared.accelerator.scaler is not None:
            self.shared.accelerator.scaler.load_state_dict(position.scaler)
        self.spikes.restore(position.spikes)
        self.saved = position.step

    def _announce(self) -> None:
        rows = part_rows(self.shared.model, self.parts)
        reporter = self.shared.reporter
        reporter.say(table(rows))
        sources = [
            f"{len(opened):,} samples, {counted}: "
            f"{source.reader.kind} {source.reader.model_dump(exclude={'kind'}, exclude_none=True)}"
            for source, opened, counted in zip(self.stage.data, self.data.tables, self.data.amounts(), strict=True)
        ]
        plan = f"{len(self.steps)} steps in {len(self.steps.ends)} epoch(s)"
        reporter.say(
            f"stage {self.stage.name}: {plan}, batches of {self.stage.batch_size} samples, {self.steps.batching}"
        )
        if reporter.main:
            record_data(self.shared.folder, self.stage.name, self.data, self.eval_data)
        if self.done == 0:
            reporter.begin(self.stage.name, {"step": 0, "parts": rows, "data": sources, "total": len(self.steps)})


@contextmanager
def _named_deaths() -> Iterator[None]:
    """A data worker that was killed, as an error that says what to do; torch's own names a process number."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise TrainingError(
            f"{brief(error)}. A data worker died, mostly because memory was full (lower num_workers or batch_size, or give more "
            "shared memory); --resume goes on from the last checkpoint"
        ) from error


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
