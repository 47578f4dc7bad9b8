"""Learned scales of activations, through peft."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import model_validator

from mmllm.config.families import AdapterConfig

if TYPE_CHECKING:
    from mmllm.adapters.base import Adapter


class IA3Config(AdapterConfig):
    """(IA)^3 (arXiv 2205.05638): a learned vector, starting at ones, times the outputs of ``targets``, or times the inputs of
    those among them that are named in ``feedforward``.

    The paper's choice are keys and values, and the input of the MLP's second layer. peft knows the names of these layers for
    the usual families; for others, and for encoders, give both lists.
    """

    kind: Literal["ia3"] = "ia3"
    targets: list[str] | None = None
    feedforward: list[str] | None = None

    @model_validator(mode="after")
    def _among_the_targets(self) -> Self:
        if strangers := set(self.feedforward or ()) - set(self.targets or ()):
            raise ValueError(
                f"`feedforward` names {', '.join(sorted(strangers))}, which `targets` does not; name them in both"
            )
        return self

    def tiny(self) -> Self:
        return self

    def attach(self, model: Any) -> Adapter:
        import peft

        from mmllm.adapters.wrapped import Wrapped

        feedforward = self.feedforward if self.targets is None else self.feedforward or []
        return Wrapped(model, peft.IA3Config(target_modules=self.targets, feedforward_modules=feedforward))
