"""Frozen parts that a checkpoint does not hold: where they come from, and whether that is still what it was."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mmllm.config.base import BuildContext, ComponentConfig
from mmllm.config.pieces import split
from mmllm.config.run import ModelConfig, RunConfig
from mmllm.errors import CheckpointError
from mmllm.model import MultimodalLM
from mmllm.pretrained import cached_commit, read_json


def stored_parts(model: MultimodalLM, config: ModelConfig, context: BuildContext, trained: Iterable[str]) -> list[str]:
    """The parts that a checkpoint must hold: trained ones, and those at random values that no file could bring back; of
    others the layers that were trained. A part that was trained but for some modules is stored whole: what is left out may
    be new, and is small.
    """
    kept = list(trained)
    nearly = {part for part, choice in map(split, kept) if isinstance(choice, frozenset)}
    whole = [name for name in model.parts() if name in kept or name in nearly or not sources(config, context, name)]
    return whole + [name for name in kept if split(name)[0] not in whole]


def references(
    model: MultimodalLM, config: ModelConfig, context: BuildContext, trained: Iterable[str]
) -> dict[str, dict[str, str | None]]:
    """Where the parts that are not stored come from: ``{part: {pretrained, revision, sha256}}``.

    A part made of several pretrained ones has an entry for each, under its path in the configuration. A local file or
    folder has a content hash; a hub id the commit that was read, so that a later one is not taken for it.
    """
    stored = set(stored_parts(model, config, context, trained))
    result: dict[str, dict[str, str | None]] = {}
    for name in model.parts():
        if name in stored:
            continue
        for path, node in sources(config, context, name).items():
            location, revision = context.resolve(str(node["pretrained"])), node.get("revision")
            local = Path(location).exists()
            result[path] = {
                "pretrained": location,
                "revision": revision if local or revision else cached_commit(location, None),
                "sha256": _content_hash(location) if local else None,
            }
    return result


def check_references(folder: Path) -> None:
    """Raise ``CheckpointError`` when local files that ``folder`` refers to are gone or hold other content than at
    training.
    """
    for part, reference in _recorded(folder).items():
        location = reference["pretrained"]
        # The shipped model refers to files inside its own folder; its manifest has their hashes.
        if reference["sha256"] is None:
            continue
        if not Path(location).exists():
            raise CheckpointError(
                f"{folder}: the weights of {part} should be at {location}, but nothing is there; bring them back"
            )
        if _content_hash(location) != reference["sha256"]:
            raise CheckpointError(
                f"{folder}: {location} no longer holds the weights of {part} that this model was trained with"
            )


def pinned(config: RunConfig, folder: Path) -> RunConfig:
    """``config`` with the hub commits that the checkpoint ``folder`` was trained with, where it names no revision."""
    tree = config.model_dump(mode="json")
    for part, reference in _recorded(folder).items():
        node: Any = tree["model"]
        for word in part.split("."):
            node = (node or {}).get(word)
        if node and node.get("revision") is None and node.get("pretrained") == reference["pretrained"]:
            node["revision"] = reference["revision"]
    return RunConfig.model_validate(tree)


def _recorded(folder: Path) -> dict[str, Any]:
    file = folder / "references.json"
    return read_json(file) if file.is_file() else {}


def sources(config: ModelConfig, context: BuildContext, part: str) -> dict[str, dict[str, Any]]:
    """The config nodes whose ``pretrained`` together restore a frozen part, by dotted path; empty when they cannot."""
    node: Any = config
    for word in part.split("."):
        node = node.get(word) if isinstance(node, Mapping) else dict(node or ()).get(word)
    if not isinstance(node, ComponentConfig) or not context.weights:
        return {}
    pieces = {
        f"{part}.{path}" if path else part: member.model_dump(mode="json") for path, member in node.members().items()
    }
    return pieces if all(piece.get("pretrained") for piece in pieces.values()) else {}


_hashes: dict[tuple[str, int, int], str] = {}


def _content_hash(location: str) -> str:
    """SHA-256 over names and contents of a file or folder. Files are hashed once per process unless size or time
    change.
    """
    root = Path(location)
    files = sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]
    total = hashlib.sha256()
    for path in files:
        stat = path.stat()
        key = (str(path), stat.st_size, stat.st_mtime_ns)
        if key not in _hashes:
            _hashes[key] = file_hash(path)
        total.update(f"{path.relative_to(root).as_posix()} {_hashes[key]}\n".encode())
    return total.hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
