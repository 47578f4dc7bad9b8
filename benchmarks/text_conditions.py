"""What the cache of text conditions saves: the time of a batch's conditions with and without it, interleaved, medians.

    python benchmarks/text_conditions.py [--captions 8] [--rounds 15]

The text encoder has the size of Stable Diffusion 1.5's (CLIP ViT-L/14: 12 layers of 768, 77 positions) and random weights.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import CLIPTextConfig, CLIPTextModel

from mmllm.generators.base import Sampling
from mmllm.generators.image_module import StableDiffusion
from mmllm.generators.text_conditions import Store, TextConditions
from mmllm.generators.tiny import tiny_pipeline


def generator() -> StableDiffusion:
    pipeline = tiny_pipeline("StableDiffusionPipeline")
    pipeline.tokenizer.model_max_length = 77
    size = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    ids = {"vocab_size": len(pipeline.tokenizer), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    pipeline.register_modules(text_encoder=CLIPTextModel(CLIPTextConfig(**size, **ids)).eval())
    return StableDiffusion(pipeline, {"text": (77, 768)}, Sampling(), None)


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    captions = [f"a picture of {number} red circles and a blue star" for number in range(options.captions)]
    made = generator()
    with tempfile.TemporaryDirectory() as folder:
        plain, kept = TextConditions(made), TextConditions(made, Store(Path(folder), 10**9))
        filling = seconds(lambda: kept(captions))
        assert torch.equal(plain(captions)["text"], kept(captions)["text"])
        pairs = [(seconds(lambda: plain(captions)), seconds(lambda: kept(captions))) for _ in range(options.rounds)]
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors")) / options.captions
    ratios = sorted(without / cached for without, cached in pairs)
    without, cached = (statistics.median(side) for side in zip(*pairs, strict=True))
    print(f"{options.captions} captions on {torch.get_num_threads()} threads, medians of {options.rounds}")
    print(f"encoded       {without * 1e3:9.1f} ms")
    print(f"from the cache{cached * 1e3:9.1f} ms")
    print(f"ratio         {statistics.median(ratios):9.1f}   (smallest {ratios[0]:.1f}, largest {ratios[-1]:.1f})")
    print(f"first time    {filling * 1e3:9.1f} ms, with the weights' hash and writing {size / 1e3:.0f} kB a caption")


if __name__ == "__main__":
    main()
