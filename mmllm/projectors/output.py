"""Output projectors: from the hidden states at a group of signal tokens to the condition of a generator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from mmllm.config.base import BuildContext
from mmllm.config.families import OutputProjectorConfig, Shape

if TYPE_CHECKING:
    from mmllm.projectors.output_module import OutputProjector

Dropout = Annotated[float, Field(ge=0, lt=1)]


class LinearOutputConfig(OutputProjectorConfig):
    """One linear layer per part of the condition, applied to every signal token alone.

    With K signal tokens and a condition of L positions, a token gives the next ``ceil(L / K)`` of them: with K = L one
    each (DreamLLM, arXiv 2309.11499), with K = 1 all of them.
    """

    kind: Literal["linear"] = "linear"

    def tiny(self) -> Self:
        return self

    def build(
        self, context: BuildContext, *, input_dim: int, num_signals: int, condition_shape: Mapping[str, Shape]
    ) -> OutputProjector:
        from mmllm.projectors.output_module import MLPOutput

        return MLPOutput(input_dim, num_signals, condition_shape, depth=1, hidden_dim=input_dim).to(context.dtype)


class MLPOutputConfig(OutputProjectorConfig):
    """``depth`` linear layers with GELU between, applied to every signal token alone (see ``linear``).

    ``hidden_dim`` is the backbone's width unless given.
    """

    kind: Literal["mlp"] = "mlp"
    depth: Annotated[int, Field(ge=2)] = 2
    hidden_dim: PositiveInt | None = None

    def tiny(self) -> Self:
        return self.model_copy(update={"hidden_dim": 16})

    def build(
        self, context: BuildContext, *, input_dim: int, num_signals: int, condition_shape: Mapping[str, Shape]
    ) -> OutputProjector:
        from mmllm.projectors.output_module import MLPOutput

        hidden = self.hidden_dim or input_dim
        return MLPOutput(input_dim, num_signals, condition_shape, depth=self.depth, hidden_dim=hidden).to(context.dtype)


class QueryOutputConfig(OutputProjectorConfig):
    """Numbers of the projectors with one trained query for every position of the condition."""

    num_layers: PositiveInt = 4
    hidden_dim: PositiveInt = 512
    num_heads: PositiveInt = 4
    ff_mult: PositiveInt = 4
    dropout: Dropout = 0.0

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_dim % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide hidden_dim {self.hidden_dim}")
        return self

    def tiny(self) -> Self:
        return self.model_copy(update={"num_layers": 1, "hidden_dim": 16, "num_heads": 2, "ff_mult": 2})

    def numbers(self) -> dict[str, Any]:
        """All but ``kind``: the keyword arguments of the module."""
        return self.model_dump(exclude={"kind"})


class TinyTransformerConfig(QueryOutputConfig):
    """An encoder-decoder transformer whose decoder reads trained queries, one per position of the condition.

    The defaults are the numbers of GILL's mapper (arXiv 2305.17216, `gill/layers.py`), which NExT-GPT (arXiv 2309.05519)
    uses as well: 4 + 4 layers of width 512, 4 heads.
    """

    kind: Literal["tiny_transformer"] = "tiny_transformer"

    def build(
        self, context: BuildContext, *, input_dim: int, num_signals: int, condition_shape: Mapping[str, Shape]
    ) -> OutputProjector:
        from mmllm.projectors.output_module import TinyTransformer

        return TinyTransformer(input_dim, condition_shape, **self.numbers()).to(context.dtype)


class QFormerOutputConfig(QueryOutputConfig):
    """BLIP-2's Q-Former (arXiv 2301.12597) with one trained query per position of the condition."""

    kind: Literal["qformer"] = "qformer"
    num_heads: PositiveInt = 8
    cross_attention_every: PositiveInt = 1

    def build(
        self, context: BuildContext, *, input_dim: int, num_signals: int, condition_shape: Mapping[str, Shape]
    ) -> OutputProjector:
        from mmllm.projectors.output_module import QFormerOutput

        return QFormerOutput(input_dim, condition_shape, **self.numbers()).to(context.dtype)
