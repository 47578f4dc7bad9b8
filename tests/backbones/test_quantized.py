"""Quantised backbones: the published NF4, the error that is left, training of LoRA alone, checkpoints, the plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mmllm.backbones.causal_lm import CausalLMConfig, byte_tokenizer
from mmllm.backbones.quantized import QuantizedLinear, normal_float
from mmllm.config.base import BuildContext
from mmllm.config.load import parse
from mmllm.config.run import RunConfig
from mmllm.errors import ConfigError
from mmllm.model import MultimodalLM
from mmllm.plan import make_plan
from mmllm.training import checkpoint
from mmllm.training.run import train

OFFLINE = BuildContext(dtype=torch.float32, weights=False)
LLAMA = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "vocab_size": 272}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA |= {"initializer_range": 0.2}  # as large as trained weights: blocks are more than a residual stream
# Appendix E of arXiv 2305.14314.
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334]
NF4 += [-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
NF4 += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]


def test_nf4_is_the_papers() -> None:
    """Measured 1.5e-8; allowed 1e-6."""
    assert torch.allclose(normal_float(), torch.tensor(NF4), atol=1e-6)


def by_hand(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Weight by weight, the nearest value that its block of 64 can have."""
    steps = torch.tensor(NF4) if bits == 4 else torch.arange(-127, 128) / 127
    flat, out = weight.flatten(), []
    for start in range(0, len(flat), 64):
        block = flat[start : start + 64]
        values = steps * block.abs().max()
        out.append(values[(block[:, None] - values[None]).abs().argmin(dim=1)])
    return torch.cat(out).view_as(weight)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(24, 64), (5, 7), (1, 130)])
def test_weights_are_the_nearest_and_the_product_is_theirs(shape: tuple[int, int], bits: Any) -> None:
    """Also the gradient of the input, and where blocks end in the middle of a row. Measured 2e-6; allowed 1e-5."""
    linear = nn.Linear(shape[1], shape[0])
    layer = QuantizedLinear(linear.weight, linear.bias, bits)
    expected = by_hand(linear.weight.detach(), bits)
    assert torch.allclose(layer.weight, expected, atol=1e-5)
    x = torch.randn(3, 2, shape[1], requires_grad=True)
    y = x.detach().clone().requires_grad_(True)
    upstream = torch.randn(3, 2, shape[0])
    layer(x).backward(upstream)
    out = nn.functional.linear(y, expected, linear.bias.detach())
    out.backward(upstream)
    assert torch.allclose(layer(x), out, atol=1e-5)
    assert torch.allclose(x.grad, y.grad, atol=1e-5)  # type: ignore[arg-type]
    assert layer.codes.numel() * 8 <= bits * (shape[0] * shape[1] + 63)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_a_block_of_zeros_stays_zero() -> None:
    assert not QuantizedLinear(torch.zeros(2, 64), None, 4).weight.any()


def backbone(quantize: dict[str, int] | None, architecture: dict[str, Any] = LLAMA, **more: Any) -> Any:
    torch.manual_seed(0)
    config = CausalLMConfig.model_validate({"architecture": architecture, "quantize": quantize, **more})
    return config.build(OFFLINE, num_new_tokens=0).eval()


