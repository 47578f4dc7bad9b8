"""The ``frames`` encoder: a clip as the pictures it is made of, seen by any encoder of pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import PositiveInt, field_validator

from mmllm.config.base import BuildContext, ComponentConfig
from mmllm.config.families import AnyEncoder, EncoderConfig, FrameCount

if TYPE_CHECKING:
    from mmllm.encoders.frames_module import FramesEncoder, FramesPreprocessor

Spread = Literal["ends", "middles"]


class FramesConfig(EncoderConfig):
    """An encoder of pictures on ``frames`` frames of a clip.

    - ``encoder``: any encoder of pictures, ``fused`` among them. It is a part of its own for checkpoints: a frozen one is kept
      by reference. An adapter belongs to this encoder, not to that one.
    - ``spread``: which frames. ``ends`` takes them evenly from the first to the last; ``middles`` the middle one of as many
      equal pieces (Video-ChatGPT, VideoChat). Of a clip with fewer frames some are repeated.
    - ``spatial_stride``: averages squares of that many features a side before anything else, what does not fill a square is
      left out (LLaVA-NeXT-Video has 2). It needs features that lie on rows and columns.
    - ``pooling``: ``none`` puts the features of one frame behind those of the frame before (Video-LLaVA, arXiv 2311.10122);
      ``mean`` averages every place over time; ``spatio_temporal`` gives the mean of every frame and behind these that mean of
      every place (Video-ChatGPT, arXiv 2306.05424: 100 and 256).
    """

    suggested: ClassVar[Mapping[str, Any]] = {
        "video": {"encoder": {"kind": "clip", "pretrained": "openai/clip-vit-large-patch14-336"}, "spatial_stride": 2}
    }
    kind: Literal["frames"] = "frames"
    encoder: AnyEncoder
    frames: FrameCount = 8
    spread: Spread = "ends"
    spatial_stride: PositiveInt = 1
    pooling: Literal["none", "mean", "spatio_temporal"] = "none"

    @field_validator("encoder")
    @classmethod
    def _one_adapter(cls, value: EncoderConfig) -> EncoderConfig:
        if value.adapter is not None:
            raise ValueError("the adapter of a clip's encoder stands beside `encoder`, not in it; move it there")
        return value

    def members(self) -> dict[str, ComponentConfig]:
        """Those of the encoder of pictures."""
        return {f"encoder.{path}" if path else "encoder": piece for path, piece in self.encoder.members().items()}

    def segments(self, context: BuildContext) -> int:
        """The frames, where they are kept apart."""
        return self.frames if self.pooling == "none" else 1

    def tiny(self) -> FramesConfig:
        """At most three frames, by the tiny version of the encoder."""
        small = {"frames": min(self.frames, 3), "spatial_stride": min(self.spatial_stride, 2)}
        return self.model_copy(update={"encoder": self.encoder.tiny(), **small})

    def preprocessor(self, context: BuildContext) -> FramesPreprocessor:
        """What the encoder of pictures makes of every frame. Raises ``ConfigError`` when it takes no pictures."""
        from mmllm.encoders.frames_module import make_preprocessor

        return make_preprocessor(self, context)

    def build(self, context: BuildContext) -> FramesEncoder:
        """Raises ``ConfigError`` with what the encoder of pictures refuses, or ``CheckpointError``."""
        from mmllm.encoders.frames_module import make_encoder

        return make_encoder(self, context)
