"""Training steps of mmllm beside transformers' LLaVA (with peft): the same weights, samples and optimizer, in one process.

    python -m benchmarks.train_step [--stage pretrain|lora] [--precision fp32|bf16] [--mix mix|single]
                                    [--geometry small224|small336] [--rounds 5] [--threads 1] [--json]

Before any clock runs, losses and all gradients are compared in float32. The variants then take turns, round after round;
a round is two optimizer steps of 8 samples each (``--batch``). Reported are medians of process time, the ratio to transformers'
padded loop with its spread, and the share of the matrix product rate measured in the same process that is *needed* work.

    hf         transformers as its trainer runs it: padded batches, logits everywhere, the whole tower
    hf_tuned   the same tuned by hand: logits where labels are, tower cut at the layer that is read, batches by length
    padded     mmllm, `batching: padded`, `short_cuts: false`
    packed     mmllm as it comes
    loop       `packed` through mmllm's own training loop (accelerate, clipping, checks): what the framework costs
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.geometry import (
    GEOMETRIES,
    LINEARS,
    LORA,
    MIXES,
    PLACEHOLDER,
    Geometry,
    Systems,
    build,
    for_transformers,
    lora_weights,
    samples,
)
from mmllm.config.run import DataSource, OptimizerConfig, StageConfig
from mmllm.data.dataset import SkipLog
from mmllm.model import MultimodalLM
from mmllm.processing.batch import Encoded
from mmllm.training.batches import StepData
from mmllm.training.loop import SummedLoss, run_steps
from mmllm.training.optimizer import build_optimizer
from mmllm.training.stages import TrainedPart, freeze, set_dtypes

CLIP = 1.0


@dataclass
class Bench:
    """What all variants share: the systems, the parameters that train, and the steps' samples."""

    systems: Systems
    geometry: Geometry
    lora: bool
    half: bool
    chunks: list[list[Encoded]]
    lr: float = 1e-6

    def __post_init__(self) -> None:
        ours, theirs = self.systems.ours, self.systems.theirs
        names = ["inputs.image.projector", *(["backbone.adapter"] if self.lora else [])]
        self.parts = [TrainedPart(name, ours.parts()[name], self.lr) for name in names]
        freeze(ours, self.parts, gradient_checkpointing=False)
        ours.backbone.eval()  # LoRA has no dropout here; nor has theirs
        self.mine = [p for part in self.parts for p in part.parameters.values()]
        self.other = [p for p in theirs.parameters() if p.requires_grad]
        if self.half:
            set_dtypes(ours, names, "bf16")
            theirs.to(torch.bfloat16)
        self.config = OptimizerConfig(schedule="constant", warmup=0.0, clip=CLIP)
        self.optimizer = build_optimizer(ours, self.parts, self.config)
        self.other_optimizer = torch.optim.AdamW(self.other, lr=self.lr)

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.half)

    # ---- transformers

    def padded_batches(self, *, by_length: bool) -> list[dict[str, Tensor]]:
        size, pool = len(self.chunks[0]), [sample for chunk in self.chunks for sample in chunk]
        if by_length:
            pool.sort(key=lambda sample: len(sample.ids))
        batches = [for_transformers(pool[i : i + size]) for i in range(0, len(pool), size)]
        for batch in batches:
            if self.half and "pixel_values" in batch:
                batch["pixel_values"] = batch["pixel_values"].bfloat16()
        return batches

    def hf(self, batches: list[dict[str, Tensor]]) -> Callable[[], None]:
        return lambda: self._their_steps(batches, lambda batch: self.systems.theirs(**batch).loss)

    def hf_tuned(self, batches: list[dict[str, Tensor]]) -> Callable[[], None]:
        model = self.systems.theirs.get_submodule("base_model.model" if self.lora else "")
        tower = model.model.vision_tower
        encoder = next(module for module in tower.modules() if type(module).__name__ == "CLIPEncoder")
        whole = encoder.layers

        def loss(batch: dict[str, Tensor]) -> Tensor:
            labels, ids = batch["labels"][:, 1:], batch["input_ids"]
            embeddings = model.get_input_embeddings()(ids)
            if "pixel_values" in batch:
                seen = model.model.multi_modal_projector(tower(batch["pixel_values"]).last_hidden_state[:, 1:])
                places = (ids == PLACEHOLDER)[..., None].expand_as(embeddings)
                embeddings = embeddings.masked_scatter(places, seen.to(embeddings.dtype))
            language = model.model.language_model
            states = language(inputs_embeds=embeddings, attention_mask=batch["attention_mask"]).last_hidden_state
            found = model.lm_head(states[:, :-1][labels != -100])
            return F.cross_entropy(found.float(), labels[labels != -100])

        def steps() -> None:
            encoder.layers = whole[:-1]
            try:
                self._their_steps(batches, loss)
            finally:
                encoder.layers = whole

        return steps

    def _their_steps(self, batches: list[dict[str, Tensor]], loss: Callable[[dict[str, Tensor]], Tensor]) -> None:
        for batch in batches:
            loss(batch).backward()
            torch.nn.utils.clip_grad_norm_(self.other, CLIP)
            self.other_optimizer.step()
            self.other_optimizer.zero_grad()

    # ---- mmllm

    def mmllm(self, *, pack: bool) -> Callable[[], None]:
        batches = [self.systems.processor.collate(chunk, pack=pack) for chunk in self.chunks]

        def steps() -> None:
            for batch in batches:
                with self._autocast():
                    loss = self.systems.ours(batch)["text"]
                (loss / batch.tokens).backward()
                torch.nn.utils.clip_grad_norm_(self.mine, CLIP)
                self.optimizer.step()
                self.optimizer.zero_grad()

        return steps

    def loop(self) -> Callable[[], None]:
        """The same steps through ``run_steps``."""
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True, mixed_precision="bf16" if self.half else "no")
        model, optimizer = accelerator.prepare(SummedLoss(self.systems.ours), self.optimizer)
        source = DataSource.model_validate("none.jsonl")
        names = [part.name for part in self.parts]
        stage = StageConfig(name="step", train=names, lr=self.lr, data=[source], optimizer=self.config)
        batches = [self.systems.processor.collate(chunk, pack=True) for chunk in self.chunks]

        def steps() -> None:
            data = [StepData(number, 0.0, [(batch, 1.0)]) for number, batch in enumerate(batches)]
            run_steps(
                accelerator,
                model,
                optimizer,
                self.parts,
                stage,
                data,
                total=len(data),
                seed=0,
                skips=SkipLog(),
                stopping=lambda: False,
                after=lambda result, stop: stop,
            )

        return steps


