"""Rows of all processes, with gradients back to where each came from: for objectives that tell samples apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed


def several() -> bool:
    """Whether other processes take part."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def gathered(rows: Tensor) -> tuple[int, Tensor]:
    """The ``rows (n, D)`` of all processes in the order of their ranks, n differing, and where this process's begin.

    Every process must call this, also one without rows, and where gradients are enabled all must use the result in
    their loss: the gradients are exchanged as well.
    """
    if not several():
        return 0, rows
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(distributed.get_world_size())]
    distributed.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    sizes = [int(count) for count in counts]
    if torch.is_grad_enabled() and not rows.requires_grad:
        # The exchange of gradients needs this process too, also where nothing of its own is to learn.
        rows = rows.detach().requires_grad_()
    return sum(sizes[: distributed.get_rank()]), _Gather.apply(rows, sizes)


def largest(number: int, device: torch.device) -> int:
    """The largest ``number`` of all processes."""
    if not several():
        return number
    most = torch.tensor([number], device=device)
    distributed.all_reduce(most, distributed.ReduceOp.MAX)
    return int(most)


class _Gather(torch.autograd.Function):
    """All processes' rows; backward, each gets the sum of what all found for its own."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        padded = rows.new_zeros(max(sizes), rows.shape[1])
        padded[: len(rows)] = rows
        pieces = [torch.empty_like(padded) for _ in sizes]
        distributed.all_gather(pieces, padded)
        return torch.cat([piece[:size] for piece, size in zip(pieces, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous().clone()
        distributed.all_reduce(gradient)
        return torch.split(gradient, ctx.sizes)[distributed.get_rank()], None
