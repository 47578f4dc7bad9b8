"""``mmllm train --dry-run``: a configuration executed from end to end in seconds, with nothing of the user's touched.

Every part is its ``tiny()`` version with random weights, every stage takes two steps on made-up data, everything is written
to one folder. What runs is the code of a real run: stages, checkpoints, resumption, loading, replies, generators.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mmllm.assistant import Assistant
from mmllm.assistant import load as load_assistant
from mmllm.config import pieces
from mmllm.config.base import BuildContext, problems_at
from mmllm.config.contradictions import matching
from mmllm.config.load import dump
from mmllm.config.load import load as load_config
from mmllm.config.run import CacheConfig, DataSource, ModelConfig, RunConfig, StageConfig
from mmllm.errors import ConfigError, MmllmError, TrainingError
from mmllm.making import Maker
from mmllm.model import MultimodalLM
from mmllm.pretrained import read_json
from mmllm.replies import Media
from mmllm.retrieval import build_index
from mmllm.synthetic import MAKERS, write_conversations
from mmllm.training import checkpoint
from mmllm.training.run import finish, open_run, select_stages, train_stage

STEPS = 2  # of every stage: the second starts from an optimizer with a past, and a resumed run has one left
LONGEST = 4096  # tokens of a sample, where the backbone takes as many; made-up samples must never be too long
PATIENCE = 300.0  # seconds for one medium


@dataclass
class DryRun:
    """What a dry run has done. ``config`` is what was run, ``final`` the folder of its model, ``losses`` those of every
    stage's steps; ``files`` how many files of the resumed run's last checkpoint equal the uninterrupted one's. ``media`` and
    ``found`` are what was generated, and retrieved, by output.
    """

    config: RunConfig
    final: Path
    losses: dict[str, list[float]]
    files: int
    assistant: Assistant
    reply: str
    media: dict[str, Media] = field(default_factory=dict)
    found: dict[str, Media] = field(default_factory=dict)


def run_dry_run(config: RunConfig, source: str, keep: Path | None = None) -> int:
    """Execute ``config`` (of the file ``source``) in a temporary folder, or in ``keep``, and print what was done; 0.

    Raises ``ConfigError``, or another ``MmllmError`` for whatever does not work.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise MmllmError("a dry run is one process; start it without a launcher")
    if keep is not None and keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise MmllmError(f"--keep: {keep} is there already and not an empty folder; choose another")
    began = time.monotonic()
    print(f"dry run of {source}: every part in its tiny version, random weights, made-up data", flush=True)
    with tempfile.TemporaryDirectory(prefix="mmllm-dry-run-") as temporary:
        folder = keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        dry_run(config, folder, lambda line: print(f"  {line}", flush=True))
    place = "a temporary folder, which is removed" if keep is None else str(keep)
    print(
        f"everything works, in {time.monotonic() - began:.1f} s. Nothing of yours was touched: no weights, data or runs were "
        f"read, downloaded or written; all output went to {place}."
    )
    return 0


def dry_run(config: RunConfig, folder: Path, say: Callable[[str], None]) -> DryRun:
    """Execute ``config`` in the empty ``folder``: all stages, a checkpoint, a resumption that must equal the uninterrupted
    run, a reply, and one medium of every output. ``say`` gets a line for each.

    Raises ``ConfigError`` where the parts do not go together, ``TrainingError`` where a resumed run differs. Errors that are
    not mmllm's own get a note with the step that they came from.
    """
    from accelerate.utils import patch_environment

    context = BuildContext(root=folder)
    select_stages(config)  # without any there is nothing to try
    with _step("build", say) as told, patch_environment(accelerate_use_cpu="true"):
        small = shrink(config, folder)
        (folder / "dry-run.yaml").write_text(dump(small), encoding="utf-8")
        if load_config(folder / "dry-run.yaml") != small:
            raise MmllmError("the shrunken configuration is not the same when it is written and read again")
        with _log(folder):
            run = open_run(small, context, small.stages)
        count = sum(p.numel() for p in run.model.parameters())
        ways = (("in", small.model.inputs), ("out", small.model.outputs))
        told.append(
            f"{count:,} parameters; " + ", ".join(f"{way}: {', '.join(['text', *kinds])}" for way, kinds in ways)
        )
    losses: dict[str, list[float]] = {}
    for stage in small.stages:
        with _step(f"stage {stage.name}", say) as told, _log(folder), _old_objects_kept():
            train_stage(run, stage)
            own = [row for row in run.reporter.metrics.rows() if row["stage"] == stage.name]
            losses[stage.name] = [row["loss"] for row in own if "loss" in row]
            parts = ", ".join(matching(stage.train, run.model.parts()))
            told.append(f"loss {' then '.join(f'{loss:.3f}' for loss in losses[stage.name])}; trained {parts}")
    with _step("save", say) as told, _log(folder):
        final = finish(run)
        told.append(f"{sum(p.stat().st_size for p in final.rglob('*')) / 1e6:.2f} MB, complete by its manifest")
    with _step("resume", say) as told, _log(folder), _old_objects_kept():
        with patch_environment(accelerate_use_cpu="true"):
            files = _resumed(small, folder, context)
        told.append(f"from step 1 of {small.stages[-1].name}: weights and optimizer equal, {files} files bit for bit")
    with _step("answer", say) as told:
        torch.manual_seed(1)
        done = DryRun(small, final, losses, files, load_assistant(final, device="cpu"), "")
        _answer(done, folder)
        made = [f"{name}: {kind}" for kind in ("media", "found") for name in getattr(done, kind)]
        told.append(f"loaded, text of {len(done.reply)} characters" + "".join(f", {one}" for one in made))
    return done


