"""The blocks of a transformer and the sublayers of a block, found by how modules are put together, not by a model's name."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Sublayer:
    """One step of a block that is added to the residual stream: attention, a MLP, a mixer.

    ``name`` is unique in the block. It reads what ``reader`` is given and returns what ``writer`` does, which may be the same
    module. With ``residual`` the writer has added its argument of that name already.
    """

    name: str
    reader: nn.Module
    writer: nn.Module
    residual: bool = False


@dataclass(frozen=True)
class Block:
    """``width`` is that of the residual stream, D."""

    name: str
    module: nn.Module
    width: int
    sublayers: tuple[Sublayer, ...]


def find_blocks(model: nn.Module) -> list[Block]:
    """The repeated blocks of ``model`` in order: the entries of its lists of modules that have norms and sublayers.

    Lists within a block (experts) are part of it. Empty when there are none, as in convolutional networks.
    """
    blocks: list[Block] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{block.name}.") for block in blocks)
        if inside or not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        blocks += [
            Block(f"{name}.{key}", child, width, tuple(found))
            for key, child in module.named_children()
            if (width := _width(child, model)) and (found := list(_sublayers(child)))
        ]
    return blocks


def _width(block: nn.Module, model: nn.Module) -> int:
    """The width of the residual stream, read off the norms of ``block``; 0 when it has none, so is no block."""
    if isinstance(block, nn.ModuleList | nn.Sequential):
        return 0
    norms = [child for child in block.children() if "norm" in type(child).__name__.lower()]
    sizes = [p.numel() for norm in norms for p in norm.parameters() if p.ndim == 1]
    if norms and not sizes:  # norms without weights (OLMo)
        config: Any = model.config
        return int(config.hidden_size)
    return max(set(sizes), key=sizes.count) if sizes else 0


def _matrices(module: nn.Module) -> int:
    """Weights of linear layers, of experts in one tensor, and of convolutions over time; those over pictures do not count."""
    return 0 if isinstance(module, nn.Embedding) else sum(p.ndim in (2, 3) for p in module.parameters())


def _sublayers(block: nn.Module) -> Iterator[Sublayer]:
    """Children with several matrices are sublayers; those with one are the layers of a MLP written into the block."""
    layers: list[tuple[str, nn.Module]] = []
    for name, child in block.named_children():
        matrices = _matrices(child)
        if matrices > 1:
            residual = "residual" in inspect.signature(child.forward).parameters
            yield Sublayer(name, child, child, residual)
        elif matrices == 1:
            layers += [(name, m) for m in child.modules() if any(p.ndim == 2 for p in m.parameters(recurse=False))]
    if len(layers) > 1:
        yield Sublayer(layers[-1][0], layers[0][1], layers[-1][1])


def read_by(arguments: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    """The hidden states among a module's arguments: the first tensor."""
    return next(value for value in (*arguments, *named.values()) if isinstance(value, Tensor))
