"""What a run leaves for people: progress, metrics, plot and summary."""

from __future__ import annotations

import json
import platform
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mmllm.config.run import RunConfig
from mmllm.errors import TrainingError

if TYPE_CHECKING:
    from accelerate import Accelerator


# Seconds between progress lines where there is no terminal to draw a bar on.
LINE_EVERY = 30.0
# Seconds between drawings of the losses while a run goes on: frequent saves are not to wait for them.
DRAW_EVERY = 60.0


def check_trackers(names: list[str]) -> None:
    """Raise ``TrainingError`` for a tracker that accelerate does not know, or whose package is not installed."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise TrainingError(f"unknown tracker {name!r}; known: {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
        if name not in available:
            raise TrainingError(
                f"tracker {name!r} needs a package that is not installed; pip install {name}, or set trackers=[]"
            )


class StepLog:
    """``metrics.jsonl`` of a run, one object per optimizer step and evaluation, or ``samples.jsonl``, the sample ids of every
    step; in order, without repetitions.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def rows(self) -> list[dict[str, Any]]:
        """All rows so far; a last line cut short by a crash is left out."""
        return [row for row, _ in self.lines()]

    def lines(self) -> Iterator[tuple[dict[str, Any], str]]:
        """The same one by one, each with its text."""
        if not self.file.is_file():
            return
        with self.file.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    yield json.loads(line), line.rstrip("\n") + "\n"
                except json.JSONDecodeError:
                    return

    def rewind(self, keep: Mapping[str, float]) -> None:
        """Forget what lies beyond the checkpoint that a run resumes from: ``keep[stage]`` is the last step to keep."""
        kept = (line for row, line in self.lines() if row["step"] <= keep.get(row["stage"], -1))
        write_whole(self.file, kept)

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row. Raises ``TrainingError`` when the disk refuses."""
        with _naming(self.file), self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def write_whole(file: Path, lines: Iterable[str]) -> None:
    """Write a file of a run so that it is there as it was, or as it is to be. Raises ``TrainingError`` when the disk refuses."""
    temporary = file.with_name(f".{file.name}.tmp")
    with _naming(file):
        with temporary.open("w", encoding="utf-8") as new:
            new.writelines(lines)
        temporary.replace(file)


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """An error of writing ``file`` with its name, which the system's own lacks."""
    try:
        yield
    except OSError as error:
        text = "checkpoints written before are untouched; make room and go on with --resume"
        raise TrainingError(f"cannot write {file}: {error.strerror}; {text}") from error


