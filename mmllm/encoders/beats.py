"""The ``beats`` encoder: BEATs, a transformer over patches of a log-mel spectrogram (arXiv 2212.09058)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from mmllm.config.base import BuildContext, Config
from mmllm.config.families import EncoderConfig

if TYPE_CHECKING:
    from mmllm.encoders.beats_module import BeatsEncoder, BeatsPreprocessor


class BeatsArchitecture(Config):
    """The numbers of a checkpoint's ``cfg`` under its names; the defaults are those of every published checkpoint.

    ``num_mel_bins`` is no number of ``cfg``: the reference has 128 always.
    """

    input_patch_size: PositiveInt = 16
    embed_dim: PositiveInt = 512
    encoder_layers: PositiveInt = 12
    encoder_embed_dim: PositiveInt = 768
    encoder_ffn_embed_dim: PositiveInt = 3072
    encoder_attention_heads: PositiveInt = 12
    conv_pos: PositiveInt = 128
    conv_pos_groups: PositiveInt = 16
    num_buckets: Annotated[int, Field(ge=4, multiple_of=4)] = 320
    max_distance: PositiveInt = 800
    num_mel_bins: PositiveInt = 128

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for name, number in (
            ("encoder_attention_heads", self.encoder_attention_heads),
            ("conv_pos_groups", self.conv_pos_groups),
        ):
            if self.encoder_embed_dim % number:
                raise ValueError(f"{name} {number} does not divide encoder_embed_dim {self.encoder_embed_dim}")
        if self.num_mel_bins < self.input_patch_size:
            raise ValueError(f"a patch of {self.input_patch_size} does not fit {self.num_mel_bins} mel bins")
        if self.max_distance <= self.num_buckets // 4:
            raise ValueError(f"max_distance {self.max_distance} is not above a quarter of {self.num_buckets} buckets")
        return self

    @property
    def rows(self) -> int:
        """Patches of one step of time."""
        return self.num_mel_bins // self.input_patch_size


class BeatsConfig(EncoderConfig):
    """A BEATs encoder on Kaldi's log-mel filter bank at 16 kHz, read at one of its layers.

    A step of 160 ms gives 8 features, from low to high frequencies: 496 for 10 s. A sound is read whole and attends over all
    of itself, so ``max_seconds`` bounds memory; one shorter than 175 ms is filled up with silence.

    - ``pretrained``: a ``.safetensors`` file with the names of a published ``BEATs_iter….pt``, a folder or a hub id that
      holds it as ``model.safetensors``. Code and weights are under the MIT licence.
    - ``architecture``: the numbers where they are not the published ones.
    - ``select_layer``: -1 the output of the last block, -2 of the one before, and so on; later blocks are then not part of
      the module. The classifier of fine-tuned checkpoints never is.
    """

    suggested: ClassVar[Mapping[str, Any]] = {"audio": {"pretrained": "./BEATs_iter3_plus_AS2M.safetensors"}}
    kind: Literal["beats"] = "beats"
    pretrained: str | None = None
    revision: str | None = None
    architecture: BeatsArchitecture = BeatsArchitecture()
    select_layer: Annotated[int, Field(le=-1)] = -1
    max_seconds: PositiveFloat = 60.0

    def tiny(self) -> BeatsConfig:
        """Three blocks of width 32 over two rows of patches."""
        whole = self.architecture
        numbers = BeatsArchitecture(
            input_patch_size=min(whole.input_patch_size, 16),
            embed_dim=32 if whole.embed_dim == whole.encoder_embed_dim else 16,
            encoder_layers=3,
            encoder_embed_dim=32,
            encoder_ffn_embed_dim=64,
            encoder_attention_heads=2,
            conv_pos=16 + whole.conv_pos % 2,
            conv_pos_groups=4,
            num_buckets=32,
            num_mel_bins=32,
        )
        select = max(self.select_layer, -3)
        return BeatsConfig(architecture=numbers, select_layer=select, max_seconds=self.max_seconds)

    def preprocessor(self, context: BuildContext) -> BeatsPreprocessor:
        """Sounds to normalised log-mel spectra."""
        from mmllm.encoders.beats_module import BeatsPreprocessor

        return BeatsPreprocessor(self.architecture, self.max_seconds)

    def build(self, context: BuildContext) -> BeatsEncoder:
        """The encoder up to ``select_layer``. Raises ``ConfigError`` or ``CheckpointError``."""
        from mmllm.encoders.beats_module import make_encoder

        return make_encoder(self, context)
