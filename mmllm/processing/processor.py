"""From a conversation to token ids, labels and media tensors.

Media spans. A media item of n features takes n placeholder ids in the token sequence (and, with ``markers``, one start and
one end id around them). Placeholder and marker ids lie beyond the backbone's table (``vocab_rows`` and up), so no text can
ever produce one and the tokenizer stays as it came.

Labels. The chat template is rendered by transformers' sandboxed Jinja. Where it marks the assistant's text with
``{% generation %}`` those spans are supervised; otherwise the reply's own text and the end-of-turn token that follows it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmllm.config.base import BuildContext, problems_at
from mmllm.errors import ConfigError, DataError, MediaError, SampleTooLong
from mmllm.processing.audio import decode_audio
from mmllm.processing.images import decode_image
from mmllm.processing.messages import Message, Part, Sample, check_turns, parse_messages
from mmllm.processing.sources import Limits, read_media
from mmllm.processing.spans import render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mmllm.config.families import Preprocessor, ProjectorConfig
    from mmllm.config.run import ModelConfig

DECODERS: dict[str, Callable[..., Any]] = {"image": decode_image, "audio": decode_audio}


@dataclass(frozen=True)
class Span:
    """One media item in a sequence: ``count`` features from token ``start`` on."""

    modality: str
    start: int
    count: int
    item: dict[str, Tensor]


@dataclass(frozen=True)
class Encoded:
    """One conversation ready for batching. ``supervised[i]`` says whether token i is to be predicted."""

    id: str
    ids: list[int]
    supervised: list[bool]
    spans: list[Span]

    @property
    def num_supervised(self) -> int:
        # The first token has nothing before it to be predicted from.
        return sum(self.supervised[1:])


@dataclass
class MediaBatch:
    """The media of one modality in a batch: N items.

    ``inputs`` is what the encoder takes. Row ``sources[i]`` of the projector's output, seen as ``(N * Q, D_llm)``, belongs
    at row ``positions[i]`` of the token embeddings, seen as ``(B * T, D_llm)``. ``width`` is Q.
    """

    inputs: dict[str, Tensor]
    positions: Tensor
    sources: Tensor
    width: int

    def to(self, device: torch.device | str) -> MediaBatch:
        inputs = {k: v.to(device, non_blocking=True) for k, v in self.inputs.items()}
        return MediaBatch(inputs, self.positions.to(device), self.sources.to(device), self.width)


@dataclass
class Batch:
    """B conversations padded to T tokens.

    ``ids (B, T)`` int64, ``attention_mask (B, T)`` int64. Logits at flat positions ``predict (K,)`` into B*T are to give
    ``targets (K,)``: the head runs nowhere else.
    """

    ids: Tensor
    attention_mask: Tensor
    predict: Tensor
    targets: Tensor
    media: dict[str, MediaBatch]
    sample_ids: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Number of supervised tokens."""
        return int(self.targets.numel())

    def to(self, device: torch.device | str) -> Batch:
        """A copy on ``device``."""
        media = {name: m.to(device) for name, m in self.media.items()}
        ids, attention = self.ids.to(device, non_blocking=True), self.attention_mask.to(device, non_blocking=True)
        predict, targets = self.predict.to(device, non_blocking=True), self.targets.to(device, non_blocking=True)
        return Batch(ids, attention, predict, targets, media, self.sample_ids)


@dataclass(frozen=True)
class Modality:
    """What the processor needs to know of one input."""

    preprocessor: Preprocessor
    projector: ProjectorConfig
    placeholder: int
    markers: tuple[int, int] | None


def new_token_names(config: ModelConfig) -> list[str]:
    """mmllm's own tokens in id order, from ``vocab_rows`` on. Placeholders come last: they need no embedding row."""
    markers = [f"<{name}_{end}>" for name, part in config.inputs.items() if part.markers for end in ("start", "end")]
    return markers + [f"<{name}>" for name in config.inputs]


