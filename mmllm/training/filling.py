"""``mmllm cache``: what the frozen parts of a run give for its data, computed ahead of it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from rich.progress import track
from torch import nn

from mmllm.cache.media import Tally
from mmllm.config.base import BuildContext
from mmllm.config.contradictions import matching, with_lengths
from mmllm.config.load import load
from mmllm.config.run import CacheConfig, RunConfig, StageConfig
from mmllm.data.mixture import StageData
from mmllm.errors import ConfigError
from mmllm.generators.base import Generator
from mmllm.model import Input, MultimodalLM
from mmllm.outputs import Output
from mmllm.processing.processor import Processor
from mmllm.training.batches import EvalDataset, loader
from mmllm.training.caching import HALF, commit, complete, open_caches, open_room
from mmllm.training.references import sources
from mmllm.training.run import keep_text_conditions
from mmllm.training.stages import set_dtypes


def run_fill(path: Path, overrides: Sequence[str], processes: int, *, trust_remote_code: bool = False) -> int:
    """Fill the caches of the configuration at ``path`` with ``processes`` processes, each with its share of the samples.

    Prints what was computed and returns an exit code. Raises ``MmllmError`` where the configuration keeps nothing, or a
    process fails.
    """
    if processes == 1:
        told = _share(path, overrides, trust_remote_code, 0, 1)
    else:
        _check(load(path, list(overrides), local_plugins=True))
        # Not a `multiprocessing.Pool`: its processes may have no children, and data workers are children.
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            shares = [
                pool.submit(_share, path, overrides, trust_remote_code, rank, processes) for rank in range(processes)
            ]
            found = [share.result() for share in shares]
        told = {part: [one for share in found for one in share[part]] for part in found[0]}
    for part, tallies in told.items():
        made, making, read = (sum(getattr(one, name) for one in tallies) for name in ("made", "making", "read"))
        each = f", {1e3 * making / made:.3g} ms each" if made else ""
        print(f"{part}: {made:,} media computed{each}; {read:,} were there")
    return 0


def _share(
    path: Path, overrides: Sequence[str], trust_remote_code: bool, rank: int, world: int
) -> dict[str, list[Tally]]:
    """One process's share; a process of its own reads the configuration anew, and with it the plugins that it names."""
    config = load(path, list(overrides), local_plugins=True)
    context = BuildContext(root=path.resolve().parent, trust_remote_code=trust_remote_code)
    return fill(config, context, rank, world)


def fill(config: RunConfig, context: BuildContext, rank: int = 0, world: int = 1) -> dict[str, list[Tally]]:
    """Compute what the frozen parts give for the share ``rank`` of ``world`` of the data of all stages; what was done, by
    part and stage.

    An encoder that a stage trains has no features for that stage or a later one: its weights are not known yet. Raises
    ``ConfigError`` where the configuration keeps nothing.
    """
    config, kept = with_lengths(config, context), _check(config)
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    processor = Processor.from_config(config.model, context)
    model = frozen_parts(config, context)
    device = torch.device("cpu")
    if torch.accelerator.is_available():
        device = torch.device(f"{torch.accelerator.current_accelerator()}:{rank % torch.accelerator.device_count()}")
    model.to(device)
    room = open_room(config, folder, world)
    keep_text_conditions(config, model, folder, world)
    told: dict[str, list[Tally]] = {}
    learned: set[str] = set()
    for stage in config.stages:
        learned |= {name.rpartition(".encoder")[0] for name in _trained(stage, model)}
        for name in learned & {f"inputs.{name}" for name in model.inputs}:
            del model.inputs[name.removeprefix("inputs.")]
        caches = open_caches(config, model, processor, device.type, room)
        reader = processor.reading_targets(kept.latents and "denoise" in stage.objectives).reading_caches(caches)
        data = [StageData(chosen, config.seed, context) for chosen in (stage.data, stage.eval_data) if chosen]
        for one in data:
            batches = EvalDataset(one, reader, stage, rank=rank, world=world)
            ready = loader(batches, range(len(batches)), stage.num_workers)
            for batch in track(ready, stage.name, len(batches), disable=rank > 0, transient=True):
                if batch is not None:
                    _compute(model, complete(batch, reader, caches).to(device), stage, config, device)
                    commit(caches)
        for part, cache in caches.items():
            cache.store.close()
            told.setdefault(part, []).append(cache.tally)
    return told


def _check(config: RunConfig) -> CacheConfig:
    keeps_text = any("condition" in stage.objectives for stage in config.stages)
    if config.cache is None or not (config.cache.features or config.cache.latents or keeps_text):
        text = "nothing is to be kept; set `cache.features=true`, or `cache.latents=true` for targets of generators"
        raise ConfigError([("cache", text)])
    return config.cache


def _trained(stage: StageConfig, model: MultimodalLM) -> list[str]:
    return [name for name in matching(stage.train, model.parts()) if name.startswith("inputs.")]


@torch.no_grad()
def _compute(model: MultimodalLM, batch: Any, stage: StageConfig, config: RunConfig, device: torch.device) -> None:
    """Everything that is kept of one batch, as a step would compute it."""
    cast_to = HALF.get(config.precision)
    with nullcontext() if cast_to is None else torch.autocast(device.type, cast_to):
        for name, media in batch.media.items():
            if media.cached is not None:
                model.inputs[name].features(media.inputs, media.cached)  # type: ignore[operator]
        for name, made in batch.made.items():
            output = model.outputs[name]
            if made.cached is not None:
                cast(Output, output).encoded_targets(made)
            conditions = output.text_conditions if isinstance(output, Output) else None
            if "condition" in stage.objectives and made.captions and conditions is not None:
                conditions(made.captions)


class Nothing(nn.Module):
    """Stands where a part is not needed."""

    adapter = None


def frozen_parts(config: RunConfig, context: BuildContext) -> MultimodalLM:
    """A model of the encoders and generators of ``config`` alone, as a run would have them in its first stage; with a whole
    one where an encoder has random weights, which depend on all that is built before it.
    """
    wanted = [f"inputs.{name}.encoder" for name in config.model.inputs]
    wanted += [f"outputs.{name}.generator" for name in config.model.outputs]
    torch.manual_seed(config.seed)
    if all(sources(config.model, context, part) for part in wanted):
        inputs = {}
        for name, part in config.model.inputs.items():
            encoder, adapter = part.encoder.build(context), None
            if part.encoder.adapter is not None:
                adapter = part.encoder.adapter.attach(encoder)
            inputs[name] = Input(encoder, cast(Any, Nothing()), adapter)
        outputs: dict[str, Any] = {}
        for name, made in config.model.outputs.items():
            generator = made.generator.build(context)
            if isinstance(generator, Generator):
                outputs[name] = Output(cast(Any, Nothing()), generator)
        model = MultimodalLM(inputs, cast(Any, Nothing()), outputs)
    else:
        model = MultimodalLM.from_config(config.model, context)
    set_dtypes(
        model, matching(chain.from_iterable(stage.train for stage in config.stages), model.parts()), config.precision
    )
    return model.requires_grad_(False).eval()
