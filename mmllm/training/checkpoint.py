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

import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
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


@dataclass(frozen=True)
class Position:
    """Where a run stands: ``step`` optimizer steps of stage ``stage`` are done; ``stage_done`` when those were all.

    ``data`` is the fingerprint of the stage's data, ``scaler`` the fp16 gradient scaler's state.
    """

    stage: str
    step: int
    stage_done: bool
    data: str
    scaler: dict[str, float]


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
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        (temporary / "config.yaml").write_text(dump(absolute(config, context)), encoding="utf-8")
        save_parts(model, temporary, stored_parts(model, config.model, context, trained))
        processor.save(temporary)
        _write_json(temporary / "references.json", references(model, config.model, context, trained))
        if position is not None:
            (temporary / "state").mkdir()
            _write_json(temporary / "state" / "position.json", asdict(position))
        if optimizer is not None:
            save_file(optimizer_tensors(optimizer), temporary / "state" / "optimizer.safetensors")
        write_manifest(temporary)
        for path in [*temporary.rglob("*"), temporary]:
            _sync(path)
        replaced = folder.with_name(f".{folder.name}.{os.getpid()}.old.tmp")
        if folder.exists():
            folder.rename(replaced)
        temporary.rename(folder)
        _sync(folder.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"cannot write {folder}: {error}; checkpoints written before are untouched") from error


def save_parts(model: MultimodalLM, folder: Path, names: Iterable[str]) -> None:
    """Write the named parts: adapters to folders of their own, all others to ``parts.safetensors``."""
    parts, wanted = model.parts(), set(names)
    adapters = {f"{part}.adapter": adapter for part, adapter in model.adapters().items()}
    stored = sorted(wanted - adapters.keys())
    tensors = {n: p.detach().cpu().contiguous() for part in stored for n, p in select(parts, part).items()}
    save_file(tensors, folder / "parts.safetensors", metadata={"parts": json.dumps(stored)})
    for part in wanted & adapters.keys():
        adapters[part].save(folder / adapter_folder(part))


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
    """Put saved state back. Raises ``CheckpointError`` when it belongs to other parameters."""
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


def remove_old(run_dir: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints, and leftovers of interrupted saves. Call after a save is
    complete.
    """
    for path in checkpoints(run_dir)[:-keep]:
        # Renamed first: a removal that is interrupted half-way must not leave a half folder under a valid name.
        path = path.rename(path.with_name(f".{path.name}.tmp"))
        shutil.rmtree(path, ignore_errors=True)
    for path in (run_dir / "checkpoints").glob(".*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def read_position(folder: Path) -> Position:
    """The position of a checkpoint that can be resumed. Raises ``CheckpointError`` for a folder without one."""
    file = folder / "state" / "position.json"
    if not file.is_file():
        raise CheckpointError(
            f"{folder}: no state/position.json; this is a final model, training cannot be resumed from it"
        )
    return Position(**read_json(file))


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
