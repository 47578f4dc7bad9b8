"""Small layers of one's own beside or behind attention and MLP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt

from mmllm.config.families import AdapterConfig

if TYPE_CHECKING:
    from mmllm.adapters.base import Adapter


class BottleneckConfig(AdapterConfig):
    """Bottleneck adapters: ``f(x) = scale * up(activation(down(x)))``, to ``dim`` values and back, with ``up`` starting at zero.

    ``placement``: ``sequential`` adds ``f`` of what attention or MLP returns, before the residual connection (Houlsby et
    al., arXiv 1902.00751); ``parallel`` adds ``f`` of what it reads (He et al., arXiv 2110.04366, who recommend it for the
    MLP alone, with ``scale: 4``). ``targets`` is ``all``, or the names in a block of what is adapted (``[mlp]``); a MLP that is
    written into the block (OPT) goes by the name of its last layer (``fc2``).
    """

    kind: Literal["adapter"] = "adapter"
    dim: PositiveInt = 64
    placement: Literal["sequential", "parallel"] = "sequential"
    activation: Literal["relu", "gelu", "silu"] = "relu"
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Literal["all"] | list[str] = "all"

    def tiny(self) -> Self:
        return self.model_copy(update={"dim": 2})

    def attach(self, model: Any) -> Adapter:
        from mmllm.adapters.bottleneck_module import Bottlenecks

        return Bottlenecks(model, self)
