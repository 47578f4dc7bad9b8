"""Bottleneck adapters in the blocks of a model, by hooks on what its sublayers read and return."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmllm.adapters.base import SETTINGS, WEIGHTS, Adapter
from mmllm.adapters.blocks import Block, Sublayer, find_blocks, read_by
from mmllm.adapters.bottleneck import BottleneckConfig
from mmllm.config.base import suggest
from mmllm.errors import CheckpointError, ConfigError
from mmllm.pretrained import copy_tensors, read_json, read_tensors

NAME = "bottlenecks"  # of the adapters' place in a block


class Bottleneck(nn.Module):
    """``scale * up(activation(down(x)))`` for ``x (..., D)``; zero until ``up`` has learned something."""

    def __init__(self, width: int, config: BottleneckConfig) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, config.dim), nn.Linear(config.dim, width)
        self.dropout, self.scale = nn.Dropout(config.dropout), config.scale
        self.activation = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}[config.activation]()
        # Without a bias what comes in decides which units of a ReLU are at work: sublayers return small values at first.
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        """In the dtype of ``x``; computed in that of the weights."""
        inner = self.dropout(self.activation(self.down(x.to(self.down.weight.dtype))))
        found: Tensor = self.scale * self.up(inner)
        return found.to(x.dtype)


class Bottlenecks(Adapter):
    """``model`` with a ``bottlenecks`` module in each of its blocks.

    Saved as safetensors under the parameters' names in the model, with the config beside them.
    """

    def __init__(self, model: nn.Module, config: BottleneckConfig) -> None:
        self.model, self.config = model, config
        model.requires_grad_(False)
        blocks = find_blocks(model)
        known = sorted({sublayer.name for block in blocks for sublayer in block.sublayers})
        wanted = known if config.targets == "all" else config.targets
        if not blocks:
            raise ConfigError([("adapter", f"found no transformer blocks in {type(model).__name__}; use lora")])
        if strange := [name for name in wanted if name not in known]:
            near = suggest(strange[0], known)
            raise ConfigError(
                [("adapter.targets", f"{strange[0]!r} is in no block; there are {', '.join(known)}{near}")]
            )
        for block in blocks:
            self._equip(block, [sublayer for sublayer in block.sublayers if sublayer.name in wanted])

    def _equip(self, block: Block, sublayers: list[Sublayer]) -> None:
        first = next(p for p in block.module.parameters() if p.is_floating_point())
        added = nn.ModuleDict()
        for sublayer in sublayers:
            added[sublayer.name] = Bottleneck(block.width, self.config).to(first)
            hooks = Hooks(added[sublayer.name], sublayer)
            if self.config.placement == "parallel":
                sublayer.reader.register_forward_pre_hook(hooks.keep, with_kwargs=True)
                sublayer.writer.register_forward_hook(hooks.add_of_input)
            else:
                sublayer.writer.register_forward_hook(hooks.add_of_output, with_kwargs=True)
        block.module.add_module(NAME, added)

    def owns(self, name: str) -> bool:
        return NAME in name.split(".")

    def _own(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters() if self.owns(name)}

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: p.cpu().contiguous() for name, p in self._own().items()}, folder / WEIGHTS)
        (folder / SETTINGS).write_text(json.dumps(self.config.model_dump(mode="json"), indent=2) + "\n", "utf-8")

    def load(self, folder: Path) -> None:
        if read_json(folder / SETTINGS).get("kind") != self.config.kind:
            raise CheckpointError(
                f"{folder} holds no bottleneck adapters; expected what mmllm saved for kind `adapter`"
            )
        copy_tensors(self._own(), read_tensors([folder / WEIGHTS], [""]), str(folder))


class Hooks:
    """What the hooks of one sublayer share."""

    def __init__(self, bottleneck: nn.Module, sublayer: Sublayer) -> None:
        self.bottleneck, self.sublayer = bottleneck, sublayer
        self.read: Tensor | None = None

    def keep(self, _module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.read = read_by(arguments, named)

    def add_of_input(self, _module: nn.Module, _arguments: tuple[Any, ...], output: Any) -> Any:
        assert self.read is not None
        extra, self.read = self.bottleneck(self.read), None
        return _with_first(output, extra)

    def add_of_output(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
        found = output if isinstance(output, Tensor) else output[0]
        if self.sublayer.residual:
            found = found - _argument(module, "residual", arguments, named)
        return _with_first(output, self.bottleneck(found))


def _with_first(output: Any, extra: Tensor) -> Any:
    """``output``, a tensor or a tuple that begins with one, with ``extra`` added to the tensor."""
    return output + extra if isinstance(output, Tensor) else (output[0] + extra, *output[1:])


def _argument(module: nn.Module, name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    import inspect

    bound = inspect.signature(module.forward).bind(*arguments, **named)
    found: Tensor = bound.arguments[name]
    return found
