"""The ``tiled`` encoder: pictures of any resolution, cut into tiles of an encoder's own size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveInt

from mmllm.config.base import BuildContext, ComponentConfig
from mmllm.config.families import AnyEncoder, EncoderConfig

if TYPE_CHECKING:
    from mmllm.encoders.tiled_module import TiledEncoder, TiledPreprocessor

Grid = tuple[PositiveInt, PositiveInt]


class TiledConfig(EncoderConfig):
    """Any resolution as LLaVA-NeXT does it (github.com/LLaVA-VL/LLaVA-NeXT, `llava/mm_utils.py` and `model/llava_arch.py`).

    The picture is scaled, with its aspect ratio, into the grid of tiles that keeps most of its pixels and, among such
    grids, wastes least; what is left of the grid is black. Every tile goes through ``encoder``. Its features come back
    as those of one large picture, row by row, without rows and columns that are nothing but black; before them, with
    ``overview``, those of the whole picture distorted into one tile. So larger pictures have more features.

    - ``encoder``: one whose features lie on a grid; its own square, whatever it is, is the size of a tile.
    - ``grids``: rows and columns of tiles to choose from. These are LLaVA-NeXT's.
    - ``row_ends`` puts a feature of zeros behind each row of the large picture, for LLaVA-NeXT's ``image_newline``: a
      projector without a mixture of features gives each the same embedding, ``mlp`` with ``row_ends`` one of its own.
    """

    suggested: ClassVar[Mapping[str, Any]] = {
        "image": {"encoder": {"kind": "clip", "pretrained": "openai/clip-vit-large-patch14-336"}}
    }
    kind: Literal["tiled"] = "tiled"
    encoder: AnyEncoder
    grids: Annotated[tuple[Grid, ...], Field(min_length=1)] = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
    overview: bool = True
    row_ends: bool = True

    def members(self) -> dict[str, ComponentConfig]:
        """Those of the encoder."""
        return {f"encoder.{path}" if path else "encoder": piece for path, piece in self.encoder.members().items()}

    def tiny(self) -> TiledConfig:
        """The tiny encoder, at most three grids."""
        return self.model_copy(update={"encoder": self.encoder.tiny(), "grids": self.grids[:3]})

    def preprocessor(self, context: BuildContext) -> TiledPreprocessor:
        """Raises ``ConfigError`` where the encoder takes no squares of one size, or its features lie on no grid."""
        from mmllm.encoders.tiled_module import make_preprocessor

        return make_preprocessor(self, context)

    def build(self, context: BuildContext) -> TiledEncoder:
        """Raises ``ConfigError`` or ``CheckpointError`` where the encoder does."""
        from mmllm.encoders.tiled_module import make_encoder

        return make_encoder(self, context)
