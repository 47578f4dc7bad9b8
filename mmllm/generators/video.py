"""The ``video_diffusion`` generator: text-to-video latent diffusion and flow matching."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PositiveInt

from mmllm.config.base import BuildContext
from mmllm.config.families import Shape
from mmllm.errors import MmllmError
from mmllm.generators.diffusion import Family, LatentDiffusionConfig, Read

if TYPE_CHECKING:
    from mmllm.generators.targets import VideoTarget

MODULE = "mmllm.generators.video_module"


def _unet3d(read: Read, length: int | None) -> dict[str, Shape]:
    positions = int(read("tokenizer/tokenizer_config.json").get("model_max_length", 77))
    return {"text": (positions, int(read("text_encoder/config.json")["hidden_size"]))}


def _wan(read: Read, length: int | None) -> dict[str, Shape]:
    return {"text": (length or 512, int(read("transformer/config.json")["text_dim"]))}


def _unet3d_size(read: Read) -> dict[str, Any]:
    side = int(read("unet/config.json")["sample_size"]) * 2 ** (len(read("vae/config.json")["block_out_channels"]) - 1)
    return {"width": side, "height": side, "num_frames": 16}


def _wan_size(read: Read) -> dict[str, Any]:
    return {"width": 832, "height": 480, "num_frames": 81}


class VideoDiffusionConfig(LatentDiffusionConfig):
    """Clips: ModelScope's text-to-video and ZeroScope (a 3-D U-Net); Wan 2.1 (a transformer).

    ``width`` and ``height`` are pixels; the pipeline's own size and number of frames when not given.
    ``frames_per_second`` is how fast the clip is shown.
    """

    media: ClassVar[str] = "video"
    families: ClassVar[Mapping[str, Family]] = {
        "TextToVideoSDPipeline": Family(f"{MODULE}:TextToVideo", _unet3d, _unet3d_size),
        "WanPipeline": Family(f"{MODULE}:Wan", _wan, _wan_size),
    }
    suggested: ClassVar[Mapping[str, Any]] = {
        "video": {
            "pretrained": "cerspense/zeroscope_v2_576w",
            "architecture": {"pipeline": "TextToVideoSDPipeline", "condition": {"text": [77, 1024]}},
        }
    }
    kind: Literal["video_diffusion"] = "video_diffusion"
    width: PositiveInt | None = None
    height: PositiveInt | None = None
    num_frames: PositiveInt | None = None
    frames_per_second: Annotated[float, Field(gt=0)] = 8.0

    def tiny(self) -> Self:
        return super().tiny().model_copy(update={"width": 16, "height": 16, "num_frames": 5})

    def size(self) -> dict[str, Any]:
        given = {"width": self.width, "height": self.height, "num_frames": self.num_frames}
        return {"frames_per_second": self.frames_per_second, **{k: v for k, v in given.items() if v is not None}}

    def target(self, context: BuildContext) -> VideoTarget:
        from mmllm.generators.targets import VideoTarget

        size = self.full_size(context)
        if "num_frames" not in size:
            raise MmllmError(
                f"{self.kind} {self.pretrained}: its size is not known offline; give `width`, `height` and `num_frames`"
            )
        return VideoTarget(size["width"], size["height"], size["num_frames"])
