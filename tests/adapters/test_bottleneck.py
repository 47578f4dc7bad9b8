"""Bottleneck adapters against a forward of each family's block that is written here, and where they go."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mmllm.adapters.blocks import find_blocks
from mmllm.adapters.bottleneck import BottleneckConfig
from mmllm.backbones.causal_lm import CausalLMConfig
from mmllm.config.base import BuildContext
from mmllm.errors import CheckpointError, ConfigError

WEIGHTS_FREE = BuildContext(dtype=torch.float32, weights=False)
Extra = Callable[[str, Tensor, Tensor], Tensor]  # (sublayer, what it read, what it returned) -> what is added


def base(family: str) -> Any:
    torch.manual_seed(0)
    config = CausalLMConfig.model_validate({"architecture": {"model_type": family}}).tiny()
    return config.build(WEIGHTS_FREE, num_new_tokens=0).model.eval()


# Blocks, from the families' papers and with the modules' own calls.
def llama(block: Any, extra: Extra) -> Callable[..., Any]:
    def forward(self: Any, h: Tensor, **rest: Any) -> Tensor:
        x = self.input_layernorm(h)
        y = self.self_attn(hidden_states=x, **rest)[0]
        h = h + y + extra("self_attn", x, y)
        x = self.post_attention_layernorm(h)
        y = self.mlp(x)
        return h + y + extra("mlp", x, y)

    return forward


def gpt2(block: Any, extra: Extra) -> Callable[..., Any]:
    def forward(self: Any, h: Tensor, past: Any, mask: Any, *_: Any, **rest: Any) -> Tensor:
        x = self.ln_1(h)
        y = self.attn(x, past_key_values=past, attention_mask=mask)[0]
        h = h + y + extra("attn", x, y)
        x = self.ln_2(h)
        y = self.mlp(x)
        return h + y + extra("mlp", x, y)

    return forward


def opt(block: Any, extra: Extra) -> Callable[..., Any]:
    def forward(self: Any, h: Tensor, **rest: Any) -> Tensor:
        x = self.self_attn_layer_norm(h)
        y = self.self_attn(hidden_states=x, **rest)[0]
        h = h + y + extra("self_attn", x, y)
        x = self.final_layer_norm(h)
        y = self.fc2(torch.relu(self.fc1(x)))
        return h + y + extra("fc2", x, y)

    return forward


def bloom(block: Any, extra: Extra) -> Callable[..., Any]:
    def forward(self: Any, h: Tensor, alibi: Tensor, attention_mask: Any, **rest: Any) -> tuple[Tensor, None]:
        x = self.input_layernorm(h)
        y = self.self_attention(x, torch.zeros_like(h), alibi=alibi, attention_mask=attention_mask)[0]
        h = h + y + extra("self_attention", x, y)
        x = self.post_attention_layernorm(h)
        y = self.mlp(x, torch.zeros_like(h))
        return h + y + extra("mlp", x, y), None

    return forward


FAMILIES = {"llama": llama, "gpt2": gpt2, "opt": opt, "bloom": bloom}
LAYERS = {"llama": "model.layers", "gpt2": "transformer.h", "opt": "model.decoder.layers", "bloom": "transformer.h"}
OPTIONS: list[dict[str, Any]] = [
    {"dim": 3},
    {"dim": 5, "placement": "parallel", "scale": 4.0, "activation": "gelu"},
]
ACTIVATIONS = {"relu": torch.relu, "gelu": nn.functional.gelu}


@pytest.mark.parametrize("options", OPTIONS, ids=["sequential", "parallel"])
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_is_the_papers(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    """The adapter's values are read from its file. Measured: at most 3e-7; allowed 2e-6."""
    config = BottleneckConfig.model_validate(options)
    adapter = config.attach(base(family))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapter.model.named_parameters():
            if adapter.owns(name):
                parameter.normal_(std=0.5)
    adapter.save(tmp_path)
    values = load_file(tmp_path / "adapter_model.safetensors")
    other = base(family)
    for index, block in enumerate(other.get_submodule(LAYERS[family])):

        def extra(sublayer: str, read: Tensor, returned: Tensor, index: int = index) -> Tensor:
            x = read if config.placement == "parallel" else returned
            place = f"{LAYERS[family]}.{index}.bottlenecks.{sublayer}"
            w = {key: values[f"{place}.{key}"] for key in ("down.weight", "down.bias", "up.weight", "up.bias")}
            inner = ACTIVATIONS[config.activation](x @ w["down.weight"].T + w["down.bias"])
            return config.scale * (inner @ w["up.weight"].T + w["up.bias"])

        block.forward = MethodType(FAMILIES[family](block, extra), block)
    ids = torch.randint(0, 272, (2, 7))
    with torch.no_grad():
        found = adapter.model.eval()(input_ids=ids).logits
        assert float((found - base(family)(input_ids=ids).logits).abs().max()) > 1e-2
        assert torch.allclose(found, other(input_ids=ids).logits, atol=2e-6)


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", ["self_attn", "mlp"]),
        ("qwen3", ["self_attn", "mlp"]),
        ("opt", ["self_attn", "fc2"]),
        ("gpt_neox", ["attention", "mlp"]),
        ("olmo", ["self_attn", "mlp"]),
        ("mixtral", ["self_attn", "mlp"]),
        ("mamba", ["mixer"]),
        ("rwkv", ["attention", "feed_forward"]),
    ],
)
def test_each_step_of_every_block_gets_one(family: str, names: list[str]) -> None:
    """At the start nothing changes; gradients then reach all of the adapter and nothing else."""
    model = base(family)
    ids = torch.randint(0, 272, (2, 6))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    blocks = find_blocks(model)
    assert len(blocks) == model.config.num_hidden_layers
    assert [[s.name for s in block.sublayers] for block in blocks] == [names] * len(blocks)
    adapter = BottleneckConfig(dim=2, activation="gelu").attach(model)
    found = adapter.model(input_ids=ids).logits
    assert torch.equal(found, expected)
    for name, parameter in adapter.model.named_parameters():
        if name.endswith("up.weight"):
            nn.init.normal_(parameter)  # the layer before it has no gradient while it is zero
    adapter.model(input_ids=ids).logits.logsumexp(-1).sum().backward()
    reached = {name for name, p in adapter.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {name for name, _ in adapter.model.named_parameters() if adapter.owns(name)}
    assert len(reached) == 4 * len(names) * len(blocks)


def test_targets_choose_and_are_checked() -> None:
    adapter = BottleneckConfig(dim=2, targets=["mlp"]).attach(base("llama"))
    places = {
        name.split(".bottlenecks.")[1].split(".")[0]
        for name, _ in adapter.model.named_parameters()
        if adapter.owns(name)
    }
    assert places == {"mlp"}
    with pytest.raises(ConfigError) as caught:
        BottleneckConfig(targets=["self_attention"]).attach(base("llama"))
    assert "'self_attention' is in no block; there are mlp, self_attn" in str(caught.value)
    with pytest.raises(ConfigError, match="no transformer blocks"):
        BottleneckConfig().attach(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))


def test_a_folder_of_another_kind_or_size_is_refused(tmp_path: Path) -> None:
    BottleneckConfig(dim=2).attach(base("llama")).save(tmp_path / "two")
    assert json.loads((tmp_path / "two" / "adapter_config.json").read_text())["kind"] == "adapter"
    with pytest.raises(CheckpointError, match=r"down\.bias is \(2,\), the model has \(3,\)"):
        BottleneckConfig(dim=3).attach(base("llama")).load(tmp_path / "two")
    (tmp_path / "two" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(CheckpointError, match="no bottleneck adapters"):
        BottleneckConfig(dim=2).attach(base("llama")).load(tmp_path / "two")
