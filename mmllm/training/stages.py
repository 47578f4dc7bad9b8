"""What a stage trains: patterns to parts, freezing, and the proofs that both came true."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn

from mmllm.config.contradictions import matching, pattern_problems, rate
from mmllm.config.pieces import select, split
from mmllm.config.run import StageConfig
from mmllm.data.mixture import StageData
from mmllm.errors import ConfigError, DataError, TrainingError
from mmllm.model import Input, MultimodalLM
from mmllm.training.sharding import local

if TYPE_CHECKING:
    from mmllm.adapters.base import Adapter

# Optimizer steps after which a declared part that has seen its modality must have had a gradient other than zero. One
# step is too few: LoRA's A matrix has a zero gradient until B has left zero.
GRADIENT_DEADLINE = 10
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TrainedPart:
    """One part that a stage trains: its parameters by qualified name, and its peak learning rate."""

    name: str
    parameters: dict[str, nn.Parameter]
    lr: float


def resolve(stage: StageConfig, parts: Mapping[str, dict[str, nn.Parameter]]) -> list[TrainedPart]:
    """The parts that ``stage.train`` names, in model order, with their rates.

    Patterns are shell-style over part names (``inputs.*.projector``); ``backbone`` alone means the backbone's own
    weights, ``backbone.layers.20-31`` those of twelve of its layers, which are a part of their own here
    (``mmllm.config.pieces``). Generators stay
    frozen: no pattern means them. Raises ``ConfigError`` for every pattern of ``train`` or ``part_lr`` that matches nothing.
    """
    problems = pattern_problems(f"stages.{stage.name}", stage.train, stage.part_lr, parts)
    if problems:
        raise ConfigError(problems)
    return [TrainedPart(name, select(parts, name), rate(stage, name)) for name in matching(stage.train, parts)]


def set_dtypes(model: MultimodalLM, trained: Iterable[str], precision: Literal["fp32", "bf16", "fp16"]) -> None:
    """Give every parameter the dtype it keeps for the whole run.

    What any stage trains (``trained``, parts or pieces) are float32 masters. All other matrices are cast to the half type
    once: autocast casts a float32 weight that needs no gradient again in every forward pass. Vectors (norms, biases)
    stay float32, which normalisation layers need. Models of codes stay float32 altogether.
    """
    parts = model.parts()
    kept = {id(p) for name in (*trained, *model.exact_parts()) for p in select(parts, name).values()}
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        half = precision != "fp32" and id(parameter) not in kept and parameter.ndim >= 2
        parameter.data = parameter.data.to(HALF[precision] if half else torch.float32)


def freeze(model: MultimodalLM, trained: Iterable[TrainedPart], *, gradient_checkpointing: bool) -> None:
    """Let exactly the trained parts require gradients, and set the train/eval mode of every part.

    Frozen encoders run in eval mode: their dropout is off and batch statistics do not move. Those of batch norm never
    move, also in trained encoders (ResNets): batches here are small and differ between processes. A frozen backbone's
    dropout is off as well, and that of the frozen layers of a part that trains in others; only the modules that do the
    checkpointing stay in train mode, where alone it works, and with them the dropout that a few families (OPT) compute there.
    """
    learning = {id(p) for part in trained for p in part.parameters.values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in learning)
    model.train()
    for one in model.inputs.values():
        encoder = cast(Input, one).encoder
        _set_modes(encoder, cast(Input, one).adapter, learning)
        _set_modes(cast(Input, one).projector, None, learning)
        for module in encoder.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()
    _set_modes(model.backbone.model, model.backbone.adapter, learning)
    if gradient_checkpointing:
        for module in model.backbone.model.modules():
            module.training |= hasattr(module, "gradient_checkpointing")
        # Non-reentrant: works when the embeddings that enter need no gradient (LoRA alone), and under DDP.
        model.backbone.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]


def _set_modes(root: nn.Module, adapter: Adapter | None, learning: Collection[int]) -> None:
    """Train mode for the modules of ``root`` whose own parameters all learn (``learning`` are ids) and for a learning
    adapter's, eval mode for all others.
    """
    added = {id(p): id(p) in learning for name, p in root.named_parameters() if adapter and adapter.owns(name)}
    root.eval()
    for name, module in root.named_modules():
        own = [id(p) in learning for p in module.parameters() if id(p) not in added]
        if own and all(own):
            module.train()
        elif adapter and adapter.owns(name):
            module.training |= any(added.values())


def part_rows(model: MultimodalLM, trained: Iterable[TrainedPart]) -> list[list[str]]:
    """A row per part: name, number of parameters, trained or frozen, rate; rows of their own for layers of a part that are
    trained. The first row is the heading.
    """
    rates = {part.name: part.lr for part in trained}
    rows = [["part", "parameters", "", "learning rate"]]
    parts = model.parts()
    for name in parts:
        layers = [piece for piece in rates if split(piece)[0] == name and piece != name]
        sizes = {piece: sum(p.numel() for p in select(parts, piece).values()) for piece in (name, *layers)}
        sizes[name] -= sum(sizes[piece] for piece in layers)
        for piece, count in sizes.items():
            state = ("trained", f"{rates[piece]:.3g}") if piece in rates else ("frozen", "")
            rows.append([piece, f"{count:,}", *state])
    return rows


class FrozenSnapshot:
    """Hashes of everything that a stage must not change: frozen parameters and persistent buffers of frozen modules."""

    def __init__(self, model: MultimodalLM) -> None:
        self._hashes = {name: _hash(tensor) for name, tensor in _frozen(model).items()}

    def check(self, model: MultimodalLM) -> None:
        """Raise ``TrainingError`` naming every frozen tensor whose bits have changed."""
        now = {name: _hash(tensor) for name, tensor in _frozen(model).items()}
        changed = sorted(name for name in self._hashes.keys() | now.keys() if self._hashes.get(name) != now.get(name))
        if changed:
            raise TrainingError(
                f"frozen tensors changed during the stage: {_some(changed)}; nothing was saved as final"
            )


def _frozen(model: MultimodalLM) -> dict[str, Tensor]:
    # By address, since a tied weight has two names in the state dict but only one among the parameters.
    moving = {local(p).data_ptr() for p in model.parameters() if p.requires_grad}
    moving |= {b.data_ptr() for m in model.modules() if m.training for b in m.buffers(recurse=False)}
    tensors = {name: local(tensor) for name, tensor in model.state_dict().items()}
    return {name: tensor for name, tensor in tensors.items() if tensor.data_ptr() not in moving}


def _hash(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy()).hexdigest()  # type: ignore[arg-type]  # arrays are buffers


class GradientWatch:
    """Asserts in the first steps that every declared part learns.

    A parameter without any gradient (None) is cut off from the loss: an error at once. A part whose gradients are all
    exactly zero in the first ``GRADIENT_DEADLINE`` steps that hold its modality is an error as well; single parameters
    that stay at zero are returned for a warning.
    """

    def __init__(self, parts: Iterable[TrainedPart]) -> None:
        self._silent = {part.name: dict(part.parameters) for part in parts}
        self._sizes = {name: len(parameters) for name, parameters in self._silent.items()}
        self._seen = dict.fromkeys(self._silent, 0)

    def __call__(self, modalities: Iterable[str]) -> list[str]:
        """Look at the gradients of one step whose batches held ``modalities`` (``inputs.image``). Returns names that
        stayed at zero.
        """
        present = set(modalities)
        warnings: list[str] = []
        for part in list(self._silent):
            parameters = self._silent[part]
            missing = [name for name, p in parameters.items() if p.grad is None]
            if missing:
                raise TrainingError(
                    f"part {part!r} is declared trainable, but the loss does not depend on {_some(missing)}; "
                    "remove the part from `train`, or the unused layers from the model"
                )
            self._silent[part] = {n: p for n, p in parameters.items() if not bool(p.grad.any())}  # type: ignore[union-attr]
            self._seen[part] += part.startswith("backbone") or ".".join(part.split(".")[:2]) in present
            if self._silent[part] and self._seen[part] < GRADIENT_DEADLINE:
                continue
            silent = list(self._silent.pop(part))
            if len(silent) == self._sizes[part]:
                raise TrainingError(
                    f"part {part!r} is declared trainable, but had only zero gradients in {GRADIENT_DEADLINE} steps; "
                    "check that something it produces reaches the loss"
                )
            warnings += silent
        return warnings


def check_finite(parts: Iterable[TrainedPart]) -> None:
    """Raise ``TrainingError`` naming trained tensors that hold NaN or infinity: such weights must not replace good ones."""
    bad = [name for part in parts for name, p in part.parameters.items() if not bool(p.detach().isfinite().all())]
    if bad:
        raise TrainingError(
            f"trained tensors are no longer finite: {_some(bad)}; nothing was saved. Checkpoints written before are "
            "untouched; lower the rate, or look at the samples of the steps before"
        )


def check_modalities(stage: StageConfig, trained: Iterable[TrainedPart], data: StageData) -> None:
    """Raise ``TrainingError`` when the stage trains a part of a modality that its data never holds.

    Reads rows (not media) in training order until every needed modality has been met, usually a few.
    """
    sides = {"inputs": "user", "outputs": "assistant"}
    owners = {}
    for part in trained:
        side, *rest = part.name.split(".")
        if side in sides and rest[1] != "prompt":  # which learns from text alone
            owners[sides[side], rest[0]] = part.name
    missing = set(owners)
    for index in chain(data.order(0), range(len(data))):
        if not missing:
            return
        try:
            missing -= {(message.role, part.type) for message in data[int(index)].messages for part in message.parts}
        except DataError:
            continue
    if missing:
        parts = ", ".join(owners[name] for name in sorted(missing))
        raise TrainingError(
            f"stage {stage.name!r} trains {parts}, but its data hold no "
            f"{' and no '.join(f'{name} from the {role}' for role, name in sorted(missing))}; "
            "add such data, or leave these parts out of `train`"
        )


def _some(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
