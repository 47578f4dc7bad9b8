"""Memory of a stage on one of the devices: weights, gradients, optimizer states, activations, by part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmllm.config.pieces import layers_of
from mmllm.plan.setting import Setting

if TYPE_CHECKING:
    from torch import nn

    from mmllm.plan.simulate import Footprint

MOMENTS = 2  # AdamW keeps two of each trained parameter, in the parameter's dtype


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the worst moment of a step.

    ``weights``, ``gradients`` and ``optimizer`` are by part; ``activations`` too, with what belongs to no part under ``losses``,
    ``backward`` (what the backward pass computes with) and ``batch``. ``exchange`` is what several devices need beside: buckets of
    gradients, or the layers gathered from the others. ``peak`` is all of it at that moment, which is ``when``; gradients that
    are not there yet at that moment do not count. The driver and its libraries come on top.
    """

    weights: dict[str, int]
    gradients: dict[str, int]
    optimizer: dict[str, int]
    activations: dict[str, int]
    exchange: int
    peak: int
    when: str


@dataclass(frozen=True)
class Sizes:
    """Bytes of a part's parameters: all of them, those that a stage trains, its largest layer, and what is in no layer."""

    weights: int
    trained: int
    layer: int
    rest: int
    largest: int  # of the single tensors that are trained


def sizes(parts: Mapping[str, Mapping[str, nn.Parameter]]) -> dict[str, Sizes]:
    """The sizes of all parts as they are now, ``requires_grad`` and dtypes included."""
    found = {}
    for name, parameters in parts.items():
        size = {key: p.numel() * p.element_size() for key, p in parameters.items()}
        layers: dict[int, int] = {}
        for key, layer in layers_of(parameters).items():
            layers[layer] = layers.get(layer, 0) + size[key]
        trained = [size[key] for key, p in parameters.items() if p.requires_grad]
        total, inside = sum(size.values()), sum(layers.values())
        found[name] = Sizes(
            total, sum(trained), max(layers.values(), default=0), total - inside, max(trained, default=0)
        )
    return found


def stage_memory(parts: Mapping[str, Sizes], footprint: Footprint, setting: Setting) -> Memory:
    """``parts`` are the sizes on one device without sharding, ``footprint`` what a micro-batch needs beside."""
    devices, sharding = setting.devices, setting.sharding
    whole = sharding in ("zero-3", "fsdp")  # weights are shared out as well
    split = whole or sharding == "zero-2"
    share = devices if split else 1
    weights = {name: _part(one.weights, devices if whole else 1) for name, one in parts.items()}
    gradients = {name: _part(one.trained, share) for name, one in parts.items() if one.trained}
    optimizer = {name: _part(MOMENTS * one.trained, share) for name, one in parts.items() if one.trained}
    trained = sum(one.trained for one in parts.values())
    exchange = 0
    if sharding == "ddp" and devices > 1:
        exchange = trained  # DDP's buckets are a second copy of the gradients
    elif whole and devices > 1:
        # What is in no layer stays gathered for the whole pass; of the layers the present one and the next.
        exchange = sum(one.rest for one in parts.values()) + 2 * max(one.layer for one in parts.values())
    kept = sum(weights.values()) + sum(optimizer.values())
    there = footprint.at_peak.get("gradients", 0)
    activations = {name: size for name, size in footprint.at_peak.items() if size and name != "gradients"}
    passing = kept + exchange + sum(activations.values()) + _part(there, share)
    # The update makes the denominators: on a GPU those of all tensors at once, on a CPU those of one, and their quotient.
    largest = max(one.largest for one in parts.values())
    update = _part(trained, share) if setting.machine.kind == "cuda" else 2 * largest
    buckets = exchange if sharding == "ddp" else 0
    updating = kept + sum(gradients.values()) + buckets + update
    if updating > passing:
        return Memory(weights, gradients, optimizer, {"update": update}, buckets, updating, "update")
    return Memory(weights, gradients, optimizer, activations, exchange, passing, "backward pass")


def _part(size: int, devices: int) -> int:
    return -(-size // devices)
