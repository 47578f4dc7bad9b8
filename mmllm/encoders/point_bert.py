"""The ``point_bert`` encoder: Point-BERT (arXiv 2111.14819) as ULIP-2 (arXiv 2305.08275) trained it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import PositiveInt, model_validator

from mmllm.config.base import BuildContext, Config
from mmllm.config.families import EncoderConfig

if TYPE_CHECKING:
    from mmllm.encoders.point_bert_module import PointBertEncoder, PointBertPreprocessor


class PointBertArchitecture(Config):
    """The numbers of a checkpoint, those of its YAML under their names there.

    The defaults are ULIP-2's PointBERT for 10,000 points with colours (``ULIP_2_PointBERT_10k_colored_pointclouds.yaml``).
    ``point_dims`` is 6 with colours, 3 without. ``embed_dim`` is the width of the space shared with pictures and text.
    ``conv_dims`` and ``pos_dim`` are no numbers of the YAML: the widths of the small PointNet and of the places' MLP.
    """

    trans_dim: PositiveInt = 384
    depth: PositiveInt = 18
    num_heads: PositiveInt = 6
    group_size: PositiveInt = 32
    num_group: PositiveInt = 512
    encoder_dims: PositiveInt = 256
    npoints: PositiveInt = 10_000
    point_dims: Literal[3, 6] = 6
    embed_dim: PositiveInt = 1280
    conv_dims: tuple[PositiveInt, PositiveInt] = (128, 256)
    pos_dim: PositiveInt = 128

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.trans_dim % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide trans_dim {self.trans_dim}")
        for name, number in (("group_size", self.group_size), ("num_group", self.num_group)):
            if number > self.npoints:
                raise ValueError(f"{name} {number} is more than npoints {self.npoints}")
        return self


class PointBertConfig(EncoderConfig):
    """Point-BERT: groups of neighbouring points as tokens of a transformer.

    A point cloud of ``npoints`` (a mesh is sampled) is moved to the unit sphere. ``num_group`` points far from each other,
    each with the ``group_size`` points nearest to it, become a token by a small PointNet.

    - ``pretrained``: a ``.safetensors`` file with the names of ULIP's or PointLLM's checkpoints, a folder or a hub id that
      holds it as ``model.safetensors``. The licences of the weights are in ``docs/encoders.md``.
    - ``architecture``: the numbers where they are not those of ULIP-2 with colours.
    - ``output``: ``tokens``, the class token and one of each group (PointLLM); ``pooled``, the class token beside the
      largest values of the others, 2 * ``trans_dim`` wide (ULIP's features); ``embedding``, those projected into the space
      shared with pictures and text, ``embed_dim`` wide (X-InstructBLIP).
    """

    suggested: ClassVar[Mapping[str, Any]] = {
        "point_cloud": {"pretrained": "./ULIP-2-PointBERT-10k-xyzrgb.safetensors"}
    }
    kind: Literal["point_bert"] = "point_bert"
    pretrained: str | None = None
    revision: str | None = None
    architecture: PointBertArchitecture = PointBertArchitecture()
    output: Literal["tokens", "pooled", "embedding"] = "tokens"

    def tiny(self) -> PointBertConfig:
        """Two blocks of width 16 over 8 groups of 4 points."""
        numbers = PointBertArchitecture(
            trans_dim=16,
            depth=2,
            num_heads=2,
            group_size=4,
            num_group=8,
            encoder_dims=12,
            npoints=64,
            point_dims=self.architecture.point_dims,
            embed_dim=24,
            conv_dims=(6, 8),
            pos_dim=6,
        )
        return PointBertConfig(architecture=numbers, output=self.output)

    def preprocessor(self, context: BuildContext) -> PointBertPreprocessor:
        """Points on the unit sphere, in groups."""
        from mmllm.encoders.point_bert_module import PointBertPreprocessor

        return PointBertPreprocessor(self.architecture, self.output)

    def build(self, context: BuildContext) -> PointBertEncoder:
        """The encoder. Raises ``CheckpointError``."""
        from mmllm.encoders.point_bert_module import make_encoder

        return make_encoder(self, context)
