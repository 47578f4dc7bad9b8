"""Decoding: mmllm beside ``LlavaForConditionalGeneration.generate`` with the same weights, prompts and geometry.

    python -m benchmarks.infer_step --json [--geometry small224] [--dtype float32] [--rounds 5] [--tokens 32]

Both answer greedily in one process, in turn; process time, medians over the rounds. *Prefill* is the time to the first token,
pictures included; *decode* that from the first to the last one, per token. Ratios above 1 say that mmllm is faster. Before
anything is timed the tokens of both must be the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.geometry import GEOMETRIES, MIXES, Systems, build, for_transformers, samples
from mmllm.assistant import Assistant
from mmllm.generation import Decoding, decode
from mmllm.processing.batch import Encoded

Clock = Callable[[], float]


class Stamps:
    """When a token came; what ``generate`` tells a streamer first is the prompt."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.times, self.prompt = clock, list[float](), True

    def put(self, _ids: object) -> None:
        if not self.prompt:
            self.times.append(self.clock())
        self.prompt = False

    def end(self) -> None:
        pass


def ours(systems: Systems, prompts: Sequence[Encoded], count: int, clock: Clock) -> tuple[list[float], list[list[int]]]:
    """Times since the beginning at which tokens came, and the tokens of every prompt."""
    begin, times, found = clock(), list[float](), list[list[int]]([] for _ in prompts)
    for step in decode(systems.ours, systems.processor, prompts, Decoding(count)):
        times.append(clock() - begin)
        for row, token in zip(found, step.ids, strict=True):
            row.append(-1 if token is None else token)
    return times, found


def theirs(systems: Systems, given: dict[str, Any], count: int, clock: Clock) -> tuple[list[float], list[list[int]]]:
    stamps = Stamps(clock)
    begin = clock()
    with torch.inference_mode():
        ids = systems.theirs.generate(
            **given, max_new_tokens=count, do_sample=False, eos_token_id=[2, 3], pad_token_id=0, streamer=stamps
        )
    return [at - begin for at in stamps.times], ids[:, given["input_ids"].shape[1] :].tolist()


def left_padded(prompts: Sequence[Encoded], dtype: torch.dtype) -> dict[str, Any]:
    """The prompts as transformers' LLaVA takes them: padded in front, so that all end together."""
    given = for_transformers(list(prompts))
    del given["labels"]
    width = given["input_ids"].shape[1]
    for row, prompt in enumerate(prompts):
        for name in ("input_ids", "attention_mask"):
            given[name][row] = given[name][row].roll(width - len(prompt.ids))
    if "pixel_values" in given:
        given["pixel_values"] = given["pixel_values"].to(dtype)
    return given


def questions(geometry: str, mix: str, seed: int, dtype: torch.dtype, count: int = 8) -> list[Encoded]:
    """Prompts of the mix without their answers."""
    found = []
    for sample in samples(GEOMETRIES[geometry], mix, count, seed):
        length = len(sample.ids) - sample.num_supervised
        spans = [replace(s, item={name: t.to(dtype) for name, t in s.item.items()}) for s in sample.spans]
        found.append(Encoded(sample.id, sample.ids[:length], [False] * length, spans))
    return found


def summary(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Medians of (theirs, ours) in seconds, and the median, smallest and largest of their ratios."""
    ratios = sorted(other / own for other, own in pairs)
    other, own = (statistics.median(side) for side in zip(*pairs, strict=True))
    spread = {"ratio": statistics.median(ratios), "smallest": ratios[0], "largest": ratios[-1]}
    return {"transformers_s": other, "mmllm_s": own, **spread}


def compare(systems: Systems, prompts: Sequence[Encoded], count: int, rounds: int, clock: Clock) -> dict[str, Any]:
    dtype = next(systems.theirs.parameters()).dtype
    given = left_padded(prompts, dtype)
    equal = []
    for a, b in zip(ours(systems, prompts, count, clock)[1], theirs(systems, given, count, clock)[1], strict=True):
        equal += [x == y for x, y in zip(a, b, strict=True)]
    prefill, step = [], []
    for _ in range(rounds):
        slow, fast = theirs(systems, given, count, clock)[0], ours(systems, prompts, count, clock)[0]
        prefill.append((slow[0], fast[0]))
        step.append(((slow[-1] - slow[0]) / (count - 1), (fast[-1] - fast[0]) / (count - 1)))
    lengths = [len(prompt.ids) for prompt in prompts]
    decoded = summary(step)
    decoded["mmllm_tokens_per_s"] = len(prompts) / decoded["mmllm_s"]
    return {
        "prompts": lengths,
        "padding": 1 - sum(lengths) / (max(lengths) * len(lengths)),
        "same_tokens": sum(equal) / len(equal),
        "prefill": summary(prefill),
        "decode": decoded,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="small224")
    parser.add_argument("--mix", choices=MIXES, default="mix")
    parser.add_argument(
        "--seed", type=int, default=1, help="of the prompts; 1 draws seven with a picture, one with two"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=33, help="tokens of an answer")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    systems = build(GEOMETRIES[options.geometry], lora=False)
    systems.ours.to(dtype).backbone.quicken(systems.ours.inputs)  # as an assistant does before its first answer
    Assistant(systems.ours, systems.processor)
    systems.theirs.to(dtype).eval()
    for head in (systems.ours.backbone.tables()[1], systems.theirs.lm_head.weight):
        head.data[[2, 3]] = 0.0  # the end tokens are never the largest, so both answer at full length
    clock = time.process_time if options.threads == 1 else time.perf_counter
    prompts = questions(options.geometry, options.mix, options.seed, dtype, max(8, *options.batches))
    # Alone, one with a picture: the first of the longest class would be two.
    single = [p for p in prompts if len(p.spans) == 1][:1]
    found: dict[str, Any] = {
        "geometry": options.geometry,
        "mix": options.mix,
        "seed": options.seed,
        "dtype": options.dtype,
    }
    found |= {"torch": torch.__version__, "threads": options.threads, "rounds": options.rounds}
    for size in options.batches:
        chosen = single if size == 1 else prompts[:size]
        found[f"b{size}"] = compare(systems, chosen, options.tokens, options.rounds, clock)
    if options.json:
        print(json.dumps(found, indent=2))
        return
    for size in options.batches:
        one = found[f"b{size}"]
        print(f"batch {size}, prompts {one['prompts']}, same tokens {one['same_tokens']:.1%}")
        for what in ("prefill", "decode"):
            r = one[what]
            line = f"{r['ratio']:5.2f}x ({r['smallest']:.2f} to {r['largest']:.2f})"
            print(
                f"  {what:8} transformers {r['transformers_s'] * 1e3:8.1f} ms  mmllm {r['mmllm_s'] * 1e3:8.1f} ms  {line}"
            )


if __name__ == "__main__":
    main()
