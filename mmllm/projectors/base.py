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


class LayoutProjector(Projector):
    """One that reads how the features lie as well: the module of a ``LayoutProjectorConfig``."""

    @abstractmethod
    def forward(self, features: Tensor, mask: Tensor, layouts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As ``Projector.forward``; row n of ``layouts (N, K)`` int64 is the config's ``layout`` of item n. What it takes
        them to be where they are not given is for the module to say.
        """
