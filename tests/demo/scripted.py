"""Tiny random assistants whose every reply is the same words and then the same media."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmllm.assistant import Assistant
from mmllm.config.base import BuildContext
from mmllm.config.load import parse
from mmllm.model import MultimodalLM
from mmllm.processing.processor import Processor

WORDS = "ab"
GENERATOR = {"kind": "stable_diffusion", "pretrained": "x", "steps": 1}
GENERATORS = {
    "audio": {"kind": "audio_diffusion", "pretrained": "x", "steps": 1},
    "video": {"kind": "video_diffusion", "pretrained": "x", "steps": 1},
}


def tiny_assistant(*outputs: str) -> Assistant:
    """An assistant that sees pictures and makes these modalities: sounds, clips, and pictures under any other name."""
    torch.manual_seed(0)
    tree = {
        "inputs": {"image": {"encoder": {"kind": "clip", "pretrained": "x"}, "projector": {"kind": "linear"}}},
        "backbone": {"kind": "causal_lm", "pretrained": "x"},
        "outputs": {
            name: {
                "projector": {"kind": "linear"},
                "generator": GENERATORS.get(name, GENERATOR),
                "signal_tokens": 2,
            }
            for name in outputs
        },
    }
    config = parse({"model": tree}).model.tiny()
    context = BuildContext(dtype=torch.float32)
    return Assistant(MultimodalLM.from_config(config, context), Processor.from_config(config, context))


def answers(assistant: Assistant, monkeypatch: pytest.MonkeyPatch, *makes: str) -> None:
    """Let the assistant answer everything with WORDS and a medium of each of ``makes``."""
    tokenizer, signals = assistant.processor.tokenizer, assistant.processor.signals
    ids = list(tokenizer.encode(WORDS, add_special_tokens=False))
    for name in makes:
        ids += range(signals[name].first, signals[name].stop)
    ids.append(int(tokenizer.eos_token_id))
    forward, left = assistant.model.backbone.forward, list[int]()

    def wishing(embeddings: torch.Tensor, *args: Any, **options: Any) -> Any:
        if embeddings.shape[1] > 1:  # a prompt: another reply begins
            left[:] = ids
        out = forward(embeddings, *args, **options)
        logits = torch.zeros_like(out.logits)
        logits[:, left.pop(0)] = 9.0
        return out._replace(logits=logits)

    monkeypatch.setattr(assistant.model.backbone, "forward", wishing)
