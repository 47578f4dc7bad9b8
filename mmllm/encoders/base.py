"""The contract of a modality encoder's module."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn


class Encoder(nn.Module):
    """Turns a preprocessed batch of one modality into features. ``output_dim`` is D."""

    output_dim: int

    @abstractmethod
    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Features ``(N, S, D)`` in the module's dtype, and a bool mask ``(N, S)``, True where a feature is real.

        The real features of every item come first (left-aligned) and are as many as ``Preprocessor.num_tokens`` said.
        """
