"""What the cache of features saves: an MM-PT step with cached features, without, and in transformers, interleaved, medians.

    python -m benchmarks.cache [--geometry small224] [--mix mix] [--precision fp32] [--rounds 5] [--json]

One step is 8 conversations (mmllm: packed, last layer trimmed), forward, backward, AdamW with clipping, one process and thread;
seconds of process time. ``cached`` finds every picture by the bytes of its file and reads its features from disk, hash
checked; ``plain`` and ``transformers`` are given the prepared pixels, so what decoding costs is not counted for them: it is printed
beside, with what reading costs.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.geometry import GEOMETRIES, MIXES, Geometry, build, for_transformers, samples
from mmllm.cache.identity import identity
from mmllm.cache.media import Facts, MediaCache
from mmllm.cache.store import Room
from mmllm.processing.batch import Encoded, Span
from mmllm.processing.images import decode_image
from mmllm.processing.sources import Limits
from mmllm.training.caching import complete

BATCH = 8


class Pictures:
    """The files of random pictures, by the prepared pixels that stand for them in the samples."""

    def __init__(self, geometry: Geometry) -> None:
        self.side, self.files = geometry.picture, dict[int, bytes]()

    def file(self, span: Span) -> bytes:
        """A JPEG file of its own for every item: noise, smoothed, so that it is as large as a photograph of the size."""
        key = id(span.item["pixels"])
        if key not in self.files:
            noise = np.random.default_rng(len(self.files)).integers(
                0, 256, (self.side // 4, self.side // 4, 3), dtype=np.uint8
            )
            out = BytesIO()
            Image.fromarray(noise).resize((self.side, self.side)).save(out, "JPEG", quality=90)
            self.files[key] = out.getvalue()
        return self.files[key]


def step_of(module: torch.nn.Module, loss: Callable[[Any], Any]) -> Callable[[Any], None]:
    """An optimizer step of what ``module`` trains."""
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step(given: Any) -> None:
        loss(given).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(geometry: Geometry, mix: str, rounds: int, half: bool) -> dict[str, Any]:
    systems, pictures = build(geometry, lora=False), Pictures(geometry)
    ours, processor = systems.ours, systems.processor
    for name, parameter in ours.named_parameters():
        parameter.requires_grad_(name.startswith("inputs.image.projector"))
        if half and not parameter.requires_grad and parameter.ndim >= 2:
            parameter.data = parameter.data.bfloat16()
    systems.theirs.to(torch.bfloat16) if half else None
    if not ours.start_packing():
        raise RuntimeError("the backbone cannot be packed")
    ours.backbone.take_short_cuts()
    one: Any = ours.inputs["image"]
    one.encoder.eval()
    with tempfile.TemporaryDirectory() as folder:
        cache = MediaCache(Path(folder), identity(one.encoder), room=Room(Path(folder), 10**10))
        one.cache = cache
        reader = processor.reading_caches({"inputs.image": cache})
        preprocessor = processor.modalities["image"].preprocessor

        def looked_up(chunk: list[Encoded]) -> list[Encoded]:
            """The samples as a worker makes them: every picture found, or prepared."""

            def found(span: Span) -> Span:
                pixels = span.item["pixels"]
                known = cache.find(pictures.file(span), lambda: {"pixels": pixels}, lambda _: Facts(span.count))
                return replace(span, known=known, item=span.item)

            return [replace(sample, spans=[found(span) for span in sample.spans]) for sample in chunk]

        def our_loss(chunk: list[Encoded]) -> torch.Tensor:
            batch = complete(reader.collate(chunk, pack=True), reader, {"inputs.image": cache})
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                return ours(batch)["text"] / batch.tokens

        def their_loss(chunk: list[Encoded]) -> torch.Tensor:
            given = for_transformers(chunk)
            if half and "pixel_values" in given:
                given["pixel_values"] = given["pixel_values"].bfloat16()
            return systems.theirs(**given).loss

        ours_step, their_step = step_of(ours, our_loss), step_of(systems.theirs, their_loss)
        chosen = samples(geometry, mix, 2 * BATCH)
        chunks = [chosen[:BATCH], chosen[BATCH:]]
        for chunk in chunks:  # fills the cache
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
                batch = complete(reader.collate(looked_up(chunk), pack=True), reader, {"inputs.image": cache})
                one.features(batch.media["image"].inputs, batch.media["image"].cached)
        cache.store.commit()
        plain, kept = (float(our_loss(chunk).detach()) for chunk in (chunks[0], looked_up(chunks[0])))
        variants: dict[str, Callable[[list[Encoded]], None]] = {
            "transformers": their_step,
            "plain": ours_step,
            "cached": lambda chunk: ours_step(looked_up(chunk)),
        }
        times: dict[str, list[float]] = {name: [] for name in variants}
        for turn in range(rounds + 1):
            for name, step in variants.items():
                begin = time.process_time()
                for chunk in chunks if turn else chunks[:1]:  # the first round warms up
                    step(chunk)
                if turn:
                    times[name].append(time.process_time() - begin)
        tally = cache.tally
        begin = time.process_time()
        for file in pictures.files.values():
            preprocessor(decode_image(file, limits=Limits()))
        decoding = (time.process_time() - begin) / len(pictures.files)
        stored = sum(path.stat().st_size for path in Path(folder).rglob("*.bin")) / len(pictures.files)

    def ratio(slow: str, fast: str) -> dict[str, float]:
        found = sorted(a / b for a, b in zip(times[slow], times[fast], strict=True))
        return {"median": statistics.median(found), "least": found[0], "most": found[-1]}

    return {
        "seconds": {name: statistics.median(found) / len(chunks) for name, found in times.items()},
        "plain / cached": ratio("plain", "cached"),
        "transformers / plain": ratio("transformers", "plain"),
        "transformers / cached": ratio("transformers", "cached"),
        "loss, relative difference": abs(kept - plain) / plain,
        "milliseconds a picture": {
            "encoding": 1e3 * tally.making / tally.made,
            "decoding and preparing": 1e3 * decoding,
            "reading": 1e3 * tally.reading / tally.read,
            "writing": 1e3 * tally.writing / tally.made,
        },
        "kilobytes a picture": stored / 1e3,
        "pictures": len(pictures.files),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", default="small224", choices=list(GEOMETRIES))
    parser.add_argument("--mix", default="mix", choices=list(MIXES))
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {
        "geometry": options.geometry, "mix": options.mix, "precision": options.precision, "rounds": options.rounds,
        "machine": platform.processor() or platform.machine(), "torch": torch.__version__,
        **measure(GEOMETRIES[options.geometry], options.mix, options.rounds, options.precision == "bf16"),
    }  # fmt: skip
    if options.json:
        print(json.dumps(found, indent=2))
        return
    for name, value in found.items():
        told = ", ".join(f"{key} {number:.4g}" for key, number in value.items()) if isinstance(value, dict) else value
        print(f"{name:28}{told}")


if __name__ == "__main__":
    main()
