"""Answering with an existing medium: an index of candidates in the retrieval space, and the rule that decides.

An index is a folder: ``index.safetensors`` holds ``embeddings (N, dim)`` and a ``probe (dim,)`` of the heads that made
them, ``index.json`` the files, relative to ``root``, which is relative to the index's own folder.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from mmllm.errors import CheckpointError, DataError, MediaError, MmllmError
from mmllm.generators.base import Artifact, Sound
from mmllm.model import MultimodalLM
from mmllm.outputs import Output
from mmllm.pretrained import read_json, read_tensors
from mmllm.processing.messages import Part
from mmllm.processing.processor import Processor
from mmllm.processing.reading import DECODERS
from mmllm.processing.sources import Limits, read_media
from mmllm.projectors.retrieval import RetrievalHeads

FORMAT = 1
Rule = Literal["auto", "trained", "generate", "retrieve"]
RULES: tuple[Rule, ...] = ("auto", "trained", "generate", "retrieve")
# What a decoded medium of a kind is to a user; the second argument are the decoder's options.
ARTIFACTS: dict[str, Callable[[Any, Mapping[str, Any]], Artifact]] = {
    "image": lambda picture, _: cast(Artifact, picture),
    "audio": lambda samples, options: Sound(samples, options["sample_rate"]),
}


@dataclass(frozen=True)
class Found:
    """A candidate: its file, and the cosine similarity to what was asked for, -1 to 1."""

    file: str
    similarity: float


@dataclass(frozen=True)
class MediaIndex:
    """Candidates for the output ``modality``: ``files`` below ``root`` and their unit vectors ``embeddings (N, dim)``.

    ``media`` and ``decode_options`` say how the files are decoded. ``skipped`` are files that could not be, by name.
    """

    modality: str
    root: Path
    files: tuple[str, ...]
    embeddings: Tensor
    probe: Tensor
    media: str
    decode_options: dict[str, Any] = field(default_factory=dict)
    skipped: tuple[tuple[str, str], ...] = ()

    def nearest(self, query: Tensor, without: Collection[str] = ()) -> Found | None:
        """The candidate most similar to the unit vector ``query (dim,)``, other than ``without``; None without any."""
        similarities = self.embeddings @ query.to(self.embeddings)
        for place in similarities.argsort(descending=True)[: len(without) + 1].tolist():
            if self.files[place] not in without:
                return Found(self.files[place], float(similarities[place]))
        return None

    def read(self, file: str) -> Artifact:
        """A candidate, decoded. Raises ``MediaError`` when it is gone, or lies outside ``root``."""
        limits = Limits()
        decoded = DECODERS[self.media](
            read_media(file, root=self.root, limits=limits), limits=limits, **self.decode_options
        )
        return ARTIFACTS[self.media](decoded, self.decode_options)

    def save(self, folder: Path) -> None:
        """Write the index to ``folder``. Raises ``MmllmError`` for a folder that holds anything else."""
        from safetensors.torch import save_file

        others = [p.name for p in folder.iterdir() if not p.name.startswith("index.")] if folder.is_dir() else []
        if others:
            raise MmllmError(f"{folder} holds other files ({others[0]}); an index needs a folder of its own")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "index.json").unlink(missing_ok=True)  # a half-written index is none
        save_file({"embeddings": self.embeddings.contiguous(), "probe": self.probe}, folder / "index.safetensors")
        root = os.path.relpath(self.root.resolve(), folder.resolve())
        told = {"format": FORMAT, "modality": self.modality, "media": self.media, "decode_options": self.decode_options}
        text = json.dumps({**told, "root": Path(root).as_posix(), "files": self.files}, ensure_ascii=False, indent=1)
        (folder / "index.json").write_text(text + "\n", encoding="utf-8")


def load_index(folder: str | Path) -> MediaIndex:
    """Read an index. Raises ``CheckpointError`` when there is none, or it is damaged."""
    folder = Path(folder)
    if not (folder / "index.json").is_file():
        raise CheckpointError(f"{folder}: no index there; make one with `mmllm index`")
    told = read_json(folder / "index.json")
    if told.get("format") != FORMAT:
        raise CheckpointError(f"{folder}: index format {told.get('format')!r}, this version reads {FORMAT}")
    tensors = read_tensors([folder / "index.safetensors"], [""])
    rows = len(tensors.get("embeddings", ()))
    if rows != len(told["files"]) or "probe" not in tensors or told["media"] not in DECODERS:
        raise CheckpointError(f"{folder} is damaged: {rows} embeddings for {len(told['files'])} files; make it again")
    root = (folder / told["root"]).resolve()
    options = (tensors["embeddings"], tensors["probe"], told["media"], told["decode_options"])
    return MediaIndex(told["modality"], root, tuple(told["files"]), *options)


def build_index(
    model: MultimodalLM, processor: Processor, source: str | Path, modality: str | None = None, batch_size: int = 16
) -> MediaIndex:
    """Embed the candidates of ``source``: a folder (all files below it), or a JSONL file of paths relative to its folder,
    each line ``{"path": …}`` or a string.

    ``modality`` is an output with retrieval heads, by default the only one. What cannot be decoded is left out and told
    as ``skipped``. Raises ``MmllmError`` when the model has no such heads, ``DataError`` when nothing is left.
    """
    able = [name for name in model.outputs if _output(model, name) is not None]
    if modality is None and len(able) == 1:
        (modality,) = able
    if modality is None or modality not in able:
        known = ", ".join(able) or "none"
        raise MmllmError(f"an index is for one output with retrieval heads; this model's: {known}; found {modality}")
    root, files = candidates(Path(source))
    preprocessor = processor.modalities[modality].preprocessor
    device = next(model.parameters()).device
    kept: list[str] = []
    skipped: list[tuple[str, str]] = []
    rows: list[Tensor] = []
    waiting: list[dict[str, Tensor]] = []

    def embed() -> None:
        if waiting:
            inputs = {name: value.to(device) for name, value in preprocessor.collate(waiting).items()}
            rows.append(model.embed_media(modality, inputs).cpu())
            waiting.clear()

    with torch.inference_mode():
        for file in _track(files):
            try:
                waiting.append(processor.load(Part(modality, file), root))
                kept.append(file)
            except MediaError as error:
                skipped.append((file, str(error)))
            if len(waiting) == batch_size:
                embed()
        embed()
    if not kept:
        first = f"; the first: {skipped[0][1]}" if skipped else ""
        raise DataError(f"{source}: none of {len(files)} files can be taken as {modality}{first}")
    embeddings, probe = torch.cat(rows).clone(), _probe(_heads(model, modality))
    options = dict(preprocessor.decode_options)
    return MediaIndex(modality, root, tuple(kept), embeddings, probe, preprocessor.media, options, tuple(skipped))


def candidates(source: Path) -> tuple[Path, list[str]]:
    """The folder that the files of ``source`` lie in, and their paths relative to it. See ``build_index``."""
    if source.is_dir():
        found = (path.relative_to(source) for path in sorted(source.rglob("*")) if path.is_file())
        return source.resolve(), [p.as_posix() for p in found if not any(word.startswith(".") for word in p.parts)]
    if not source.is_file():
        raise DataError(f"{source}: neither a folder nor a file of paths")
    files = []
    for number, line in enumerate(source.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{source}:{number}: no JSON: {error}") from error
        path = row.get("path") if isinstance(row, dict) else row
        if not isinstance(path, str):
            raise DataError(f'{source}:{number}: expected {{"path": …}} or a string, found {line:.80}')
        files.append(path)
    return source.resolve().parent, list(dict.fromkeys(files))


@dataclass(frozen=True)
class Retrieval:
    """When an existing medium of ``index`` is the answer.

    ``rule``: ``auto`` when the nearest is at least ``threshold`` similar, ``trained`` when the model's decision head says
    so, ``retrieve`` always, ``generate`` never.
    """

    index: MediaIndex
    rule: Rule = "auto"
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise MmllmError(f"rule {self.rule!r}; expected one of {', '.join(RULES)}")
        if not -1 <= self.threshold <= 1:
            raise MmllmError(f"the threshold is a cosine similarity, -1 to 1, not {self.threshold}")

    def check(self, model: MultimodalLM) -> None:
        """Raise ``MmllmError`` when ``model`` did not make the index, or cannot follow the rule."""
        heads = _heads(model, self.index.modality)
        probe = _probe(heads)
        # By angle, not bit by bit: the same heads may be held in bfloat16 here and were in float32 there.
        if probe.shape != self.index.probe.shape or float(probe @ self.index.probe) < 0.999:
            raise MmllmError("the index was made with another model; make it again with `mmllm index`")
        output = _output(model, self.index.modality)
        if self.rule == "trained" and (output is None or output.decision is None):
            raise MmllmError(
                f"this model has no decision head for {self.index.modality}; choose auto, generate or retrieve"
            )

    @torch.inference_mode()
    def find(self, output: Output, signals: Tensor, without: Collection[str] = ()) -> Found | None:
        """The medium to answer ``signals (1, K, D_llm)`` with, not one of ``without``; None to generate one."""
        if self.rule == "generate" or output.retrieval is None:
            return None
        if self.rule == "trained" and output.decision is not None and int(output.decision(signals).argmax()) == 0:
            return None
        found = self.index.nearest(output.retrieval.embed_signals(signals)[0].cpu(), without)
        if self.rule == "auto" and found is not None and found.similarity < self.threshold:
            return None
        return found


def _output(model: MultimodalLM, modality: str) -> Output | None:
    """The output of that name, if it has retrieval heads. Outputs that write codes have none."""
    output = dict(model.outputs.items()).get(modality)
    return output if isinstance(output, Output) and output.retrieval is not None else None


def _heads(model: MultimodalLM, modality: str) -> RetrievalHeads:
    output = _output(model, modality)
    if output is None or output.retrieval is None:
        raise MmllmError(f"the index is for {modality}, but this model has no retrieval heads for that")
    return output.retrieval


def _probe(heads: RetrievalHeads) -> Tensor:
    """Where the media head sends a fixed vector: two models that agree here have the same head."""
    pattern = torch.linspace(-1, 1, heads.media.in_features)[None, None].to(heads.media.weight.device)
    with torch.no_grad():
        return heads.embed_media(pattern, torch.ones(1, 1, dtype=torch.bool, device=pattern.device))[0].cpu()


def _track(files: list[str]) -> Iterable[str]:
    from rich.console import Console
    from rich.progress import track

    return track(files, "embedding", console=Console(stderr=True), disable=not sys.stderr.isatty())
