"""The ``videomae`` and ``vjepa2`` encoders: clips as a video transformer of transformers sees them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from mmllm.config.base import BuildContext
from mmllm.config.families import EncoderConfig, FrameCount

if TYPE_CHECKING:
    from mmllm.encoders.video_transformer_module import ClipPreprocessor, VideoEncoder

Numbers = dict[str, Any]
TINY_FRAMES, TINY_SIZE = 4, 32


class VideoTransformerConfig(EncoderConfig):
    """A video transformer of transformers, read at one of its layers. A feature is a *tubelet*: a patch of a few frames.

    - ``pretrained``: a folder written by ``save_pretrained`` of such a model, with or without a head, or a hub id of one.
      Frames are prepared by the checkpoint's own video or image processor, where it has one.
    - ``architecture``: the numbers under transformers' names, so that a plan needs no file; random weights without
      ``pretrained``. The ids in ``KNOWN`` need none.
    - ``select_layer``: -1 the model's output (``last_hidden_state``), -2 the output of the block before the last
      (``hidden_states[-2]``), and so on; later blocks are then not part of the module, nor are heads, decoders and predictors.
    - ``norm``: whether the final norm is applied, where the model has one. Left out it is for -1 and is not for earlier
      layers.
    - ``frames``, ``image_size``: other ones than the checkpoint's: how many frames of the whole clip, and the square in pixels;
      positions are those of the new grid. ``spread`` says which frames, as for ``frames``.

    Features lie in order of time, those of one time row by row. Trained, the model runs without dropout and the like.
    """

    model_type: ClassVar[str]
    known: ClassVar[dict[str, Numbers]]
    small: ClassVar[Numbers]

    architecture: Numbers | None = None
    pretrained: str | None = None
    revision: str | None = None
    select_layer: Annotated[int, Field(le=-1)] = -1
    norm: bool | None = None
    frames: FrameCount | None = None
    spread: Literal["ends", "middles"] = "ends"
    image_size: PositiveInt | None = None

    @model_validator(mode="after")
    def _some_architecture(self) -> Self:
        if self.architecture is None and self.pretrained is None:
            raise ValueError("found no architecture; give `pretrained`, or `architecture` for random weights")
        return self

    @property
    def normed(self) -> bool:
        """Whether the final norm is applied."""
        return self.select_layer == -1 if self.norm is None else self.norm

    def segments(self, context: BuildContext) -> int:
        """The times of tubelets."""
        from mmllm.encoders.video_transformer_module import read_shape

        return read_shape(self, context).times

    def tiny(self) -> Self:
        """Three blocks of width 32 on four frames of 32 pixels."""
        whole = self.architecture or self.known.get(self.pretrained or "", {})
        checkpoints = {"pretrained": None, "revision": None, "frames": None, "image_size": None}
        numbers = {"architecture": whole | self.small, "select_layer": max(self.select_layer, -3)}
        return self.model_copy(update=checkpoints | numbers)

    def preprocessor(self, context: BuildContext) -> ClipPreprocessor:
        """Frames to tensors as the checkpoint says. Raises ``ConfigError`` on a contradiction."""
        from mmllm.encoders.video_transformer_module import make_preprocessor

        return make_preprocessor(self, context)

    def build(self, context: BuildContext) -> VideoEncoder:
        """The encoder up to ``select_layer``. Raises ``ConfigError`` or ``CheckpointError``."""
        from mmllm.encoders.video_transformer_module import make_encoder

        return make_encoder(self, context)


def _videomae(width: int, blocks: int, heads: int, pooled: bool) -> Numbers:
    return {
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "use_mean_pooling": pooled,
    }


class VideoMAEConfig(VideoTransformerConfig):
    """VideoMAE (arXiv 2203.12602): 16 frames, tubelets of 2 x 16 x 16. Checkpoints that were fine-tuned for classes norm the
    mean of all features in their head, so their last features are not normed.
    """

    model_type: ClassVar[str] = "videomae"
    # The `config.json` of these hub ids, of what concerns the encoder.
    known: ClassVar[dict[str, Numbers]] = {
        "MCG-NJU/videomae-small-finetuned-kinetics": _videomae(384, 12, 6, True),
        "MCG-NJU/videomae-base": _videomae(768, 12, 12, False),
        "MCG-NJU/videomae-base-finetuned-kinetics": _videomae(768, 12, 12, True),
        "MCG-NJU/videomae-base-finetuned-ssv2": _videomae(768, 12, 12, True),
        "MCG-NJU/videomae-large": _videomae(1024, 24, 16, False),
        "MCG-NJU/videomae-large-finetuned-kinetics": _videomae(1024, 24, 16, True),
        "MCG-NJU/videomae-huge-finetuned-kinetics": _videomae(1280, 32, 16, True),
    }
    small: ClassVar[Numbers] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "patch_size": 8,
        "image_size": TINY_SIZE,
        "num_frames": TINY_FRAMES,
    }
    suggested: ClassVar[Mapping[str, Any]] = {"video": {"pretrained": "MCG-NJU/videomae-base"}}
    kind: Literal["videomae"] = "videomae"


def _vjepa2(width: int, blocks: int, heads: int, size: int = 256, mlp: float = 4.0) -> Numbers:
    return {
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "mlp_ratio": mlp,
        "crop_size": size,
    }


class VJEPA2Config(VideoTransformerConfig):
    """V-JEPA 2 (arXiv 2506.09985): 64 frames, tubelets of 2 x 16 x 16, rotary positions."""

    model_type: ClassVar[str] = "vjepa2"
    known: ClassVar[dict[str, Numbers]] = {
        "facebook/vjepa2-vitl-fpc64-256": _vjepa2(1024, 24, 16),
        "facebook/vjepa2-vith-fpc64-256": _vjepa2(1280, 32, 16),
        "facebook/vjepa2-vitg-fpc64-256": _vjepa2(1408, 40, 22, mlp=48 / 11),
        "facebook/vjepa2-vitg-fpc64-384": _vjepa2(1408, 40, 22, 384, 48 / 11),
    }
    small: ClassVar[Numbers] = {
        "hidden_size": 32,
        "mlp_ratio": 2.0,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "patch_size": 8,
        "crop_size": TINY_SIZE,
        "frames_per_clip": TINY_FRAMES,
        "pred_hidden_size": 32,
        "pred_num_attention_heads": 2,
        "pred_num_hidden_layers": 1,
    }
    suggested: ClassVar[Mapping[str, Any]] = {"video": {"pretrained": "facebook/vjepa2-vitl-fpc64-256"}}
    kind: Literal["vjepa2"] = "vjepa2"
