"""What an input learns from captions beside its projector: BLIP-2's first stage and P-Former. Numbers only."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from mmllm.config.base import Config

LETTERS = 2 * 68 + 5  # tokens of the WordPiece tokenizer that models without files use: see `mmllm.processing.captions`


class CaptionConfig(Config):
    """How captions are read: by a BERT-like text side with a tokenizer of its own.

    - ``tokenizer``: hub id or folder of a tokenizer with a class (``[CLS]``) and a separator (``[SEP]``) token. None is
      one of letters, for models that are built without files. ``vocab_size`` is the number of its tokens.
    - ``max_length``: a caption's tokens with these two; longer ones are cut.
    - ``max_positions``: rows of the table of positions.
    - ``bert``: hub id or folder of a BERT whose embeddings and layers are the start.
    """

    tokenizer: str | None = "google-bert/bert-base-uncased"
    revision: str | None = None
    vocab_size: PositiveInt = 30_522
    max_length: Annotated[int, Field(ge=3)] = 32
    max_positions: PositiveInt = 512
    bert: str | None = None

    @model_validator(mode="after")
    def _room(self) -> Self:
        if self.max_length > self.max_positions:
            raise ValueError(f"max_length {self.max_length} is above max_positions {self.max_positions}")
        return self

    def tiny(self) -> Self:
        """The same with a tokenizer of letters and nothing to load."""
        length = min(self.max_length, 32)
        small = {"tokenizer": None, "revision": None, "vocab_size": LETTERS, "max_length": length}
        return self.model_copy(update={**small, "max_positions": length, "bert": None})


class AlignmentConfig(CaptionConfig):
    """BLIP-2's first stage (arXiv 2301.12597): the text side of a ``qformer`` projector and its heads.

    It is what the objectives ``itc``, ``itm`` and ``itg`` need beside the projector: embeddings of words and positions, a
    feed-forward block for text in every layer of the Q-Former, and heads. ``dim`` is the width of the space where captions
    and media meet, ``temperature`` where that of ``itc`` starts, ``label_smoothing`` that of ``itc`` and ``itg``.
    ``pretrained``: a folder or hub id of a transformers ``Blip2ForImageTextRetrieval`` checkpoint; the temperature and the
    head of ``itg``, which these lack, start anew.
    """

    kind: Literal["blip2"] = "blip2"
    dim: PositiveInt = 256
    temperature: PositiveFloat = 0.07
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    pretrained: str | None = None

    def tiny(self) -> Self:
        return super().tiny().model_copy(update={"dim": 8, "pretrained": None})


class PFormerConfig(CaptionConfig):
    """P-Former (arXiv 2307.07063): from a text to the prompt that would make a frozen language model say it.

    A BERT of these numbers reads the text; its class token becomes as many embeddings of the backbone as the projector
    gives of a medium. It learns from text alone (``reconstruction``, ``self_contrastive``, ``quantization``), with the share
    ``mask`` of the tokens hidden; then it is what the projector is drawn to (``alignment``). ``dim`` is the width of the space of
    ``self_contrastive``, with ``temperature`` and ``label_smoothing``; ``dropout`` acts in training.
    """

    kind: Literal["p_former"] = "p_former"
    num_layers: PositiveInt = 12
    hidden_dim: PositiveInt = 768
    num_heads: PositiveInt = 12
    ff_mult: PositiveInt = 4
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    mask: Annotated[float, Field(ge=0, lt=1)] = 0.25
    dim: PositiveInt = 256
    temperature: PositiveFloat = 0.07
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_dim % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide hidden_dim {self.hidden_dim}")
        return self

    def tiny(self) -> Self:
        small = {"num_layers": 2, "hidden_dim": 16, "num_heads": 2, "ff_mult": 2, "dim": 8}
        return super().tiny().model_copy(update=small)
