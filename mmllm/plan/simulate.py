"""A training step without memory: the model's own code runs on fake tensors, and every storage it makes is written down.

No formula of any architecture is used: torch's shape rules run the real forward and backward passes, with autocast, gradient
checkpointing, frozen parts and all, so what is counted is what a run allocates. A step of a 7B model takes seconds.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mmllm.config.families import Shape
from mmllm.generators.base import Condition
from mmllm.model import MultimodalLM
from mmllm.outputs import Output
from mmllm.processing.batch import Batch

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
LOSSES, BACKWARD, GRADIENTS, BATCH = "losses", "backward", "gradients", "batch"
# Families whose code in transformers goes along the sequence token by token. Beside that they mix only neighbours, so rows of
# `SHORT` tokens, as many more of them, take the same memory and operations, and minutes less to rehearse.
STEPWISE, SHORT = ("mamba", "falcon_mamba"), 64


@dataclass(frozen=True)
class Footprint:
    """What one forward and backward pass needs beside weights and optimizer.

    ``peak`` is the most bytes alive at once and ``at_peak`` whose they are: a part's name for what its forward pass keeps,
    ``losses`` for splicing and losses, ``backward`` for what the backward pass computes with, ``gradients``, and ``batch``.
    ``flops`` counts matrix products, convolutions and attention, 2 for a multiplication with addition, recomputation included;
    ``forward`` is the forward pass' share of it by part.
    """

    peak: int
    at_peak: dict[str, int]
    flops: int
    forward: dict[str, int] = field(default_factory=dict)


def is_unknowable(error: Exception) -> bool:
    """Whether torch refused what cannot be known without values, or has no shape rule for an operation."""
    # For a tensor that is to become a numpy array torch has no class of its own, but these words.
    return isinstance(error, UNKNOWABLE) or "is not supported for tensor subclasses" in str(error)


UNKNOWABLE = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)


INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default}


def _places(indices: list[Tensor | None]) -> list[Tensor | None]:
    """``indices`` with the places where they hold for real truth values: within fake ones they could not be counted."""
    found: list[Tensor | None] = []
    for index in indices:
        if isinstance(index, Tensor) and index.dtype == torch.bool and not isinstance(index, FakeTensor):
            with unset_fake_temporarily():
                found += index.nonzero().unbind(1)
        else:
            found.append(index)
    return found


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the bytes of all storages alive, by the label under which they were made, and counts operations.

    Whole numbers and truth values stay real tensors, so that code may look at masks and positions; only what is computed
    from weights is fake.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.labels = [LOSSES]
        self.alive: Counter[str] = Counter()
        self.at_peak: dict[str, int] = {}
        self.now = self.peak = 0
        self.flops: Counter[str] = Counter()
        self._storages: dict[int, tuple[Any, int, str]] = {}

    def take(self, tensor: Tensor, label: str | None = None) -> None:
        """Count the storage of ``tensor``, if it is not counted yet, under ``label`` or the present one."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size, label = storage.nbytes(), label or self.labels[-1]
        self._storages[key] = (weakref.ref(storage, lambda _: self._gone(key)), size, label)
        self.alive[label] += size
        self.now += size
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, dict(self.alive)

    def relabel(self, tensor: Tensor, label: str) -> None:
        """The storage of ``tensor`` has become something else."""
        key = tensor.untyped_storage()._cdata
        reference, size, before = self._storages[key]
        self._storages[key] = (reference, size, label)
        self.alive[before] -= size
        self.alive[label] += size

    def resized(self, storage: torch.UntypedStorage) -> None:
        """``storage`` was made larger or smaller."""
        if storage._cdata not in self._storages:
            return
        reference, size, label = self._storages[storage._cdata]
        self._storages[storage._cdata] = (reference, storage.nbytes(), label)
        self.alive[label] += storage.nbytes() - size
        self.now += storage.nbytes() - size
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, dict(self.alive)

    def forget(self) -> None:
        """What is alive now counts no longer, and the peak begins anew."""
        self._storages = {key: (reference, 0, label) for key, (reference, _, label) in self._storages.items()}
        self.alive.clear()
        self.now = self.peak = 0
        self.at_peak = {}

    def _gone(self, key: int) -> None:
        _, size, label = self._storages.pop(key)
        self.alive[label] -= size
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # more than half of all calls, each slow on the usual way
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not any(isinstance(t, FakeTensor) or t.is_floating_point() for t in tensors):
            with unset_fake_temporarily():
                real = func(*args, **kwargs)
            if not any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in tree_leaves(real)):
                return real
        if func in INDEXING:
            args = (args[0], _places(args[1]), *args[2:])
        out = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops[self.labels[-1]] += formula(*args, **kwargs, out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, FakeTensor):
                self.take(leaf)
        return out


