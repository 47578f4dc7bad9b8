"""Flamingo's gated cross-attention layers between the blocks of a frozen backbone (arXiv 2204.14198)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, PositiveInt

from mmllm.config.base import BuildContext
from mmllm.config.families import FusionConfig
from mmllm.errors import ConfigError

if TYPE_CHECKING:
    from mmllm.fusion.gated_cross_attention_module import GatedCrossAttention


class GatedCrossAttentionConfig(FusionConfig):
    """A layer of cross-attention and feed-forward, each behind a tanh gate that starts at 0, before block ``first`` and every
    ``every``-th one after it. A token attends to the medium directly before it, as in Flamingo.

    The media have the encoder's width unless ``media_dim`` says another; ``num_heads`` of ``head_dim``.
    ``norm``, ``feedforward`` (``feedforward_dim`` wide, by default 4 D), ``qk_norm`` and ``gates`` (one number or one for each
    channel) tell variants apart: the defaults are OpenFlamingo's, IDEFICS has ``rms``, ``swiglu`` and its backbone's sizes.
    """

    kind: Literal["gated_cross_attention"] = "gated_cross_attention"
    every: PositiveInt = 1
    first: Annotated[int, Field(ge=0)] = 0
    media_dim: PositiveInt | None = None
    num_heads: PositiveInt = 8
    head_dim: PositiveInt = 64
    norm: Literal["layer", "rms"] = "layer"
    feedforward: Literal["gelu", "swiglu"] = "gelu"
    feedforward_dim: PositiveInt | None = None
    qk_norm: bool = False
    gates: Literal["scalar", "vector"] = "scalar"

    def tiny(self) -> Self:
        small = {"every": 1, "first": 0, "num_heads": 2, "head_dim": 8, "feedforward_dim": 24}
        return self.model_copy(update=small | {"media_dim": None if self.media_dim is None else 12})

    def width(self, encoder_dim: int) -> int:
        return self.media_dim or encoder_dim

    def build(self, context: BuildContext, *, hidden_dim: int, media_dim: int, num_layers: int) -> GatedCrossAttention:
        """Raises ``ConfigError`` when ``first`` lies behind the last block."""
        from mmllm.fusion.gated_cross_attention_module import GatedCrossAttention

        if self.first >= num_layers:
            raise ConfigError([("first", f"is block {self.first}, but the backbone has blocks 0 to {num_layers - 1}")])
        at = range(self.first, num_layers, self.every)
        return GatedCrossAttention(self, at, hidden_dim, media_dim).to(context.dtype)