def shrink(config: RunConfig, folder: Path) -> RunConfig:
    """``config`` with tiny parts, two steps of every stage on data that are made up in ``folder``, and all output there.

    Raises ``ConfigError`` for what the parts refuse, and for media of which no file can be made up.
    """
    model, context = config.model.tiny(), BuildContext(root=folder)
    source = DataSource.model_validate(str(made_up_data(model, folder)))
    positions = model.backbone.max_positions(context)
    fixed = {
        "data": [source],
        "epochs": None,
        "max_steps": STEPS,
        "batch_size": 2,
        "micro_batch_size": 2,
        "max_length": LONGEST if positions is None else min(LONGEST, positions),
        "num_workers": 0,
        "eval_every": None,
        "save_every": None,
        "spike": None,
    }
    parts: Mapping[str, Any] = {}
    if any(pieces.split(pattern)[1] is not None for stage in config.stages for pattern in stage.train):
        parts = MultimodalLM.from_config(model, context).parts()
    stages = []
    for stage in config.stages:
        own = {"eval_data": [source] if stage.eval_data else [], "samples": min(stage.samples, 1)}
        stages.append(_fewer_layers(stage.model_copy(update=fixed | own), parts))
    if stages:
        stages[-1] = stages[-1].model_copy(update={"save_every": 1})
    here = {
        "model": model,
        "stages": stages,
        "output": str(folder / "run"),
        "cache": None if config.cache is None else CacheConfig(),
        "trackers": [],
        "keep_last": 2,
        "keep_every": None,
        "save_async": False,
        "compile": False,  # minutes of compiling for seconds of work
        "precision": "bf16" if config.precision == "fp16" else config.precision,  # CPUs have no fp16
    }
    return config.model_copy(update=here)


def made_up_data(model: ModelConfig, folder: Path) -> Path:
    """Conversations for ``model`` in ``folder``: see ``mmllm.synthetic``. Raises ``ConfigError`` for media of which no file
    can be made up.
    """
    context = BuildContext(root=folder)
    problems: list[tuple[str, str]] = []
    inputs, outputs = {}, {}
    for name, part in model.inputs.items():
        with problems_at(f"model.inputs.{name}.encoder", problems, context):
            inputs[name] = part.encoder.preprocessor(context).media
    for name, made in model.outputs.items():
        with problems_at(f"model.outputs.{name}.generator", problems, context):
            outputs[name] = made.generator.target(context).media
    known = ", ".join(MAKERS)
    problems += [
        (f"model.{way}.{name}", f"no files of {media!r} can be made up for a dry run, only of {known}")
        for way, kinds in (("inputs", inputs), ("outputs", outputs))
        for name, media in kinds.items()
        if media not in MAKERS
    ]
    if problems:
        raise ConfigError(problems)
    return write_conversations(folder, inputs, outputs)


