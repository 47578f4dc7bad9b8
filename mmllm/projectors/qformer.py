"""The ``qformer`` input projector: BLIP-2's Querying Transformer (arXiv 2301.12597) and its linear layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from mmllm.config.base import BuildContext
from mmllm.config.families import ProjectorConfig

if TYPE_CHECKING:
    from mmllm.projectors.qformer_module import QFormerProjector


class QFormerConfig(ProjectorConfig):
    """``num_queries`` trained queries read the features by cross-attention in every ``cross_attention_every``-th layer.

    However many features there are, ``num_queries`` outputs come out. The defaults are BLIP-2's numbers.

    - ``norm`` puts a LayerNorm on the features first (BLIP-2's ``ln_vision``), for encoders read before it.
    - ``pretrained``: a folder or hub id of a transformers BLIP-2 checkpoint. Its Q-Former, queries and, with ``norm``,
      its vision tower's last LayerNorm are taken; the encoder's width and all numbers here must be the checkpoint's.
      Its linear layer is taken too when the backbone has the width it was made for; otherwise that starts at random.
    """

    kind: Literal["qformer"] = "qformer"
    num_queries: PositiveInt = 32
    num_layers: PositiveInt = 12
    hidden_dim: PositiveInt = 768
    num_heads: PositiveInt = 12
    ff_mult: PositiveInt = 4
    cross_attention_every: PositiveInt = 2
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    norm: bool = False
    pretrained: str | None = None
    revision: str | None = None

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_dim % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide hidden_dim {self.hidden_dim}")
        return self

    def num_outputs(self, length: int) -> int:
        return self.num_queries

    def tiny(self) -> QFormerConfig:
        """At most 4 queries and two layers of width 16, one without cross-attention where the original has such."""
        return QFormerConfig(
            num_queries=min(self.num_queries, 4),
            num_layers=2,
            hidden_dim=16,
            num_heads=2,
            ff_mult=2,
            cross_attention_every=min(self.cross_attention_every, 2),
            dropout=self.dropout,
            norm=self.norm,
        )

    def build(self, context: BuildContext, *, input_dim: int, output_dim: int) -> QFormerProjector:
        """Raises ``CheckpointError`` when the checkpoint has other numbers."""
        from mmllm.projectors.qformer_module import make_projector

        return make_projector(self, context, input_dim, output_dim)