class Rehearsal:
    """A model that was built on the meta device, made ready to run on fake tensors. It changes ``model``, which serves for
    nothing else afterwards. ``conditions`` are the shapes of its generators' conditions, by output.
    """

    def __init__(self, model: MultimodalLM, conditions: Mapping[str, Mapping[str, Shape]]) -> None:
        self.model = model
        self.stepwise = cast(Any, model.backbone.model).config.model_type in STEPWISE
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        _make_fake(model, self.mode)
        for name, output in model.outputs.items():
            if isinstance(output, Output):
                # A run keeps text conditions on disk; what is in memory of them are the conditions themselves.
                output.text_conditions = cast(Any, _Conditions(conditions[name]))

    def step(
        self,
        batch: Batch,
        objectives: Mapping[str, float],
        precision: Literal["fp32", "bf16", "fp16"],
        *,
        accumulating: bool,
    ) -> Footprint:
        """One forward and backward pass over ``batch``, whose floating-point tensors may be on the meta device.

        ``accumulating``: gradients of earlier micro-batches are there already. Parameters must require gradients as in
        the stage (``mmllm.training.stages.freeze``).
        """
        ledger = Ledger()
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            ledger.take(tensor)
        ledger.forget()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        with self.mode, ledger, _labelled(self.model, ledger), self._folded():
            batch = fake_batch(batch)
            for tensor in _tensors(batch):
                ledger.take(tensor, BATCH)
            if accumulating:
                for parameter in trained:
                    parameter.grad = torch.empty_like(parameter)
                    ledger.relabel(parameter.grad, GRADIENTS)
            hooks = [p.register_post_accumulate_grad_hook(_gradient(ledger)) for p in trained]  # type: ignore[no-untyped-call]
            half = HALF.get(precision)
            with torch.autocast("cpu", dtype=half, enabled=half is not None):
                losses = self.model(batch, objectives)
            total = sum(loss * objectives[name] for name, loss in losses.items())
            forward = {name: count for name, count in ledger.flops.items() if count}
            ledger.labels = [BACKWARD]
            if isinstance(total, Tensor) and total.requires_grad:
                total.backward()  # type: ignore[no-untyped-call]
            footprint = Footprint(ledger.peak, dict(ledger.at_peak), sum(ledger.flops.values()), forward)
            for hook in hooks:
                hook.remove()
            for parameter in trained:
                parameter.grad = None
        return footprint

    def cast(self, dtype: torch.dtype) -> None:
        """Give all parameters that hold fractions another dtype, as a trained model is loaded. Buffers as well, but for the
        language model's, which transformers leaves as they are.
        """
        with self.mode:
            for parameter in self.model.parameters():
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(dtype)
            for module in chain(self.model.inputs.modules(), self.model.outputs.modules()):
                for name, buffer in module._buffers.items():
                    if buffer is not None and buffer.is_floating_point():
                        module._buffers[name] = buffer.to(dtype)

    def prefill(self, batch: Batch, dtype: torch.dtype) -> tuple[int, int]:
        """The bytes of the cache that stays behind when ``batch`` has been read, and the peak while it is read, weights
        left out. ``dtype`` is that of media and weights.
        """
        ledger = Ledger()
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            ledger.take(tensor)
        ledger.forget()
        self.model.eval()
        with self.mode, ledger, _labelled(self.model, ledger), self._folded() as fold, torch.no_grad():
            batch = fake_batch(batch, dtype)
            last, length = batch.predict[-1:], batch.ids.shape[1]
            cache = self.model.backbone.new_cache()
            embeddings = self.model.splice(batch.ids, batch.media)
            out = self.model.backbone(embeddings, batch.attention_mask, positions=last, cache=cache)
            peak = ledger.peak
            del out, embeddings, batch
            kept = ledger.now
        own = kept // fold(length)  # every row has a state of its own
        return own, peak - kept + own

    @contextmanager
    def _folded(self) -> Iterator[Callable[[int], int]]:
        """While this lasts, a family of ``STEPWISE`` gets every row as several short ones; flat positions mean the same in
        both. Gives the number of them that a row of so many tokens becomes.
        """

        def fold(length: int) -> int:
            shortest = min(SHORT, length) if self.stepwise else length
            return next(length // short for short in range(shortest, length + 1) if length % short == 0)

        def shorten(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(t.reshape(-1, t.shape[1] // fold(t.shape[1]), *t.shape[2:]) for t in args)

        hook = self.model.backbone.register_forward_pre_hook(shorten)
        try:
            yield fold
        finally:
            hook.remove()


class _Conditions:
    """Conditions of the shape that a generator takes, in place of those that its text encoder would compute."""

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        self.shapes = shapes

    def __call__(self, captions: list[str]) -> Condition:
        return Condition({name: torch.zeros(len(captions), *shape) for name, shape in self.shapes.items()})


def _make_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Put fake tensors in place of all parameters and of the buffers that hold fractions or have no values."""
    made: dict[int, nn.Parameter] = {}  # a tied weight stays one
    with mode:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    if id(parameter) not in made:
                        made[id(parameter)] = nn.Parameter(_fake(parameter), requires_grad=parameter.requires_grad)
                    module._parameters[name] = made[id(parameter)]
            for name, buffer in module._buffers.items():
                if buffer is not None and (buffer.is_meta or buffer.is_floating_point()):
                    module._buffers[name] = _fake(buffer)


def _fake(tensor: Tensor) -> Tensor:
    """A fake tensor on the CPU like ``tensor``; to be called in a fake mode."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


def fake_batch(batch: Batch, dtype: torch.dtype = torch.float32) -> Batch:
    """``batch`` with fake tensors of fractions; to be called in a fake mode."""

    def fake(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: _fake(t).to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}

    copy = replace(batch, media={name: replace(media) for name, media in batch.media.items()})
    copy.made = {name: replace(made) for name, made in batch.made.items()}
    for media in copy.media.values():
        media.inputs = fake(media.inputs)
    for made in copy.made.values():
        made.seen = None if made.seen is None else fake(made.seen)
        made.targets = None if made.targets is None else _fake(made.targets)
    return copy


def _tensors(batch: Batch) -> list[Tensor]:
    found = [t for media in batch.media.values() for t in media.inputs.values()]
    for made in batch.made.values():
        found += [*(made.seen or {}).values(), *([] if made.targets is None else [made.targets])]
    return [t for t in found if isinstance(t, FakeTensor)]


def _gradient(ledger: Ledger) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        if parameter.grad is not None:
            ledger.relabel(parameter.grad, GRADIENTS)

    return hook


@contextmanager
def _labelled(model: MultimodalLM, ledger: Ledger) -> Iterator[None]:
    """While this lasts, what a part's forward pass makes is the part's."""
    parts: dict[str, nn.Module] = {"backbone": model.backbone}
    for side, modules in (("inputs", model.inputs), ("outputs", model.outputs)):
        for name, module in modules.items():
            parts |= {f"{side}.{name}.{child}": part for child, part in module.named_children()}

    def enter(name: str) -> Callable[..., None]:
        # What is computed again in the backward pass stays its.
        return lambda *_: ledger.labels.append(BACKWARD if ledger.labels[-1] == BACKWARD else name)

    def leave(*_: Any) -> None:
        ledger.labels.pop()

    hooks = []
    # Some objectives call a projector's layers without its forward, and fused layers run inside the backbone's.
    for name, module in [(name, module) for name, part in parts.items() for module in part.modules()]:
        hooks.append(module.register_forward_pre_hook(enter(name)))
        hooks.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