def gradients(bench: Bench) -> dict[str, dict[str, Tensor]]:
    """Of the first step's summed loss, by system: the loss and every trained gradient under mmllm's names."""
    ours, theirs = bench.systems.ours, bench.systems.theirs
    chunk = bench.chunks[0]
    found: dict[str, dict[str, Tensor]] = {}
    for name, pack in (("padded", False), ("packed", True)):
        batch = bench.systems.processor.collate(chunk, pack=pack)
        loss = ours(batch)["text"] / batch.tokens
        loss.backward()
        projector = dict(ours.inputs["image"].projector.named_parameters())  # type: ignore[union-attr]
        named = {**projector, **(lora_weights(ours.backbone.model) if bench.lora else {})}
        found[name] = {"loss": loss.detach(), **{n: p.grad.clone() for n, p in named.items() if p.grad is not None}}
        bench.optimizer.zero_grad()
    loss = theirs(**for_transformers(chunk)).loss
    loss.backward()
    projector = theirs.get_submodule("base_model.model" if bench.lora else "").model.multi_modal_projector
    layers = {"layers.0": projector.linear_1, "layers.2": projector.linear_2}
    named = {f"{n}.{k}": p for n, layer in layers.items() for k, p in layer.named_parameters()}
    named |= lora_weights(theirs) if bench.lora else {}
    found["hf"] = {"loss": loss.detach(), **{n: p.grad.clone() for n, p in named.items() if p.grad is not None}}
    bench.other_optimizer.zero_grad()
    return found


