"""Adapters that peft puts around single layers of a model (LoRA, (IA)^3)."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from mmllm.adapters.attention import open_attention
from mmllm.adapters.base import WEIGHTS, Adapter
from mmllm.errors import ConfigError, brief
from mmllm.pretrained import copy_tensors, read_tensors


class Wrapped(Adapter):
    """``model`` with peft's layers in it, by peft's ``settings``; saved in PEFT's layout.

    Raises ``ConfigError`` where peft refuses the model or finds none of its targets.
    """

    def __init__(self, model: Any, settings: Any) -> None:
        import peft
        from transformers import PreTrainedModel

        if isinstance(model, PreTrainedModel) and model.can_generate():
            settings.task_type = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
        open_attention(model)
        with warnings.catch_warnings():
            # peft asks transformers for a property by its old name, and corrects its own setting for GPT-2's layers;
            # nothing that a user could act on.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            # Of the two tensors of a layer of experts peft looks for both at each.
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
            try:
                self.model: Any = peft.get_peft_model(model, settings)
            except (ValueError, re.error) as error:  # no such modules, or a family whose modules take no adapter
                raise ConfigError([("adapter.targets", f"peft refuses it: {brief(error)}")]) from error
        self.prefix = self.model.base_model.prefix  # of the names that peft gives its parameters: lora_A, ia3_l, …

    def owns(self, name: str) -> bool:
        return any(word.startswith(self.prefix) for word in name.split("."))

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # a model card of blanks

    def load(self, folder: Path) -> None:
        from peft import get_peft_model_state_dict

        # These tensors share their storage with the model's parameters.
        own = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        copy_tensors(own, read_tensors([folder / WEIGHTS], [""]), str(folder))


def linear_layers(model: Any) -> str | list[str]:
    """What peft is to adapt when every linear layer is meant: of a language model all but its head, which peft itself knows
    how to find; of an encoder the names of them all.

    Left out are layers whose weights the module around them uses without calling the layer, as the fused kernels of
    state-space mixers do: an adapter on those would have no effect.
    """
    from transformers import PreTrainedModel

    open_attention(model)
    closed = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    bypassed = set(_bypassed(model))
    if isinstance(model, PreTrainedModel) and not bypassed:
        return "all-linear"
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and name not in bypassed
        and not name.startswith(tuple(f"{outer}." for outer in closed))
    ]


def _bypassed(model: nn.Module) -> Iterator[str]:
    """Names of linear layers in mixers with a convolution over time that read ``self.<layer>.weight`` themselves."""
    for name, mixer in model.named_modules():
        if any(isinstance(child, nn.Conv1d) for child in mixer.children()):
            read = set(re.findall(r"self\.(\w+)\.weight\b(?!\.dtype)", inspect.getsource(type(mixer))))
            yield from (
                f"{name}.{key}" for key, child in mixer.named_children() if key in read and isinstance(child, nn.Linear)
            )
