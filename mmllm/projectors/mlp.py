"""Position-wise input projectors: one linear layer, or an MLP. Neighbouring features may become one token, or one several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import PositiveInt, model_validator

from mmllm.config.base import BuildContext
from mmllm.config.families import ProjectorConfig

if TYPE_CHECKING:
    from mmllm.projectors.mlp_module import MLPProjector


class LinearConfig(ProjectorConfig):
    """One linear layer (LLaVA, arXiv 2304.08485). ``stack`` neighbouring features are concatenated into one first;
    each then gives ``expand`` outputs (GILL, arXiv 2305.17216: four tokens from one pooled feature).
    """

    kind: Literal["linear"] = "linear"
    stack: PositiveInt = 1
    expand: PositiveInt = 1

    def num_outputs(self, length: int) -> int:
        return -(-length // self.stack) * self.expand

    def tiny(self) -> Self:
        return self

    def build(self, context: BuildContext, *, input_dim: int, output_dim: int) -> MLPProjector:
        from mmllm.projectors.mlp_module import MLPProjector

        return MLPProjector(input_dim, output_dim, depth=1, stack=self.stack, expand=self.expand).to(context.dtype)


class MLPConfig(ProjectorConfig):
    """``depth`` linear layers with GELU between (LLaVA-1.5, arXiv 2310.03744, uses 2).

    ``hidden_dim`` is the width between the layers, the backbone's unless given; a list has one for each of the
    ``depth - 1`` (Prismatic's projector of fused features). ``norm`` puts a LayerNorm in front, for encoders whose features
    are not of unit scale. ``stack`` and ``expand`` as for ``linear``. With ``row_ends`` every feature that is all zeros gives a
    trained embedding of its own, LLaVA-NeXT's ``image_newline``: what the encoder ``tiled`` puts behind each row.
    """

    kind: Literal["mlp"] = "mlp"
    depth: PositiveInt = 2
    hidden_dim: PositiveInt | tuple[PositiveInt, ...] | None = None
    stack: PositiveInt = 1
    expand: PositiveInt = 1
    norm: bool = False
    row_ends: bool = False

    @model_validator(mode="after")
    def _a_width_for_each(self) -> Self:
        if isinstance(self.hidden_dim, tuple) and len(self.hidden_dim) != self.depth - 1:
            raise ValueError(f"found {len(self.hidden_dim)} hidden_dim, expected depth - 1 = {self.depth - 1}")
        if self.row_ends and (self.stack > 1 or self.expand > 1):
            raise ValueError("`row_ends` needs an output for each feature; leave out `stack` and `expand`")
        return self

    def num_outputs(self, length: int) -> int:
        return -(-length // self.stack) * self.expand

    def tiny(self) -> Self:
        return self.model_copy(update={"hidden_dim": 16})

    def build(self, context: BuildContext, *, input_dim: int, output_dim: int) -> MLPProjector:
        from mmllm.projectors.mlp_module import MLPProjector

        module = MLPProjector(
            input_dim,
            output_dim,
            depth=self.depth,
            hidden_dim=self.hidden_dim,
            stack=self.stack,
            expand=self.expand,
            norm=self.norm,
            row_ends=self.row_ends,
        )
        return module.to(context.dtype)
