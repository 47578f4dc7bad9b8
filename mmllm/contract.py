"""What every clause of a component's contract is checked with."""

from __future__ import annotations

from torch import Tensor

from mmllm.config.base import ComponentConfig


class ContractError(AssertionError):
    """A component breaks a clause of its family's contract."""


def require(holds: bool | Tensor, config: ComponentConfig, clause: str, found: str) -> None:
    if not bool(holds):
        raise ContractError(f"{config.family} {config.kind!r} breaks the clause “{clause}”: {found}")


def equal(config: ComponentConfig, clause: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    require(
        found.shape == expected.shape, config, clause, f"shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    )
    off = float((found.float() - expected.float()).abs().max()) if found.numel() else 0.0
    require(off <= tolerance, config, clause, f"values differ by {off:.3g}, at most {tolerance:g} allowed")
