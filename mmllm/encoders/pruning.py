"""Leaving out of a reference library's model what has no part in the features that are read."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Skipped(nn.Module):
    """In the place of a module that has no part in the features."""

    def forward(self, x: Any, *_: Any, **__: Any) -> Any:
        return x


def unused_parameters(model: nn.Module, features: Tensor) -> frozenset[str]:
    """Names of the parameters of ``model`` that ``features``, just computed with gradients, do not depend on."""
    features.sum().backward()  # type: ignore[no-untyped-call]
    return frozenset(name for name, parameter in model.named_parameters() if parameter.grad is None)


def drop_unused(model: nn.Module, unused: frozenset[str]) -> None:
    """Take the parameters ``unused`` out of ``model``: a module of such parameters alone as a whole.

    Such a module may still be called, with the features first, and returns them: what it gave is not read.
    """
    dropped: list[str] = []
    for path, module in list(model.named_modules()):
        names = [f"{path}.{name}" for name, _ in module.named_parameters()]
        if path and names and unused.issuperset(names) and not path.startswith(tuple(f"{gone}." for gone in dropped)):
            dropped.append(path)
            model.set_submodule(path, Skipped())
    for name in unused:
        owner, _, parameter = name.rpartition(".")
        if not name.startswith(tuple(f"{gone}." for gone in dropped)):
            setattr(model.get_submodule(owner), parameter, None)
