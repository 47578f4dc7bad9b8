"""Position-wise input projectors: one linear layer, or an MLP. Neighbouring features may become one token, or one several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import PositiveInt

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

    ``hidden_dim`` is the backbone's width unless given. ``norm`` puts a LayerNorm in front, for encoders whose features
    are not of unit scale. ``stack`` and ``expand`` as for ``linear``.
    """

    kind: Literal["mlp"] = "mlp"
    depth: PositiveInt = 2
    hidden_dim: PositiveInt | None = None
    stack: PositiveInt = 1
    expand: PositiveInt = 1
    norm: bool = False

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
        )
        return module.to(context.dtype)
