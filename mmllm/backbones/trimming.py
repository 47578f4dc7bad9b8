"""The last layer of a decoder, computed only where somebody looks at what it gives.

Behind the last layer nothing but the head reads hidden states, and that at supervised positions only. Of the others the
layer's keys and values are needed, no output projection and no MLP: of a layer of a Llama, three quarters of the work.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

ASKED = "mmllm_asked"
"""The keyword by which a decoder hands its layers the flat positions, int64 ``(K,)``, that are asked for."""
PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}


def last_layer(model: nn.Module) -> nn.Module | None:
    """The last of a decoder's layers, where each has two norms, attention with ``o_proj`` and a MLP and no other parts."""

    def usual(layer: nn.Module) -> bool:
        return {name for name, _ in layer.named_children()} == PARTS and hasattr(layer.self_attn, "o_proj")

    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    return next((layers[-1] for layers in lists if all(map(usual, layers))), None)


def trim(layer: nn.Module) -> None:
    """Let ``layer``, a ``last_layer``, give ``(1, K, D)`` where it is handed K asked positions, else all.

    Right where the layer adds up its parts in the usual way, which has to be tried out.
    """
    parts: dict[str, Any] = dict(layer.named_children())
    whole, asked = layer.forward, list[Tensor]()

    def select(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return (at(args[0], asked[-1]), *args[1:]) if asked else None

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        wanted = kwargs.pop(ASKED, None)
        if wanted is None:
            return whole(hidden_states, *args, **kwargs)
        asked.append(wanted)
        try:
            found = parts["self_attn"](parts["input_layernorm"](hidden_states), *args, **kwargs)[0]
        finally:
            asked.clear()
        here = at(hidden_states, wanted) + found
        return here + parts["mlp"](parts["post_attention_layernorm"](here))

    parts["self_attn"].o_proj.register_forward_pre_hook(select)
    layer.forward = forward


def at(states: Tensor, positions: Tensor) -> Tensor:
    """``(1, K, D)``: what ``states (B, T, D)`` hold at the flat ``positions (K,)``."""
    return states.flatten(0, 1)[positions][None]
