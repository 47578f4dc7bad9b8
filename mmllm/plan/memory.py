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

LAYERED = ("backbone", "backbone.adapter")  # their layers are gathered one by one
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
    """Bytes of a part's parameters: all of them, those that a stage trains, its largest layer, and what is in no layer. Of what
    is trained: ``layer_trained`` in the layer that has most of it, ``rest_trained`` in no layer.
    """

    weights: int
    trained: int
    layer: int
    rest: int
    largest: int  # of the single tensors that are trained
    layer_trained: int = 0
    rest_trained: int = 0


@dataclass(frozen=True)
class Traffic:
    """Bytes that a device gets from the others (``gathered``: weights, or with DDP averaged gradients) and gives to them
    (``reduced``: gradients) in an optimizer step.
    """

    gathered: int
    reduced: int


def sizes(parts: Mapping[str, Mapping[str, nn.Parameter]]) -> dict[str, Sizes]:
    """The sizes of all parts as they are now, ``requires_grad`` and dtypes included."""
    found = {}
    for name, parameters in parts.items():
        size = {key: p.numel() * p.element_size() for key, p in parameters.items()}
        layers: dict[int, int] = {}
        for key, layer in layers_of(parameters).items():
            layers[layer] = layers.get(layer, 0) + size[key]
        learning = {key: size[key] if p.requires_grad else 0 for key, p in parameters.items()}
        learned: dict[int, int] = {}
        for key, layer in layers_of(parameters).items():
            learned[layer] = learned.get(layer, 0) + learning[key]
        total, inside = sum(size.values()), sum(layers.values())
        found[name] = Sizes(
            total,
            sum(learning.values()),
            max(layers.values(), default=0),
            total - inside,
            max(learning.values(), default=0),
            max(learned.values(), default=0),
            sum(learning.values()) - sum(learned.values()),
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
        # Of the backbone's layers the present one and the next, and gradients whole with a copy to be given away; all else
        # stays gathered for the whole pass.
        layered = [one for name, one in parts.items() if name in LAYERED]
        exchange = gathered_once(parts) + 2 * sum(one.layer + one.layer_trained for one in layered)
    kept = sum(weights.values()) + sum(optimizer.values())
    there = footprint.at_peak.get("gradients", 0)
    activations = {name: size for name, size in footprint.at_peak.items() if size and name != "gradients"}
    passing = kept + exchange + sum(activations.values()) + _part(there, share)
    # The update makes the denominators: on a GPU those of all tensors at once, on a CPU those of one, and their quotient.
    largest = max(one.largest for one in parts.values())
    update = _part(trained, share) if setting.machine.kind == "cuda" else 2 * largest
    buckets = exchange if sharding == "ddp" else 0
    if whole and devices > 1:
        # At the end those of what is in no layer are.
        copies = 2 * sum(one.rest_trained if name in LAYERED else one.trained for name, one in parts.items())
        ending = kept + gathered_once(parts) + sum(gradients.values()) + copies
        if ending > passing:
            here = gathered_once(parts) + copies
            return Memory(weights, gradients, optimizer, {}, here, ending, "exchange of gradients")
    updating = kept + sum(gradients.values()) + buckets + update
    if updating > passing:
        return Memory(weights, gradients, optimizer, {"update": update}, buckets, updating, "update")
    return Memory(weights, gradients, optimizer, activations, exchange, passing, "backward pass")


def gathered_once(parts: Mapping[str, Sizes]) -> int:
    """Bytes of the weights that a sharded step gathers together, at its beginning: all but the backbone's layers."""
    return sum(one.rest if name in LAYERED else one.weights for name, one in parts.items())


def step_traffic(parts: Mapping[str, Sizes], setting: Setting, rounds: int) -> Traffic:
    """What an optimizer step of ``rounds`` micro-batches on each device makes travel."""
    devices, sharding = setting.devices, setting.sharding
    if devices == 1:
        return Traffic(0, 0)
    others = (devices - 1) / devices
    weights, trained = sum(one.weights for one in parts.values()), sum(one.trained for one in parts.values())
    once = gathered_once(parts)
    match sharding:
        case (
            "zero-3" | "fsdp"
        ):  # layers again for the backward pass; gradients at once, so that none has to hold them all
            return Traffic(round(rounds * (once + 2 * (weights - once)) * others), round(rounds * trained * others))
        case "zero-2":
            return Traffic(round(trained * others), round(rounds * trained * others))
        case _:  # an all-reduce is a reduce-scatter and an all-gather
            return Traffic(round(trained * others), round(trained * others))


def _part(size: int, devices: int) -> int:
    return -(-size // devices)
