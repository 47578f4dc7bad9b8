"""The contract of an adapter, once its config has attached it to a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

# Of the folder that an adapter is saved in, whatever its kind.
SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Adapter(ABC):
    """Parameters of its own in a model. ``model`` takes the place of the model that it was attached to: that model itself,
    or a wrapper around it with the same forward. ``positions`` of a backbone's context are taken by it.
    """

    model: nn.Module
    positions: int = 0

    @abstractmethod
    def owns(self, name: str) -> bool:
        """Whether the parameter or module of ``model`` under this qualified name is the adapter's."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write ``adapter_config.json`` and ``adapter_model.safetensors`` to ``folder``, which is made."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Read what ``save`` wrote, in the parameters' own dtypes. Raises ``CheckpointError`` when it does not fit."""
