"""The ``timm`` encoder: pictures as any backbone of timm sees them, convolutional ones (NFNet, ConvNeXt, …) included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveInt, model_validator

from mmllm.config.base import BuildContext
from mmllm.config.families import EncoderConfig

if TYPE_CHECKING:
    from mmllm.encoders.pictures import SquarePreprocessor
    from mmllm.encoders.timm_backbone_module import TimmEncoder


class TimmConfig(EncoderConfig):
    """A backbone of timm, read at one of its levels: the blocks of a transformer, the stages of a convolutional network.

    A feature map (C, H, W) gives H * W features of width C, row by row; of tokens those of patches.

    - ``arch``: a name of ``timm.list_models()``, with or without the tag of its weights (``dm_nfnet_f6.dm_in1k``), or a
      model that a plugin registered there. Needless where ``pretrained`` tells it.
    - ``pretrained``: a ``.safetensors`` file, a folder in timm's layout (``config.json``, ``model.safetensors``), or a
      hub id; ``timm/NAME`` is known without a file. Random weights without it.
    - ``arguments``: further arguments of ``timm.create_model`` (``{embed_dim: 256, depth: 4}``).
    - ``select_layer``: -1 the output of the backbone (``forward_features``), -2 the level before the last
      (``forward_intermediates``), and so on; later levels are then not part of the module, nor is the head.
    - ``norm``: whether the final norm is applied, for backbones that have one (of an NFNet it is the last activation).
      Left out it is for -1 and is not for earlier levels.
    - ``select``: ``patch``; ``cls`` the class token; ``cls_patch`` that before the patches. Register and distillation
      tokens are never among them.
    - ``fit``: ``checkpoint`` prepares pictures as timm does for these weights; ``crop`` takes the centre square, ``pad``
      the whole picture on the mean colour, ``squash`` the whole picture distorted.
    - ``image_size``: another square in pixels; transformers interpolate their positions.

    Trained, the backbone runs without dropout and the like, and the statistics of batch norms stay as they are.
    """

    suggested: ClassVar[Mapping[str, Any]] = {
        "image": {"pretrained": "timm/vit_so400m_patch14_siglip_384.webli", "select_layer": -2}
    }
    kind: Literal["timm"] = "timm"
    arch: str | None = None
    pretrained: str | None = None
    revision: str | None = None
    arguments: dict[str, Any] = {}
    select_layer: Annotated[int, Field(le=-1)] = -1
    norm: bool | None = None
    select: Literal["patch", "cls_patch", "cls"] = "patch"
    fit: Literal["checkpoint", "crop", "pad", "squash"] = "checkpoint"
    image_size: PositiveInt | None = None

    @model_validator(mode="after")
    def _some_architecture(self) -> TimmConfig:
        if self.arch is None and self.pretrained is None:
            raise ValueError("found no architecture; give `pretrained`, or `arch` for random weights")
        return self

    @property
    def whole(self) -> bool:
        """Whether the backbone's own output is read, not a level of it."""
        return self.select_layer == -1 and self.norm is not False

    def tiny(self) -> TimmConfig:
        """timm's own test model of the same class, where there is one, else its smallest vision transformer."""
        from mmllm.encoders.timm_backbone_module import tiny_name

        return TimmConfig(
            arch=tiny_name(self),
            select_layer=max(self.select_layer, -3),
            norm=self.norm,
            select=self.select,
            fit=self.fit,
        )

    def preprocessor(self, context: BuildContext) -> SquarePreprocessor:
        """Pictures to tensors, as timm and ``fit`` say. Raises ``ConfigError`` on a contradiction."""
        from mmllm.encoders.timm_backbone_module import make_preprocessor

        return make_preprocessor(self, context)

    def build(self, context: BuildContext) -> TimmEncoder:
        """The encoder up to ``select_layer``. Raises ``ConfigError`` or ``CheckpointError``."""
        from mmllm.encoders.timm_backbone_module import make_encoder

        return make_encoder(self, context)
