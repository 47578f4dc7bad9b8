"""Pixel shuffle, pooling and MobileVLM V2's projector: features on a grid to fewer of them, and an MLP."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmllm.projectors.base import LayoutProjector
from mmllm.projectors.grid import square
from mmllm.projectors.mlp_module import MLPProjector


class GridProjector(LayoutProjector):
    """``layouts (N, 3)`` are the items' pictures, rows and columns; without them each is one square picture."""

    def forward(self, features: Tensor, mask: Tensor, layouts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if layouts is None:
            layouts = torch.tensor([(1, *square(count)) for count in mask.sum(dim=1).tolist()])
        return self.project(features, mask, layouts)

    @abstractmethod
    def project(self, features: Tensor, mask: Tensor, layouts: Tensor) -> tuple[Tensor, Tensor]:
        """As ``forward``."""


class PixelShuffle(GridProjector):
    """``(N, S, D)`` to ``(N, Q, output_dim)``: blocks of neighbours joined, then ``mlp``."""

    def __init__(self, mlp: MLPProjector, factor: int) -> None:
        super().__init__()
        self.mlp, self.factor = mlp, factor

    def project(self, features: Tensor, mask: Tensor, layouts: Tensor) -> tuple[Tensor, Tensor]:
        joined: tuple[Tensor, Tensor] = self.mlp(*on_grids(features, layouts, self._join))
        return joined

    def _join(self, table: Tensor) -> Tensor:
        """``(B, R, C, D)`` to ``(B, R', C', factor * factor * D)``."""
        f = self.factor
        table = F.pad(table, (0, 0, 0, -table.shape[2] % f, 0, -table.shape[1] % f))
        count, rows, cols, width = table.shape
        blocks = table.reshape(count, rows // f, f, cols // f, f, width)
        return blocks.transpose(2, 3).flatten(3)


class Pool(GridProjector):
    """``(N, S, D)`` to ``(N, Q, output_dim)``: means of blocks, or of as many as ``how (rows, cols)`` says, then ``mlp``."""

    def __init__(self, mlp: MLPProjector, how: int | tuple[int, int] | None) -> None:
        super().__init__()
        self.mlp, self.how = mlp, how

    def project(self, features: Tensor, mask: Tensor, layouts: Tensor) -> tuple[Tensor, Tensor]:
        pooled: tuple[Tensor, Tensor] = self.mlp(*on_grids(features, layouts, lambda table: average(table, self.how)))
        return pooled


class LDP(GridProjector):
    """MobileVLM V2's ``ldpnetv2``: ``mlp``, adaptive pooling to ``size``, ``x + depthwise(x)``."""

    def __init__(self, mlp: MLPProjector, output_dim: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.mlp, self.size = mlp, size
        self.places = nn.Conv2d(output_dim, output_dim, 3, padding=1, groups=output_dim)

    def project(self, features: Tensor, mask: Tensor, layouts: Tensor) -> tuple[Tensor, Tensor]:
        embeddings, _ = self.mlp(features, mask)
        return on_grids(embeddings, layouts, self._shrink)

    def _shrink(self, table: Tensor) -> Tensor:
        small = average(table, self.size)
        placed: Tensor = self.places(small.permute(0, 3, 1, 2))
        return small + placed.permute(0, 2, 3, 1)


def average(table: Tensor, how: int | tuple[int, int] | None) -> Tensor:
    """Means of ``table (B, R, C, D)`` over blocks of ``how`` x ``how``, or over ``how (rows, cols)`` equal shares of it."""
    channels_first = table.permute(0, 3, 1, 2)
    if isinstance(how, int):
        # A block over the edge counts what is on the grid alone. No block is larger than the grid: torch refuses that.
        kernel = (min(how, table.shape[1]), min(how, table.shape[2]))
        pooled = F.avg_pool2d(channels_first, kernel, kernel, ceil_mode=True, count_include_pad=False)
    else:
        pooled = F.adaptive_avg_pool2d(channels_first, how)
    return pooled.permute(0, 2, 3, 1)


def on_grids(features: Tensor, layouts: Tensor, change: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """``change``, from ``(B, R, C, D)`` to ``(B, R', C', D')``, on every picture of features ``(N, S, D)``.

    ``layouts (N, 3)`` are pictures, rows and columns of each item. Returns ``(N, Q, D')``, zeros behind the shorter ones, and
    the mask ``(N, Q)``. Items of one layout are changed together.
    """
    told = layouts.cpu()
    changed = []
    for layout in torch.unique(told, dim=0):
        where = (told == layout).all(dim=1).nonzero().flatten().to(features.device)
        pictures, height, width = layout.tolist()
        part = features[where, : pictures * height * width]
        tables = change(part.reshape(len(where) * pictures, height, width, -1))
        changed.append((where, tables.reshape(len(where), -1, tables.shape[-1])))
    longest = max(part.shape[1] for _, part in changed)
    padded = torch.cat([F.pad(part, (0, 0, 0, longest - part.shape[1])) for _, part in changed])
    counts = torch.cat([torch.full_like(where, part.shape[1]) for where, part in changed])
    order = torch.cat([where for where, _ in changed]).argsort()
    mask = torch.arange(longest, device=features.device)[None] < counts[:, None]
    return padded[order], mask[order]
