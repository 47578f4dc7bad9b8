"""How one process's samples of an optimizer step are put into micro-batches.

The loss of a step is a sum over its samples divided once, so any cut of them gives the same loss and the same gradients.
What differs is the time and the memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from mmllm.config.run import ALIGNING, PROMPTING, Batching, StageConfig
from mmllm.model import MultimodalLM
from mmllm.processing.batch import Batch, Encoded


def batching_of(stage: StageConfig, model: MultimodalLM) -> Batching:
    """How the micro-batches of ``stage`` are made: as it says, where that is possible with its objectives and ``model``.

    Objectives that tell the media of a micro-batch apart are to have the same ones whatever is faster, so their batches
    stay as the data's order makes them. A backbone that cannot keep sequences of one row apart gets padded ones of similar
    length.
    """
    if any(name in (*ALIGNING, *PROMPTING, "contrastive") for name in stage.objectives):
        return "padded"
    return "grouped" if stage.batching == "packed" and not model.start_packing() else stage.batching


def cut(samples: Sequence[Encoded], stage: StageConfig, batching: Batching) -> list[list[Encoded]]:
    """``samples`` in micro-batches of at most ``stage.micro_batch_size`` samples, ``micro_batch_tokens`` tokens with padding
    and ``micro_batch_media`` media of one modality; a sample that is beyond a limit by itself is alone.

    ``padded`` keeps the order. ``grouped`` puts samples of similar length together, the longest first. ``packed``, where
    there is no padding to save, spreads them so that all micro-batches have about as many tokens.
    """
    if not samples:
        return []
    if batching == "packed":
        return _spread(samples, stage)
    rows = list(samples) if batching == "padded" else sorted(samples, key=_length, reverse=True)
    chunks: list[list[Encoded]] = []
    for sample in rows:
        if not chunks or not _fits([*chunks[-1], sample], stage, _padded):
            chunks.append([])
        chunks[-1].append(sample)
    return chunks


def _spread(samples: Sequence[Encoded], stage: StageConfig) -> list[list[Encoded]]:
    """As few micro-batches as it finds within the limits: the longest samples are dealt first, each to the shortest
    micro-batch that takes it, or, where that leaves one without a place, to the longest.
    """
    rows = sorted(samples, key=_length, reverse=True)
    least = -(-len(rows) // stage.micro_batch_size)
    if stage.micro_batch_tokens is not None:  # a sample beyond the limit fills a micro-batch by itself
        tokens = sum(min(len(sample.ids), stage.micro_batch_tokens) for sample in rows)
        least = max(least, -(-tokens // stage.micro_batch_tokens))
    return next(
        chunks
        for count in range(least, len(rows) + 1)
        for choose in (min, max)
        if (chunks := _dealt(rows, stage, count, choose)) is not None
    )


def _dealt(
    rows: Sequence[Encoded], stage: StageConfig, count: int, choose: Callable[..., list[Encoded]]
) -> list[list[Encoded]] | None:
    """``rows`` in ``count`` micro-batches, each where ``choose`` wants it by tokens; None when one does not fit anywhere."""
    chunks: list[list[Encoded]] = [[] for _ in range(count)]
    for sample in rows:
        free = [chunk for chunk in chunks if not chunk or _fits([*chunk, sample], stage, _tokens)]
        if not free:
            return None
        choose(free, key=_tokens).append(sample)
    return [chunk for chunk in chunks if chunk]


def _length(sample: Encoded) -> int:
    return len(sample.ids)


def _tokens(chunk: Sequence[Encoded]) -> int:
    return sum(map(_length, chunk))


def _padded(chunk: Sequence[Encoded]) -> int:
    return len(chunk) * max(map(_length, chunk))


def _fits(chunk: Sequence[Encoded], stage: StageConfig, tokens: Callable[[Sequence[Encoded]], int]) -> bool:
    media = Counter(span.modality for sample in chunk for span in sample.spans)
    return (
        len(chunk) <= stage.micro_batch_size
        and (stage.micro_batch_tokens is None or tokens(chunk) <= stage.micro_batch_tokens)
        and (stage.micro_batch_media is None or max(media.values(), default=0) <= stage.micro_batch_media)
    )


def filler(batch: Batch) -> Batch:
    """``batch`` for a process that has no samples where others have some: run with weight 0.

    Its media must not be among those that others are told apart from.
    """
    return replace(batch, made={}, captions={}, prompted={}, sentences={})