def _fewer_layers(stage: StageConfig, parts: Mapping[str, Any]) -> StageConfig:
    """``stage`` with pieces of parts (``backbone.layers.20-31``) that tiny ``parts`` have: the pieces of each become one
    layer, from the last on, and those that are left without any are dropped. Modules of parts stay.
    """
    asked = [(pattern, *pieces.split(pattern)) for pattern in stage.train]
    new: dict[str, str] = {}
    for part in dict.fromkeys(part for _, part, layers in asked if isinstance(layers, range)):
        layers = {layer for name in matching([part], parts) for layer in pieces.layers_of(parts[name]).values()}
        own = [(span.start, pattern) for pattern, of, span in asked if of == part and isinstance(span, range)]
        pairs = zip(sorted(own, reverse=True), sorted(layers, reverse=True), strict=False)
        new |= {pattern: f"{part}.layers.{layer}" for (_, pattern), layer in pairs}
    gone = {pattern for pattern, _, layers in asked if isinstance(layers, range) and pattern not in new}
    return stage.model_copy(
        update={
            "train": [new.get(pattern, pattern) for pattern in stage.train if pattern not in gone],
            "part_lr": {new.get(name, name): lr for name, lr in stage.part_lr.items() if name not in gone},
        }
    )


def _resumed(config: RunConfig, folder: Path, context: BuildContext) -> int:
    """Go on from the checkpoint after the last stage's first step, in a run folder of its own; how many files of its last
    checkpoint equal those of the uninterrupted run. Raises ``TrainingError`` where one does not.
    """
    before, whole = checkpoint.checkpoints(Path(config.output))[-2:]
    again = folder / "resumed"
    shutil.copytree(before, again / "checkpoints" / before.name)
    run = open_run(config.model_copy(update={"output": str(again)}), context, config.stages, resume=True)
    train_stage(run, config.stages[-1])
    expected, found = (
        {name: entry for name, entry in read_json(path / "manifest.json")["files"].items() if name != "config.yaml"}
        for path in (whole, again / "checkpoints" / whole.name)
    )
    if other := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        raise TrainingError(
            f"resumed from {before.name}, the run ended with other values than the uninterrupted one in {', '.join(other)}; "
            "a part draws random numbers or keeps a state that its checkpoint does not hold"
        )
    return len(expected)


def _answer(done: DryRun, folder: Path) -> None:
    """Fill in a reply to one of the made-up questions, and a medium of every output: generated, and retrieved where there
    are heads for it. Signals are made up, since random weights begin no group of them by themselves.
    """
    assistant, question = done.assistant, json.loads((folder / "data.jsonl").open(encoding="utf-8").readline())
    content = [
        part if part["type"] == "text" else {**part, "path": str(folder / part["path"])}
        for part in question["messages"][0]["content"]
    ]
    done.reply = assistant.chat([{"role": "user", "content": content}], max_new_tokens=4)
    for name, output in done.config.model.outputs.items():
        signals = assistant.processor.signals[name]
        told = signals.told(signals.ids, torch.randn(signals.count, assistant.model.backbone.hidden_dim))
        options = {} if signals.group.free else {name: {"steps": 1}}
        done.media[name] = _finished(Maker(assistant.model, options), name, told, folder)
        if output.retrieval is not None:
            listed = "".join(json.dumps(path.name) + "\n" for path in sorted(folder.glob(f"{name}[0-9]*")))
            (folder / f"{name}.index.jsonl").write_text(listed, encoding="utf-8")
            build_index(assistant.model, assistant.processor, folder / f"{name}.index.jsonl", name).save(
                folder / f"{name}.index"
            )
            assistant.use_index(folder / f"{name}.index", "retrieve")
            maker = Maker(assistant.model, options, retrieval=assistant.retrieval)
            done.found[name] = _finished(maker, name, told, folder)


def _finished(maker: Maker, name: str, signals: torch.Tensor, folder: Path) -> Media:
    """A medium, waited for and written to ``folder``."""
    media = maker.make(name, signals)
    maker.close()
    media.result(PATIENCE)
    media.save(folder / f"{media.source}-{name}{media.suffix}")
    return media


@contextmanager
def _step(name: str, say: Callable[[str], None]) -> Iterator[list[str]]:
    """Time a step and say how long it took, with what its block appends to the list. A foreign error gets its name."""
    told: list[str] = []
    began = time.monotonic()
    try:
        yield told
    except MmllmError:
        raise
    except Exception as error:
        error.add_note(f"in the dry run's step {name!r}")
        raise
    say(f"{name:<20} {time.monotonic() - began:5.1f} s   {', '.join(told)}")


@contextmanager
def _old_objects_kept() -> Iterator[None]:
    """A stage's end collects garbage; looking through all imported modules for it takes longer than the stage."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _log(folder: Path) -> Iterator[None]:
    """Let what a run prints go to ``train.log``."""
    with (folder / "train.log").open("a", encoding="utf-8") as file, redirect_stdout(file):
        yield
