"""The caches of a stage: which parts may have one, where it is, and what it gained."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from mmllm.cache.identity import identity
from mmllm.cache.media import MediaCache
from mmllm.cache.store import Room
from mmllm.config.run import RunConfig
from mmllm.errors import MmllmError, TrainingError
from mmllm.model import Input, MultimodalLM
from mmllm.processing.processor import Processor
from mmllm.training.batches import StepData

if TYPE_CHECKING:
    from mmllm.training.report import Reporter

log = logging.getLogger(__name__)

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def folder_of(config: RunConfig, run: Path) -> Path:
    """Where the features and latents of a run in folder ``run`` are."""
    kept = None if config.cache is None else config.cache.folder
    return (run if kept is None else Path(kept)) / "features"


def open_room(config: RunConfig, run: Path, processes: int) -> Room | None:
    """The room for features and latents; None when ``config`` keeps neither. Raises ``TrainingError``."""
    if config.cache is None or not (config.cache.features or config.cache.latents):
        return None
    folder = folder_of(config, run)
    try:
        return Room(folder, int(config.cache.gigabytes * 1e9), processes)
    except OSError as error:
        raise TrainingError(
            f"cache.folder: cannot use {folder} ({error.strerror}); choose another, or `features: false`"
        ) from error


def open_caches(
    config: RunConfig, model: MultimodalLM, processor: Processor, run: Path, device: str, room: Room | None
) -> dict[str, MediaCache]:
    """A cache for every input whose encoder is frozen as ``model`` stands, has no adapter and is in evaluation mode, by its
    part (``inputs.image``); the model's parts are given theirs.

    ``device`` is the type of that which the model will compute on.
    """
    caches: dict[str, MediaCache] = {}
    for name, module in model.inputs.items():
        one = cast(Input, module)
        one.cache = None
        if config.cache is None or room is None or not config.cache.features or not _constant(one.encoder, one.adapter):
            continue
        about = [one.encoder, processor.modalities[name].preprocessor, processor.limits]
        try:
            one.cache = MediaCache(room.folder, _identity(config, device, *about), config.cache.storage, room)
        except MmllmError as error:
            log.warning("the features of %s are not kept: %s", name, error)
            continue
        caches[f"inputs.{name}"] = one.cache
    return caches


def _constant(encoder: nn.Module, adapter: object) -> bool:
    learns = any(p.requires_grad for p in encoder.parameters())
    return adapter is None and not learns and not any(module.training for module in encoder.modules())


def _identity(config: RunConfig, device: str, *about: object) -> str:
    cast_to = HALF.get(config.precision)
    kept = "exact" if config.cache is None else config.cache.storage
    return identity(*about, device, cast_to, torch.get_float32_matmul_precision(), kept)


def completed(steps: Iterable[StepData], processor: Processor) -> Iterator[StepData]:
    """``steps``, their batches made ready for the model when it is their turn."""
    for data in steps:
        for batch, _ in data.micro:
            processor.complete(batch)
        yield data


def commit(caches: Mapping[str, MediaCache]) -> None:
    """Let what was put be found by others, all of it at once."""
    for cache in caches.values():
        cache.store.commit()


def close(caches: Mapping[str, MediaCache], reporter: Reporter, stage: str, step: int) -> None:
    """Close the caches of a stage that has come to ``step`` and report what they did, in the main process."""
    for cache in caches.values():
        cache.store.close()
    if caches:
        rows = {name: {**asdict(cache.tally), "off": cache.off} for name, cache in caches.items()}
        reporter.begin(stage, {"step": step, "cache": rows})
