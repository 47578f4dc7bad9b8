"""Configuration that all latent-diffusion generators share: any diffusers folder or hub repository of a known class."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import PositiveInt

from mmllm.config.base import BuildContext, suggest
from mmllm.config.families import GeneratorConfig, Shape
from mmllm.errors import CheckpointError, MmllmError
from mmllm.pretrained import find, read_json

if TYPE_CHECKING:
    from mmllm.generators.diffusion_module import LatentDiffusion

Read = Callable[[str], dict[str, Any]]  # a JSON file of the folder, by its path in it


@dataclass(frozen=True)
class Family:
    """What mmllm knows of one diffusers pipeline class.

    ``module`` is ``module:Class`` of its ``LatentDiffusion``; ``shapes(read, length)`` gives the condition's streams, where
    ``length`` is the number of text positions asked for, or None for the pipeline's own; ``size(read)`` is the pipeline's own
    size of what it makes, as keyword arguments of its call.
    """

    module: str
    shapes: Callable[[Read, int | None], dict[str, Shape]]
    size: Callable[[Read], dict[str, Any]]


class LatentDiffusionConfig(GeneratorConfig):
    """``pretrained`` is a diffusers folder (``./`` is relative to the config file) or a hub id.

    - ``architecture``: what a plan needs without the files, ``{pipeline: StableDiffusionPipeline, condition: {text: [77,
      768]}}``; it is checked against the folder when there is one. Without ``pretrained``, ``pipeline`` names the class
      of a tiny random generator.
    - ``scheduler``: the name of a diffusers scheduler class to sample with, in place of the folder's.
    - ``steps``, ``guidance``, ``negative`` (a text), ``seed``: defaults of sampling; the pipeline's own when not given.
    - ``condition_length``: positions of the text condition, for families where that is free.
    """

    families: ClassVar[Mapping[str, Family]]
    pretrained: str | None = None
    revision: str | None = None
    architecture: dict[str, Any] | None = None
    scheduler: str | None = None
    steps: PositiveInt | None = None
    guidance: float | None = None
    negative: str | None = None
    seed: int | None = None
    condition_length: PositiveInt | None = None

    @abstractmethod
    def size(self) -> dict[str, Any]:
        """The size that the YAML asks for, as keyword arguments of the pipeline's call."""

    def full_size(self, context: BuildContext) -> dict[str, Any]:
        """The size of what is made: the YAML's, and the pipeline's own where that says nothing."""
        read = self._reader(context)
        own = self.families[self.pipeline_class(context)].size(read) if read else {}
        return own | self.size()

    def tiny(self) -> Self:
        name = (self.architecture or {}).get("pipeline") or next(iter(self.families))
        return self.model_copy(
            update={
                "pretrained": None,
                "revision": None,
                "architecture": {"pipeline": name},
                "steps": 2,
                "condition_length": None,
            }
        )

    def pipeline_class(self, context: BuildContext) -> str:
        """The diffusers class. Raises ``CheckpointError`` for a folder of another kind."""
        given = (self.architecture or {}).get("pipeline")
        read = self._reader(context)
        name = read("model_index.json").get("_class_name") if read else given
        if name is None:
            raise MmllmError(
                f"{self.kind} {self.pretrained}: its class is not known offline; give `architecture: {{pipeline: …, "
                "condition: {text: [L, D]}}` or a local folder as `pretrained`"
            )
        if name not in self.families:
            known = ", ".join(self.families)
            raise CheckpointError(
                f"{self.kind} {self.pretrained}: found a {name}, expected one of {known}{suggest(str(name), self.families)}"
            )
        if given not in (None, name):
            raise CheckpointError(f"{self.kind} {self.pretrained}: found a {name}, `architecture` says {given}")
        return str(name)

    def condition_shape(self, context: BuildContext) -> dict[str, Shape]:
        name, read = self.pipeline_class(context), self._reader(context)
        given = {k: (int(v[0]), int(v[1])) for k, v in (self.architecture or {}).get("condition", {}).items()}
        if read is None:
            if not given:
                raise MmllmError(
                    f"{self.kind} {self.pretrained}: give `architecture.condition`, such as {{text: [77, 768]}}"
                )
            return given
        found = self.families[name].shapes(read, self.condition_length)
        if given and given != found:
            raise CheckpointError(
                f"{self.kind} {self.pretrained}: its condition is {found}, `architecture` says {given}"
            )
        return found

    def build(self, context: BuildContext) -> LatentDiffusion | None:
        if self.pretrained is not None and not context.weights:
            return None
        from mmllm.generators.diffusion_module import load_generator

        return load_generator(self, context)

    def _reader(self, context: BuildContext) -> Read | None:
        """Reads the folder's JSON files; None on the hub without leave to download."""
        if self.pretrained is None:
            from mmllm.generators.tiny import tiny_configs

            return tiny_configs((self.architecture or {}).get("pipeline") or next(iter(self.families)))
        reference = context.resolve(self.pretrained)
        if not context.weights and not Path(reference).is_dir():
            return None

        def read(name: str) -> dict[str, Any]:
            path = find(reference, self.revision, [name])
            if path is None:
                raise CheckpointError(f"found no {name} in {reference}; expected a diffusers folder")
            return read_json(path)

        return read
