"""FSDP2: weights, gradients and optimizer states shared out over the processes, frozen parts too.

Asked for as accelerate asks for it: by an `accelerate launch` configuration with ``fsdp_version: 2``, which sets
``ACCELERATE_USE_FSDP`` and ``FSDP_VERSION``. The sharding itself is torch's ``fully_shard`` (arXiv 2304.11277, in its
per-parameter form). Each of the backbone's blocks is a unit that is gathered when it runs, and freed behind it. All else
(encoders, projectors, tables, generators) is one unit, gathered for the whole of a step: whether an encoder runs on a process
depends on the media of its batch, and a gathering that only some processes take part in would wait for ever.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mmllm.adapters.blocks import find_blocks
from mmllm.config.pieces import select
from mmllm.errors import TrainingError
from mmllm.model import MultimodalLM
from mmllm.outputs import Output
from mmllm.processing.batch import Batch

if TYPE_CHECKING:
    from accelerate import Accelerator


def asked_for() -> bool:
    """Whether the launcher asks for FSDP2. Raises ``TrainingError`` when it asks for the first FSDP."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    # By default accelerate's launcher lets transformers load weights in the first process alone; here each of them loads.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise TrainingError(
            f"the launcher asks for FSDP version {version}; only version 2 can share frozen and trained parameters out "
            "together. Set `fsdp_version: 2`, as in training/launch/fsdp2.yaml"
        )
    return True


def tell(accelerator: Accelerator) -> None:
    """Let ``accelerator`` know that the processes shard: by itself it does so on accelerators only, torch on CPUs as well."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()  # reads what the launcher has set
        accelerator.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # from which every new state is copied


def shard(model: MultimodalLM, accelerator: Accelerator) -> None:
    """Share the parameters of ``model`` out, in place, and move them to the process's device.

    Precision is autocast's, as without sharding, and gathered is what the parameters are: what is frozen in half precision
    travels so.
    """
    for output in model.outputs.values():
        if isinstance(output, Output) and output.text_conditions is not None:
            output.text_conditions.pin()
    plugin = accelerator.state.fsdp_plugin
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    share_out(model, mesh, reshard=plugin.reshard_after_forward, offload_policy=plugin.cpu_offload)
    for parameter in model.parameters():
        if not isinstance(
            parameter, DTensor
        ):  # what is shared out is where it belongs: with offloading, in host memory
            parameter.data = parameter.data.to(accelerator.device)


def share_out(model: MultimodalLM, mesh: DeviceMesh, *, reshard: bool, **options: Any) -> None:
    """``fully_shard`` over ``mesh``, in place: every block of the backbone a unit, which is freed between its forward and
    backward pass if ``reshard``, and all else another. Parameters without a dimension stay whole; ``average_whole`` sees to
    their gradients.
    """
    options |= {"mesh": mesh, "ignored_params": {p for p in model.parameters() if p.ndim == 0}}
    for block in find_blocks(model.backbone.model):
        fully_shard(block.module, reshard_after_forward=reshard, **options)
    fully_shard(model, reshard_after_forward=False, **options)


def local(tensor: Tensor) -> Tensor:
    """What this process has of ``tensor``."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of ``tensor``. Every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """``value``, which every process has, on the device of ``parameter`` and shared out like it."""
    value = value.to(parameter.device)
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def accumulating(accelerator: Accelerator, model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """For a micro-batch's backward pass: gradients are exchanged in the ``last`` one of a step, unless they are shared out.
    Then in each: a whole set of gradients on every process is what sharding is there to avoid.
    """
    return nullcontext() if last or accelerator.is_fsdp2 else accelerator.no_sync(model)


def average_whole(accelerator: Accelerator, parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients of parameters that are not shared out over the processes of a sharded run."""
    if not accelerator.is_fsdp2:
        return
    for parameter in parameters:
        if not isinstance(parameter, DTensor) and parameter.grad is not None:
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= accelerator.num_processes


def in_step(accelerator: Accelerator, batches: Iterable[Batch | None]) -> Iterator[tuple[Batch, bool]]:
    """``batches`` without the missing ones (None), and that they count. Where weights are shared out every process gets as
    many: in place of missing ones, and behind its last one, batches that do not count.
    """
    if not accelerator.is_fsdp2:
        yield from ((batch, True) for batch in batches if batch is not None)
        return
    waiting = iter(batches)
    while True:
        try:
            batch, left = next(waiting), 1
        except StopIteration:
            batch, left = None, 0
        anywhere = torch.tensor(left, device=accelerator.device)
        torch.distributed.all_reduce(anywhere, torch.distributed.ReduceOp.MAX)
        if not anywhere:
            return
        yield (_nothing(), False) if batch is None else (batch, True)


def _nothing() -> Batch:
    """Two tokens, of which one predicts the other: just enough for every block to run."""
    ids, one = torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    return Batch(ids, torch.ones_like(ids), one, one, {}, replies=torch.tensor([[0, 1, 2]]))


@contextmanager
def at_hand(model: MultimodalLM) -> Iterator[None]:
    """While this lasts, the methods of ``model`` can be called, not its forward alone: by every process, with the same
    arguments. Afterwards everything is shared out again.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


@contextmanager
def gathered(
    model: MultimodalLM, parts: Iterable[str], optimizer: torch.optim.Optimizer | None = None, *, keep: bool
) -> Iterator[None]:
    """While this lasts, the named parts of a sharded ``model`` and the states of ``optimizer`` are whole tensors on the CPU
    where ``keep``, so that they can be written as those of any other run. Every process has to enter; nothing may be
    computed meanwhile.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    model.reshard()
    everything = model.parts()
    owners = _owners(model)
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    for parameter in chain.from_iterable(select(everything, part).values() for part in parts):
        found = whole(parameter.detach())
        if keep:
            kept = nn.Parameter(found.cpu(), requires_grad=parameter.requires_grad)
            for module, key in owners[id(parameter)]:
                replaced.append((module, key, parameter))
                module._parameters[key] = kept
    kept_states = {} if optimizer is None else optimizer.state
    shared_states = dict(kept_states)
    for tensor, state in shared_states.items():
        values = {key: whole(value) for key, value in state.items()}
        if keep:
            kept_states[tensor] = {key: value.cpu() for key, value in values.items()}
    try:
        yield
    finally:
        for module, key, parameter in replaced:
            module._parameters[key] = parameter
        kept_states.update(shared_states)


def _owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """The modules that hold each parameter, and under which name: several where it is tied."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((module, key))
    return found
