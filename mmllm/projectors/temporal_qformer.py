"""The ``temporal_qformer`` input projector: Q-Formers over the frames of a clip (Video-LLaMA, arXiv 2306.02858)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, PositiveInt, field_validator

from mmllm.config.base import BuildContext
from mmllm.config.families import EncoderConfig, ProjectorConfig
from mmllm.errors import ConfigError
from mmllm.projectors.qformer import QFormerConfig

if TYPE_CHECKING:
    from mmllm.projectors.temporal_qformer_module import TemporalQFormer

NAME = "temporal_qformer projector"
VIDEO_LLAMA = {"num_layers": 2, "cross_attention_every": 1}


def _as_in_video_llama(value: Any) -> Any:
    return VIDEO_LLAMA | dict(value) if isinstance(value, Mapping) else value


class TemporalQFormerConfig(ProjectorConfig):
    """Trained positions tell a clip's frames apart, and the queries of a Q-Former read the features of all of them.

    However long a clip is, one output comes out for each query of ``clip``.

    - ``frame``: a Q-Former that reads every frame by itself first; without it the encoder's own features are read. Video-LLaMA
      takes BLIP-2's (``norm: true``, ``pretrained``) and leaves it frozen: ``train: [inputs.video.projector.modules.clip,
      inputs.video.projector.modules.positions]``.
    - ``clip``: the Q-Former over all frames. What is not given is as in Video-LLaMA: two layers, both with cross-attention, 32
      queries.
    - ``norm`` puts a LayerNorm on the encoder's features, before positions are added.
    - ``max_frames``: how many positions there are.
    - ``frames``: how many frames there are. It comes from the encoder (the stretches of a sound are frames too); an encoder
      that does not say has one.
    """

    kind: Literal["temporal_qformer"] = "temporal_qformer"
    frame: QFormerConfig | None = None
    clip: Annotated[QFormerConfig, BeforeValidator(_as_in_video_llama)] = QFormerConfig.model_validate(VIDEO_LLAMA)
    norm: bool = False
    max_frames: PositiveInt = 32
    frames: PositiveInt | None = None

    @field_validator("frame")
    @classmethod
    def _whole_frames(cls, value: QFormerConfig | None) -> QFormerConfig | None:
        if value is not None and value.window is not None:
            raise ValueError("a frame is read whole; leave out `window`")
        return value

    def num_outputs(self, length: int) -> int:
        return self.clip.num_outputs(length)

    def behind(self, encoder: EncoderConfig, context: BuildContext) -> Self:
        """With the encoder's frames. Raises ``ConfigError`` when others are given, or there are more than positions."""
        frames = encoder.segments(context)
        if self.frames not in (None, frames):
            problem = f"found {self.frames}, but the encoder gives {frames}; leave it out"
            raise ConfigError([("frames", problem)], NAME)
        if frames > self.max_frames:
            problem = f"found {self.max_frames}, but the encoder gives {frames} frames; raise it, or take fewer frames"
            raise ConfigError([("max_frames", problem)], NAME)
        return self.model_copy(update={"frames": frames})

    def tiny(self) -> TemporalQFormerConfig:
        """The tiny versions of both Q-Formers, behind a tiny encoder with frames of its own."""
        return TemporalQFormerConfig(
            frame=None if self.frame is None else self.frame.tiny(),
            clip=self.clip.tiny(),
            norm=self.norm,
            max_frames=self.max_frames,
        )

    def build(self, context: BuildContext, *, input_dim: int, output_dim: int) -> TemporalQFormer:
        """Raises ``CheckpointError`` when a checkpoint has other numbers."""
        from mmllm.projectors.temporal_qformer_module import make_projector

        return make_projector(self, context, input_dim, output_dim)
