"""The contract of a backbone's module."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn


class NewTokens(nn.Module):
    """Embedding rows of mmllm's own tokens, beside the backbone's frozen table. ``weight`` is ``(n, D_llm)``."""

    def __init__(self, table: Tensor, count: int) -> None:
        super().__init__()
        # Rows start as the mean of the table plus noise of its spread (Hewitt 2021, "Initializing new word embeddings"),
        # which keeps their norm at the table's scale. They train, so they are kept in float32.
        table = table.detach().float()
        std, mean = torch.std_mean(table, dim=0)
        self.weight = nn.Parameter(mean + std * torch.randn(count, table.shape[1], device=table.device))


class Backbone(nn.Module):
    """A language model that takes embeddings. ``hidden_dim`` is D_llm, ``vocab_rows`` the size of its own table.

    ``model`` is the (possibly adapter-wrapped) transformers model; ``new_tokens`` holds the rows of mmllm's own tokens,
    or is None when there are none.
    """

    hidden_dim: int
    vocab_rows: int
    model: nn.Module
    new_tokens: NewTokens | None

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings ``(..., D_llm)`` of int64 ids ``(...)``; ids from ``vocab_rows`` on are new tokens."""

    @abstractmethod
    def compile_layers(self) -> None:
        """Compile the repeated layers in place, for batches of any shape; the names of the parameters stay."""

    @abstractmethod
    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """Logits from ``inputs_embeds (B, T, D_llm)``.

        ``positions`` (int64, K) are flat indices into B*T: the head runs there only and the result is ``(K, vocab_rows)``;
        without it the result is ``(B, T, vocab_rows)``. ``attention_mask (B, T_total)`` and ``position_ids (B, T)`` as in
        transformers; ``cache`` is a transformers cache, filled in place.
        """
