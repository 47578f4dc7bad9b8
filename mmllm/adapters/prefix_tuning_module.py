"""The prefix of a transformers causal LM: peft's parameters and files, put into the cache before each forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.adapters.base import WEIGHTS, Adapter
from mmllm.adapters.prefix_tuning import PrefixTuningConfig
from mmllm.errors import ConfigError
from mmllm.pretrained import copy_tensors, read_tensors

NAME = "prefix_encoder"  # of peft's module in the model
# PEFT's layout holds the finished keys and values alone; to go on with training, what makes them is needed too.
PROJECTION = "projection.safetensors"


class Prefix(Adapter):
    """``model`` with a ``prefix_encoder`` (peft's ``PrefixEncoder``) and a hook that fills the cache from it.

    A pass without cache, or with an empty one, begins behind the prefix; one with a filled cache has it already. Masks get
    the prefix's columns in front and positions its length, so callers count the sequence alone.
    """

    def __init__(self, model: Any, config: PrefixTuningConfig) -> None:
        import peft

        self.layers, heads, width = key_value_shape(model)
        self.shape = (config.num_virtual_tokens, 2 * self.layers, heads, width)
        self.settings = peft.PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=config.num_virtual_tokens,
            token_dim=heads * width,
            num_attention_heads=heads,
            num_layers=self.layers,
            num_transformer_submodules=1,
            prefix_projection=config.projection_dim is not None,
            encoder_hidden_size=config.projection_dim or heads * width,
        )
        self.model, self.positions = model, config.num_virtual_tokens
        self.encoder: Any = peft.PrefixEncoder(self.settings)
        model.requires_grad_(False).add_module(NAME, self.encoder)
        model.register_forward_pre_hook(self._begin_behind, with_kwargs=True)

    def owns(self, name: str) -> bool:
        return name.split(".")[0] == NAME

    def keys_and_values(self) -> Tensor:
        """``(2 * layers, heads, P, head_dim)``: keys and values of the layers in turn."""
        places = torch.arange(self.shape[0], device=self.encoder.embedding.weight.device)
        found: Tensor = self.encoder(places).view(self.shape).permute(1, 2, 0, 3)
        return found

    def _begin_behind(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        from transformers import DynamicCache

        given = next(
            value for value in (*args, kwargs.get("inputs_embeds"), kwargs.get("input_ids")) if value is not None
        )
        cache = kwargs.get("past_key_values")
        cache = DynamicCache(config=model.config) if cache is None else cache
        if not cache.get_seq_length():
            kind = given.device.type
            half = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            states = self.keys_and_values().to(half or model.get_input_embeddings().weight.dtype)
            for layer in range(self.layers):
                key, value = (states[2 * layer + which].expand(len(given), -1, -1, -1) for which in (0, 1))
                cache.update(key, value, layer)
        moved: dict[str, Any] = {"past_key_values": cache}
        if (mask := kwargs.get("attention_mask")) is not None:
            moved["attention_mask"] = torch.cat([mask.new_ones(len(mask), self.shape[0]), mask], dim=1)
        if (places := kwargs.get("position_ids")) is not None:
            moved["position_ids"] = places + self.shape[0]
        return args, {**kwargs, **moved}

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        self.settings.inference_mode = True  # for peft, as in all that it saves
        self.settings.save_pretrained(folder)
        self.settings.inference_mode = False
        tokens, states, heads, width = self.shape
        flat = self.keys_and_values().permute(2, 0, 1, 3).reshape(tokens, states * heads * width)
        save_file({"prompt_embeddings": flat.detach().cpu().contiguous()}, folder / WEIGHTS, metadata={"format": "pt"})
        if self.settings.prefix_projection:
            own = {name: tensor.detach().cpu().contiguous() for name, tensor in self.encoder.state_dict().items()}
            save_file(own, folder / PROJECTION)

    def load(self, folder: Path) -> None:
        if self.settings.prefix_projection:
            copy_tensors(self.encoder.state_dict(), read_tensors([folder / PROJECTION], [""]), str(folder))
        else:
            own = {"prompt_embeddings": self.encoder.embedding.weight}
            copy_tensors(own, read_tensors([folder / WEIGHTS], [""]), str(folder))


def key_value_shape(model: nn.Module) -> tuple[int, int, int]:
    """Layers, heads and width of the keys and values that a causal LM caches, found by running one token.

    Raises ``ConfigError`` for models without such a cache in every layer, or with layers of different shapes: PEFT's layout
    has one shape for all.
    """
    from transformers import DynamicCache, PreTrainedModel

    where = "adapter"
    if not (isinstance(model, PreTrainedModel) and model.can_generate()):
        text = f"prefix_tuning works through a language model's cache, which {type(model).__name__} does not have; use lora"
        raise ConfigError([(where, text)])
    if model.config.is_encoder_decoder:
        raise ConfigError([(where, "prefix_tuning is made for decoder-only models; use lora or adapter")])
    cache = DynamicCache(config=model.config)
    token = torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device)
    try:
        with torch.no_grad():
            model(input_ids=token, past_key_values=cache, use_cache=True)
    except ValueError:  # hybrids ask the cache of their recurrent layers for a length
        cache = DynamicCache()
    states = [(layer.keys, layer.values) for layer in cache.layers if hasattr(layer, "keys")]
    shapes = {(state.shape[1], state.shape[3]) for pair in states for state in pair if state is not None}
    if len(states) != len(cache.layers) or len(shapes) != 1 or any(state is None for pair in states for state in pair):
        text = f"{model.config.model_type} does not keep keys and values of one shape in every layer; use lora"
        raise ConfigError([(where, text)])
    (heads, width), *_ = shapes
    return len(states), int(heads), int(width)
