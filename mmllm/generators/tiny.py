"""Random pipelines of a few thousand parameters: what ``tiny()`` generators run, with the same classes as real ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from mmllm.generators import tiny_audio, tiny_image, tiny_video

PIPELINES = {**tiny_image.PIPELINES, **tiny_audio.PIPELINES, **tiny_video.PIPELINES}


def tiny_pipeline(name: str) -> Any:
    """A diffusers pipeline of class ``name`` with random weights."""
    import diffusers

    torch_state = torch.get_rng_state()
    torch.manual_seed(0)  # the same weights in every process and after every load
    try:
        return getattr(diffusers, name)(**PIPELINES[name]())
    finally:
        torch.set_rng_state(torch_state)


def tiny_configs(name: str) -> Callable[[str], dict[str, Any]]:
    """The JSON files that a folder of ``tiny_pipeline(name)`` would hold, by path."""
    parts = _parts(name)

    def read(path: str) -> dict[str, Any]:
        if path == "model_index.json":
            return {"_class_name": name}
        part, _, file = path.partition("/")
        if file == "tokenizer_config.json":
            return {"model_max_length": parts[part].model_max_length}
        config = parts[part].config
        return dict(config.to_dict() if hasattr(config, "to_dict") else config)

    return read


@cache
def _parts(name: str) -> dict[str, Any]:
    return dict(tiny_pipeline(name).components)
