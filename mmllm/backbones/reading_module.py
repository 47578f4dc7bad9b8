"""What a backbone has read of a batch of prompts, and how it reads on, one token a row at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from mmllm.backbones.base import Backbone, BackboneOutput

GROWTH = 64  # columns by which buffers grow: what is held is copied only so often


class Reading(ABC):
    """A batch of B prompts that a backbone reads, and goes on with."""

    @abstractmethod
    def begin(self, embeddings: Tensor) -> BackboneOutput:
        """Read the prompts; logits ``(B, V)`` and states ``(B, D_llm)`` at their last positions."""

    @abstractmethod
    def step(self, embeddings: Tensor) -> BackboneOutput:
        """Read one more token of every row, ``(B, 1, D_llm)``; logits and states there, as in ``begin``."""

    @abstractmethod
    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone (int64, indices into the present ones, rising)."""


class PaddedReading(Reading):
    """Prompts padded in front to one length, ``(B, T, D_llm)``; ``attention (B, T)`` int64 says what is real. So reads any
    backbone, with the memory that it makes itself.
    """

    def __init__(self, backbone: Backbone, attention: Tensor) -> None:
        self.backbone, self.attention, self.cache = backbone, attention, backbone.new_cache()
        self.places = (attention.cumsum(dim=1) - 1).clamp(min=0)

    def begin(self, embeddings: Tensor) -> BackboneOutput:
        last = torch.arange(1, len(embeddings) + 1, device=embeddings.device) * embeddings.shape[1] - 1
        out: BackboneOutput = self.backbone(
            embeddings, self.attention, self.places, positions=last, states_at=last, cache=self.cache
        )
        return out

    def step(self, embeddings: Tensor) -> BackboneOutput:
        self.attention = torch.cat([self.attention, self.attention.new_ones(len(embeddings), 1)], dim=1)
        self.places = self.places[:, -1:] + 1
        return self.begin(embeddings)

    def keep(self, rows: Tensor) -> None:
        self.attention, self.places = self.attention[rows], self.places[rows]
        self.backbone.keep_rows(self.cache, rows)


class KeyValues:
    """Keys and values ``(B, H, C, D)`` of every layer, in buffers of C columns that have room for more than is held.

    A model of transformers uses it as it uses its own caches. Appending writes one column; transformers' own cache copies
    all that it holds for every token of every layer.

    While ``places`` are set, what comes is one row of all prompts: token i goes to row ``places[0][i]`` and column
    ``places[1][i]``, and attention gets what came.
    """

    is_compileable = False  # as transformers asks it

    def __init__(self, layers: int) -> None:
        self.held = [0] * layers
        self.buffers: list[tuple[Tensor, Tensor] | None] = [None] * layers
        self.places: tuple[Tensor, Tensor] | None = None

    @contextmanager
    def laying_out(self, lengths: Sequence[int], device: torch.device) -> Iterator[None]:
        """Put every prompt of the row that comes into a row of its own, so that all end at the same column."""
        width = max(lengths)
        rows = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        columns = torch.cat([torch.arange(width - length, width) for length in lengths])
        self.places = rows.to(device), columns.to(device)
        try:
            yield
        finally:
            self.places, self.held = None, [width] * len(self.held)

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take ``(B, H, L, D)`` of a layer; what attention is to see of it."""
        pair = self.buffers[layer_idx]
        if self.places is not None:
            rows, width = int(self.places[0][-1]) + 1, int(self.places[1][-1]) + 1
            pair = self._room_for(key, value, (rows, width), layer_idx)
            for buffer, new in zip(pair, (key, value), strict=True):
                buffer.transpose(1, 2)[self.places] = new[0].transpose(0, 1)
            return key, value
        begin = self.held[layer_idx]
        end = self.held[layer_idx] = begin + key.shape[2]
        if pair is None or end > pair[0].shape[2]:
            pair = self._room_for(key, value, (len(key), end), layer_idx, begin)
        keys, values = pair
        keys[:, :, begin:end] = key
        values[:, :, begin:end] = value
        return keys[:, :, :end], values[:, :, :end]

    def _room_for(
        self, key: Tensor, value: Tensor, shape: tuple[int, int], layer: int, held: int = 0
    ) -> tuple[Tensor, Tensor]:
        """New buffers of ``shape`` (B, columns) and some room, with what is ``held`` so far."""
        # Zeros: what is masked takes part in a product all the same, where a stray not-a-number would survive.
        keys, values = (new.new_zeros(shape[0], new.shape[1], shape[1] + GROWTH, new.shape[3]) for new in (key, value))
        old = self.buffers[layer]
        if old is not None:
            keys[:, :, :held], values[:, :, :held] = (buffer[:, :, :held] for buffer in old)
        self.buffers[layer] = keys, values
        return keys, values

    def keep(self, rows: Tensor, begin: int) -> None:
        """Hold these rows alone, and of them the columns from ``begin`` on."""
        for layer, pair in enumerate(self.buffers):
            if pair is not None:
                keys, values = (buffer[:, :, begin:].index_select(0, rows) for buffer in pair)
                self.buffers[layer] = keys, values
                self.held[layer] -= begin

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.held[layer_idx]

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.held[layer_idx]

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.held[layer_idx] + query_length, 0


class RowReading(Reading):
    """Prompts of ``lengths`` of a model whose only memory are keys and values. Nothing is computed for padding.

    Prompts of different lengths are read in one row ``(1, sum(lengths), D_llm)``, each attending to itself alone; those of one
    length as ``(B, T, D_llm)``. What they leave lies in rows that end together, so what follows is read as a batch.
    """

    def __init__(self, backbone: Backbone, lengths: Sequence[int], layers: int) -> None:
        self.backbone, self.lengths, self.cache = backbone, list(lengths), KeyValues(layers)
        self.empty = [max(lengths) - length for length in lengths]  # columns in front of each row
        self.mask: Tensor | None = None

    def begin(self, embeddings: Tensor) -> BackboneOutput:
        device, lengths = embeddings.device, torch.tensor(self.lengths)
        last = (lengths.cumsum(0) - 1).to(device)
        self.places = lengths.to(device)[:, None]
        asked: dict[str, Any] = {"positions": last, "states_at": last, "cache": self.cache}
        if not any(self.empty):
            places = torch.arange(self.lengths[0], device=device).expand(len(embeddings), -1)
            out: BackboneOutput = self.backbone(embeddings, None, places, **asked)
            return out
        with self.cache.laying_out(self.lengths, device):
            out = self.backbone(embeddings, lengths=lengths, **asked)
        # 0 where a row has a token, minus infinity in front of it.
        hidden = torch.arange(max(self.lengths)) < torch.tensor(self.empty)[:, None]
        mask = torch.zeros(hidden.shape, dtype=embeddings.dtype).masked_fill(hidden, -torch.inf)
        self.mask = mask[:, None, None].to(device)
        return out

    def step(self, embeddings: Tensor) -> BackboneOutput:
        if self.mask is not None:
            self.mask = F.pad(self.mask, (0, 1))
        last = torch.arange(len(embeddings), device=embeddings.device)
        out: BackboneOutput = self.backbone(
            embeddings, self.mask, self.places, positions=last, states_at=last, cache=self.cache
        )
        self.places = self.places + 1
        return out

    def keep(self, rows: Tensor) -> None:
        self.empty = [self.empty[row] for row in rows.tolist()]
        begin = min(self.empty)
        self.empty = [columns - begin for columns in self.empty]
        self.cache.keep(rows, begin)
        self.places = self.places[rows]
        if self.mask is not None:
            self.mask = self.mask[rows][..., begin:] if any(self.empty) else None
