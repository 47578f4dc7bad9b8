"""Retrieval as GILL does it (arXiv 2305.17216): signal tokens and media meet in one space; a classifier says when to."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmllm.projectors.gather import gathered


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
        if self.training:
            mine, everyone = gathered(everyone)
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