class Processor:
    """Everything between a conversation and the model's input, for training and for chat alike. Picklable."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocab_rows: int,
        config: ModelConfig,
        preprocessors: dict[str, Preprocessor],
        limits: Limits | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.limits = limits or Limits()
        ids = {name: vocab_rows + i for i, name in enumerate(new_token_names(config))}
        self.modalities = {
            name: Modality(
                preprocessors[name],
                part.projector,
                ids[f"<{name}>"],
                (ids[f"<{name}_start>"], ids[f"<{name}_end>"]) if part.markers else None,
            )
            for name, part in config.inputs.items()
        }
        stop = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.pad_id: int = 0 if stop is None else stop

    @classmethod
    def from_config(cls, config: ModelConfig, context: BuildContext) -> Processor:
        """Tokenizer and preprocessors of a configuration; no weights are read. Raises ``ConfigError``."""
        problems: list[tuple[str, str]] = []
        preprocessors = {}
        with problems_at("model.backbone", problems, context):
            tokenizer, rows = config.backbone.tokenizer(context), config.backbone.vocab_rows(context)
        for name, part in config.inputs.items():
            with problems_at(f"model.inputs.{name}.encoder", problems, context):
                preprocessors[name] = part.encoder.preprocessor(context)
        if problems:
            raise ConfigError(problems)
        return cls(tokenizer, rows, config, preprocessors)

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files and ``processor.json`` (new tokens and their ids, for readers of the checkpoint)."""
        self.tokenizer.save_pretrained(folder)
        tokens = {name: {"placeholder": m.placeholder, "markers": m.markers} for name, m in self.modalities.items()}
        (folder / "processor.json").write_text(json.dumps({"new_tokens": tokens}, indent=2) + "\n", encoding="utf-8")

    def encode_sample(self, sample: Sample, max_length: int) -> Encoded:
        """Token ids and labels of a training conversation.

        Raises ``DataError`` (roles, unknown modality, nothing supervised), ``MediaError``, or ``SampleTooLong`` beyond
        ``max_length`` tokens: media spans are never cut, so a long sample is refused whole.
        """
        check_turns(sample.messages, sample.id, training=True)
        encoded = self._encode(sample.id, sample.messages, sample.root, generation_prompt=False)
        if len(encoded.ids) > max_length:
            raise SampleTooLong(f"{sample.id}: {len(encoded.ids)} tokens, max_length is {max_length}")
        if encoded.num_supervised == 0:
            raise DataError(f"{sample.id}: the chat template leaves no token of the reply to learn from")
        return encoded

    def encode_prompt(self, messages: Sequence[Any], *, id: str = "prompt", root: Path | None = None) -> Encoded:
        """Token ids of a conversation that the assistant is to continue. Raises ``DataError`` or ``MediaError``."""
        parsed = parse_messages(messages, id)
        check_turns(parsed, id)
        if parsed[-1].role != "user":
            raise DataError(f"{id}: the last message is from {parsed[-1].role!r}; the assistant answers a user message")
        return self._encode(id, parsed, root, generation_prompt=True)

    def encode_messages(self, messages: tuple[Message, ...]) -> Encoded:
        """Token ids of a conversation as it stands, checked neither for training nor for chat."""
        return self._encode("messages", messages, None, generation_prompt=False)

    def _encode(self, id: str, messages: tuple[Message, ...], root: Path | None, *, generation_prompt: bool) -> Encoded:
        media = [part for part in chain.from_iterable(m.parts for m in messages) if part.type != "text"]
        for part in media:
            if part.type not in self.modalities:
                known = ", ".join(self.modalities) or "none"
                raise DataError(f"{id}: a part of type {part.type!r}, but this model's input modalities are: {known}")
        rendered = render(self.tokenizer, messages, generation_prompt=generation_prompt)
        ids: list[int] = []
        supervised: list[bool] = []
        spans: list[Span] = []
        for piece in rendered.pieces:
            if piece.media is None:
                ids += piece.ids
                supervised += piece.supervised
                continue
            part = media[piece.media]
            modality, item = self.modalities[part.type], self._load(part, root)
            count = modality.projector.num_outputs(modality.preprocessor.num_tokens(item))
            start, end = ([m] for m in modality.markers) if modality.markers else ([], [])
            spans.append(Span(part.type, len(ids) + len(start), count, item))
            ids += start + [modality.placeholder] * count + end
            supervised += [False] * (len(ids) - len(supervised))
        return Encoded(id, ids, supervised, spans)

    def _load(self, part: Part, root: Path | None) -> dict[str, Tensor]:
        preprocessor = self.modalities[part.type].preprocessor
        data = read_media(part.value, root=root, limits=self.limits)
        try:
            decoded = DECODERS[preprocessor.media](data, limits=self.limits, **preprocessor.decode_options)
            # Samples of replies are drawn inside a training run's autocast; what is prepared must not depend on that.
            with torch.autocast("cpu", enabled=False):
                return preprocessor(decoded)
        except MediaError as error:
            # Of several files the reader wants to know which; a data URL or bytes have no name.
            named = isinstance(part.value, str) and not part.value.startswith("data:")
            raise MediaError(f"{Path(str(part.value)).name}: {error}" if named else str(error)) from error

    def collate(self, samples: Sequence[Encoded], *, pad_left: bool = False) -> Batch:
        """One batch, padded on the right (training) or on the left (generation, where all must end together)."""
        rows, width = len(samples), max(len(s.ids) for s in samples)
        ids = torch.full((rows, width), self.pad_id, dtype=torch.int64)
        attention = torch.zeros((rows, width), dtype=torch.int64)
        predict, targets = [], []
        items: dict[str, list[tuple[int, Span]]] = {}
        for row, sample in enumerate(samples):
            offset = width - len(sample.ids) if pad_left else 0
            tokens = torch.tensor(sample.ids, dtype=torch.int64)
            ids[row, offset : offset + len(tokens)] = tokens
            attention[row, offset : offset + len(tokens)] = 1
            wanted = torch.tensor(sample.supervised[1:], dtype=torch.bool).nonzero().flatten()
            predict.append(wanted + row * width + offset)
            targets.append(tokens[1:][wanted])
            for span in sample.spans:
                items.setdefault(span.modality, []).append((row * width + offset + span.start, span))
        # Sorted so that every rank and every run visits the modalities in the same order.
        media = {name: self._collate_media(name, items[name]) for name in sorted(items)}
        return Batch(ids, attention, torch.cat(predict), torch.cat(targets), media, [s.id for s in samples])

    def _collate_media(self, name: str, placed: list[tuple[int, Span]]) -> MediaBatch:
        modality = self.modalities[name]
        inputs = modality.preprocessor.collate([span.item for _, span in placed])
        # The projector's padded length: num_outputs never shrinks with length, so the longest item sets it.
        width = max(span.count for _, span in placed)
        positions = torch.cat([torch.arange(start, start + span.count) for start, span in placed])
        sources = torch.cat([torch.arange(i * width, i * width + span.count) for i, (_, span) in enumerate(placed)])
        return MediaBatch(inputs, positions, sources, width)
