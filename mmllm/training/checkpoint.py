"""Checkpoints: directories of safetensors and JSON that are either complete or not there.

A checkpoint or final model holds

    config.yaml          the resolved configuration, local references made absolute
    parts.safetensors    every part trained so far, and frozen parts that no reference could restore
    adapter/             the backbone's adapter, in PEFT layout where peft has its kind
    inputs.<name>.encoder.adapter/   an encoder's
    tokenizer*, processor.json, …
    references.json      where the other parts come from: path with content hash, or hub id with its commit
    state/               checkpoints only: optimizer tensors, and position.json (stage, step, gradient scaler)
    manifest.json        size and SHA-256 of every file above

It is written to a temporary sibling, synced to disk and renamed, so a folder under its final name is complete. Random
number states need no file: the training loop derives them from the seed and the step.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmllm.adapters.base import WEIGHTS
from mmllm.config.base import BuildContext
from mmllm.config.load import dump
from mmllm.config.pieces import select, split
from mmllm.config.run import RunConfig
from mmllm.errors import CheckpointError
from mmllm.model import MultimodalLM
from mmllm.pretrained import copy_tensors, read_json
from mmllm.training.growth import NEW_TOKENS, grown
from mmllm.training.references import check_references, file_hash, references, stored_parts
from mmllm.training.sharding import like

if TYPE_CHECKING:
    from mmllm.processing.processor import Processor

FORMAT = 1
ADAPTER = "adapter"
OPTIMIZER = "state/optimizer.safetensors"
Written = dict[str, tuple[dict[str, Tensor], dict[str, str] | None]]
"""The tensors of files and their metadata, by the files' names."""


@dataclass(frozen=True)
class Position:
    """Where a run stands: ``step`` optimizer steps of stage ``stage`` are done; ``stage_done`` when those were all.

    ``data`` is the fingerprint of the stage's data, ``scaler`` the fp16 gradient scaler's state, ``spikes`` what the watch
    over leaping losses remembers.
    """

    stage: str
    step: int
    stage_done: bool
    data: str
    scaler: dict[str, float]
    spikes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Pending:
    """A checkpoint on its way to ``folder``: small files are in ``temporary`` already, ``tensors`` are yet to be written there,
    each with the file's metadata.
    """

    folder: Path
    temporary: Path
    tensors: Written

    def commit(self) -> None:
        """Write the rest, and put the whole in its place. Raises ``CheckpointError`` when the disk refuses."""
        with _cleaned_up(self.folder, self.temporary):
            for name, (tensors, metadata) in self.tensors.items():
                save_file(tensors, self.temporary / name, metadata=metadata)
            write_manifest(self.temporary)
            for path in [*self.temporary.rglob("*"), self.temporary]:
                _sync(path)
            if self.folder.exists():
                self.folder.rename(_empty(self.folder.with_name(f".{self.folder.name}.{os.getpid()}.old.tmp")))
            self.temporary.rename(self.folder)
            _sync(self.folder.parent)
            for leftover in self.folder.parent.glob(f".{glob.escape(self.folder.name)}.*.tmp"):
                shutil.rmtree(leftover, ignore_errors=True)


