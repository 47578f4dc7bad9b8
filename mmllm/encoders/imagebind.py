"""The ``imagebind`` encoder: six modalities, one trunk each, one embedding space (arXiv 2305.05665)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import PositiveInt, model_validator

from mmllm.config.base import BuildContext, Config
from mmllm.config.families import EncoderConfig, FrameCount

if TYPE_CHECKING:
    from mmllm.encoders.imagebind_module import ImageBindEncoder
    from mmllm.encoders.imagebind_preprocess import ImageBindPreprocessor

Modality = Literal["image", "video", "audio", "text", "depth", "thermal", "imu"]
Trunk = Literal["vision", "audio", "text", "depth", "thermal", "imu"]
TRUNKS: dict[Modality, Trunk] = {
    "image": "vision",
    "video": "vision",
    "audio": "audio",
    "text": "text",
    "depth": "depth",
    "thermal": "thermal",
    "imu": "imu",
}
CLIPS: dict[Modality, int] = {"video": 5, "audio": 3}  # `load_and_transform_…_data` of the reference's data.py


class ImageBindArchitecture(Config):
    """One trunk's numbers.

    ``size`` is what it reads: rows and columns of pixels; mel bins and frames; channels and samples of an IMU; vocabulary
    and positions of text. A token is a ``patch`` of it (a square; of an IMU, samples), the next begins ``stride`` on.
    ``output_dim`` is the width of the common embedding.
    """

    width: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    size: tuple[PositiveInt, PositiveInt]
    patch: PositiveInt = 1
    stride: PositiveInt = 1
    output_dim: PositiveInt = 1024

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide width {self.width}")
        if self.patch > self.size[1]:
            raise ValueError(f"a patch of {self.patch} does not fit a size of {self.size[0]} x {self.size[1]}")
        return self

    def steps(self, axis: int) -> int:
        """Patches along an axis of ``size``."""
        return (self.size[axis] - self.patch) // self.stride + 1


# `imagebind_huge` of facebookresearch/ImageBind, imagebind/models/imagebind_model.py
HUGE: dict[Trunk, ImageBindArchitecture] = {
    "vision": ImageBindArchitecture(width=1280, layers=32, heads=16, size=(224, 224), patch=14, stride=14),
    "audio": ImageBindArchitecture(width=768, layers=12, heads=12, size=(128, 204), patch=16, stride=10),
    "text": ImageBindArchitecture(width=1024, layers=24, heads=16, size=(49408, 77)),
    "depth": ImageBindArchitecture(width=384, layers=12, heads=8, size=(224, 224), patch=16, stride=16),
    "thermal": ImageBindArchitecture(width=768, layers=12, heads=12, size=(224, 224), patch=16, stride=16),
    "imu": ImageBindArchitecture(width=512, layers=6, heads=8, size=(6, 2000), patch=8, stride=8),
}
TINY: dict[Trunk, tuple[int, int]] = {"audio": (36, 204), "text": (49408, 77), "imu": (6, 40)}


class ImageBindConfig(EncoderConfig):
    """One trunk of ImageBind. Several inputs may name the same ``pretrained`` file: each reads its own trunk of it.

    - ``modality``: ``image`` and ``video`` (both the vision trunk), ``audio``, ``depth`` and ``thermal`` (pictures, read as
      grey), ``text`` and ``imu`` (from Python only: no file of those is opened).
    - ``pretrained``: a ``.safetensors`` file with the names of the published ``imagebind_huge.pth``, a folder or a hub id
      that holds it as ``model.safetensors``. The weights are CC BY-NC-SA 4.0: not for commercial use.
    - ``architecture``: the trunk's numbers where they are not ``imagebind_huge``'s.
    - ``output``: ``pooled``, one embedding of unit length (NExT-GPT); ``clips``, one of every stretch (Video-LLaMA); or
      ``tokens``, what the trunk's last block gives, the class token first.
    - ``clips``: stretches of two seconds that a film (5) or a sound (3) is read in, spread evenly over it. Two frames are
      taken of a film's, each cropped left, centre and right. Embeddings are averaged over them, but for ``clips``; tokens
      follow each other.
    """

    suggested: ClassVar[Mapping[str, Any]] = {
        modality: {"modality": modality, "pretrained": "./imagebind_huge.safetensors"}
        for modality in ("image", "video", "audio", "depth", "thermal")
    }
    kind: Literal["imagebind"] = "imagebind"
    modality: Modality
    pretrained: str | None = None
    revision: str | None = None
    architecture: ImageBindArchitecture | None = None
    output: Literal["pooled", "clips", "tokens"] = "pooled"
    clips: FrameCount | None = None

    @model_validator(mode="after")
    def _clips_of_what_lasts(self) -> Self:
        if self.clips is not None and self.modality not in CLIPS:
            raise ValueError(f"`clips` is for {' and '.join(CLIPS)}; leave it out for {self.modality}")
        return self

    @property
    def trunk(self) -> Trunk:
        """Which trunk reads the modality."""
        return TRUNKS[self.modality]

    @property
    def numbers(self) -> ImageBindArchitecture:
        """The trunk's numbers."""
        return self.architecture or HUGE[self.trunk]

    @property
    def stretches(self) -> int:
        """How many stretches a film or sound is read in; 1 of what does not last."""
        return self.clips or CLIPS.get(self.modality, 1)

    def segments(self, context: BuildContext) -> int:
        """The stretches, where they are kept apart."""
        return 1 if self.output == "pooled" else self.stretches

    def tiny(self) -> Self:
        """Two blocks of width 8; text keeps its vocabulary."""
        whole = HUGE[self.trunk]
        size = TINY.get(self.trunk, (2 * whole.patch, 2 * whole.patch))
        numbers = whole.model_copy(update={"width": 8, "layers": 2, "heads": 2, "output_dim": 16, "size": size})
        return self.model_copy(update={"pretrained": None, "revision": None, "architecture": numbers})

    def preprocessor(self, context: BuildContext) -> ImageBindPreprocessor:
        """What the modality's media become before the trunk."""
        from mmllm.encoders.imagebind_preprocess import make_preprocessor

        return make_preprocessor(self)

    def build(self, context: BuildContext) -> ImageBindEncoder:
        """The trunk alone. Raises ``CheckpointError``."""
        from mmllm.encoders.imagebind_module import make_encoder

        return make_encoder(self, context)
