"""Position-wise input projectors: one linear layer, or an MLP. Neighbouring features may become one token, or one several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import PositiveInt, model_validator

from mmllm.config.base import BuildContext
from mmllm.config.families import ProjectorConfig

if TYPE_CHECKING:
    from mmllm.projectors.mlp_module import MLPProjector

Activation = Literal["gelu", "relu", "silu", "swiglu"]


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


class LayersConfig(ProjectorConfig):
    """What projectors that end in an MLP have in common.

    ``depth`` linear layers with ``activation`` between; ``hidden_dim`` is the width between the layers, the backbone's
    unless given; a list has one for each of the ``depth - 1`` (Prismatic's projector of fused features). ``swiglu`` gates:
    the layer before it is twice as wide (Ultravox). ``bias``: whether the layers have one. ``norm`` puts a LayerNorm in
    front, for encoders whose features are not of unit scale.
    """

    depth: PositiveInt = 2
    hidden_dim: PositiveInt | tuple[PositiveInt, ...] | None = None
    activation: Activation = "gelu"
    bias: bool = True
    norm: bool = False

    @model_validator(mode="after")
    def _a_width_for_each(self) -> Self:
        if isinstance(self.hidden_dim, tuple) and len(self.hidden_dim) != self.depth - 1:
            raise ValueError(f"found {len(self.hidden_dim)} hidden_dim, expected depth - 1 = {self.depth - 1}")
        return self

    def tiny(self) -> Self:
        return self.model_copy(update={"hidden_dim": 16})

    def layers(
        self, input_dim: int, output_dim: int, *, stack: int = 1, expand: int = 1, row_ends: bool = False
    ) -> MLPProjector:
        """The MLP on features of ``input_dim``."""
        from mmllm.projectors.mlp_module import MLPProjector

        return MLPProjector(
            input_dim,
            output_dim,
            depth=self.depth,
            hidden_dim=self.hidden_dim,
            activation=self.activation,
            bias=self.bias,
            stack=stack,
            expand=expand,
            norm=self.norm,
            row_ends=row_ends,
        )


class MLPConfig(LayersConfig):
    """Linear layers with an activation between, on each feature (LLaVA-1.5, arXiv 2310.03744, has two and GELU).

    ``depth``, ``hidden_dim``, ``activation``, ``bias``, ``norm``: see ``LayersConfig``. ``stack`` and ``expand`` as for
    ``linear``. With ``row_ends`` every feature that is all zeros gives a trained embedding of its own, LLaVA-NeXT's
    ``image_newline``: what the encoder ``tiled`` puts behind each row.
    """

    kind: Literal["mlp"] = "mlp"
    stack: PositiveInt = 1
    expand: PositiveInt = 1
    row_ends: bool = False

    @model_validator(mode="after")
    def _an_output_for_each(self) -> Self:
        if self.row_ends and (self.stack > 1 or self.expand > 1):
            raise ValueError("`row_ends` needs an output for each feature; leave out `stack` and `expand`")
        return self

    def num_outputs(self, length: int) -> int:
        return -(-length // self.stack) * self.expand

    def build(self, context: BuildContext, *, input_dim: int, output_dim: int) -> MLPProjector:
        layers = self.layers(input_dim, output_dim, stack=self.stack, expand=self.expand, row_ends=self.row_ends)
        return layers.to(context.dtype)
