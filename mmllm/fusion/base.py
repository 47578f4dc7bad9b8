"""The contract of a fusion's module: what it is told of the media, and where it sits in the backbone."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class Seen:
    """The N media of one modality in a batch, and which of them every token sees: the last one that stands before it.

    ``media (N, Q, D_m)``; ``places (N, 3)`` int64 are row, first column that sees it, and number of real features of each, in
    the order of rows and columns; ``shape`` is (B, T). ``kept`` is for what a fusion computes of the media alone, so that
    decoding computes it once.
    """

    def __init__(self, media: Tensor, places: Tensor, shape: tuple[int, int]) -> None:
        rows, width = shape
        row, column, count = places.unbind(dim=1)
        self.media, self.shape = media, shape
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        of_row = torch.zeros(rows, dtype=torch.int64, device=places.device).scatter_add(0, row, torch.ones_like(row))
        self.most = int(of_row.max())
        # The place of each medium among those of its row, and the media laid out by rows: (B, most).
        order = torch.arange(len(row), device=row.device) - (of_row.cumsum(0) - of_row)[row]
        self.slots = row * self.most + order
        begun = torch.zeros(rows, width, dtype=torch.int64, device=row.device)
        begun.view(-1).scatter_add_(0, row * width + column, torch.ones_like(row))
        met = begun.cumsum(dim=1)  # (B, T): how many media stand before a token
        real = torch.zeros(rows * self.most, media.shape[1], dtype=torch.bool, device=row.device)
        real[self.slots] = torch.arange(media.shape[1], device=row.device) < count[:, None]
        latest = met[..., None] - 1 == torch.arange(self.most, device=row.device)  # (B, T, most)
        visible = latest[..., None] & real.view(rows, 1, self.most, -1)
        self._some = met > 0
        self._visible = visible.flatten(2) | ~self._some[..., None]  # attention over nothing is not a number

    def at(self, rows: Tensor) -> Seen:
        """What ``rows`` alone see, from the last position told of on, once what all computed is ``kept``."""
        found = copy(self)
        found.shape = len(rows), self.shape[1]
        found.kept = {index: (keys[rows], values[rows]) for index, (keys, values) in self.kept.items()}
        found._some, found._visible = self._some[rows, -1:], self._visible[rows, -1:]
        return found

    def by_rows(self, values: Tensor) -> Tensor:
        """``values (N, Q, C)`` of the media as ``(B, most * Q, C)``; zeros where a row has fewer."""
        rows, (_, length, dim) = self.shape[0], values.shape
        laid = values.new_zeros(rows * self.most, length, dim).index_copy(0, self.slots, values)
        return laid.view(rows, self.most * length, dim)

    def masks(self, length: int) -> tuple[Tensor, Tensor]:
        """For ``length`` positions: ``(B, length, most * Q)`` which features each sees, and ``(B, length)`` whether it sees any.

        Fewer positions than were told of are later ones, which see what the last one does.
        """
        some, visible = self._some, self._visible
        if length != some.shape[1]:
            some, visible = some[:, -1:].expand(-1, length), visible[:, -1:].expand(-1, length, -1)
        return visible, some


class Fusion(nn.Module):
    """Modules in front of some of the backbone's blocks. ``at`` are those blocks' numbers, ``blocks[i]`` sits before block
    ``at[i]`` and maps hidden states ``(B, L, D)`` and what is ``Seen`` to hidden states.

    Before training every one of them returns what it was given, bit for bit.
    """

    at: Sequence[int]
    blocks: nn.ModuleList

    def __init__(self) -> None:
        super().__init__()
        # Not emptied after a pass: checkpointed blocks are run again in backward.
        self.seen: Seen | None = None

    def attach(self, layers: Sequence[nn.Module]) -> None:
        """Sit down before the backbone's ``layers``, which take hidden states ``(B, L, D)`` as their first tensor."""
        for index, at in enumerate(self.at):
            layers[at].register_forward_pre_hook(partial(self._before, index), with_kwargs=True)

    def look(self, seen: Seen | None) -> None:
        """What all passes see from now on; None: nothing."""
        self.seen = seen

    def _before(
        self, index: int, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (self.fuse(index, args[0], self.seen), *args[1:]), kwargs
        name = next(key for key, value in kwargs.items() if isinstance(value, Tensor))
        return args, {**kwargs, name: self.fuse(index, kwargs[name], self.seen)}

    @abstractmethod
    def fuse(self, index: int, hidden: Tensor, seen: Seen | None) -> Tensor:
        """Hidden states ``(B, L, D)`` for block ``at[index]`` with what they see of the media, in their dtype.

        A row without media gives the same whether others have some or nothing is ``seen`` at all.
        """
