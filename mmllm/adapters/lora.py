"""Low-rank adapters through peft."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt

from mmllm.config.families import AdapterConfig

if TYPE_CHECKING:
    from mmllm.adapters.base import Adapter


class LoraConfig(AdapterConfig):
    """LoRA (arXiv 2106.09685): ``W + alpha / rank * B A``, B starting at zero.

    ``targets`` is ``all-linear`` (every linear layer but the head), a list of module names, or a regular expression that their
    whole qualified names match, as peft takes them.
    """

    kind: Literal["lora"] = "lora"
    rank: PositiveInt = 16
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: str | list[str] = "all-linear"

    def tiny(self) -> Self:
        return self.model_copy(update={"rank": 2})

    def attach(self, model: Any) -> Adapter:
        import peft

        from mmllm.adapters.wrapped import Wrapped, linear_layers

        settings = peft.LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=linear_layers(model) if self.targets == "all-linear" else self.targets,
            bias="none",
        )
        return Wrapped(model, settings)
