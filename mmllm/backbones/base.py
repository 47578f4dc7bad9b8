"""The contract of a backbone's module."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn


class Backbone(nn.Module):
    """A language model that takes embeddings. ``hidden_dim`` is D_llm, ``vocab_rows`` the size of its own table.

    ``model`` is the (possibly adapter-wrapped) transformers model; ``new_tokens`` holds the rows of mmllm's own tokens,
    or is None when there are none.
    """

    hidden_dim: int
    vocab_rows: int
    model: nn.Module
    new_tokens: nn.Module | None

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings ``(..., D_llm)`` of int64 ids ``(...)``; ids from ``vocab_rows`` on are new tokens."""

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
