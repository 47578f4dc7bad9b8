"""The contract of a projector's module."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn


class Projector(nn.Module):
    """Maps encoder features ``(N, S, D)`` to backbone embeddings ``(N, Q, D_llm)``."""

    @abstractmethod
    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings ``(N, Q, D_llm)`` and their bool mask ``(N, Q)``.

        The real outputs of an item with s real features come first and number ``config.num_outputs(s)``; features where
        ``mask`` is False never influence them.
        """
