"""Input projectors that read features on their grid: ``pixel_shuffle``, ``pool`` and ``ldp``."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import PositiveInt, model_validator

from mmllm.config.base import BuildContext
from mmllm.config.families import Gridded, Layout, LayoutProjectorConfig, Preprocessor
from mmllm.errors import ConfigError
from mmllm.projectors.mlp import LayersConfig

if TYPE_CHECKING:
    from mmllm.projectors.grid_module import GridProjector


class GridConfig(LayersConfig, LayoutProjectorConfig):
    """What reads a grid: its layout is ``(pictures, rows, cols)``, row by row, one picture (tile, frame) after the other.

    The grid comes from the encoder's preprocessor (``Gridded``), so pictures of any aspect ratio have their own. What is not
    told, as where the module is called with features and mask alone, is taken for a square.
    """

    def layout(self, preprocessor: Preprocessor, item: dict[str, Any]) -> Layout:
        found = preprocessor.grid(item) if isinstance(preprocessor, Gridded) else None
        if found is None:
            problem = (
                "the encoder's features lie on no grid (a class token among them, a pooled feature, members joined by "
                "`pad` or along the sequence, or tokens without places); choose another projector or select patches"
            )
            raise ConfigError([("", problem)], f"{self.kind} projector")
        if len(found) == 1:
            return self.of_steps(found[0])
        pictures = math.prod(found[:-2])
        return (pictures, found[-2], found[-1])

    def of_steps(self, steps: int) -> Layout:
        """The layout of a sound's features; ``ConfigError`` where rows and columns are needed."""
        problem = f"the features are {steps} steps in time, not rows and columns; `stack` of linear and mlp joins steps"
        raise ConfigError([("", problem)], f"{self.kind} projector")

    def num_outputs(self, length: int) -> int:
        """For a square picture of ``length`` features; raises ``ValueError`` for other numbers."""
        return self.num_outputs_on((1, *square(length)))

    def num_outputs_on(self, layout: Layout) -> int:
        pictures, rows, cols = layout
        new_rows, new_cols = self.new_grid(rows, cols)
        return pictures * new_rows * new_cols

    def layout_examples(self) -> list[tuple[int, Layout]]:
        return [(math.prod(layout), layout) for layout in ((1, 1, 1), (1, 2, 1), (1, 1, 5), (2, 3, 3), (1, 4, 6))]

    @abstractmethod
    def new_grid(self, rows: int, cols: int) -> tuple[int, int]:
        """Rows and columns of the outputs of one picture."""


def square(length: int) -> tuple[int, int]:
    """``(rows, cols)`` of ``length`` features of a square. Raises ``ValueError`` for other numbers."""
    side = math.isqrt(length)
    if side * side != length:
        raise ValueError(f"found {length} features, expected a square number; give their layout (pictures, rows, cols)")
    return side, side


class PixelShuffleConfig(GridConfig):
    """``factor`` x ``factor`` neighbouring features become one of as many times the width, then an MLP.

    Space to depth as in Idefics3 (arXiv 2408.12637; ``depth: 1, bias: false``) and InternVL (arXiv 2404.16821; ``norm:
    true``): in a block the features stand row by row. Where the grid is no multiple of ``factor``, zeros fill it up at the
    bottom and the right. ``norm`` is a LayerNorm on the joined features; the rest as for ``mlp``.
    """

    kind: Literal["pixel_shuffle"] = "pixel_shuffle"
    factor: PositiveInt = 2

    def new_grid(self, rows: int, cols: int) -> tuple[int, int]:
        return -(-rows // self.factor), -(-cols // self.factor)

    def build(self, context: BuildContext, *, input_dim: int, output_dim: int) -> GridProjector:
        from mmllm.projectors.grid_module import PixelShuffle

        return PixelShuffle(self.layers(input_dim * self.factor**2, output_dim), self.factor).to(context.dtype)


class PoolConfig(GridConfig):
    """The mean of neighbouring features, then an MLP.

    Exactly one of ``factor`` (blocks of ``factor`` x ``factor``, as LLaVA-NeXT-Video's pooling of frames; of sounds,
    ``factor`` steps, as Qwen-Audio's) and ``size`` ([rows, cols] for every picture whatever its grid: adaptive pooling,
    DeCo, arXiv 2405.20985). Blocks at the edge average what there is of them. The rest as for ``mlp``.
    """

    suggested: ClassVar[Mapping[str, Any]] = {"any": {"factor": 2}}

    kind: Literal["pool"] = "pool"
    factor: PositiveInt | None = None
    size: tuple[PositiveInt, PositiveInt] | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.factor is None) == (self.size is None):
            found = "neither" if self.factor is None else "both"
            raise ValueError(f"found {found} of `factor` and `size`, expected one of them")
        return self

    def tiny(self) -> Self:
        """With a grid of at most 3 x 3."""
        size = None if self.size is None else (min(self.size[0], 3), min(self.size[1], 3))
        return super().tiny().model_copy(update={"size": size})

    def of_steps(self, steps: int) -> Layout:
        """One row."""
        return super().of_steps(steps) if self.factor is None else (1, 1, steps)

    def new_grid(self, rows: int, cols: int) -> tuple[int, int]:
        if self.factor is None:
            return self.size or (1, 1)
        return -(-rows // self.factor), -(-cols // self.factor)

    def build(self, context: BuildContext, *, input_dim: int, output_dim: int) -> GridProjector:
        from mmllm.projectors.grid_module import Pool

        return Pool(self.layers(input_dim, output_dim), self.factor or self.size).to(context.dtype)


class LDPConfig(GridConfig):
    """MobileVLM V2's lightweight downsample projector (arXiv 2402.03766): the MLP on every feature, adaptive average pooling
    to ``size``, and a depthwise 3 x 3 convolution added to what it reads, which tells outputs their places.
    """

    kind: Literal["ldp"] = "ldp"
    size: tuple[PositiveInt, PositiveInt] = (12, 12)

    def tiny(self) -> Self:
        """With a grid of at most 3 x 3."""
        return super().tiny().model_copy(update={"size": (min(self.size[0], 3), min(self.size[1], 3))})

    def new_grid(self, rows: int, cols: int) -> tuple[int, int]:
        return self.size

    def build(self, context: BuildContext, *, input_dim: int, output_dim: int) -> GridProjector:
        from mmllm.projectors.grid_module import LDP

        return LDP(self.layers(input_dim, output_dim), output_dim, self.size).to(context.dtype)
