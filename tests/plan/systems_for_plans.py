"""Small systems whose costs can be worked out by hand."""

from __future__ import annotations

from typing import Any

from mmllm.config.run import RunConfig

LAYERS, WIDTH, GROUPS, HEAD = 3, 32, 2, 8
LLAMA = {
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": GROUPS,
    "head_dim": HEAD,
    "vocab_size": 272,
}
CLIP = {"kind": "clip", "vision_cfg": {"image_size": 64, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16}}


def system(*train: str, adapter: bool = False, **changes: Any) -> RunConfig:
    """Pictures, 16 tokens each, in front of a Llama of three layers; ``changes`` are the stage's, or the run's ``precision``."""
    backbone: dict[str, Any] = {"kind": "causal_lm", "architecture": LLAMA, "quantize": changes.pop("quantize", None)}
    if adapter:
        backbone["adapter"] = {"kind": "lora", "rank": 2, "alpha": 4}
    run = {"precision": changes.pop("precision", "fp32")}
    stage = {
        "name": "stage",
        "train": list(train) or ["inputs.*.projector"],
        "lr": 1e-3,
        "data": ["nowhere.jsonl"],
        "max_steps": 10,
        "batch_size": 4,
        "micro_batch_size": 4,
        "max_length": 64,
        **changes,
    }
    inputs = {"image": {"encoder": CLIP, "projector": {"kind": "linear"}}}
    return RunConfig.model_validate({"model": {"inputs": inputs, "backbone": backbone}, "stages": [stage], **run})
