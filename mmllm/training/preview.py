"""A few replies of the model in training, for the log."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from mmllm.data.mixture import StageData
from mmllm.generation import Decoding, decode
from mmllm.model import MultimodalLM
from mmllm.processing.messages import Part
from mmllm.processing.processor import Processor


def sample_replies(
    model: MultimodalLM, processor: Processor, data: StageData, count: int, max_new_tokens: int = 48
) -> list[tuple[str, str, str]]:
    """Greedy replies to the last user turn of ``count`` samples spread over ``data``: (question, expected, answered).

    Samples that cannot be used are left out. Leaves every module's train/eval mode as it was.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    replies = []
    edges = [len(data) * i // count for i in range(count + 1)] if count else []
    for start, stop in pairwise(edges):
        if start == stop:
            continue
        try:
            sample = data[start]
            question, reference = sample.messages[-2:]
            prompt = processor.encode_prompt(sample.messages[:-1], id=sample.id, root=sample.root)
            with torch.compiler.set_stance("force_eager"):  # a growing cache would be compiled again and again
                steps = decode(model, processor, [prompt], Decoding(max_new_tokens=max_new_tokens))
                ids = [token for step in steps for token in step.ids if token is not None]
        except ValueError:  # unusable data, a prompt beyond the backbone's context, a conversation without reply
            continue
        replies.append((_shown(question.parts), _shown(reference.parts), processor.text(ids)))
    for module, mode in modes.items():
        module.training = mode
    return replies


def _shown(parts: Sequence[Part]) -> str:
    return " ".join(str(part.value).strip() if part.type == "text" else f"[{part.type}]" for part in parts)
