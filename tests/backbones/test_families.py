"""Families of language models: the contract on each, and answers equal to those of transformers' own ``generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mmllm.backbones.causal_lm import CausalLMConfig, LanguageModelConfig, byte_tokenizer
from mmllm.backbones.seq2seq import Seq2SeqConfig
from mmllm.config.base import BuildContext
from mmllm.config.run import ModelConfig
from mmllm.errors import ConfigError
from mmllm.generation import Decoding, decode, stop_ids
from mmllm.model import MultimodalLM
from mmllm.processing.processor import Processor
from mmllm.testing import check_component

DENSE = ("llama", "mistral", "olmo", "olmo2", "qwen2", "qwen3", "gemma", "gemma2", "opt", "bloom", "gpt2", "gpt_neox")
DENSE += ("phi", "phi3", "falcon")
EXPERTS = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
RECURRENT = ("mamba", "mamba2", "falcon_mamba", "rwkv", "jamba")
ENCODER_DECODERS = ("t5", "mt5", "bart")
CAUSAL = (*DENSE, *EXPERTS, *RECURRENT)
KINDS: dict[str, type[LanguageModelConfig]] = dict.fromkeys(CAUSAL, CausalLMConfig)
KINDS |= dict.fromkeys(ENCODER_DECODERS, Seq2SeqConfig)


def config_of(family: str, **keys: Any) -> LanguageModelConfig:
    return KINDS[family].model_validate({"architecture": {"model_type": family}, **keys})


@pytest.mark.parametrize("family", KINDS)
def test_the_contract_holds_with_and_without_lora(family: str) -> None:
    check_component(config_of(family))
    check_component(config_of(family, adapter={"kind": "lora"}))


def checkpoint(folder: Path, family: str) -> LanguageModelConfig:
    """A small random model as transformers saves it, with a byte tokenizer; its matrices are large enough to disagree."""
    # With one table for both ends these say again what they just read, whatever the prompt.
    untied: dict[str, Any] = {"tie_word_embeddings": False} if family in ("gemma", "gemma2", "bloom") else {}
    config = KINDS[family].model_validate({"architecture": {"model_type": family, **untied}}).tiny()
    backbone = config.build(BuildContext(dtype=torch.float32, weights=False), num_new_tokens=0)
    torch.manual_seed(3)
    for module in backbone.model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.4)
    backbone.model.save_pretrained(folder)  # type: ignore[operator]
    byte_tokenizer().save_pretrained(folder)
    return KINDS[family].model_validate({"pretrained": str(folder)})


@pytest.mark.parametrize("family", KINDS)
def test_a_batch_of_unequal_lengths_is_answered_as_transformers_answers_each(family: str, tmp_path: Path) -> None:
    parts = ModelConfig(backbone=checkpoint(tmp_path, family))
    context = BuildContext(dtype=torch.float32)
    torch.manual_seed(0)
    model = MultimodalLM.from_config(parts, context).eval()
    processor = Processor.from_config(parts, context)
    questions = ["what?", "how many red circles are there", "a"]
    prompts = [processor.encode_prompt([{"role": "user", "content": text}]) for text in questions]
    steps = list(decode(model, processor, prompts, Decoding(max_new_tokens=8)))
    found = [[id for step in steps if (id := step.ids[row]) is not None] for row in range(len(prompts))]
    ends = sorted(stop_ids(model, processor))
    reference: Any = model.backbone.model
    reference.generation_config.forced_eos_token_id = None  # BART's, at the last token that fits
    start = {"decoder_start_token_id": 0} if family in ENCODER_DECODERS else {}
    for prompt, ours in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt.ids])
        # RWKV's generation reads ids alone; of the others what is given is embeddings, as in a multimodal model.
        given = {"inputs_embeds": model.backbone.embed(ids)} if family != "rwkv" else {"input_ids": ids}
        theirs = reference.generate(
            **given,
            **start,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=0,
        )[0].tolist()
        theirs = theirs[len(prompt.ids) :] if family == "rwkv" else theirs
        theirs = theirs[1:] if family in ENCODER_DECODERS else theirs  # the start token
        assert ours == [id for id in theirs if id not in ends]
    assert len({tuple(ids) for ids in found}) > 1  # prompts matter, so equality says something


def test_lora_leaves_out_what_fused_kernels_read_themselves() -> None:
    config = config_of("mamba", adapter={"kind": "lora"}).tiny()
    backbone = config.build(BuildContext(weights=False), num_new_tokens=0)
    adapted = {
        name.rpartition(".lora_A")[0].rpartition(".")[2] for name, _ in backbone.named_parameters() if "lora_A" in name
    }
    assert adapted == {"in_proj"}
    hybrid = config_of("jamba", adapter={"kind": "lora"}).tiny().build(BuildContext(weights=False), num_new_tokens=0)
    adapted = {n.rpartition(".lora_A")[0].rpartition(".")[2] for n, _ in hybrid.named_parameters() if "lora_A" in n}
    assert {"in_proj", "q_proj", "o_proj", "down_proj"} <= adapted
    assert not {"dt_proj", "lm_head"} & adapted


def test_rwkv_keeps_its_weights_when_evaluation_begins() -> None:
    numbers = {"model_type": "rwkv", "num_hidden_layers": 8, "hidden_size": 16, "vocab_size": 272, "rescale_every": 2}
    backbone = CausalLMConfig(architecture=numbers).build(BuildContext(weights=False), num_new_tokens=0)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    backbone.eval()
    with torch.no_grad():
        backbone(torch.randn(1, 3, 16))
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "family", "words"),
    [
        (Seq2SeqConfig, "llama", "has no sequence-to-sequence LM 'llama'"),
        (CausalLMConfig, "t5", "has no causal LM 't5'"),
    ],
)
def test_a_family_of_the_other_kind_is_refused(kind: type[LanguageModelConfig], family: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        kind.model_validate({"architecture": {"model_type": family}}).build(
            BuildContext(weights=False), num_new_tokens=0
        )


def test_prefixes_are_refused_by_encoder_decoders() -> None:
    config = config_of("t5", adapter={"kind": "prefix_tuning"}).tiny()
    with pytest.raises(ConfigError, match="made for decoder-only models; use lora or adapter"):
        config.build(BuildContext(weights=False), num_new_tokens=0)
