"""The ``cross_attention`` input projector: the Perceiver resampler of Flamingo (arXiv 2204.14198, figure 5)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import PositiveInt

from mmllm.config.base import BuildContext
from mmllm.config.families import ProjectorConfig

if TYPE_CHECKING:
    from mmllm.projectors.cross_attention_module import PerceiverResampler


class CrossAttentionConfig(ProjectorConfig):
    """``num_queries`` trained queries attend ``depth`` times to the features and to themselves.

    However many features there are, ``num_queries`` outputs come out. ``hidden_dim`` is the encoder's width unless
    given; ``ff_mult`` is the feed-forward's width relative to it.
    """

    kind: Literal["cross_attention"] = "cross_attention"
    num_queries: PositiveInt = 64
    depth: PositiveInt = 6
    num_heads: PositiveInt = 8
    hidden_dim: PositiveInt | None = None
    ff_mult: PositiveInt = 4

    def num_outputs(self, length: int) -> int:
        return self.num_queries

    def tiny(self) -> CrossAttentionConfig:
        """At most 4 queries, two layers of width 16."""
        queries = min(self.num_queries, 4)
        return CrossAttentionConfig(num_queries=queries, depth=2, num_heads=2, hidden_dim=16, ff_mult=2)

    def build(self, context: BuildContext, *, input_dim: int, output_dim: int) -> PerceiverResampler:
        """Raises ``ConfigError`` when ``num_heads`` does not divide the width."""
        from mmllm.projectors.cross_attention_module import PerceiverResampler

        module = PerceiverResampler(
            input_dim,
            output_dim,
            num_queries=self.num_queries,
            depth=self.depth,
            num_heads=self.num_heads,
            hidden_dim=self.hidden_dim or input_dim,
            ff_mult=self.ff_mult,
        )
        return module.to(context.dtype)
