"""The ``vit`` encoder: pictures as a vision transformer of transformers sees them (ViT, DeiT, DINO, DINOv2, DINOv3, SigLIP, …)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveInt, model_validator

from mmllm.config.base import BuildContext
from mmllm.config.families import EncoderConfig

if TYPE_CHECKING:
    from mmllm.encoders.pictures import PicturePreprocessor
    from mmllm.encoders.vision_transformer_module import VitEncoder

Fit = Literal["checkpoint", "crop", "pad", "squash"]
Numbers = dict[str, Any]

# Widths, blocks, heads and inner widths of the usual sizes.
_S, _B, _L, _SO = (
    {"hidden_size": width, "num_hidden_layers": blocks, "num_attention_heads": heads, "intermediate_size": inner}
    for width, blocks, heads, inner in (
        (384, 12, 6, 1536),
        (768, 12, 12, 3072),
        (1024, 24, 16, 4096),
        (1152, 27, 16, 4304),
    )
)


def _without_inner(numbers: Numbers) -> Numbers:
    return {name: value for name, value in numbers.items() if name != "intermediate_size"}


def _vit(numbers: Numbers, patch: int, size: int = 224, model_type: str = "vit") -> Numbers:
    return {"model_type": model_type, **numbers, "patch_size": patch, "image_size": size}


def _dinov2(numbers: Numbers, registers: bool) -> Numbers:
    family = (
        {"model_type": "dinov2_with_registers", "num_register_tokens": 4} if registers else {"model_type": "dinov2"}
    )
    return {**family, **_without_inner(numbers), "patch_size": 14, "image_size": 518, "mlp_ratio": 4}


def _dinov3(numbers: Numbers, gated: bool = False, biased: bool = True) -> Numbers:
    inner = {"hidden_act": "silu", "use_gated_mlp": True} if gated else {}
    biases = {} if biased else {"query_bias": False, "value_bias": False}
    return _vit(numbers, 16, model_type="dinov3_vit") | {"num_register_tokens": 4} | inner | biases


_G = {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24, "use_swiglu_ffn": True}
_H = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 20, "intermediate_size": 5120}
_7B = {"hidden_size": 4096, "num_hidden_layers": 40, "num_attention_heads": 32, "intermediate_size": 8192}
_SIGLIP = "siglip_vision_model"
_NAFLEX = {"model_type": "siglip2_vision_model", "patch_size": 16, "num_patches": 256}

# The `config.json` of these hub ids (of what concerns the vision tower), so that a plan needs no file.
KNOWN: dict[str, Numbers] = {
    "google/vit-base-patch16-224": _vit(_B, 16),
    "google/vit-base-patch16-224-in21k": _vit(_B, 16),
    "google/vit-base-patch16-384": _vit(_B, 16, 384),
    "google/vit-large-patch16-224": _vit(_L, 16),
    "google/vit-large-patch16-384": _vit(_L, 16, 384),
    "google/vit-huge-patch14-224-in21k": _vit(_H | {"num_attention_heads": 16}, 14),
    "facebook/deit-small-distilled-patch16-224": _vit(_S, 16, model_type="deit"),
    "facebook/deit-base-distilled-patch16-224": _vit(_B, 16, model_type="deit"),
    "facebook/dino-vits16": _vit(_S, 16),
    "facebook/dino-vits8": _vit(_S, 8),
    "facebook/dino-vitb16": _vit(_B, 16),
    "facebook/dino-vitb8": _vit(_B, 8),
    "facebook/dinov2-small": _dinov2(_S, registers=False),
    "facebook/dinov2-base": _dinov2(_B, registers=False),
    "facebook/dinov2-large": _dinov2(_L, registers=False),
    "facebook/dinov2-giant": _dinov2(_G, registers=False),
    "facebook/dinov2-with-registers-small": _dinov2(_S, registers=True),
    "facebook/dinov2-with-registers-base": _dinov2(_B, registers=True),
    "facebook/dinov2-with-registers-large": _dinov2(_L, registers=True),
    "facebook/dinov2-with-registers-giant": _dinov2(_G, registers=True),
    "facebook/dinov3-vits16-pretrain-lvd1689m": _dinov3(_S),
    "facebook/dinov3-vits16plus-pretrain-lvd1689m": _dinov3(_S, gated=True),
    "facebook/dinov3-vitb16-pretrain-lvd1689m": _dinov3(_B),
    "facebook/dinov3-vitl16-pretrain-lvd1689m": _dinov3(_L),
    "facebook/dinov3-vith16plus-pretrain-lvd1689m": _dinov3(_H, gated=True),
    "facebook/dinov3-vit7b16-pretrain-lvd1689m": _dinov3(_7B, gated=True, biased=False),
    "google/siglip-base-patch16-224": _vit(_B, 16, model_type=_SIGLIP),
    "google/siglip-base-patch16-384": _vit(_B, 16, 384, _SIGLIP),
    "google/siglip-large-patch16-384": _vit(_L, 16, 384, _SIGLIP),
    "google/siglip-so400m-patch14-224": _vit(_SO, 14, 224, _SIGLIP),
    "google/siglip-so400m-patch14-384": _vit(_SO, 14, 384, _SIGLIP),
    "google/siglip2-base-patch16-224": _vit(_B, 16, model_type=_SIGLIP),
    "google/siglip2-so400m-patch14-384": _vit(_SO, 14, 384, _SIGLIP),
    "google/siglip2-base-patch16-naflex": _B | _NAFLEX,
    "google/siglip2-so400m-patch16-naflex": _SO | _NAFLEX,
}
# Where a checkpoint's image processor gives pictures of another size than its `image_size`, in pixels.
KNOWN_SIZES = {name: 224 for name in KNOWN if name.startswith("facebook/dinov2-")}

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "num_patches": 16,
}


class VitConfig(EncoderConfig):
    """A vision transformer of transformers, read at one of its layers.

    Any model that ``AutoModel`` makes of pictures and whose output are patch tokens: ViT, DeiT, DINO, DINOv2, DINOv3, the
    vision towers of SigLIP and SigLIP 2, of CLIP, AIMv2, I-JEPA, BEiT, … What is no patch (class, distillation and
    register tokens) is told apart by the grid.

    - ``pretrained``: a folder written by ``save_pretrained`` of such a model, with or without a head, or of a model with
      a vision tower (``SiglipModel``, …), or a hub id of one. Pictures are prepared by the checkpoint's own image
      processor, where it has one.
    - ``architecture``: the numbers under transformers' names with ``model_type``, so that a plan needs no file; random
      weights without ``pretrained``. The ids in ``KNOWN`` need none.
    - ``select_layer``: -1 the model's output (``last_hidden_state``), -2 the output of the block before the last
      (``hidden_states[-2]``), and so on; later blocks are then not part of the module, nor are heads and poolings.
    - ``norm``: whether the model's final norm is applied. Left out it is for -1 and is not for earlier layers. Models whose
      own output is not normed (CLIP) have none.
    - ``select``: ``patch`` the patches; ``cls`` the class token; ``cls_patch`` that before the patches. Register and
      distillation tokens are never among them.
    - ``fit``: ``checkpoint`` leaves the picture to the image processor; ``crop`` takes the centre square, ``pad`` the
      whole picture on the mean colour, ``squash`` the whole picture distorted, each with the processor's colours.
    - ``image_size``: another square in pixels than the image processor's; the model interpolates its positions.

    SigLIP 2's NaFlex checkpoints (``siglip2_vision_model``) keep the aspect ratio: as many patches as the picture has,
    up to the checkpoint's number. There ``fit`` and ``image_size`` are refused. Trained, the model runs without dropout
    and the like.
    """

    suggested: ClassVar[Mapping[str, Any]] = {
        "image": {"pretrained": "google/siglip-so400m-patch14-384", "select_layer": -2}
    }
    kind: Literal["vit"] = "vit"
    architecture: Numbers | None = None
    pretrained: str | None = None
    revision: str | None = None
    select_layer: Annotated[int, Field(le=-1)] = -1
    norm: bool | None = None
    select: Literal["patch", "cls_patch", "cls"] = "patch"
    fit: Fit = "checkpoint"
    image_size: PositiveInt | None = None

    @model_validator(mode="after")
    def _some_architecture(self) -> VitConfig:
        if self.architecture is None and self.pretrained is None:
            raise ValueError("found no architecture; give `pretrained`, or `architecture` for random weights")
        return self

    @property
    def normed(self) -> bool:
        """Whether the final norm is applied."""
        return self.select_layer == -1 if self.norm is None else self.norm

    def tiny(self) -> VitConfig:
        """Three blocks of width 32 on 32 pixels; what else tells the code path stays where it is known."""
        from mmllm.encoders.vision_transformer_module import taken_names

        whole = self.architecture or KNOWN.get(self.pretrained or "", {"model_type": "vit"})
        known = taken_names(whole)
        numbers = whole | {name: number for name, number in TINY.items() if name in known}
        return VitConfig(
            architecture=numbers,
            select_layer=max(self.select_layer, -3),
            norm=self.norm,
            select=self.select,
            fit=self.fit,
        )

    def preprocessor(self, context: BuildContext) -> PicturePreprocessor:
        """Pictures to tensors, as the checkpoint and ``fit`` say. Raises ``ConfigError`` on a contradiction."""
        from mmllm.encoders.vision_transformer_module import make_preprocessor

        return make_preprocessor(self, context)

    def build(self, context: BuildContext) -> VitEncoder:
        """The encoder up to ``select_layer``. Raises ``ConfigError`` or ``CheckpointError``."""
        from mmllm.encoders.vision_transformer_module import make_encoder

        return make_encoder(self, context)