def save(
    folder: Path,
    model: MultimodalLM,
    processor: Processor,
    config: RunConfig,
    context: BuildContext,
    trained: Iterable[str],
    *,
    position: Position | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Write a complete model to ``folder``, with ``position`` and ``optimizer`` as a checkpoint to resume from.

    Either all of it appears under that name or nothing does. Raises ``CheckpointError`` when the disk refuses.
    """
    prepare(folder, model, processor, config, context, trained, position=position, optimizer=optimizer).commit()


def prepare(
    folder: Path,
    model: MultimodalLM,
    processor: Processor,
    config: RunConfig,
    context: BuildContext,
    trained: Iterable[str],
    *,
    position: Position | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    copy: bool = False,
) -> Pending:
    """What ``save`` writes, as it is now, to be committed; with ``copy`` the weights may change before that.

    Adapters and what the processor has are written at once: the former know best how, and the latter's tokenizer may be
    in use by the time of the commit. Raises ``CheckpointError`` when the disk refuses.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    with _cleaned_up(folder, temporary):
        _empty(temporary).mkdir(parents=True)
        (temporary / "config.yaml").write_text(dump(absolute(config, context)), encoding="utf-8")
        processor.save(temporary)
        names = stored_parts(model, config.model, context, trained)
        tensors: Written = {"parts.safetensors": _parts(model, temporary, names)}
        _write_json(temporary / "references.json", references(model, config.model, context, trained))
        if position is not None:
            (temporary / "state").mkdir()
            _write_json(temporary / "state" / "position.json", asdict(position))
        if optimizer is not None:
            tensors[OPTIMIZER] = optimizer_tensors(optimizer), None
    if copy:
        tensors = {name: ({k: t.clone() for k, t in own.items()}, data) for name, (own, data) in tensors.items()}
    return Pending(folder, temporary, tensors)


def _empty(path: Path) -> Path:
    """``path`` without what a killed save has left there: in a container every run has the same process id."""
    shutil.rmtree(path, ignore_errors=True)
    return path


@contextmanager
def _cleaned_up(folder: Path, temporary: Path) -> Iterator[None]:
    """Turns what goes wrong in writing ``folder`` into a ``CheckpointError``, and removes ``temporary`` then."""
    try:
        yield
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # Python's and safetensors' own; tokenizers has no class for a disk that refuses, but says the system's number.
        if not isinstance(error, (OSError, SafetensorError)) and "(os error " not in str(error):
            raise
        raise CheckpointError(f"cannot write {folder}: {error}; checkpoints written before are untouched") from error


def _parts(model: MultimodalLM, folder: Path, names: Iterable[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Write the adapters among the named parts to folders of their own; the tensors of all others, with their metadata."""
    parts, wanted = model.parts(), set(names)
    adapters = {f"{part}.adapter": adapter for part, adapter in model.adapters().items()}
    for part in wanted & adapters.keys():
        adapters[part].save(folder / adapter_folder(part))
    stored = sorted(wanted - adapters.keys())
    tensors = {n: p.detach().cpu().contiguous() for part in stored for n, p in select(parts, part).items()}
    return tensors, {"parts": json.dumps(stored)}


def load_parts(model: MultimodalLM, folder: Path, processor: Processor | None = None) -> list[str]:
    """Read the parts saved in ``folder`` into ``model``, in the model's own dtypes, and return their names.

    With ``processor``, the model's, it may have inputs and outputs that the folder's model has not: the rows of its new
    tokens are then found by what they stand for, and those of no such row stay as they are.

    The folder is verified against its manifest first. Raises ``CheckpointError`` when a file is missing or altered,
    when a reference no longer holds what it held, or when names or shapes differ from the model's in either direction.
    """
    verify(folder)
    check_references(folder)
    parts = model.parts()
    with safe_open(folder / "parts.safetensors", framework="pt") as file:
        stored = json.loads(file.metadata()["parts"])
    unknown = [name for name in stored if split(name)[0] not in parts]
    if unknown:
        raise CheckpointError(f"{folder} holds {', '.join(unknown)}, but the model's parts are {', '.join(parts)}")
    expected: dict[str, Tensor] = {name: p.data for part in stored for name, p in select(parts, part).items()}
    found = load_file(folder / "parts.safetensors")
    if processor is not None and NEW_TOKENS in stored:
        found |= grown(found, expected, read_json(folder / "processor.json"), processor)
    copy_tensors(expected, found, str(folder / "parts.safetensors"))
    # By the manifest: a folder that somebody put there is not what was verified.
    files = read_json(folder / "manifest.json")["files"]
    adapters = {adapter_folder(f"{part}.adapter"): part for part in model.adapters()}
    for place in sorted({file.rpartition("/")[0] for file in files if file.endswith(f"/{WEIGHTS}")}):
        if place not in adapters:
            where = "backbone" if place == ADAPTER else place.removesuffix(".adapter")
            raise CheckpointError(f"{folder} holds an adapter, but the model's {where} has none; set `{where}.adapter`")
        model.adapters()[adapters[place]].load(folder / place)
        stored.append(f"{adapters[place]}.adapter")
    return list(stored)


def adapter_folder(part: str) -> str:
    """Where a checkpoint has the adapter ``part``: the backbone's in ``adapter``, others under their own names."""
    return ADAPTER if part == f"backbone.{ADAPTER}" else part


def absolute(config: RunConfig, context: BuildContext) -> RunConfig:
    """The same configuration with the local references of model and data made absolute, so that it works from
    anywhere.
    """

    def rooted(path: Any) -> Any:
        if isinstance(path, list):
            return [rooted(item) for item in path]
        return path if path is None else str((context.root / Path(path).expanduser()).absolute())

    def walk(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: walk(value) for key, value in node.items()}
        if isinstance(node, list):
            return [walk(value) for value in node]
        return context.resolve(node) if isinstance(node, str) else node

    tree = config.model_dump(mode="json")
    for stage in tree["stages"]:
        for source in [*stage["data"], *stage["eval_data"]]:
            # Data paths need no leading ./ in a config.
            source["reader"] = {k: rooted(v) if k in ("path", "root") else v for k, v in source["reader"].items()}
    return RunConfig.model_validate(tree | {"model": walk(tree["model"])})


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as ``{parameter name/state name: tensor}``."""
    tensors = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in optimizer.state[parameter].items():
                tensors[f"{name}/{key}"] = value.detach().cpu().contiguous()
    return tensors


def load_optimizer(optimizer: torch.optim.Optimizer, file: Path) -> None:
    """Put saved state back. Raises ``CheckpointError`` when there is none, or it belongs to other parameters."""
    if not file.is_file():
        raise CheckpointError(f"{file}: missing; without the optimizer's state the run would go on as another one")
    found = load_file(file)
    names = {name for group in optimizer.param_groups for name in group["names"]}
    stored = {key.rpartition("/")[0] for key in found}
    if found and stored != names:
        raise CheckpointError(
            f"{file}: state of other parameters than are trained now: {', '.join(sorted(stored ^ names)[:5])}"
        )
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            state = {key.rpartition("/")[2]: value for key, value in found.items() if key.rpartition("/")[0] == name}
            # AdamW keeps its step counter on the CPU and its moments beside the parameter.
            optimizer.state[parameter] = {k: v if k == "step" else like(v, parameter) for k, v in state.items()}


def checkpoint_name(stage_index: int, stage: str, step: int) -> str:
    """Folder name of a checkpoint; names sort in the order of training."""
    return f"{stage_index}-{stage}-{step:08d}"


def checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first. Unfinished saves never count."""
    folder = run_dir / "checkpoints"
    found = [p for p in folder.iterdir() if re.fullmatch(r"\d+-.+-\d{8}", p.name)] if folder.is_dir() else []
    return sorted(found, key=lambda p: (int(p.name.partition("-")[0]), int(p.name.rpartition("-")[2])))


def latest_valid(run_dir: Path) -> Path | None:
    """The newest complete checkpoint, verified; None when there is none.

    Raises ``CheckpointError`` when its files are missing or altered: going on from an older one is the user's decision.
    """
    found = checkpoints(run_dir)
    if not found:
        return None
    try:
        verify(found[-1])
    except CheckpointError as error:
        older = f" or go on from {found[-2].name} by removing this folder" if len(found) > 1 else ""
        raise CheckpointError(f"{error}; restore it{older}") from error
    return found[-1]


def remove_old(run_dir: Path, keep: int, every: int | None = None) -> None:
    """Remove all but the newest ``keep`` checkpoints and the first one of each ``every`` steps of a stage, and leftovers of
    interrupted saves. Call after a save is complete.
    """
    found = checkpoints(run_dir)
    for path in [path for path in found[:-keep] if not (every and _is_first(path, found, every))]:
        # Renamed first: a removal that is interrupted half-way must not leave a half folder under a valid name.
        path = path.rename(path.with_name(f".{path.name}.tmp"))
        shutil.rmtree(path, ignore_errors=True)
    for path in (run_dir / "checkpoints").glob(".*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def _is_first(path: Path, found: Iterable[Path], every: int) -> bool:
    """Whether a checkpoint is its stage's first at or after a multiple of ``every``. A save can come late: see
    ``StageRun``.
    """
    stage, _, step = path.name.rpartition("-")
    steps = [int(other.name.rpartition("-")[2]) for other in found if other.name.rpartition("-")[0] == stage]
    return int(step) >= every and int(step) == min(other for other in steps if other // every == int(step) // every)


def read_position(folder: Path) -> Position:
    """The position of a checkpoint that can be resumed. Raises ``CheckpointError`` for a folder without one, or with one that
    this version does not understand.
    """
    file = folder / "state" / "position.json"
    if not file.is_file():
        raise CheckpointError(
            f"{folder}: no state/position.json; this is a final model, training cannot be resumed from it"
        )
    found = read_json(file)
    needed = {f.name for f in fields(Position) if f.default is MISSING and f.default_factory is MISSING}
    known = {f.name for f in fields(Position)}
    if problems := [f"lacks {name!r}" for name in sorted(needed - found.keys())] + [
        f"has {name!r}, which this version does not know" for name in sorted(found.keys() - known)
    ]:
        raise CheckpointError(f"{file} {', '.join(problems)}; resume with the version of mmllm that wrote it")
    return Position(**found)


def write_manifest(folder: Path) -> None:
    """Write ``manifest.json``: size in bytes and SHA-256 of every other file."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / "manifest.json")
    listing = {p.relative_to(folder).as_posix(): {"size": p.stat().st_size, "sha256": file_hash(p)} for p in files}
    _write_json(folder / "manifest.json", {"format": FORMAT, "files": listing})


def verify(folder: Path) -> None:
    """Raise ``CheckpointError`` naming every file of ``folder`` that is missing, or differs from the manifest."""
    if not (folder / "manifest.json").is_file():
        raise CheckpointError(f"{folder}: no manifest.json; expected a checkpoint or final model written by mmllm")
    manifest = read_json(folder / "manifest.json")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{folder}: checkpoint format {manifest.get('format')!r}, this version reads {FORMAT}")
    missing = [name for name in manifest["files"] if not (folder / name).is_file()]
    altered = [
        name
        for name, entry in manifest["files"].items()
        if name not in missing
        and ((folder / name).stat().st_size != entry["size"] or file_hash(folder / name) != entry["sha256"])
    ]
    problems = [f"missing: {', '.join(missing)}"] * bool(missing) + [f"altered: {', '.join(altered)}"] * bool(altered)
    if problems:
        raise CheckpointError(f"{folder} is damaged; {'; '.join(problems)}")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
