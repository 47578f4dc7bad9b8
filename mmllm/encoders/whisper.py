"""The ``whisper`` encoder: sounds of any length to features of a Whisper encoder (arXiv 2212.04356)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from mmllm.config.base import BuildContext, Config
from mmllm.config.families import EncoderConfig

if TYPE_CHECKING:
    from mmllm.encoders.whisper_module import WhisperEncoder, WhisperPreprocessor


class WhisperArchitecture(Config):
    """The encoder's numbers under transformers' names (``WhisperConfig``); the defaults are whisper-tiny's.

    ``max_source_positions`` features make one window; a feature spans 320 samples at 16 kHz, 20 ms.
    """

    d_model: PositiveInt = 384
    encoder_layers: PositiveInt = 4
    encoder_attention_heads: PositiveInt = 6
    encoder_ffn_dim: PositiveInt = 1536
    num_mel_bins: PositiveInt = 80
    max_source_positions: PositiveInt = 1500

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.d_model % self.encoder_attention_heads:
            raise ValueError(f"{self.encoder_attention_heads} heads do not divide d_model {self.d_model}")
        return self


def _openai(state: int, layers: int, mels: int = 80) -> WhisperArchitecture:
    return WhisperArchitecture(
        d_model=state,
        encoder_layers=layers,
        encoder_attention_heads=state // 64,
        encoder_ffn_dim=4 * state,
        num_mel_bins=mels,
    )


# openai-whisper's model sizes (arXiv 2212.04356, table 1; large-v3 and turbo read 128 mel bins)
SIZES = {
    "tiny": _openai(384, 4),
    "base": _openai(512, 6),
    "small": _openai(768, 12),
    "medium": _openai(1024, 24),
    "large-v1": _openai(1280, 32),
    "large-v2": _openai(1280, 32),
    "large-v3": _openai(1280, 32, 128),
    "large-v3-turbo": _openai(1280, 32, 128),
}
Size = Literal["tiny", "base", "small", "medium", "large-v1", "large-v2", "large-v3", "large-v3-turbo"]


class WhisperConfig(EncoderConfig):
    """A Whisper encoder, read at one of its layers.

    Sounds are cut into windows of the checkpoint's length (30 s for the published ones). Whisper attends over each
    whole window, silence included, as it was trained to; features of the padding are then dropped, and the windows of
    one sound follow each other. One feature stands for 20 ms.

    - ``pretrained``: a folder written by ``save_pretrained`` of transformers' ``WhisperModel`` or
      ``WhisperForConditionalGeneration``, a hub id of one, or an openai-whisper ``.pt`` file (``./tiny.pt``).
    - ``arch``: an openai size, or ``architecture``: the numbers, so that a plan needs no file; random weights without
      ``pretrained``. Hub ids ``openai/whisper-*`` are known.
    - ``select_layer``: -1 the encoder's output (final norm included, as every Whisper decoder sees it), -2 the output
      of the block before the last, and so on; later blocks and the norm are then not part of the module.
    - ``max_seconds``: longer sounds are refused. A minute costs 3000 features.
    """

    suggested: ClassVar[Mapping[str, Any]] = {"audio": {"pretrained": "openai/whisper-small"}}
    kind: Literal["whisper"] = "whisper"
    arch: Size | None = None
    architecture: WhisperArchitecture | None = None
    pretrained: str | None = None
    revision: str | None = None
    select_layer: Annotated[int, Field(le=-1)] = -1
    max_seconds: PositiveFloat = 600.0

    @model_validator(mode="after")
    def _one_architecture(self) -> Self:
        if self.arch is not None and self.architecture is not None:
            raise ValueError("found `arch` and `architecture`, expected one of them: keep what describes the encoder")
        if self.arch is None and self.architecture is None and self.pretrained is None:
            raise ValueError("found no architecture; give `pretrained`, or `arch` for random weights")
        return self

    def tiny(self) -> WhisperConfig:
        """Three blocks of width 32 over windows of half a second."""
        numbers = WhisperArchitecture(
            d_model=32,
            encoder_layers=3,
            encoder_attention_heads=2,
            encoder_ffn_dim=64,
            num_mel_bins=16,
            max_source_positions=25,
        )
        select = max(self.select_layer, -3)
        return WhisperConfig(architecture=numbers, select_layer=select, max_seconds=self.max_seconds)

    def preprocessor(self, context: BuildContext) -> WhisperPreprocessor:
        """Sounds to log-mel windows."""
        from mmllm.encoders.whisper_module import make_preprocessor

        return make_preprocessor(self, context)

    def build(self, context: BuildContext) -> WhisperEncoder:
        """The encoder up to ``select_layer``. Raises ``ConfigError`` or ``CheckpointError``."""
        from mmllm.encoders.whisper_module import make_encoder

        return make_encoder(self, context)
