"""The plan's memory against real runs on the CPU: peaks of `train()` for systems of different kinds.

    python benchmarks/memory_plan.py [--only NAME …] [--markdown]

What is measured is not the process' resident memory, which depends on what the allocator and the libraries keep, but every
allocation and release of torch's CPU allocator, as torch.profiler records them: the highest sum over the whole run, loading,
two optimizer steps and the final save included. The plan sees the same configuration and is told the samples' length alone.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image

from mmllm.config.base import BuildContext
from mmllm.config.run import RunConfig
from mmllm.data.dataset import open_stage
from mmllm.plan import Setting, make_plan
from mmllm.processing.processor import Processor
from mmllm.training.run import train

LLAMA = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
}
CLIP = {"kind": "clip", "vision_cfg": {"image_size": 96, "patch_size": 16, "width": 128, "layers": 3, "head_width": 32}}
WHISPER = {
    "kind": "whisper",
    "architecture": {
        "d_model": 64,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 128,
        "max_source_positions": 250,
    },
}
QFORMER = {"kind": "qformer", "num_queries": 8, "hidden_dim": 64, "num_layers": 2, "num_heads": 4}
PICTURE = {"image": {"encoder": CLIP, "projector": {"kind": "mlp", "depth": 2}}}
SOUND = {"audio": {"encoder": WHISPER, "projector": {"kind": "mlp", "depth": 2, "stack": 10}}}
DRAWING = {
    "image": {
        "signal_tokens": 4,
        "projector": {"kind": "tiny_transformer", "num_layers": 2, "hidden_dim": 128, "num_heads": 4},
        "generator": {"kind": "stable_diffusion", "architecture": {"pipeline": "StableDiffusionPipeline"}},
    }
}
LORA = {"kind": "lora", "rank": 8, "alpha": 16}


@dataclass(frozen=True)
class Case:
    """A system and one stage of it; ``shown`` is what its samples hold, ``words`` the length of a reply in bytes."""

    inputs: dict[str, Any]
    backbone: dict[str, Any]
    train: list[str]
    outputs: dict[str, Any]
    stage: dict[str, Any]
    precision: str = "fp32"
    words: int = 160


def case(
    inputs: dict[str, Any],
    train: list[str],
    *,
    backbone: dict[str, Any] | None = None,
    outputs: dict[str, Any] | None = None,
    precision: str = "fp32",
    words: int = 160,
    **stage: Any,
) -> Case:
    """A case on the Llama of four layers, unless another ``backbone`` is given."""
    return Case(inputs, backbone or {"architecture": LLAMA}, train, outputs or {}, stage, precision, words)


def other(model_type: str, **numbers: Any) -> dict[str, Any]:
    return {"architecture": {"model_type": model_type, "vocab_size": 2048, **numbers}}


CASES = {
    "projectors, two modalities": case(
        {"image": {"encoder": CLIP, "projector": QFORMER}, **SOUND}, ["inputs.*.projector"]
    ),
    "LoRA": case(
        PICTURE, ["inputs.*.projector", "backbone.adapter"], backbone={"architecture": LLAMA, "adapter": LORA}
    ),
    "LoRA, bf16, checkpointing": case(
        PICTURE,
        ["inputs.*.projector", "backbone.adapter"],
        backbone={"architecture": LLAMA, "adapter": LORA},
        precision="bf16",
        gradient_checkpointing=True,
    ),
    "whole backbone": case(PICTURE, ["inputs.*.projector", "backbone"]),
    "whole backbone, accumulating": case(PICTURE, ["inputs.*.projector", "backbone"], micro_batch_size=2),
    "4-bit base and LoRA": case(
        PICTURE,
        ["backbone.adapter"],
        backbone={"architecture": LLAMA, "adapter": LORA, "quantize": {"bits": 4}},
        precision="bf16",
    ),
    "encoder in training": case(SOUND, ["inputs.*"], words=40),
    "GPT-2, bottlenecks": case(
        PICTURE,
        ["backbone.adapter"],
        backbone={**other("gpt2", n_embd=192, n_layer=4, n_head=4), "adapter": {"kind": "adapter", "dim": 16}},
    ),
    "OPT, some layers": case(
        PICTURE,
        ["backbone.layers.2-3", "inputs.*.projector"],
        backbone=other(
            "opt", hidden_size=192, ffn_dim=512, num_hidden_layers=4, num_attention_heads=4, word_embed_proj_dim=192
        ),
    ),
    "pictures out": case(
        PICTURE,
        ["outputs.*", "backbone.new_tokens"],
        outputs=DRAWING,
        objectives={"text": 1.0, "condition": 1.0},
    ),
    "Mixtral, eager attention": case(
        PICTURE,
        ["inputs.*.projector"],
        backbone={
            **other(
                "mixtral",
                hidden_size=128,
                intermediate_size=256,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                num_local_experts=4,
            ),
            "attention": "eager",
        },
    ),
}


def make_data(folder: Path, one: Case) -> Path:
    """Eight samples of one length, with the media that the plan takes for usual ones."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (512, 512, 3), dtype=np.uint8)).save(folder / "picture.png")
    soundfile.write(folder / "sound.wav", rng.normal(0, 0.1, 30 * 16_000).astype(np.float32), 16_000)
    files = {"image": "picture.png", "audio": "sound.wav"}
    content: list[dict[str, str]] = [{"type": name, "path": files[name]} for name in one.inputs]
    reply: list[dict[str, str]] = [{"type": "text", "text": "a" * one.words}]
    reply += [{"type": name, "path": files[name], "caption": "a caption"} for name in one.outputs]
    messages = [
        {"role": "user", "content": [*content, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": reply},
    ]
    rows = [json.dumps({"id": str(i), "messages": messages}) for i in range(8)]
    path = folder / "data.jsonl"
    path.write_text("\n".join(rows) + "\n")
    return path


def configuration(folder: Path, one: Case) -> RunConfig:
    stage = {
        "name": "stage",
        "train": one.train,
        "lr": 1e-3,
        "data": [str(make_data(folder, one))],
        "max_steps": 2,
        "batch_size": 4,
        "micro_batch_size": 4,
        "max_length": 1024,
        "samples": 0,
        **one.stage,
    }
    model = {
        "inputs": one.inputs,
        "backbone": {"kind": "causal_lm", "chat_template": "chatml", **one.backbone},
        "outputs": one.outputs,
    }
    return RunConfig.model_validate(
        {
            "model": model,
            "stages": [stage],
            "output": str(folder / "run"),
            "precision": one.precision,
            "trackers": [],
            "cache": None,
        }
    )


def planned_peak(config: RunConfig, context: BuildContext) -> int:
    """The plan's bytes, told how long the samples are and how much of them is learned."""
    stage = config.stages[0]
    sample = Processor.from_config(config.model, context).encode_sample(
        open_stage(stage, config.seed, context)[0], stage.max_length
    )
    length = len(sample.ids)
    media = sum(span.count for span in sample.spans)
    share = sample.num_supervised / (length - 1 - media)
    plan = make_plan(config, context, Setting(device="cpu", length=length, supervised=share), costs=True)
    assert plan.costs is not None, "the costs were asked for"
    assert not plan.costs.notes, plan.costs.notes
    return plan.costs.stages[stage.name].memory.peak


def measured_peak(config: RunConfig, context: BuildContext) -> int:
    """The highest sum of torch's CPU allocations while `train` runs."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        contextlib.redirect_stdout(io.StringIO()),
        torch.profiler.profile(activities=activities, profile_memory=True) as profile,
    ):
        train(config, context)
    results: Any = profile.profiler
    events = sorted(
        (event for event in results.kineto_results.events() if event.name() == "[memory]"),
        key=lambda event: event.start_ns(),
    )
    return int(max(np.cumsum([event.nbytes() for event in events])))


def compare(one: Case) -> tuple[int, int]:
    """The planned and the measured peak of a case."""
    with tempfile.TemporaryDirectory() as name:
        config, context = configuration(Path(name), one), BuildContext(root=Path(name))
        return planned_peak(config, context), measured_peak(config, context)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(CASES))
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    form = "| {} | {} | {} | {} |" if options.markdown else "{:<32} {:>10} {:>10} {:>8}"
    print(form.format("system", "plan", "measured", "error"), flush=True)
    if options.markdown:
        print("|---|---|---|---|")
    for name in options.only:
        planned, measured = compare(CASES[name])
        error = f"{planned / measured - 1:+.1%}"
        print(form.format(name, f"{planned / 1e6:.1f} MB", f"{measured / 1e6:.1f} MB", error), flush=True)


if __name__ == "__main__":
    main()
