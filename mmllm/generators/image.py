"""The ``stable_diffusion`` generator: text-to-image latent diffusion and flow matching."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import PositiveInt

from mmllm.config.base import BuildContext
from mmllm.config.families import Shape
from mmllm.errors import MmllmError
from mmllm.generators.diffusion import Family, LatentDiffusionConfig, Read

if TYPE_CHECKING:
    from mmllm.generators.targets import ImageTarget

MODULE = "mmllm.generators.image_module"


def _clip_length(read: Read, folder: str = "tokenizer") -> int:
    return int(read(f"{folder}/tokenizer_config.json").get("model_max_length", 77))


def _sd(read: Read, length: int | None) -> dict[str, Shape]:
    return {"text": (_clip_length(read), int(read("text_encoder/config.json")["hidden_size"]))}


def _sdxl(read: Read, length: int | None) -> dict[str, Shape]:
    first, second = read("text_encoder/config.json"), read("text_encoder_2/config.json")
    width = int(first["hidden_size"]) + int(second["hidden_size"])
    return {"text": (_clip_length(read), width), "pooled": (1, int(second["projection_dim"]))}


def _joint(own: int, clip: bool) -> Any:
    """SD3 and Flux: T5 positions (``own`` by default), behind CLIP's where the two are joined; and CLIP's pooled vector."""

    def shapes(read: Read, length: int | None) -> dict[str, Shape]:
        numbers = read("transformer/config.json")
        positions = (length or own) + (_clip_length(read) if clip else 0)
        return {
            "text": (positions, int(numbers["joint_attention_dim"])),
            "pooled": (1, int(numbers["pooled_projection_dim"])),
        }

    return shapes


def _sana(read: Read, length: int | None) -> dict[str, Shape]:
    return {"text": (length or 300, int(read("transformer/config.json")["caption_channels"]))}


def _square(denoiser: str, own: int | None = None) -> Callable[[Read], dict[str, int]]:
    """Pixels of a side: latents of the denoiser's ``sample_size`` (or ``own``) times the autoencoder's reduction."""

    def size(read: Read) -> dict[str, int]:
        vae = read("vae/config.json")
        blocks = vae.get("block_out_channels") or vae["encoder_block_out_channels"]
        side = (own or int(read(f"{denoiser}/config.json")["sample_size"])) * 2 ** (len(blocks) - 1)
        return {"width": side, "height": side}

    return size


# Pixels of a tiny pipeline's pictures where the pipeline's own size is a number in its code, not one of its (tiny) parts.
TINY_SIDES = {"FluxPipeline": 32}


class StableDiffusionConfig(LatentDiffusionConfig):
    """Pictures: Stable Diffusion 1 and 2, XL (with its pooled vector), 3; Flux; Sana.

    ``width`` and ``height`` are pixels; the pipeline's own size when not given.
    """

    media: ClassVar[str] = "image"
    families: ClassVar[Mapping[str, Family]] = {
        "StableDiffusionPipeline": Family(f"{MODULE}:StableDiffusion", _sd, _square("unet")),
        "StableDiffusionXLPipeline": Family(f"{MODULE}:StableDiffusionXL", _sdxl, _square("unet")),
        "StableDiffusion3Pipeline": Family(
            f"{MODULE}:StableDiffusion3", _joint(256, clip=True), _square("transformer")
        ),
        "FluxPipeline": Family(f"{MODULE}:Flux", _joint(512, clip=False), _square("transformer", own=128)),
        "SanaPipeline": Family(f"{MODULE}:Sana", _sana, _square("transformer")),
    }
    suggested: ClassVar[Mapping[str, Any]] = {
        "image": {
            "pretrained": "stable-diffusion-v1-5/stable-diffusion-v1-5",
            "architecture": {"pipeline": "StableDiffusionPipeline", "condition": {"text": [77, 768]}},
        }
    }
    kind: Literal["stable_diffusion"] = "stable_diffusion"
    width: PositiveInt | None = None
    height: PositiveInt | None = None

    def tiny(self) -> Self:
        tiny = super().tiny()
        side = TINY_SIDES.get((tiny.architecture or {})["pipeline"])
        return tiny.model_copy(update={"width": side, "height": side})

    def size(self) -> dict[str, Any]:
        return {name: value for name, value in (("width", self.width), ("height", self.height)) if value is not None}

    def target(self, context: BuildContext) -> ImageTarget:
        from mmllm.generators.targets import ImageTarget

        size = self.full_size(context)
        if not size:
            raise MmllmError(f"{self.kind} {self.pretrained}: its size is not known offline; give `width` and `height`")
        return ImageTarget(size["width"], size["height"])
