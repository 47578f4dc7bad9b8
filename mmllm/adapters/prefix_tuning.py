"""Learned keys and values in front of every layer's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import PositiveInt

from mmllm.config.families import AdapterConfig

if TYPE_CHECKING:
    from mmllm.adapters.base import Adapter


class PrefixTuningConfig(AdapterConfig):
    """Prefix tuning (arXiv 2101.00190): every attention layer of the backbone sees ``num_virtual_tokens`` learned keys and
    values before those of the sequence, which begins behind them.

    ``projection_dim``: train smaller vectors and an MLP of this width that makes keys and values of them, as the paper does
    for stability; without it keys and values are trained themselves. An encoder has no cache, so this is for backbones.
    """

    kind: Literal["prefix_tuning"] = "prefix_tuning"
    num_virtual_tokens: PositiveInt = 20
    projection_dim: PositiveInt | None = None
    checkpointing: ClassVar[bool] = False  # transformers takes the cache away from checkpointed layers

    @property
    def positions(self) -> int:
        return self.num_virtual_tokens

    def tiny(self) -> Self:
        return self.model_copy(
            update={"num_virtual_tokens": 3, "projection_dim": None if self.projection_dim is None else 8}
        )

    def attach(self, model: Any) -> Adapter:
        from mmllm.adapters.prefix_tuning_module import Prefix

        return Prefix(model, self)
