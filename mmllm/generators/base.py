"""The contract of a generator's module."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn import functional as F

from mmllm.config.families import Codes, Shape
from mmllm.errors import MmllmError


@dataclass(frozen=True)
class Condition:
    """What a generator is told, for N items: ``streams`` are ``{name: (N, L, D)}``.

    ``masks`` are bool ``(N, L)``, True where a position says something; a stream without one is real all over.
    """

    streams: dict[str, Tensor]
    masks: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.streams.values())))

    def __getitem__(self, name: str) -> Tensor:
        return self.streams[name]

    def mask(self, name: str) -> Tensor:
        """The mask of a stream, ``(N, L)`` bool."""
        stream = self.streams[name]
        return self.masks.get(name, torch.ones(stream.shape[:2], dtype=torch.bool, device=stream.device))

    def at(self, index: Tensor) -> Condition:
        """The condition of the items at ``index`` (int64)."""
        streams = {name: value[index] for name, value in self.streams.items()}
        return Condition(streams, {name: mask[index] for name, mask in self.masks.items()})

    def to(self, device: torch.device, dtype: torch.dtype) -> Condition:
        streams = {name: value.to(device, dtype) for name, value in self.streams.items()}
        return Condition(streams, {name: mask.to(device) for name, mask in self.masks.items()})

    def distance(self, wanted: Condition, measure: Literal["l2", "cosine"] = "l2") -> Tensor:
        """How far this is from ``wanted``, ``(N,)`` in float32: the mean over the real positions of all its streams.

        ``l2`` is the Euclidean norm over D, not squared (GILL's and NExT-GPT's loss); ``cosine`` is 1 - cosine similarity.
        """
        far, real = [], []
        for name, target in wanted.streams.items():
            a, b = self.streams[name].float(), target.float()
            far.append((a - b).norm(dim=-1) if measure == "l2" else 1 - F.cosine_similarity(a, b, dim=-1))
            real.append(wanted.mask(name))
        mask = torch.cat(real, dim=1)
        return (torch.cat(far, dim=1) * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


@dataclass(frozen=True)
class Sampling:
    """How media are drawn from a condition. None leaves a value to the generator's own default.

    ``size`` holds the keyword arguments of the family: width and height in pixels, number of frames, seconds.
    """

    steps: int | None = None
    guidance: float | None = None
    negative: str | None = None
    seed: int | None = None
    size: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise MmllmError(f"steps is {self.steps}; at least 1 is needed")

    def with_(self, **changes: Any) -> Self:
        """A copy with those ``changes`` that are not None; unknown names are sizes."""
        given = {name: value for name, value in changes.items() if value is not None}
        own = {name: given.pop(name) for name in ("steps", "guidance", "negative", "seed") if name in given}
        return replace(self, **own, size={**self.size, **given})


class Artifact(Protocol):
    """A generated medium: a ``PIL.Image``, a ``Sound`` or a ``Clip``."""

    def save(self, path: str | Path) -> None: ...


@dataclass(frozen=True)
class Sound:
    """Mono float32 ``samples (T,)`` in [-1, 1] at ``sample_rate`` Hz."""

    samples: np.ndarray[Any, np.dtype[np.float32]]
    sample_rate: int

    def save(self, path: str | Path) -> None:
        """Write 16-bit PCM; the ending of ``path`` chooses the format (wav, flac, ogg)."""
        import soundfile

        soundfile.write(path, self.samples, self.sample_rate)


@dataclass(frozen=True)
class Clip:
    """A video without sound: RGB pictures at ``frames_per_second``."""

    frames: list[Image]
    frames_per_second: float

    def save(self, path: str | Path) -> None:
        """Write an animated picture; the ending of ``path`` chooses the format (gif, webp, png)."""
        first, *rest = self.frames
        first.save(path, save_all=True, append_images=rest, duration=round(1000 / self.frames_per_second), loop=0)


class MediaGenerator(nn.Module):
    """What all generators have: ``suffix``, the usual ending of what it makes, ``sampling``, its defaults, and ``options``,
    the names by which a call can change them.
    """

    suffix: ClassVar[str]
    sampling: Sampling

    @property
    @abstractmethod
    def options(self) -> tuple[str, ...]: ...

    def train(self, mode: bool = True) -> Self:
        """Always in evaluation mode: a generator is frozen."""
        return super().train(False)


class CodeGenerator(MediaGenerator):
    """A frozen model of discrete codes, ``codes`` of them per medium. It draws nothing, so it has no options.

    P is ``codes.length * codes.codebooks``: position by position, and at each the codebooks in turn.
    """

    codes: Codes
    sampling = Sampling()
    options = ()

    @abstractmethod
    def encode(self, targets: Tensor) -> Tensor:
        """The codes ``(N, P)``, int64 from 0 to ``codes.size - 1``, of ``targets (N, …)`` made by the config's ``Target``."""

    @abstractmethod
    def generate(
        self,
        codes: Tensor,
        sampling: Sampling | None = None,
        on_step: Callable[[int, int], bool] | None = None,
    ) -> list[Artifact]:
        """N media from codes ``(N, P)``, in one step; ``on_step`` as for ``Generator.generate``."""


class Generator(MediaGenerator):
    """A frozen generator that is told a condition; ``condition_shape`` maps the condition's streams to (L, D).
    ``size_options`` are the names that its ``Sampling.size`` may hold.
    """

    size_options: ClassVar[tuple[str, ...]]
    condition_shape: dict[str, Shape]

    @property
    def options(self) -> tuple[str, ...]:
        return ("steps", "guidance", "negative", "seed", *self.size_options)

    @abstractmethod
    def encode_text(self, captions: Sequence[str]) -> Condition:
        """The generator's own text condition of N captions, without a graph: what an output projector learns to give."""

    def fingerprint(self) -> str:
        """A hash of all that ``encode_text`` depends on: the class, the weights and their dtypes, and the versions of the
        libraries that compute. What else a subclass reads belongs in here too.
        """
        import diffusers
        import transformers

        versions = [torch.__version__, transformers.__version__, diffusers.__version__]
        total = hashlib.sha256(f"{type(self).__qualname__} {versions} {self.condition_shape}\n".encode())
        for name, value in sorted(self.state_dict().items()):
            total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return total.hexdigest()

    @abstractmethod
    def denoising_loss(self, condition: Condition, targets: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The frozen denoiser's loss ``(N,)`` on noised latents of ``targets (N, …)``, made by the config's
        ``Target``; differentiable in ``condition``.
        """

    def defaults(self) -> dict[str, float]:
        """``steps`` and ``guidance`` as they are when no call says otherwise; without those that do not apply."""
        numbers = {"steps": self.sampling.steps, "guidance": self.sampling.guidance}
        return {name: value for name, value in numbers.items() if value is not None}

    @abstractmethod
    def generate(
        self,
        condition: Condition,
        sampling: Sampling | None = None,
        on_step: Callable[[int, int], bool] | None = None,
    ) -> list[Artifact]:
        """N media from a condition; item i uses seed ``sampling.seed + i``.

        ``on_step(done, all)`` is called after every denoising step; when it returns False, generation ends and the
        result is empty.
        """
