"""Trainings in processes of their own that can be killed, forked from a server that has imported everything once."""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import pathlib
import resource
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

IMPORTED = [
    "mmllm.training.run",
    "mmllm.backbones.causal_lm_module",
    "transformers.models.llama.modeling_llama",
    "transformers.models.clip.modeling_clip",
    "transformers.models.whisper.modeling_whisper",
    "accelerate",
    "peft",
]
PATIENCE = 600  # seconds for a process to end: machines can be busy


Call = tuple[Any, ...]
"""A function that can be pickled and its arguments."""


def start(folder: Path, *calls: Call, environment: dict[str, str] | None = None) -> BaseProcess:
    """Make ``calls`` one after the other in a new process. What it prints goes to ``folder/rank-<n>.log``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    process = context.Process(target=_work, args=(folder, calls, environment or {}))
    process.start()
    return process


def start_two(folder: Path, *calls: Call) -> list[BaseProcess]:
    """The same as two processes of one run; see ``rank``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    ranks = [{**place, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    return [start(folder, *calls, environment=rank) for rank in ranks]


def exit_codes(*processes: BaseProcess) -> list[int | None]:
    """How the processes ended, waited for. One that has not ended in time is killed and has None."""
    codes: list[int | None] = []
    for process in processes:
        process.join(PATIENCE)
        codes.append(process.exitcode)
        process.kill()
    return codes


def output(folder: Path, rank: int = 0) -> str:
    """What a process has printed."""
    return (folder / f"rank-{rank}.log").read_text()


def rank() -> int:
    """This process's number in its run."""
    return int(os.environ.get("RANK", "0"))


def train(folder: Path, *, resume: bool = False) -> None:
    """Train ``folder/config.yaml``, without plots."""
    from mmllm.config.base import BuildContext
    from mmllm.config.load import load
    from mmllm.training import report, run

    report.plot_losses = lambda rows, file: None
    run.train(load(folder / "config.yaml"), BuildContext(root=folder), resume=resume)


def resume(folder: Path) -> None:
    """Go on with the run of ``folder/config.yaml``."""
    train(folder, resume=True)


def _work(folder: Path, calls: tuple[Call, ...], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    log = os.open(folder / f"rank-{rank()}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import torch

    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of data workers, as in a program of its own
    faulthandler.dump_traceback_later(PATIENCE - 10)  # where one that hangs is
    try:
        for function, *arguments in calls:
            function(*arguments)
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # as a training script ends: nothing waits for the other processes


def at_step(step: int, call: Call, only: int | None = None) -> None:
    """Make ``call`` when the optimizer step number ``step`` (from 1) of any stage begins, in process ``only`` or in all."""
    from mmllm.training import loop

    original = loop.seed_step

    def seed_step(seed: int, stage: str, number: int, process: int) -> None:
        if number + 1 == step and only in (None, process):
            call[0](*call[1:])
        original(seed, stage, number, process)

    loop.seed_step = seed_step


def kill() -> None:
    """As the kernel does when memory is full."""
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    """As code does that nobody has tried on such data."""
    raise IndexError("the row that nobody thought of")


def limit_files(size: int) -> None:
    """From now on no file can grow beyond ``size`` bytes: the disk is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def signal_group(number: int) -> None:
    """What Ctrl-C in a terminal does, or a scheduler: every process of the job gets the signal, data workers too."""
    os.killpg(os.getpgrp(), number)
    time.sleep(0.5)


def slow_writes(seconds: float) -> None:
    """Tensors reach the disk only after a while. Notes what is written at the same time as something else."""
    from mmllm.training import checkpoint

    original, busy = checkpoint.save_file, threading.Lock()

    def save_file(*arguments: Any, **named: Any) -> None:
        assert busy.acquire(blocking=False), "two saves at once"
        time.sleep(seconds)
        original(*arguments, **named)
        busy.release()

    checkpoint.save_file = save_file  # type: ignore[assignment]


def teach_nothing(only: int | None = None) -> None:
    """Every sample of process ``only``, or of all, comes without a label."""
    from dataclasses import replace

    from mmllm.processing.processor import Processor

    original = Processor.encode_sample

    def encode_sample(self: Processor, *arguments: Any) -> Any:
        encoded = original(self, *arguments)
        none = [False] * len(encoded.ids)
        return replace(encoded, supervised=none) if only in (None, rank()) else encoded

    Processor.encode_sample = encode_sample  # type: ignore[method-assign]


def spoil(what: str, only: int, *ids: str) -> None:
    """In process ``only`` micro-batches with one of the samples ``ids`` have an infinite ``loss``, or ``gradient``s that are
    no numbers.
    """
    import torch

    from mmllm.training.loop import SummedLoss

    class Spoilt(torch.autograd.Function):
        @staticmethod
        def forward(_: Any, loss: torch.Tensor) -> torch.Tensor:
            return loss.clone()

        @staticmethod
        def backward(_: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * torch.nan

    forward = SummedLoss.forward

    def spoilt(self: SummedLoss, batch: Any) -> Any:
        losses = forward(self, batch)
        if rank() != only or not {*ids} & {*batch.sample_ids}:
            return losses
        return {name: Spoilt.apply(loss) if what == "gradient" else loss * torch.inf for name, loss in losses.items()}

    SummedLoss.forward = spoilt  # type: ignore[method-assign]


def note_weights(folder: Path) -> None:
    """Leave a hash of the trained weights after every step in ``folder/weights-<rank>.txt``."""
    import hashlib

    from mmllm.training.stage_run import StageRun

    after = StageRun._after

    def noting(self: StageRun, *arguments: Any) -> bool:
        content = hashlib.sha256()
        for part in self.parts:
            for parameter in part.parameters.values():
                content.update(parameter.detach().numpy().tobytes())
        with (folder / f"weights-{rank()}.txt").open("a") as file:
            file.write(content.hexdigest() + "\n")
        return after(self, *arguments)

    StageRun._after = noting  # type: ignore[method-assign]


def limit_nonfinite(limit: int) -> None:
    """Let a run end after so many steps without a finite loss."""
    from mmllm.training import loop

    loop.NONFINITE_LIMIT = limit


def count_events(file: Path | None = None, kind: str = "all", kill_at: int | None = None) -> None:
    """Count the calls within mmllm's code from the first stage on: all of them, and those while a checkpoint is written.

    The numbers are left in ``file`` at the end; at number ``kill_at`` of a ``kind`` the process kills itself.
    """
    import safetensors

    import mmllm
    from mmllm.training import run

    package = Path(mmllm.__file__).parent
    writing = {str(package / "training" / "checkpoint.py"), pathlib.__file__, shutil.__file__}
    writing.add(str(Path(safetensors.__file__).parent / "torch.py"))
    counts = {"all": 0, "saving": 0}

    def profile(frame: Any, event: str, _argument: Any) -> None:
        name = frame.f_code.co_filename
        if event not in ("call", "c_call") or not (name in writing or name.startswith(str(package))):
            return
        counts["all"] += 1
        counts["saving"] += name in writing
        if counts[kind] == kill_at:
            kill()

    first: Callable[..., None] = run.train_stage

    def train_stage(*arguments: Any) -> None:
        threading.setprofile(profile)
        sys.setprofile(profile)
        first(*arguments)

    run.train_stage = train_stage
    if file is not None:
        finish = run.finish

        def finished(one: run.Run) -> Path:
            final = finish(one)
            sys.setprofile(None)
            file.write_text(json.dumps(counts))
            return final

        run.finish = finished
