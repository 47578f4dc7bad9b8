"""Retrieval as GILL does it (arXiv 2305.17216): signal tokens and media meet in one space; a classifier says when to."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F


class RetrievalHeads(nn.Module):
    """A linear head for signals, one for an encoder's features, and the logit scale of their similarities.

    From GILL's code (``gill/models.py``): the first signal token alone is read, the scale starts at 1 / 0.07 and is
    learned as its logarithm. GILL reads the hidden state without the token's embedding; that is the same vector for every
    medium, so it comes to the same as another bias.
    """

    def __init__(self, input_dim: int, feature_dim: int, dim: int) -> None:
        super().__init__()
        self.text = nn.Linear(input_dim, dim)
        self.media = nn.Linear(feature_dim, dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def embed_signals(self, signals: Tensor) -> Tensor:
        """Unit vectors ``(N, dim)``, float32, of ``signals (N, K, D_llm)``."""
        return F.normalize(self.text(signals[:, 0].to(self.text.weight.dtype)).float(), dim=-1)

    def embed_media(self, features: Tensor, mask: Tensor) -> Tensor:
        """Unit vectors ``(N, dim)``, float32, of encoder features ``(N, S, D)``: of the mean of the real ones."""
        real = mask[..., None].to(features.dtype)
        pooled = (features * real).sum(dim=1) / real.sum(dim=1).clamp(min=1)
        return F.normalize(self.media(pooled.to(self.media.weight.dtype)).float(), dim=-1)

    def loss(self, text: Tensor, media: Tensor) -> Tensor:
        """Symmetric InfoNCE of unit vectors ``text`` and ``media (N, dim)``, row by row a pair: a sum of N terms.

        Term i is half the cross-entropy of finding medium i among all media, and half that of finding text i among all
        texts. In training all are those of all processes, and gradients reach all of them; a process without pairs must
        call this too. The sum over processes is that of one process with all pairs.
        """
        mine, everyone = 0, torch.cat([text, media], dim=1)
        if self.training and distributed.is_available() and distributed.is_initialized():
            mine, everyone = _gathered(everyone)
        all_text, all_media = everyone.chunk(2, dim=1)
        pairs = mine + torch.arange(len(text), device=text.device)
        with torch.autocast(text.device.type, enabled=False):
            scale = self.logit_scale.float().exp()
            found = F.cross_entropy(scale * text @ all_media.T, pairs, reduction="sum")
            return (found + F.cross_entropy(scale * media @ all_text.T, pairs, reduction="sum")) / 2


class DecisionHead(nn.Module):
    """GILL's decision (``TrainDecisionClassifier.ipynb``): dropout and a linear layer on the first signal token."""

    def __init__(self, input_dim: int, dropout: float) -> None:
        super().__init__()
        self.dropout, self.linear = nn.Dropout(dropout), nn.Linear(input_dim, 2)

    def forward(self, signals: Tensor) -> Tensor:
        """Logits ``(N, 2)``, float32, of generating (0) and retrieving (1), from ``signals (N, K, D_llm)``."""
        logits: Tensor = self.linear(self.dropout(signals[:, 0].to(self.linear.weight.dtype)))
        return logits.float()


def _gathered(rows: Tensor) -> tuple[int, Tensor]:
    """The ``rows (n, D)`` of all processes in the order of their ranks, n differing, and where this process's begin."""
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(distributed.get_world_size())]
    distributed.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    sizes = [int(count) for count in counts]
    if torch.is_grad_enabled() and not rows.requires_grad:
        # The exchange of gradients needs this process too, also where nothing of its own is to learn.
        rows = rows.detach().requires_grad_()
    return sum(sizes[: distributed.get_rank()]), _Gather.apply(rows, sizes)


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
