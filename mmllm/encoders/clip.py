"""The ``clip`` encoder: pictures to patch features of a CLIP, EVA-CLIP, SigLIP or any other open_clip vision tower."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from mmllm.config.base import BuildContext, Config, suggest
from mmllm.config.families import EncoderConfig

if TYPE_CHECKING:
    from mmllm.encoders.clip_module import ClipEncoder
    from mmllm.encoders.pictures import PicturePreprocessor


@cache
def known_architectures() -> list[str]:
    """open_clip's architecture names, read from its folder of JSON files: importing open_clip costs seconds."""
    spec = find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise ImportError("the clip encoder needs open_clip; install it with `pip install open_clip_torch`")
    return sorted(path.stem for path in (Path(spec.origin).parent / "model_configs").glob("*.json"))


SelectLayer = Annotated[int, Field(le=-1)] | Literal["pooled"]


class ClipArchitecture(Config):
    """The numbers of a transformers ``vision_config``, under its own names; ``model_type`` says which of two towers.

    Defaults are transformers' (``CLIPVisionConfig``; the activation and epsilon left out are those of ``model_type``).
    ``image_size`` and ``patch_size`` are pixels.
    """

    model_type: Literal["clip_vision_model", "siglip_vision_model"] = "clip_vision_model"
    hidden_size: PositiveInt = 768
    intermediate_size: PositiveInt = 3072
    num_hidden_layers: PositiveInt = 12
    num_attention_heads: PositiveInt = 12
    image_size: PositiveInt = 224
    patch_size: PositiveInt = 32
    hidden_act: Literal["quick_gelu", "gelu", "gelu_pytorch_tanh", "gelu_new"] | None = None
    layer_norm_eps: PositiveFloat | None = None


class ClipConfig(EncoderConfig):
    """A frozen-or-trained CLIP-style vision tower, read at one of its layers.

    The architecture comes from exactly one of ``arch``, ``vision_cfg`` and ``architecture``, or, when none is given,
    from ``pretrained`` itself. Weights come from ``pretrained`` (random values without it).

    - ``arch``: any name of ``open_clip.list_models()``: ViT, EVA-CLIP, SigLIP, PE, MobileCLIP, ViTamin, ConvNeXt, Swin
      and ResNet towers.
    - ``vision_cfg``: open_clip's own mapping for another architecture (``width``, ``layers``, ``patch_size``, …).
    - ``architecture``: the numbers of a transformers checkpoint, so that a plan needs no file.
    - ``pretrained``: a ``.safetensors`` file; a folder in open_clip's layout (``open_clip_config.json``,
      ``open_clip_model.safetensors``; the ``visual.*`` tensors suffice) or written by ``save_pretrained`` of
      ``CLIPModel``, ``CLIPVisionModel``, ``SiglipModel`` or ``SiglipVisionModel``; or a hub id of either. Local ones
      begin with ``./``, ``../``, ``~`` or ``/``. ``revision`` is the hub's branch, tag or commit.
    - ``select_layer``: whose output is returned, counted from the end: -1 the last block, -2 the one before (LLaVA's
      choice, arXiv 2304.08485). Later blocks, the final norm and the projection are not part of the module. On towers
      made of stages (ConvNeXt, Swin, FastViT, ResNet) it counts stages. ``pooled`` returns one feature per picture
      instead: the whole tower with its own norm and pooling, before the projection into CLIP's shared space
      (transformers' ``pooler_output``; GILL's choice, arXiv 2305.17216).
    - ``keep_class_token``: puts the class token before the patches; an error for towers without one.
    - ``fit``: ``checkpoint`` preprocesses as the checkpoint says; ``crop`` takes the centre square, ``pad`` the whole
      picture on the mean colour, ``squash`` the whole picture distorted. ``native`` keeps the aspect ratio: the grid of
      patches follows the picture, at most ``max_patches`` of them (default: as many as the checkpoint's own square);
      pictures of fewer than ``min_patches`` are scaled up to about as many (default: none is),
      with position embeddings interpolated and pictures of different grids in one padded call. It works on open_clip's
      ``VisionTransformer`` and on transformers' CLIP; other towers refuse it.
    - ``image_size``: another square in pixels than the checkpoint's; position embeddings are interpolated.
    """

    suggested: ClassVar[Mapping[str, Any]] = {
        "image": {"pretrained": "openai/clip-vit-large-patch14-336", "select_layer": -2}
    }
    kind: Literal["clip"] = "clip"
    arch: str | None = None
    vision_cfg: dict[str, Any] | None = None
    architecture: ClipArchitecture | None = None
    pretrained: str | None = None
    revision: str | None = None
    select_layer: SelectLayer = -2
    keep_class_token: bool = False
    fit: Literal["checkpoint", "crop", "pad", "squash", "native"] = "checkpoint"
    image_size: PositiveInt | None = None
    max_patches: PositiveInt | None = None
    min_patches: PositiveInt | None = None

    @field_validator("arch")
    @classmethod
    def _known_arch(cls, value: str | None) -> str | None:
        known = known_architectures()
        if value is not None and value not in known:
            raise ValueError(f"no open_clip architecture of this name{suggest(value, known)}")
        return value

    @model_validator(mode="after")
    def _one_architecture(self) -> Self:
        choices = {"arch": self.arch, "vision_cfg": self.vision_cfg, "architecture": self.architecture}
        given = [name for name, value in choices.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"found {' and '.join(given)}, expected one of them: keep what describes the tower")
        if not given and self.pretrained is None:
            raise ValueError("found no architecture; give `pretrained`, or `arch` for random weights")
        for name, patches in {"max_patches": self.max_patches, "min_patches": self.min_patches}.items():
            if patches is not None and self.fit != "native":
                raise ValueError(f"`{name}` goes with `fit: native`, found `fit: {self.fit}`; use `image_size` there")
        if self.max_patches is not None and self.min_patches is not None and self.min_patches > self.max_patches:
            raise ValueError(f"found `min_patches: {self.min_patches}` beyond `max_patches: {self.max_patches}`")
        if self.image_size is not None and self.fit == "native":
            raise ValueError("`image_size` does not go with `fit: native`; give `max_patches` instead")
        if self.select_layer == "pooled" and (self.fit == "native" or self.keep_class_token):
            other = "`fit: native`" if self.fit == "native" else "`keep_class_token`"
            raise ValueError(f"`select_layer: pooled` gives one feature of the tower's own square; leave out {other}")
        return self

    def tiny(self) -> ClipConfig:
        """The same tower class with three narrow blocks (ResNet: one per stage; timm: ``test_vit``), 32-160 pixels."""
        from mmllm.encoders.clip_module import tiny_architecture

        layer = self.select_layer if self.select_layer == "pooled" else max(self.select_layer, -3)
        kept = {"select_layer": layer, "fit": self.fit, "keep_class_token": self.keep_class_token}
        return ClipConfig.model_validate(tiny_architecture(self) | kept)

    def preprocessor(self, context: BuildContext) -> PicturePreprocessor:
        """Pictures to tensors, as the checkpoint and ``fit`` say. Raises ``ConfigError`` on a contradiction."""
        from mmllm.encoders.clip_module import make_preprocessor

        return make_preprocessor(self, context)

    def build(self, context: BuildContext) -> ClipEncoder:
        """The tower up to ``select_layer``. Raises ``ConfigError`` or ``CheckpointError``."""
        from mmllm.encoders.clip_module import make_encoder

        return make_encoder(self, context)
