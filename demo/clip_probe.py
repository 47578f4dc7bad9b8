"""Held-out probe of the small CLIP: does it write exact captions, do its patches name the right shapes?"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from clip_data import JOINT, START, Words, collate
from scene_model import Scene, sample_scene, scene_from_nlvr
from scene_text import part_captions, summary

if TYPE_CHECKING:
    from train_clip import Trainee


@torch.no_grad()
def probe(model: Trainee, words: Words, per_kind: int, nlvr: Path | None) -> dict[str, dict[str, float]]:
    """Per kind of scene: word accuracy under teacher forcing, exact greedy captions, exact patches, by caption type.

    The scenes come from a seed that training never uses; with ``nlvr``, the pictures of its dev split as the corpus
    describes them are added (drawn by :func:`scene_model.render`, which equals the originals up to edge pixels).
    """
    rng = random.Random("clip-probe")
    sets: dict[str, list[Scene]] = {
        kind: [sample_scene(rng, kind) for _ in range(per_kind)] for kind in ("canvas", "scatter", "tower")
    }
    if nlvr is not None:
        rows = [json.loads(line) for line in (nlvr / "dev.jsonl").read_text().splitlines()]
        sets["nlvr dev"] = [scene_from_nlvr(r["structured_rep"]) for r in rng.sample(rows, min(len(rows), per_kind))]
    model.eval()
    results = {name: _measure(model, words, scenes, rng) for name, scenes in sets.items()}
    model.train()
    return results


def _measure(model: Trainee, words: Words, scenes: list[Scene], rng: random.Random) -> dict[str, float]:
    hits: dict[str, list[float]] = {}
    device = next(model.parameters()).device
    for start in range(0, len(scenes), 20):
        group = scenes[start : start + 20]
        texts = [[summary(s), *part_captions(s, rng, 3)] for s in group]
        batch = {k: v.to(device) for k, v in collate(group, texts, words).items()}
        features, patches, _ = model.see(batch["patches"], batch["grids"])
        text = batch["text"].flatten(0, 1)
        logits = model.write(model.read(text)[0], patches, features.mask)
        right = (logits[:, :-1].argmax(-1) == text[:, 1:])[text[:, 1:] != 0]
        hits.setdefault("word accuracy", []).extend(right.float().tolist())
        joint = (model.grounding(patches)[..., :JOINT] > 0) == (batch["grounding"][..., :JOINT] > 0)
        hits.setdefault("grounding: exact pictures", []).extend(
            (joint.all(-1) | ~features.mask).all(-1).float().tolist()
        )
        written = _greedy(text, words, lambda t, p=patches, m=features.mask: model.write(model.read(t)[0], p, m))
        for want, got in zip(text.tolist(), written.tolist(), strict=True):
            name = _name(words.decode(want))
            hits.setdefault(f"exact: {name}", []).append(float(words.decode(want) == words.decode(_cut(got, words))))
    return {k: round(sum(v) / len(v), 4) for k, v in sorted(hits.items())}


def _name(caption: list[str]) -> str:
    """The type of a caption, from the words before its colon, without the name of the box."""
    head = caption[: caption.index(":")]
    return " ".join("box" if w in ("left", "middle", "right") else w for w in head if w != "box")


def _cut(ids: list[int], words: Words) -> list[int]:
    end = len(words.words) - 1
    return ids[: ids.index(end)] if end in ids else ids


def _greedy(text: torch.Tensor, words: Words, logits: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Continue each caption after its colon by the most likely word, to the length of the longest reference."""
    colon = words.ids[":"]
    heads = (text == colon).int().argmax(dim=1)  # the part's name and the colon are given, the rest is written
    ids = torch.where(torch.arange(text.shape[1], device=text.device)[None] <= heads[:, None], text, 0)
    ids[:, 0] = START
    for position in range(1, text.shape[1]):
        step = logits(ids[:, :position])[:, -1].argmax(-1)
        ids[:, position] = torch.where(position <= heads, ids[:, position], step)
    return ids