def differences(found: dict[str, dict[str, Tensor]]) -> dict[str, float]:
    """The largest difference from transformers', relative to the largest entry of the tensor."""
    expected = found["hf"]
    assert all(tensors.keys() == expected.keys() for tensors in found.values())
    return {
        name: max(float((t - expected[key]).abs().max() / expected[key].abs().max()) for key, t in tensors.items())
        for name, tensors in found.items()
        if name != "hf"
    }


def needed_flops(geometry: Geometry, chunks: list[list[Encoded]], *, lora: bool) -> float:
    """Work of one step's forward and backward that no implementation can leave out: real tokens, causal attention at half,
    frozen weights two passes (forward, gradient of what flows through), LoRA's three, logits where labels are, the tower
    up to the layer that is read without gradient, of the last layer keys and values and the rest where labels are.
    """
    v, t = geometry.vision, geometry.text
    total = 0.0
    for sample in (sample for chunk in chunks for sample in chunk):
        length, said = len(sample.ids), sum(sample.supervised)
        places, width, inner = geometry.tokens + 1, v["hidden_size"], v["intermediate_size"]
        layers = v["num_hidden_layers"] - 1
        picture = layers * (2 * places * (4 * width**2 + 2 * width * inner) + 4 * places**2 * width)
        picture += 2 * geometry.tokens * 3 * geometry.patch**2 * width
        d, hidden = t["hidden_size"], t["intermediate_size"]
        linear, low = 2 * (4 * d**2 + 3 * d * hidden), 0.0
        if lora:
            low = (
                2
                * LORA["rank"]
                * sum({"g": d + hidden, "u": d + hidden, "d": d + hidden}.get(n[0], 2 * d) for n in LINEARS)
            )
        attention = 4 * d * length / 2  # of a token, over the places before it
        full, last = length * (linear + attention), length * 2 * 2 * d**2 + said * (linear - 4 * d**2 + attention)
        backbone = (t["num_hidden_layers"] - 1) * full + last
        passes = 2 * backbone + (3 * t["num_hidden_layers"] * length * low)
        head = 2 * 2 * said * d * t["vocab_size"]
        projector = 3 * 2 * geometry.tokens * (width * d + d * d)
        total += passes + head + len(sample.spans) * (picture + projector)
    return total


def peak_rate(half: bool) -> float:
    """FLOP/s of the backbone's usual matrix product in this process: the best of several."""
    dtype = torch.bfloat16 if half else torch.float32
    a, b = torch.randn(2048, 512).to(dtype), torch.randn(512, 1376).to(dtype)
    rates = []
    for _ in range(20):
        begun = time.process_time()
        for _ in range(5):
            a @ b
        rates.append(5 * 2 * 2048 * 512 * 1376 / (time.process_time() - begun))
    return max(rates) * torch.get_num_threads()


def short_cuts(model: MultimodalLM) -> None:
    """What a run does by itself."""
    assert model.start_packing()
    assert "last layer trimmed" in model.backbone.take_short_cuts()


