"""The caches of a stage: which parts may have one, where it is, and what it gained."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mmllm.cache.identity import identity
from mmllm.cache.media import MediaCache
from mmllm.cache.store import Room
from mmllm.config.run import RunConfig
from mmllm.errors import MmllmError, TrainingError
from mmllm.generators.diffusion_module import LatentDiffusion
from mmllm.model import Input, MultimodalLM
from mmllm.outputs import Output
from mmllm.processing.batch import Batch
from mmllm.processing.processor import Processor
from mmllm.processing.reading import DECODERS
from mmllm.processing.sources import DECODER_VERSION
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
    config: RunConfig, model: MultimodalLM, processor: Processor, device: str, room: Room | None
) -> dict[str, MediaCache]:
    """A cache for every input whose encoder is frozen as ``model`` stands, has no adapter and is in evaluation mode, and
    for every output whose targets go through an autoencoder; by part (``inputs.image``). The model's parts are given theirs.

    ``device`` is the type of that which the model will compute on.
    """
    caches: dict[str, MediaCache] = {}
    for name, module in model.inputs.items():
        one, preprocessor = cast(Input, module), processor.modalities[name].preprocessor
        wanted = config.cache is not None and config.cache.features and _constant(one.encoder, one.adapter)
        one.cache = _opened(config, room, device, one.encoder, preprocessor, processor.limits) if wanted else None
        if one.cache is not None:
            caches[f"inputs.{name}"] = one.cache
    for name, out in model.outputs.items():
        if not isinstance(out, Output):
            continue
        generator, target = out.generator, processor.signals[name].target
        wanted = config.cache is not None and config.cache.latents and isinstance(generator, LatentDiffusion)
        wanted = wanted and not _shared_out(cast(nn.Module, generator))
        about = (generator.autoencoder, generator.dtype) if isinstance(generator, LatentDiffusion) else ()
        out.cache = _opened(config, room, device, *about, target, processor.limits) if wanted else None
        if out.cache is not None:
            caches[f"outputs.{name}"] = out.cache
    return caches


def _opened(config: RunConfig, room: Room | None, device: str, *about: object) -> MediaCache | None:
    """The cache of what ``about`` computes; None where it cannot be told apart from others."""
    if config.cache is None or room is None:
        return None
    precision = (device, HALF.get(config.precision), torch.get_float32_matmul_precision())
    try:
        identity_ = identity(*about, DECODERS, DECODER_VERSION, precision, config.cache.storage)
    except MmllmError as error:
        log.warning("what a %s gives is not kept: %s", type(about[0]).__name__, error)
        return None
    return MediaCache(room.folder, identity_, config.cache.storage, room)


def _shared_out(module: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in module.parameters())


def _constant(encoder: nn.Module, adapter: object) -> bool:
    # A sharded encoder's processes compute together, or not at all; with a cache each would when it needs to.
    if _shared_out(encoder):
        return False
    learns = any(p.requires_grad for p in encoder.parameters())
    return adapter is None and not learns and not any(module.training for module in encoder.modules())


def complete(batch: Batch, processor: Processor, caches: Mapping[str, MediaCache]) -> Batch:
    """``batch``, by workers that may have read caches, ready for the model: with what has become known meanwhile, and the
    rest collated. For the process that computes, on the CPU.
    """
    for name, media in batch.media.items():
        if media.cached is not None:
            media.cached = caches[f"inputs.{name}"].complete(media.cached)
            if items := media.cached.take():
                media.inputs = processor.modalities[name].preprocessor.collate(items)
    for name, made in batch.made.items():
        if made.cached is not None:
            made.cached = caches[f"outputs.{name}"].complete(made.cached)
            if items := made.cached.take():
                made.targets = torch.stack([item["target"] for item in items])
    return batch


def completed(steps: Iterable[StepData], processor: Processor, caches: Mapping[str, MediaCache]) -> Iterator[StepData]:
    """``steps``, their batches made ready for the model when it is their turn."""
    for data in steps:
        for batch, _ in data.micro:
            complete(batch, processor, caches)
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
