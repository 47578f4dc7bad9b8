"""The ``cformer`` encoder: X-LLM's C-Former (arXiv 2305.04160), which integrates frames of speech until a token fires."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from mmllm.config.base import BuildContext, Config
from mmllm.config.families import EncoderConfig

if TYPE_CHECKING:
    from mmllm.encoders.cformer_module import CFormerEncoder, CFormerPreprocessor


class AcousticNumbers(Config):
    """The transformer before the firing. X-LLM's authors published features 512 wide, not the model that made them; depth and
    heads are ours.
    """

    hidden_size: PositiveInt = 512
    num_hidden_layers: PositiveInt = 12
    num_attention_heads: PositiveInt = 8
    intermediate_size: PositiveInt = 2048
    num_mel_bins: PositiveInt = 80

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} is no multiple of twice num_attention_heads {self.num_attention_heads}"
            )
        return self


class BertNumbers(Config):
    """The transformer behind the firing under transformers' names (``BertConfig``); the defaults are BERT base's."""

    hidden_size: PositiveInt = 768
    num_hidden_layers: PositiveInt = 12
    num_attention_heads: PositiveInt = 12
    intermediate_size: PositiveInt = 3072
    max_position_embeddings: PositiveInt = 512

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"{self.num_attention_heads} heads do not divide hidden_size {self.hidden_size}")
        return self


class CFormerConfig(EncoderConfig):
    """Speech to about as many features as its text has tokens.

    Log-mel frames of 10 ms go through two convolutions (40 ms a frame then) and a transformer; every frame gets a weight,
    and as often as the weights add up to 1 a feature fires: the weighted sum of the frames since the last one (continuous
    integrate-and-fire, arXiv 1905.11235). A linear layer, ReLU and a BERT follow.

    - ``rate``: features for a second of sound, rounded to whole ones, at least one. The weights are scaled so that exactly
      that many fire, as they are scaled to the length of the text in CIF's own training; where they fire is learned.
    - ``acoustic``, ``transformer``: the numbers of the transformers before and behind the firing.
    - ``bert``: a folder written by ``save_pretrained`` of a transformers BERT or a hub id of one; its weights are those of
      the transformer behind, as in X-LLM, which begins with ``bert-base-chinese``. Everything else starts at random.

    A sound is read whole, so ``max_seconds`` bounds memory; with ``rate`` it may not ask for more positions than the
    transformer behind has. The quantity loss of CIF teaches the weights to add up to the length of a transcript; it belongs
    to a training for speech recognition and is not part of this.
    """

    kind: Literal["cformer"] = "cformer"
    rate: Annotated[float, Field(gt=0, le=25)] = 5.0
    acoustic: AcousticNumbers = AcousticNumbers()
    transformer: BertNumbers = BertNumbers()
    bert: str | None = None
    revision: str | None = None
    max_seconds: PositiveFloat = 60.0

    @model_validator(mode="after")
    def _positions_suffice(self) -> Self:
        most, there = self.num_features(self.max_seconds), self.transformer.max_position_embeddings
        if most > there:
            raise ValueError(
                f"{self.max_seconds:g} seconds at {self.rate:g} features a second are {most} features, but the transformer has "
                f"{there} positions; lower max_seconds or rate"
            )
        return self

    def num_features(self, seconds: float) -> int:
        """Features of a sound."""
        return max(1, round(self.rate * seconds))

    def tiny(self) -> CFormerConfig:
        """Two blocks of width 32 on each side."""
        small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        return CFormerConfig(
            rate=self.rate,
            acoustic=AcousticNumbers.model_validate({**small, "num_mel_bins": 16}),
            transformer=self.transformer.model_copy(update=small),
            max_seconds=self.max_seconds,
        )

    def preprocessor(self, context: BuildContext) -> CFormerPreprocessor:
        """Sounds to normalised log-mel frames."""
        from mmllm.encoders.cformer_module import CFormerPreprocessor

        return CFormerPreprocessor(self)

    def build(self, context: BuildContext) -> CFormerEncoder:
        """Raises ``CheckpointError`` when ``bert`` has other numbers."""
        from mmllm.encoders.cformer_module import make_encoder

        return make_encoder(self, context)
