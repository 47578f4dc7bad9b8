"""A real model of random weights that makes pictures, sounds and clips, and says what it is told to say."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from mmllm.assistant import Assistant
from mmllm.config.base import BuildContext
from mmllm.config.load import parse
from mmllm.model import MultimodalLM
from mmllm.processing.processor import Processor

GENERATORS = {"image": "stable_diffusion", "audio": "audio_diffusion", "video": "video_diffusion"}


class Obedient(Assistant):
    """Says the last message of the user; ``[image]``, ``[audio]`` and ``[video]`` in it are made.

    Everything is the real thing, encoders and diffusers pipelines included, but for the logits. ``read`` are the prompts.
    """

    def __init__(self, delay: float = 0.0, outputs: Sequence[str] = tuple(GENERATORS)) -> None:
        torch.manual_seed(0)
        makes = {
            name: {
                "signal_tokens": 2,
                "projector": {"kind": "linear"},
                "generator": {"kind": GENERATORS[name], "pretrained": "x"},
            }
            for name in outputs
        }
        tree = {
            "inputs": {"image": {"encoder": {"kind": "clip", "pretrained": "x"}, "projector": {"kind": "linear"}}},
            "backbone": {"kind": "causal_lm", "pretrained": "x"},
            "outputs": makes,
        }
        config = parse({"model": tree}).model.tiny()
        context = BuildContext(dtype=torch.float32)
        super().__init__(MultimodalLM.from_config(config, context), Processor.from_config(config, context))
        self.read: list[Any] = []
        self.options: list[dict[str, Any]] = []
        self.delay = threading.Event()
        self._wishes: Iterator[int] = iter(())

        def slowly(*_: Any) -> None:
            self.delay.wait(delay)

        for output in self.model.outputs.values():  # a step takes as long as a word
            output.frozen().parts[output.frozen().denoiser].register_forward_pre_hook(slowly)
        forward, encode = self.model.backbone.forward, self.processor.encode_prompt

        def obeying(*args: Any, **named: Any) -> Any:
            self.delay.wait(delay)
            out = forward(*args, **named)
            logits = torch.zeros_like(out.logits)
            logits[:, next(self._wishes)] = 9.0
            return out._replace(logits=logits)

        def noted(messages: Sequence[Any], **named: Any) -> Any:
            self.read.append(encode(messages, **named))
            return self.read[-1]

        self.model.backbone.forward = obeying  # type: ignore[method-assign]
        self.processor.encode_prompt = noted  # type: ignore[method-assign]

    def chat(self, messages: Any, *args: Any, **options: Any) -> Any:
        self.options.append(options)
        text = "".join(part["text"] for part in messages[-1]["content"] if part["type"] == "text")
        self._wishes = self._ids(text)
        return super().chat(messages, *args, **options)

    def _ids(self, text: str) -> Iterator[int]:
        tokenizer = self.processor.tokenizer
        for piece in re.split(r"(\[\w+\])", text):
            signals = self.processor.signals.get(piece.strip("[]"))
            yield from signals.ids if signals else tokenizer.encode(piece, add_special_tokens=False)
        while True:
            yield int(tokenizer.eos_token_id)
