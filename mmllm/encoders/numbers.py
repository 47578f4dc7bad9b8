"""Where an encoder's numbers come from: the YAML, the checkpoint's own files, or a table of well-known hub ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from mmllm.config.base import BuildContext, Config
from mmllm.errors import CheckpointError, ConfigError
from mmllm.pretrained import find, is_local, read_json

Numbers = TypeVar("Numbers", bound=Config)


def agreed_numbers(
    kind: str,
    pretrained: str | None,
    context: BuildContext,
    *,
    declared: Numbers | None,
    known: Numbers | None,
    read: Callable[[str], Numbers],
) -> Numbers:
    """The architecture of an encoder: what the YAML declares, what ``read`` finds, or what is ``known`` of a hub id.

    ``read`` gets the resolved reference. A hub is asked only when ``context.weights``; files at hand are read when the YAML
    declares nothing. Raises ``ConfigError`` when nothing tells the numbers, ``CheckpointError`` when YAML and checkpoint
    contradict each other.
    """
    found = None
    if pretrained is not None:
        reference = context.resolve(pretrained)
        if context.weights or (declared is None and is_local(reference)):
            found = read(reference)
        elif declared is None:
            found = known
    if declared is not None and found is not None and declared != found:
        other = dict(found)
        differ = [
            f"{name}: {value} in the YAML, {other[name]} in the checkpoint"
            for name, value in declared
            if value != other[name]
        ]
        raise CheckpointError(f"{pretrained} is not the declared architecture; {'; '.join(differ)}")
    numbers = found or declared
    if numbers is None:
        problem = f"unknown for {pretrained!r} without reading it; give `architecture`"
        raise ConfigError([("architecture", problem)], f"{kind} encoder")
    return numbers


def extractor_settings(reference: str, revision: str | None) -> dict[str, Any]:
    """What ``save_pretrained`` of a transformers feature extractor, or of a processor around one, wrote; ``{}`` without."""
    path = find(reference, revision, ["preprocessor_config.json", "processor_config.json"])
    content = read_json(path) if path is not None else {}
    settings: dict[str, Any] = content.get("feature_extractor", content)
    return settings