def step_memory(steps: Callable[[], None]) -> int:
    """The bytes that torch allocates at most at once beyond what is there before, in ``steps``."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        steps()
    found: Any = profile.profiler
    events = [event for event in found.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events))


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    geometry, lora, half = GEOMETRIES[arguments.geometry], arguments.stage == "lora", arguments.precision == "bf16"
    drawn = samples(geometry, arguments.mix, 2 * arguments.batch)
    chunks = [drawn[: arguments.batch], drawn[arguments.batch :]]
    exact = Bench(build(geometry, lora=lora), geometry, lora, False, chunks)
    short_cuts(exact.systems.ours)
    errors = differences(gradients(exact))
    assert max(errors.values()) < 1e-4, errors
    bench = exact
    if half:
        bench = Bench(build(geometry, lora=lora), geometry, lora, True, chunks)
    plain = Bench(build(geometry, lora=lora), geometry, lora, half, chunks)  # neither packed nor trimmed
    short_cuts(bench.systems.ours)
    variants: dict[str, Callable[[], None]] = {
        "hf": bench.hf(bench.padded_batches(by_length=False)),
        "hf_tuned": bench.hf_tuned(bench.padded_batches(by_length=True)),
        "padded": plain.mmllm(pack=False),
        "packed": bench.mmllm(pack=True),
        "loop": bench.loop(),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(arguments.rounds + 1):
        for name, steps in variants.items():
            begun = time.process_time()
            steps()
            if number:  # the first round warms up
                seconds[name].append(time.process_time() - begun)
    work, peak = needed_flops(geometry, chunks, lora=lora), peak_rate(half)
    real = sum(len(sample.ids) for sample in drawn)
    padded = sum(len(chunk) * max(len(sample.ids) for sample in chunk) for chunk in chunks)
    memory = {name: step_memory(steps) for name, steps in variants.items()}
    rows = {}
    for name, own in seconds.items():
        ratios = [base / mine for base, mine in zip(seconds["hf"], own, strict=True)]
        tuned = [base / mine for base, mine in zip(seconds["hf_tuned"], own, strict=True)]
        rows[name] = {
            "seconds": statistics.median(own),
            "over_hf": statistics.median(ratios),
            "spread": [min(ratios), max(ratios)],
            "over_tuned": statistics.median(tuned),
            "needed_of_peak": work / statistics.median(own) / peak,
            "memory_mb": memory[name] / 1e6,
            "memory_over_hf": memory[name] / memory["hf"],
        }
    tax = [loop / packed - 1 for loop, packed in zip(seconds["loop"], seconds["packed"], strict=True)]
    return {
        "stage": arguments.stage,
        "precision": arguments.precision,
        "geometry": arguments.geometry,
        "mix": arguments.mix,
        "rounds": arguments.rounds,
        "tokens": {"real": real, "padded": padded},
        "differences_from_hf_fp32": errors,
        "needed_gflop": work / 1e9,
        "peak_gflops": peak / 1e9,
        "variants": rows,
        "framework_tax": statistics.median(tax),
        "machine": {"cpu": platform.processor(), "threads": torch.get_num_threads(), "torch": torch.__version__},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("pretrain", "lora"), default="pretrain")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--geometry", choices=tuple(GEOMETRIES), default="small224")
    parser.add_argument("--mix", choices=tuple(MIXES), default="mix")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    logging.disable(logging.WARNING)
    torch.set_num_threads(arguments.threads)
    found = run(arguments)
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    print(f"{found['stage']}, {found['precision']}, {found['geometry']}, {found['mix']}: {found['tokens']}")
    print("largest difference of loss and gradients from transformers', float32:", found["differences_from_hf_fp32"])
    for name, row in found["variants"].items():
        low, high = row["spread"]
        print(
            f"{name:10s} {row['seconds']:7.2f} s   {row['over_hf']:5.2f} x hf ({low:.2f} to {high:.2f})   "
            f"{row['over_tuned']:5.2f} x tuned   {row['needed_of_peak']:4.0%} of {found['peak_gflops']:.0f} GFLOP/s   "
            f"{row['memory_mb']:5.0f} MB, {row['memory_over_hf']:.2f} of hf's"
        )
    print(f"training loop over the same modules called by hand: {found['framework_tax']:+.1%}")


if __name__ == "__main__":
    main()
