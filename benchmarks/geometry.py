"""The systems that the benchmarks measure: mmllm's and transformers' LLaVA with the same random weights, and the samples.

``small224`` and ``small336`` are a CLIP tower of 12 x 384 read at layer -2 without class token, an MLP of two layers and a
Llama of 8 x 512 with a vocabulary of 32,000; they differ in the pictures' size, 196 or 576 tokens each.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmllm.config.base import BuildContext
from mmllm.config.load import parse
from mmllm.model import MultimodalLM
from mmllm.processing.batch import Encoded, Span
from mmllm.processing.processor import Processor

VOCABULARY = 32_000
PLACEHOLDER = VOCABULARY - 1  # transformers' image token; no sample has it as a word
LORA = {"rank": 16, "alpha": 32}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Geometry:
    """Sizes of a system: side of its pictures and of their patches, in pixels."""

    picture: int
    patch: int

    @property
    def tokens(self) -> int:
        """Tokens of a picture."""
        return (self.picture // self.patch) ** 2

    @property
    def vision(self) -> dict[str, int]:
        return {
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_hidden_layers": 12,
            "num_attention_heads": 6,
            "image_size": self.picture,
            "patch_size": self.patch,
        }

    @property
    def text(self) -> dict[str, Any]:
        return {
            "hidden_size": 512,
            "intermediate_size": 1376,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 4096,
        }


GEOMETRIES = {"small224": Geometry(224, 16), "small336": Geometry(336, 14)}
# Shares of samples without a picture, with one and with two.
MIXES = {"mix": (0.1, 0.8, 0.1), "single": (0.0, 1.0, 0.0)}


@dataclass
class Systems:
    """mmllm's system with its processor, and transformers' with the same weights."""

    ours: MultimodalLM
    processor: Processor
    theirs: Any


def build(geometry: Geometry, *, lora: bool) -> Systems:
    """Both systems in float32, frozen but for the projector (and the adapter)."""
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModel,
        LlamaConfig,
        LlamaForCausalLM,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    from mmllm.backbones.causal_lm import byte_tokenizer

    torch.manual_seed(0)
    vision, text = CLIPVisionConfig(**geometry.vision), LlamaConfig(**geometry.text)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        CLIPVisionModel(vision).save_pretrained(folder / "clip")
        LlamaForCausalLM(text).save_pretrained(folder / "llama")
        byte_tokenizer().save_pretrained(folder / "llama")
        backbone: dict[str, Any] = {"kind": "causal_lm", "pretrained": "./llama", "chat_template": "chatml"}
        if lora:
            backbone["adapter"] = {"kind": "lora", **LORA, "targets": LINEARS}
        encoder = {"kind": "clip", "pretrained": "./clip", "select_layer": -2}
        inputs = {"image": {"encoder": encoder, "projector": {"kind": "mlp", "depth": 2}}}
        config = parse({"model": {"inputs": inputs, "backbone": backbone}}).model
        context = BuildContext(dtype=torch.float32, root=folder)
        ours, processor = MultimodalLM.from_config(config, context), Processor.from_config(config, context)
        theirs = LlavaForConditionalGeneration(
            LlavaConfig(vision_config=vision, text_config=text, image_token_id=PLACEHOLDER, vision_feature_layer=-2)
        )
        theirs.model.vision_tower.load_state_dict(CLIPVisionModel.from_pretrained(folder / "clip").state_dict())
        llama = LlamaForCausalLM.from_pretrained(folder / "llama")
    theirs.model.language_model.load_state_dict(llama.model.state_dict())
    theirs.lm_head.load_state_dict(llama.lm_head.state_dict())
    layers: Any = ours.inputs["image"].projector.layers  # type: ignore[union-attr]
    theirs.model.multi_modal_projector.linear_1.load_state_dict(layers[0].state_dict())
    theirs.model.multi_modal_projector.linear_2.load_state_dict(layers[2].state_dict())
    theirs.requires_grad_(False)
    if lora:
        theirs = _with_lora(theirs, ours)
    theirs.get_submodule("base_model.model" if lora else "").model.multi_modal_projector.requires_grad_(True)
    return Systems(ours, processor, theirs)


def _with_lora(theirs: Any, ours: MultimodalLM) -> Any:
    """``theirs`` with peft's LoRA on the language model's linear layers, at the weights of ``ours``."""
    from peft import LoraConfig, get_peft_model

    targets = rf".*language_model.*\.({'|'.join(LINEARS)})"
    config = LoraConfig(r=LORA["rank"], lora_alpha=LORA["alpha"], target_modules=targets)
    wrapped = get_peft_model(theirs, config)
    mine = lora_weights(ours.backbone.model)
    for name, weight in lora_weights(wrapped).items():
        # B begins at zero, where A has no gradient: not the state in which most of a run is.
        torch.nn.init.normal_(mine[name], std=0.01)
        weight.data.copy_(mine[name].data)
    return wrapped


def lora_weights(model: Any) -> dict[str, Tensor]:
    """LoRA's parameters by ``layers.3.self_attn.q_proj.lora_A``."""
    found = {name: p for name, p in model.named_parameters() if "lora_" in name}
    return {name[name.index("layers.") :].replace(".default.weight", ""): p for name, p in found.items()}


def samples(
    geometry: Geometry, mix: str, count: int, seed: int = 3, answer: tuple[int, int] = (10, 80)
) -> list[Encoded]:
    """Conversations of random words: prompts of 20 to 60 tokens, pictures at random places in them, answers of ``answer``."""
    draw = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=draw))

    def words(length: int) -> list[int]:
        return torch.randint(3, VOCABULARY - 1, (length,), generator=draw).tolist()

    found = []
    for index in range(count):
        pictures = int(torch.multinomial(torch.tensor(MIXES[mix]), 1, generator=draw))
        prompt, ids, spans = words(number(20, 60)), list[int](), list[Span]()
        places = sorted(number(1, len(prompt) - 1) for _ in range(pictures))
        for place, word in enumerate(prompt):
            ids.append(word)
            for _ in range(places.count(place + 1)):
                pixels = torch.randn(3, geometry.picture, geometry.picture, generator=draw)
                spans.append(Span("image", len(ids), geometry.tokens, {"pixels": pixels}))
                ids += [PLACEHOLDER] * geometry.tokens
        said = words(number(*answer))
        found.append(Encoded(str(index), ids + said, [False] * len(ids) + [True] * len(said), spans))
    return found


def for_transformers(chunk: list[Encoded]) -> dict[str, Tensor]:
    """A padded batch as LLaVA of transformers takes it."""
    width = max(len(sample.ids) for sample in chunk)
    ids = torch.zeros(len(chunk), width, dtype=torch.int64)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, sample in enumerate(chunk):
        ids[row, : len(sample.ids)] = torch.tensor(sample.ids)
        mask[row, : len(sample.ids)] = 1
        said = torch.tensor(sample.supervised)
        labels[row, : len(sample.ids)][said] = torch.tensor(sample.ids)[said]
    pixels = [span.item["pixels"] for sample in chunk for span in sample.spans]
    found = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return found | ({"pixel_values": torch.stack(pixels)} if pixels else {})
