"""The ``fused`` encoder: several encoders on the same picture or sound, their features joined."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from mmllm.config.base import BuildContext, ComponentConfig
from mmllm.config.families import AnyEncoder, EncoderConfig

if TYPE_CHECKING:
    from mmllm.encoders.fused_module import FusedEncoder, FusedPreprocessor

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


class FusedConfig(EncoderConfig):
    """Two or more encoders of one kind of media.

    Prismatic (arXiv 2402.07865) and MouSi (2401.17221) join towers of pictures like this, SALMONN (2310.13289) those of
    sounds.

    - ``encoders``: each under a name of its own; the order is that of the features. Every one prepares the medium in its
      own way, and is a part of its own for checkpoints: a frozen one is kept by reference.
    - ``along``: ``channels`` joins the features of one place to one of the sum of widths; ``sequence`` puts those of the
      second encoder behind those of the first, which needs equal widths.
    - ``lengths``: how features along channels come to be as many as the first encoder's. ``interpolate`` resamples their
      grid to the first one's, pictures in two dimensions, sounds in time: bilinear, antialiased, with the outer edges of
      both grids on each other (``align_corners=False``). Where one of them lies on no grid, or one on rows and columns
      and the other in time, that is refused; nothing is needed, and nothing is done, where there are equally many.
      ``pad`` puts zeros behind the shorter one instead, as SALMONN does.
    - ``widths``: along the sequence features of different widths are refused (``equal``), or the narrower ones get zeros
      (``pad``), for a projector that tells the encoders apart (``mq_former``).
    """

    # Prismatic's towers, and SALMONN's.
    suggested: ClassVar[Mapping[str, Any]] = {
        "image": {
            "encoders": {
                "siglip": {"kind": "vit", "pretrained": "google/siglip-so400m-patch14-384", "select_layer": -2},
                "dino": {"kind": "vit", "pretrained": "facebook/dinov2-large", "select_layer": -2},
            }
        },
        "audio": {
            "encoders": {
                "whisper": {"kind": "whisper", "pretrained": "openai/whisper-large-v2"},
                "beats": {"kind": "beats", "pretrained": "./BEATs_iter3_plus_AS2M.safetensors"},
            },
            "lengths": "pad",
        },
    }
    kind: Literal["fused"] = "fused"
    encoders: dict[Name, AnyEncoder]
    along: Literal["channels", "sequence"] = "channels"
    lengths: Literal["interpolate", "pad"] = "interpolate"
    widths: Literal["equal", "pad"] = "equal"

    @model_validator(mode="after")
    def _several(self) -> FusedConfig:
        if len(self.encoders) < 2:
            raise ValueError(
                f"found {len(self.encoders)} in `encoders`, expected at least two; use one without `fused`"
            )
        if self.along == "sequence" and self.lengths != "interpolate":
            raise ValueError("`lengths` goes with `along: channels`; leave it out")
        if self.along == "channels" and self.widths != "equal":
            raise ValueError("`widths` goes with `along: sequence`; leave it out")
        return self

    def members(self) -> dict[str, ComponentConfig]:
        """Those of every encoder."""
        return {
            f"encoders.{name}.{path}" if path else f"encoders.{name}": piece
            for name, encoder in self.encoders.items()
            for path, piece in encoder.members().items()
        }

    def tiny(self) -> FusedConfig:
        """The tiny version of every encoder."""
        return self.model_copy(update={"encoders": {name: encoder.tiny() for name, encoder in self.encoders.items()}})

    def preprocessor(self, context: BuildContext) -> FusedPreprocessor:
        """What every encoder makes of the medium. Raises ``ConfigError`` when they do not take the same."""
        from mmllm.encoders.fused_module import make_preprocessor

        return make_preprocessor(self, context)

    def build(self, context: BuildContext) -> FusedEncoder:
        """All encoders. Raises ``ConfigError`` with everything that they refuse, or ``CheckpointError``."""
        from mmllm.encoders.fused_module import make_encoder

        return make_encoder(self, context)