@pytest.mark.parametrize(("bits", "allowed"), [(8, 0.04), (4, 0.5)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_outputs_are_near_the_unquantised(family: str, bits: int, allowed: float) -> None:
    """Relative to the logits' size (root mean square). Measured: 0.027 and 0.013 with 8 bits, 0.35 and 0.20 with 4."""
    architecture = (
        LLAMA
        if family == "llama"
        else {
            "model_type": "gpt2",
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "vocab_size": 272,
            "initializer_range": 0.2,
        }
    )
    embeddings = torch.randn(2, 9, 64)
    with torch.no_grad():
        expected = backbone(None, architecture)(embeddings).logits
        found = backbone({"bits": bits}, architecture)(embeddings).logits
    error = float((found - expected).norm() / expected.norm())
    assert 0 < error < allowed


@pytest.mark.parametrize("adapter", [{"kind": "lora", "rank": 2}, {"kind": "ia3"}, {"kind": "adapter", "dim": 2}])
def test_adapters_fit_on_top(adapter: dict[str, Any]) -> None:
    plain, adapted = backbone({"bits": 4}), backbone({"bits": 4}, adapter=adapter)
    embeddings = torch.randn(1, 5, 64)
    assert torch.equal(adapted(embeddings).logits, plain(embeddings).logits)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert trained
    assert all(p.dtype == torch.float32 for p in trained)


def system(folder: Path, train_parts: list[str], **changes: Any) -> tuple[RunConfig, BuildContext]:
    plain = parse({"model": {"backbone": {"kind": "causal_lm", "architecture": LLAMA}}}).model
    torch.manual_seed(0)
    MultimodalLM.from_config(plain, OFFLINE).backbone.model.save_pretrained(folder / "llama")  # type: ignore[operator]
    byte_tokenizer().save_pretrained(folder / "llama")
    row = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]}
    (folder / "data.jsonl").write_text((json.dumps(row) + "\n") * 4)
    base = {
        "kind": "causal_lm",
        "pretrained": "./llama",
        "adapter": {"kind": "lora", "rank": 2},
        "quantize": {"bits": 4},
    }
    stage = {
        "name": "one",
        "train": train_parts,
        "lr": 0.01,
        "data": ["data.jsonl"],
        "max_steps": 2,
        "batch_size": 4,
        "micro_batch_size": 2,
        "samples": 0,
    }
    tree = {"model": {"backbone": base | changes}, "stages": [stage], "output": str(folder / "run"), "trackers": []}
    return parse(tree), BuildContext(root=folder)


def test_lora_alone_trains_and_the_base_is_a_reference(tmp_path: Path) -> None:
    config, context = system(tmp_path, ["backbone.adapter"])
    final = train(config, context)
    assert load_file(final / "parts.safetensors") == {}
    assert set(checkpoint.read_json(final / "references.json")) == {"backbone"}
    import mmllm

    loaded = mmllm.load(final, device="cpu")
    fresh = MultimodalLM.from_config(config.model, context)
    own = dict(loaded.model.named_parameters())
    for name, parameter in fresh.named_parameters():
        if "lora_" not in name:
            assert torch.equal(own[name], parameter), name
        elif "lora_B" in name:
            assert own[name].any(), name
    assert isinstance(loaded.chat([{"role": "user", "content": "hello"}], max_new_tokens=2), str)


def test_without_files_the_packed_weights_are_saved(tmp_path: Path) -> None:
    """Random weights have nothing to come back from."""
    config, context = system(
        tmp_path, ["backbone.adapter"], pretrained=None, architecture=LLAMA, chat_template="chatml"
    )
    final = train(config, context)
    torch.manual_seed(9)
    model = MultimodalLM.from_config(config.model, context)
    checkpoint.load_parts(model, final)
    torch.manual_seed(config.seed)
    trained = dict(MultimodalLM.from_config(config.model, context).named_parameters())
    assert all(torch.equal(p, trained[name]) for name, p in model.named_parameters() if "lora_" not in name)


def test_quantised_weights_are_not_trained(tmp_path: Path) -> None:
    for pattern in ("backbone", "backbone.layers.1"):
        config, context = system(tmp_path, [pattern])
        with pytest.raises(ConfigError, match=r"quantised weights cannot be trained; train backbone\.adapter"):
            make_plan(config, context)


def test_the_plan_counts_parameters_and_the_bytes_they_take(tmp_path: Path) -> None:
    config, context = system(tmp_path, ["backbone.adapter"])
    plan = make_plan(config, context)
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 112
    others = 2 * 272 * 64
    assert plan.parameters["backbone"] == 2 * layer + others + 5 * 64
    # Half a byte for each weight and four for every 64; tables and norms in float32.
    assert plan.quantized_bytes == 2 * (layer // 2 + layer // 64 * 4) + (others + 5 * 64) * 4
    model = MultimodalLM.from_config(config.model, context)
    own = list(model.parts()["backbone"].values())
    assert sum(p.numel() * p.element_size() for p in own) == plan.quantized_bytes
