"""Adapters of peft's kinds equal peft's own: same files, same outputs, same greedy tokens. Float32, CPU, tiny random models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmllm.backbones.causal_lm import CausalLMConfig
from mmllm.backbones.causal_lm_module import CausalLM
from mmllm.config.base import BuildContext
from mmllm.config.load import parse
from mmllm.generation import Decoding, context_length, decode
from mmllm.model import MultimodalLM
from mmllm.processing.processor import Processor

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12},
    "qwen2": {"num_attention_heads": 4, "num_key_value_heads": 1},
    "gpt2": {"num_attention_heads": 2},
    "opt": {"num_attention_heads": 2, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"n_head": 2},
    "gemma2": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 8},
    "mixtral": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4},
}
NUMBERS = {"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 272}
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 3},
    "ia3": {"kind": "ia3"},
    "prefix": {"kind": "prefix_tuning", "num_virtual_tokens": 5},
    "projected prefix": {"kind": "prefix_tuning", "num_virtual_tokens": 4, "projection_dim": 7},
}


def numbers(family: str) -> dict[str, Any]:
    known = {"intermediate_size": 48} if family in ("llama", "qwen2", "gemma2", "mixtral") else {}
    return {"model_type": family, **NUMBERS, **known, **FAMILIES[family]}


def build(family: str, adapter: dict[str, Any] | None = None) -> CausalLM:
    """The same base weights in every call."""
    config = CausalLMConfig.model_validate({"architecture": numbers(family), "adapter": adapter})
    torch.manual_seed(0)
    backbone = config.build(BuildContext(dtype=torch.float32, weights=False), num_new_tokens=0).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in backbone.model.named_parameters():
            if backbone.adapter is not None and backbone.adapter.owns(name):
                parameter.add_(torch.randn_like(parameter), alpha=0.5)
    return backbone


def peft_model(family: str, folder: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(build(family).model, folder).eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_forward_is_pefts_own_on_the_saved_files(family: str, adapter: str, tmp_path: Path) -> None:
    """With and without padding. Measured 0; allowed 1e-6, of logits up to 0.5."""
    ours = build(family, ADAPTERS[adapter])
    assert ours.adapter is not None
    ours.adapter.save(tmp_path / "adapter")
    theirs = peft_model(family, tmp_path / "adapter")
    embeddings, mask = torch.randn(2, 9, 32), torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    with torch.no_grad():
        plain = build(family)(embeddings).logits
        assert float((plain - ours(embeddings).logits).abs().max()) > 1e-3, "the adapter does something"
        expected = theirs(inputs_embeds=embeddings).logits
        assert torch.allclose(ours(embeddings).logits, expected, atol=1e-6)
        expected = theirs(inputs_embeds=embeddings, attention_mask=mask).logits
        found = ours(embeddings, mask).logits
        assert torch.allclose(found[0], expected[0], atol=1e-6)
        assert torch.allclose(found[1, :5], expected[1, :5], atol=1e-6)


def prompts(processor: Processor) -> list[Any]:
    texts = ["hi", "a question that is rather long", "tell me more"]
    return [processor.encode_prompt([{"role": "user", "content": text}]) for text in texts]


def greedy(model: MultimodalLM, processor: Processor, chosen: list[Any], count: int) -> list[list[int | None]]:
    steps = list(decode(model, processor, chosen, Decoding(count)))
    return [[step.ids[row] for step in steps] for row in range(len(chosen))]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_greedy_tokens_are_pefts(family: str, adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the cache, one prompt at a time and in a padded batch: those of peft's ``generate`` for each prompt alone.

    Gemma 2's window of 8 here is shorter than the batch: padding then pushes the prefix out of it earlier than alone.
    """
    backbone = {"kind": "causal_lm", "architecture": numbers(family), "adapter": ADAPTERS[adapter]}
    context = BuildContext(dtype=torch.float32, weights=False)
    config = parse({"model": {"backbone": backbone}}).model
    model, processor = MultimodalLM.from_config(config, context), Processor.from_config(config, context)
    model.backbone = build(family, ADAPTERS[adapter])
    assert model.backbone.adapter is not None
    model.backbone.adapter.save(tmp_path / "adapter")
    theirs = peft_model(family, tmp_path / "adapter")
    monkeypatch.setattr("mmllm.generation.stop_ids", lambda *_: set())
    together = greedy(model, processor, prompts(processor), 12)
    for row, prompt in enumerate(prompts(processor)):
        ids = torch.tensor([prompt.ids])
        mask = torch.ones_like(ids)
        ids = theirs.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None)
        written = ids[0, len(prompt.ids) :].tolist()
        assert greedy(model, processor, [prompt], 12) == [written]
        assert together[row] == written or (family == "gemma2" and "prefix" in adapter)


def test_a_prefix_takes_its_positions_from_the_context() -> None:
    architecture = numbers("gpt2") | {"n_positions": 64}
    offline = BuildContext(dtype=torch.float32, weights=False)
    config = CausalLMConfig.model_validate({"architecture": architecture, "adapter": ADAPTERS["prefix"]})
    assert config.max_positions(offline) == 59
    model = MultimodalLM({}, config.build(offline, num_new_tokens=0), {})
    assert context_length(model) == 59
    logits = model.backbone(torch.randn(1, 59, 32)).logits
    assert logits.isfinite().all()
    with pytest.raises(IndexError):
        model.backbone(torch.randn(1, 60, 32))
