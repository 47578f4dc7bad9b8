"""Turns signals into media in a thread of its own while the text goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import torch
from torch import Tensor

from mmllm.config.base import suggest
from mmllm.errors import MmllmError
from mmllm.generators.base import Artifact, Sampling
from mmllm.model import MultimodalLM
from mmllm.outputs import AnyOutput, Output
from mmllm.replies import Media
from mmllm.retrieval import Retrieval


class Maker:
    """Turns signals into media in a thread of its own, one after the other, while the backbone writes on.

    ``options`` are changes of the generators' sampling by modality, ``{"image": {"steps": 20, "seed": 1}}``. ``seed`` is
    for generators that have none of their own: the i-th medium of a reply gets ``seed + i``. ``retrieval`` holds what may
    be found instead, by modality.
    """

    def __init__(
        self,
        model: MultimodalLM,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        seed: int | None = None,
        stop: threading.Event | None = None,
        retrieval: Mapping[str, Retrieval] | None = None,
    ) -> None:
        self.model, self.options, self.seed, self.stop = model, options or {}, seed, stop
        self.retrieval = retrieval or {}
        unknown = [name for name in self.options if name not in model.outputs]
        if unknown:
            known = ", ".join(model.outputs) or "nothing"
            raise MmllmError(f"options for {', '.join(unknown)}, but this model makes {known}")
        for name, changes in self.options.items():
            known_options = _output(model, name).frozen().options
            for option in changes:
                if option not in known_options:
                    found = f"unknown option {option!r} of {name}; known: {', '.join(known_options) or 'none'}"
                    raise MmllmError(found + suggest(option, known_options))
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="generator")
        self._made = 0
        self._found: dict[int, set[str]] = {}

    def make(self, modality: str, signals: Tensor, reply: int = 0) -> Media:
        """Begin to make a medium from the ``signals`` of a group, or to read one that is found: none twice in one ``reply``
        of several.
        """
        output = _output(self.model, modality)
        retrieval = self.retrieval.get(modality)
        found = retrieval and retrieval.find(cast(Output, output), signals, self._found.setdefault(reply, set()))
        if retrieval and found:
            self._found[reply].add(found.file)
            path = retrieval.index.root / found.file
            media = Media(modality, path.suffix, path, found.similarity)
            self._pool.submit(self._fill, media, lambda: retrieval.index.read(found.file))
            return media
        generator = output.frozen()
        sampling = generator.sampling.with_(**self.options.get(modality, {}))
        if sampling.seed is None and self.seed is not None:
            sampling = sampling.with_(seed=self.seed + self._made)
        self._made += 1
        media = Media(modality, generator.suffix)
        self._pool.submit(self._fill, media, lambda: self._generated(media, output, signals, sampling))
        return media

    def _generated(self, media: Media, output: AnyOutput, signals: Tensor, sampling: Sampling) -> Artifact | None:
        def after(done: int, total: int) -> bool:
            media.progress = (done, total)
            return self.stop is None or not self.stop.is_set()

        with torch.no_grad():
            made = output.make(signals, sampling, after)
        return made[0] if made else None

    def _fill(self, media: Media, get: Callable[[], Artifact | None]) -> None:
        try:
            media._future.set_result(None if self.stop is not None and self.stop.is_set() else get())
        except Exception as error:  # of any library underneath; `result` raises it where it is asked for
            media._future.set_exception(error)

    def close(self) -> None:
        """Take no more; what was begun goes on."""
        self._pool.shutdown(wait=False)


def _output(model: MultimodalLM, name: str) -> AnyOutput:
    return cast(AnyOutput, model.outputs[name])
