"""Where the weights come from: what has to be downloaded, and under which licence. Known by hub id, without asking the hub."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from mmllm.config.base import BuildContext, ComponentConfig, Config
from mmllm.config.run import ModelConfig

UNKNOWN = "unknown"
TABLE = Path(__file__).parent / "hub.yaml"


@dataclass(frozen=True)
class Source:
    """Pretrained weights of a configuration. ``parts`` are the dotted paths that name them; ``bytes`` is the size of the
    download (0 for local files, None when it is not known), ``estimated`` whether it was made from the part as it is built.
    """

    pretrained: str
    parts: list[str]
    licence: str
    bytes: int | None
    estimated: bool


@cache
def known() -> dict[str, dict[str, Any]]:
    """The table of published weights, by hub id."""
    table: dict[str, dict[str, Any]] = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    return table


def sources(config: ModelConfig, context: BuildContext, parameters: Mapping[str, int]) -> list[Source]:
    """All pretrained weights that ``config`` names, each once; ``parameters`` are the counts of the parts that were built."""
    found: dict[str, list[str]] = {}
    for part, component in _components(config).items():
        for path, member in component.members().items():
            for reference in _references(member):
                found.setdefault(reference, []).append(f"{part}.{path}" if path else part)
    for name, one in config.inputs.items():
        for part, reader in {"alignment": one.alignment, "prompt": one.prompt}.items():
            for reference in () if reader is None else _references(reader):
                found.setdefault(reference, []).append(f"inputs.{name}.{part}")
    return [_source(reference, parts, context, parameters) for reference, parts in found.items()]


def _references(config: Config) -> list[str]:
    """The weights that a part starts from: a checkpoint of its own kind, or a BERT."""
    dumped = config.model_dump(mode="json")
    return [dumped[key] for key in ("pretrained", "bert") if dumped.get(key)]


def _source(reference: str, parts: list[str], context: BuildContext, parameters: Mapping[str, int]) -> Source:
    entry = known().get(reference, {})
    licence = entry.get("licence", UNKNOWN)
    if Path(context.resolve(reference)).is_absolute():
        return Source(reference, parts, licence, 0, estimated=False)
    width = entry.get("bytes", 2 if parts[0].startswith("backbone") else 4)
    count = entry.get("parameters") or max(parameters.get(part, 0) for part in parts)
    return Source(reference, parts, licence, count * width or None, estimated=not {"parameters", "bytes"} <= set(entry))


def generator_parameters(reference: str, context: BuildContext) -> int | None:
    """How many parameters the generator ``reference`` has: those in a folder's files, or of a published one as the table says;
    None when that is not known.
    """
    from safetensors import safe_open

    folder = Path(context.resolve(reference))
    if not folder.is_absolute():
        count: int | None = known().get(reference, {}).get("parameters")
        return count
    total = 0
    for file in folder.rglob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total or None


def _components(config: ModelConfig) -> dict[str, ComponentConfig]:
    parts: dict[str, ComponentConfig] = {}
    for name, one in config.inputs.items():
        parts |= {f"inputs.{name}.encoder": one.encoder, f"inputs.{name}.projector": one.projector}
        if one.fusion is not None:
            parts[f"inputs.{name}.fusion"] = one.fusion
    parts["backbone"] = config.backbone
    for name, made in config.outputs.items():
        if made.projector is not None:
            parts[f"outputs.{name}.projector"] = made.projector
        parts[f"outputs.{name}.generator"] = made.generator
    return parts
