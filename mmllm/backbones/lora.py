"""Low-rank adapters through peft."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt

from mmllm.config.families import AdapterConfig
from mmllm.errors import ConfigError, brief

if TYPE_CHECKING:
    from torch import nn


class LoraConfig(AdapterConfig):
    """LoRA (arXiv 2106.09685): ``W + alpha / rank * B A``, B starting at zero.

    ``targets`` is ``all-linear`` (every linear layer but the head) or a list of module names as peft takes them.
    """

    kind: Literal["lora"] = "lora"
    rank: PositiveInt = 16
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Literal["all-linear"] | list[str] = "all-linear"

    def tiny(self) -> Self:
        return self.model_copy(update={"rank": 2})

    def apply(self, model: Any) -> nn.Module:
        import peft

        config = peft.LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.targets,
            task_type="CAUSAL_LM",
            bias="none",
        )
        with warnings.catch_warnings():
            # peft asks transformers for a property by its old name; nothing that a user could act on.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            try:
                wrapped: nn.Module = peft.get_peft_model(model, config)
            except ValueError as error:  # no such modules, or a family whose modules take no adapter
                raise ConfigError([("adapter.targets", f"peft refuses it: {brief(error)}")]) from error
        return wrapped