class Reporter:
    """The main process's voice: console, ``metrics.jsonl``, trackers. Other processes own a silent one."""

    def __init__(self, accelerator: Accelerator, folder: Path) -> None:
        self.accelerator, self.folder = accelerator, folder
        self.main: bool = accelerator.is_main_process
        self.console = Console(quiet=not self.main)
        self.metrics, self.samples = StepLog(folder / "metrics.jsonl"), StepLog(folder / "samples.jsonl")
        self._bar: Progress | None = None
        self._total, self._started, self._first, self._spoken = 0, 0.0, 0, 0.0
        self._drawn = time.monotonic()

    @contextmanager
    def stage(self, name: str, done: int, total: int) -> Iterator[None]:
        """Progress of one stage: a bar on a terminal, a line now and then elsewhere."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._total, self._started, self._first, self._spoken = total, time.monotonic(), done, 0.0
        with Progress(*columns, console=self.console, disable=not (self.main and self.console.is_terminal)) as bar:
            self._bar, self._task = bar, bar.add_task(name, completed=done, total=total)
            yield

    def begin(self, stage: str, row: Mapping[str, Any]) -> None:
        """Record what a stage sets out to do; it goes to ``run.md``."""
        if self.main:
            self.metrics.add({"stage": stage, **row})

    def rewind(self, keep: Mapping[str, float]) -> None:
        """Forget the steps beyond the checkpoint that the run resumes from: see ``StepLog.rewind``."""
        if self.main:
            self.metrics.rewind(keep)
            self.samples.rewind(keep)

    def step(self, stage: str, row: Mapping[str, Any], ids: Sequence[str]) -> None:
        """Record one optimizer step and the samples that it learned from."""
        if not self.main:
            return
        self.samples.add({"stage": stage, "step": row["step"], "ids": ids})
        self.metrics.add({"stage": stage, **row})
        numbers = ("epoch", "loss", "tokens", "samples", "lr", "grad_norm", "seconds")
        self.accelerator.log({f"{stage}/{key}": row[key] for key in numbers}, step=row["step"])
        now, step = time.monotonic(), row["step"]
        rate = (step - self._first) / max(now - self._started, 1e-9)
        text = f"{stage}  loss {row['loss']:.4f}  lr {row['lr']:.2e}  {rate * row['samples']:.1f} samples/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        if not self.console.is_terminal and (now - self._spoken > LINE_EVERY or step == self._total):
            self._spoken = now
            left = duration((self._total - step) / max(rate, 1e-9))
            self.say(f"{text}  step {step}/{self._total}  epoch {row['epoch']:.2f}  {left} left")

    def evaluation(self, stage: str, row: Mapping[str, Any]) -> None:
        """Record an evaluation: ``eval_loss`` if there are evaluation data, ``replies`` as (question, expected,
        answered).
        """
        if not self.main:
            return
        self.metrics.add({"stage": stage, **row})
        if "eval_loss" in row:
            self.accelerator.log({f"{stage}/eval_loss": row["eval_loss"]}, step=row["step"])
            self.say(f"{stage}  step {row['step']}  evaluation loss {row['eval_loss']:.4f}")
        for question, expected, answered in row.get("replies", []):
            self.say(f"  {question!r}\n    expected {expected!r}\n    answered {answered!r}")

    def rollback(self, stage: str, step: int, to: int) -> None:
        """Record that the loss leapt at ``step``, so that the weights are again those after step ``to``."""
        if self.main:
            self.metrics.add({"stage": stage, "step": step, "rolled_back_to": to})
            self.say(
                f"{stage}  step {step}  the loss leapt; back to the weights of step {to}, and on behind step {step}"
            )

    def draw(self, every: float = 0.0) -> None:
        """Draw ``loss.png``, unless that was done within the last ``every`` seconds (the run's beginning counts)."""
        if time.monotonic() - self._drawn >= every:
            self._drawn = time.monotonic()
            plot_losses(self.metrics.rows(), self.folder / "loss.png")

    def say(self, text: Any) -> None:
        """A line (or table) for people, in the main process only."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """``1 h 02 min``, ``3 min 20 s`` or ``12 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def plot_losses(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw training and evaluation loss over the steps of all stages."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    offset, steps, losses, evaluated = 0, [], [], []
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    for stage in stages:
        own = [row for row in rows if row["stage"] == stage]
        steps += [offset + row["step"] for row in own if "loss" in row]
        losses += [row["loss"] for row in own if "loss" in row]
        evaluated += [(offset + row["step"], row["eval_loss"]) for row in own if "eval_loss" in row]
        axes.axvline(offset, color="0.7", linewidth=0.8)
        axes.text(offset, 1.01, f" {stage}", transform=axes.get_xaxis_transform(), fontsize=9)
        offset += max(row["step"] for row in own)
    axes.plot(steps, losses, linewidth=0.6, alpha=0.35, color="C0")
    axes.plot(steps, smooth(losses), color="C0", label="training (smoothed)")
    if evaluated:
        axes.plot(*zip(*evaluated, strict=True), "o-", color="C1", markersize=3, label="evaluation")
    axes.set(xlabel="optimizer step", ylabel="loss per supervised token (nats)")
    axes.legend()
    figure.savefig(file, dpi=120)


def smooth(values: list[float], weight: float = 0.95) -> list[float]:
    """Exponential moving average, corrected for its start as in Adam (arXiv 1412.6980, section 3)."""
    result, mean, mass = [], 0.0, 0.0
    for value in values:
        mean, mass = weight * mean + (1 - weight) * value, weight * mass + 1 - weight
        result.append(mean / mass)
    return result


def write_summary(folder: Path, rows: list[dict[str, Any]], accelerator: Accelerator, config: RunConfig) -> float:
    """Write ``run.md`` from the rows of ``metrics.jsonl``; the seconds that all steps took."""
    lines, total = ["# Training run", ""], 0.0
    for name in dict.fromkeys(row["stage"] for row in rows):
        own = [row for row in rows if row["stage"] == name]
        seconds = sum(row.get("seconds", 0.0) for row in own)
        lines += _stage_summary(name, own, seconds)
        total += seconds
    packages = ", ".join(f"{name} {version(name)}" for name in ("mmllm", "torch", "transformers", "peft", "accelerate"))
    lines += [
        "## Environment",
        "",
        f"{packages}; Python {platform.python_version()} on {platform.platform()}; "
        f"{accelerator.num_processes} process(es), {accelerator.device.type}, {config.precision}, seed {config.seed}. "
        f"Steps took {duration(total)} in all.",
        "",
        "`loss.png` shows the losses, `metrics.jsonl` holds every step, `samples.jsonl` the samples of each, `config.yaml` the "
        "resolved configuration, `data.json` the data files with their hashes, `environment.json` all versions.",
    ]
    write_whole(folder / "run.md", [f"{line}\n" for line in lines])
    return total


def _stage_summary(name: str, rows: list[dict[str, Any]], seconds: float) -> list[str]:
    steps = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "eval_loss" in row]
    skipped: Counter[str] = sum((Counter(row["skipped"]) for row in steps), Counter())
    lines = [f"## Stage `{name}`", ""]
    for row in rows:
        if "parts" in row:
            lines += [*_markdown(row["parts"]), "", "Data:", "", *(f"- {line}" for line in row["data"]), ""]
    if steps:
        lines.append(
            f"{len(steps)} steps, {steps[-1]['epoch']:.2f} epochs, {sum(row['samples'] for row in steps):,} samples, "
            f"{duration(seconds)}. Loss {steps[0]['loss']:.4f} at the first step, {steps[-1]['loss']:.4f} at the last."
        )
    for row in (row for row in rows if "rolled_back_to" in row):
        lines.append(
            f"The loss leapt at step {row['step']}: back to step {row['rolled_back_to']}, and on behind the leap."
        )
    lines += [f"Skipped samples: {', '.join(f'{n} x {reason}' for reason, n in skipped.items()) or 'none'}.", ""]
    lines += _caches([row["cache"] for row in rows if "cache" in row])
    if evaluations:
        lines += _markdown(
            [["step", "evaluation loss"], *([str(r["step"]), f"{r['eval_loss']:.4f}"] for r in evaluations)]
        )
        lines.append("")
    answered = [row["replies"] for row in rows if "replies" in row]
    for question, expected, answer in answered[-1] if answered else []:
        lines += [f"> **{question}**  ", f"> expected: {expected}  ", f"> answered: {answer}", ""]
    return lines


def _caches(told: list[dict[str, dict[str, Any]]]) -> list[str]:
    """What the caches of a stage gained, a line each; ``told`` are ``Tally``s by part, of every time that it was run."""
    lines = []
    for part in dict.fromkeys(part for row in told for part in row):
        own = [row[part] for row in told if part in row]
        sums = {key: sum(row[key] for row in own) for key in own[0] if key != "off"}
        line = f"Cache of `{part}`: {sums['made']:,} media computed and kept"
        if sums["made"]:
            line += f" ({_each(sums['making'], sums['made'])}, keeping them {_each(sums['writing'], sums['made'])})"
        line += f", {sums['read']:,} read"
        if sums["read"]:
            ratio = sums["spared"] / max(sums["reading"], 1e-9)
            line += f" ({_each(sums['reading'], sums['read'])} instead of {_each(sums['spared'], sums['read'])}: "
            line += f"{ratio:.3g} times as fast)"
        slower = " Reading was slower than computing, so it was turned off." if any(row["off"] for row in own) else ""
        lines.append(f"- {line}.{slower}")
    return [*lines, ""] if lines else []


def _each(seconds: float, count: int) -> str:
    return f"{1e3 * seconds / max(count, 1):.3g} ms each"


def table(rows: list[list[str]]) -> Table:
    """Rows, the first of them the heading, for the console."""
    shown = Table(*rows[0])
    for row in rows[1:]:
        shown.add_row(*row)
    return shown


def _markdown(rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]
