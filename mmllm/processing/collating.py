"""The media of several conversations as one batch of each modality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmllm.cache.media import CachedBatch, Known
from mmllm.processing.batch import CodeBatch, Made, MadeBatch, MediaBatch, Span

if TYPE_CHECKING:
    from mmllm.processing.processor import Modality, Signals


def collate_media(modality: Modality, placed: Sequence[tuple[int, Span]], row_width: int) -> MediaBatch:
    """The media of one modality; each is ``placed`` at a token, counted over all rows of ``row_width``."""
    known = [span.known for _, span in placed if span.known is not None]
    cached = CachedBatch.of(known) if known else None
    inputs = {} if known else modality.preprocessor.collate([span.item for _, span in placed])
    # The projector's padded length: the item with the most outputs sets it.
    width = max(span.count for _, span in placed)
    told = [span.layout for _, span in placed if span.layout is not None]
    layouts = torch.tensor(told) if told else None
    if modality.fused:
        none = torch.zeros(0, dtype=torch.int64)
        places = [[*divmod(start - 1, row_width), span.count] for start, span in placed]
        return MediaBatch(inputs, none, none, width, layouts, torch.tensor(places), cached)
    positions = torch.cat([torch.arange(start, start + span.count) for start, span in placed])
    sources = torch.cat([torch.arange(i * width, i * width + span.count) for i, (_, span) in enumerate(placed)])
    return MediaBatch(inputs, positions, sources, width, layouts, cached=cached)


def collate_made(signals: Signals, modality: Modality | None, placed: Sequence[tuple[int, Made]]) -> MadeBatch:
    """What the assistant makes of one modality by signal tokens; ``modality`` is how it can be looked at."""
    count = signals.count
    positions = torch.stack([torch.arange(start, start + count) for start, _ in placed])
    captions = [(i, made.caption) for i, (_, made) in enumerate(placed) if made.caption is not None]
    targets = [(i, made.target) for i, (_, made) in enumerate(placed) if made.target is not None]
    tensors = [target for _, target in targets if isinstance(target, Tensor)]
    known = [target for _, target in targets if isinstance(target, Known)]
    shown = [(i, made.seen) for i, (_, made) in enumerate(placed) if made.seen is not None]
    decided = [(i, made.retrieved) for i, (_, made) in enumerate(placed) if made.retrieved is not None]
    return MadeBatch(
        positions,
        [caption for _, caption in captions],
        torch.tensor([i for i, _ in captions], dtype=torch.int64),
        torch.stack(tensors) if tensors else None,
        torch.tensor([i for i, _ in targets], dtype=torch.int64),
        modality.preprocessor.collate([seen for _, seen in shown]) if shown and modality else None,
        torch.tensor([i for i, _ in shown], dtype=torch.int64),
        torch.tensor([i for i, _ in decided], dtype=torch.int64),
        torch.tensor([retrieved for _, retrieved in decided], dtype=torch.int64),
        CachedBatch.of(known) if known else None,
    )


def collate_codes(signals: Signals, placed: Sequence[tuple[int, Made]]) -> CodeBatch:
    """What the assistant makes of one modality in codes."""
    places = torch.tensor(signals.group.free)
    targets = torch.stack([made.target for _, made in placed if isinstance(made.target, Tensor)])
    positions = torch.stack([start + places for start, _ in placed])
    return CodeBatch(targets, positions, torch.tensor(signals.code_firsts))
