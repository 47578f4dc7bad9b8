"""From a conversation to token ids, labels and media tensors.

Media spans. A media item of n features takes n placeholder ids in the token sequence (and, with ``markers``, one start and
one end id around them). What the assistant makes takes its output's signal tokens. All these ids lie beyond the backbone's
table (``vocab_rows`` and up), so no text can ever produce one and the tokenizer stays as it came.

What the assistant showed is put in front of the user's next message as well, where the model has an encoder for it: as if
the user had sent it back. So "make it blue" can be answered by looking.

Labels. The chat template is rendered by transformers' sandboxed Jinja. Where it marks the assistant's text with
``{% generation %}`` those spans are supervised; otherwise the reply's own text and the end-of-turn token that follows it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmllm.cache.media import Facts, Known, MediaCache, Told
from mmllm.config.base import BuildContext, problems_at
from mmllm.config.families import outputs_of
from mmllm.errors import ConfigError, DataError, SampleTooLong
from mmllm.processing.batch import Batch, Encoded, Made, Span
from mmllm.processing.captions import CaptionReader, captions_of, collate_texts, said_in
from mmllm.processing.collating import collate_codes, collate_made, collate_media
from mmllm.processing.messages import Message, Part, Sample, check_turns, parse_messages
from mmllm.processing.reading import decoded, prepared, read
from mmllm.processing.sources import Limits
from mmllm.processing.spans import render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mmllm.config.families import Preprocessor, ProjectorConfig, Target, TokenGroup
    from mmllm.config.run import ModelConfig


@dataclass(frozen=True)
class Modality:
    """What the processor needs to know of one input."""

    preprocessor: Preprocessor
    projector: ProjectorConfig
    placeholder: int
    markers: tuple[int, int] | None
    fused: bool = False


@dataclass(frozen=True)
class Signals:
    """The tokens of one output: ``first`` is the id of its first one, ``group`` how they make up one medium, ``target`` how
    a target of it is read.

    ``retrieval`` tells that its media are also looked at by the encoder of the input of the same name.
    """

    first: int
    group: TokenGroup
    target: Target | None
    retrieval: bool

    @property
    def count(self) -> int:
        """Tokens of a group."""
        return len(self.group.places)

    @property
    def stop(self) -> int:
        """The first id behind the output's tokens."""
        return self.first + self.group.rows

    @property
    def ids(self) -> list[int]:
        """The ids of a group; the first that is allowed where the backbone chooses."""
        return [self.first + place.start for place in self.group.places]

    def allowed(self, place: int) -> slice:
        """The ids that may stand at a place of the group."""
        choice = self.group.places[place]
        return slice(self.first + choice.start, self.first + choice.stop)

    @property
    def code_firsts(self) -> list[int]:
        """The ids of code 0 at the places where the backbone chooses."""
        return [self.first + self.group.places[place].start for place in self.group.free]

    def told(self, ids: Sequence[int], states: Tensor) -> Tensor:
        """What the output takes of a complete group: its codes ``(1, P)`` where there are any, else the ``states (K, D)`` at
        its tokens, as ``(1, K, D)``.
        """
        codes = [ids[place] - first for place, first in zip(self.group.free, self.code_firsts, strict=True)]
        return torch.tensor([codes], dtype=torch.int64) if codes else states[None]


class Processor:
    """Everything between a conversation and the model's input, for training and for chat alike. Picklable."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocab_rows: int,
        config: ModelConfig,
        preprocessors: dict[str, Preprocessor],
        limits: Limits | None = None,
        targets: dict[str, Target] | None = None,
        groups: dict[str, TokenGroup] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.limits = limits or Limits()
        self.vocab_rows = vocab_rows
        self._targets = self._shown = False
        self._captions: dict[str, CaptionReader] = {}
        self._caches: dict[str, MediaCache] = {}
        # mmllm's own tokens, from `vocab_rows` on. Those that the backbone writes come first, since they alone have rows in
        # the head; placeholders last: they need no embedding row.
        self.signals: dict[str, Signals] = {}
        next_id = vocab_rows
        for name, group in (groups or {}).items():
            looked_at = config.outputs[name].retrieval is not None
            self.signals[name] = Signals(next_id, group, (targets or {}).get(name), looked_at)
            next_id = self.signals[name].stop
        marked = [name for name, part in config.inputs.items() if part.markers]
        markers = {name: (next_id + 2 * i, next_id + 2 * i + 1) for i, name in enumerate(marked)}
        next_id += 2 * len(marked)
        self.modalities = {
            name: Modality(preprocessors[name], part.projector, next_id + i, markers.get(name), part.fusion is not None)
            for i, (name, part) in enumerate(config.inputs.items())
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
        targets, groups = {}, {}
        for name, made in config.outputs.items():
            with problems_at(f"model.outputs.{name}.generator", problems, context):
                targets[name] = made.generator.target(context)
                groups[name] = made.generator.tokens(context, made.signal_tokens)
        if problems:
            raise ConfigError(problems)
        return cls(tokenizer, rows, config, preprocessors, targets=targets, groups=groups)

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files and ``processor.json`` (`own_tokens`, for readers of the checkpoint)."""
        self.tokenizer.save_pretrained(folder)
        written = json.dumps(self.own_tokens(), indent=2) + "\n"
        (folder / "processor.json").write_text(written, encoding="utf-8")

    def own_tokens(self) -> dict[str, Any]:
        """mmllm's own tokens and their ids: ``new_tokens`` by input, and ``signal_tokens`` by output where there are any."""
        tokens = {name: {"placeholder": m.placeholder, "markers": m.markers} for name, m in self.modalities.items()}
        found: dict[str, Any] = {"new_tokens": tokens}
        if self.signals:
            found["signal_tokens"] = {
                name: {"first": signals.first, "rows": signals.group.rows, "group": signals.count}
                for name, signals in self.signals.items()
            }
        return found

    def reading_targets(self, wanted: bool, *, shown: bool = False) -> Processor:
        """This processor, reading the files of what the assistant makes as well, or leaving them alone (the default):
        as what the generators are to make, and with ``shown`` as what the encoders see, where there are retrieval heads.
        """
        other = copy(self)
        other._targets, other._shown = wanted, shown
        return other

    def reading_captions(self, readers: Mapping[str, CaptionReader]) -> Processor:
        """This processor, reading also what the assistant says, and to which media, for the parts ``readers``
        (``inputs.image.alignment``).
        """
        other = copy(self)
        other._captions = dict(readers)
        return other

    def reading_caches(self, caches: Mapping[str, MediaCache]) -> Processor:
        """This processor, looking media up in ``caches``, by their part (``inputs.image``, ``outputs.image``), before it
        decodes them. Its batches are to go through ``mmllm.training.caching.complete``.
        """
        other = copy(self)
        other._caches = dict(caches)
        return other

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

    def text(self, ids: Sequence[int]) -> str:
        """The text of a reply; what it makes stands in brackets."""
        names = {signals.first: f"[{name}]" for name, signals in self.signals.items()}
        pieces = []
        for new, run in groupby(ids, key=lambda id: id >= self.vocab_rows):
            if new:
                pieces += [names[id] for id in run if id in names]
            else:
                pieces.append(str(self.tokenizer.decode(list(run), skip_special_tokens=True)).strip())
        return " ".join(piece for piece in pieces if piece)

    def encode_messages(self, messages: tuple[Message, ...]) -> Encoded:
        """Token ids of a conversation as it stands, checked neither for training nor for chat."""
        return self._encode("messages", messages, None, generation_prompt=False)

    def _encode(self, id: str, messages: tuple[Message, ...], root: Path | None, *, generation_prompt: bool) -> Encoded:
        messages = tuple(self.as_read(messages))
        media = [(m.role == "assistant", part) for m in messages for part in m.parts if part.type != "text"]
        captions = captions_of(messages)
        for made, part in media:
            known: Mapping[str, Any] = self.signals if made else self.modalities
            if part.type not in known:
                raise DataError(
                    f"{id}: a part of type {part.type!r}, but this model's {'output' if made else 'input'} modalities are: "
                    f"{', '.join(known) or 'none'}"
                )
        rendered = render(self.tokenizer, messages, generation_prompt=generation_prompt)
        encoded = Encoded(id, [], [], [], said=said_in(messages))
        for piece in rendered.pieces:
            if piece.media is None:
                encoded.ids.extend(piece.ids)
                encoded.supervised.extend(piece.supervised)
                continue
            made, part = media[piece.media]
            if made:
                signals = self.signals[part.type]
                # Codes are part of the sequence, so what they are made of is read whatever the objectives.
                target = self._target(part, root) if self._targets or signals.group.free else None
                wanted = self._shown and signals.retrieval and part.value is not None
                seen = self.load(part, root) if wanted else None
                retrieved = None if part.source is None else part.source == "retrieved"
                encoded.made.append(Made(part.type, len(encoded.ids), part.caption, target, seen, retrieved))
                encoded.ids.extend(signals.ids)
                encoded.supervised.extend([not generation_prompt] * signals.count)
                continue
            modality, found = self.modalities[part.type], self._known(part, root)
            item: dict[str, Tensor] = self.load(part, root) if found is None else {}
            asked: Any = modality.preprocessor if found is None else Told(found.facts)
            path = f"model.inputs.{part.type}.projector"
            count, layout = outputs_of(modality.projector, asked, item, path)
            start, end = ([m] for m in modality.markers) if modality.markers else ([], [])
            place, width = len(encoded.ids) + len(start), 0 if modality.fused else count
            said = captions[piece.media]
            encoded.spans.append(Span(part.type, place, count, item, layout, said, modality.fused, found))
            encoded.ids.extend(start + [modality.placeholder] * width + end)
            encoded.supervised.extend([False] * (len(encoded.ids) - len(encoded.supervised)))
        return encoded

    def as_read(self, messages: Sequence[Message]) -> Iterator[Message]:
        """The messages as the model gets them: with what the assistant showed in front of the user's next one."""
        shown: tuple[Part, ...] = ()
        for message in messages:
            if message.role == "assistant":
                shown = tuple(p for p in message.parts if p.type in self.modalities and p.value is not None)
            elif shown:
                message, shown = Message(message.role, (*shown, *message.parts)), ()
            yield message

    def load(self, part: Part, root: Path | None) -> dict[str, Tensor]:
        """What the encoder of ``part.type`` takes of a medium, without a batch axis. Raises ``MediaError``."""
        return prepared(part, read(part, root, self.limits), self.modalities[part.type].preprocessor, self.limits)

    def _known(self, part: Part, root: Path | None) -> Known | None:
        """A medium in the cache of its encoder's features, prepared where it is not there yet; None without a cache."""
        if (cache := self._caches.get(f"inputs.{part.type}")) is None:
            return None
        preprocessor, limits = self.modalities[part.type].preprocessor, self.limits
        data = read(part, root, limits)
        return cache.find(data, lambda: prepared(part, data, preprocessor, limits), partial(Facts.of, preprocessor))

    def _target(self, part: Part, root: Path | None) -> Tensor | Known | None:
        """The target of what the assistant makes, or what the cache of its latents has of it; None where there is none."""
        signals = self.signals[part.type]
        target, limits = signals.target, self.limits
        if target is None or (part.value is None and not signals.group.free):
            return None
        data = read(part, root, limits)
        if (cache := self._caches.get(f"outputs.{part.type}")) is None:
            return target(decoded(part, data, target, limits))
        return cache.find(data, lambda: {"target": target(decoded(part, data, target, limits))}, lambda _: Facts())

    def collate(self, samples: Sequence[Encoded], *, pad_left: bool = False, pack: bool = False) -> Batch:
        """One batch, padded on the right (training) or on the left (generation, where all must end together), or packed: all
        in one row.
        """
        lengths = [len(sample.ids) for sample in samples]
        rows, width = (1, sum(lengths)) if pack else (len(samples), max(lengths))
        ends = list(accumulate(lengths)) if pack else [width * (row + 1) for row in range(rows)]
        ids = torch.full((rows, width), self.pad_id, dtype=torch.int64)
        attention = torch.zeros((rows, width), dtype=torch.int64)
        predict, targets, replies = [], [], list[tuple[int, int, int]]()
        items: dict[str, list[tuple[int, Span]]] = {}
        things: dict[str, list[tuple[int, Made]]] = {}
        for sample, behind in zip(samples, ends, strict=True):
            # Where the conversation begins, counted over all rows.
            start = behind - len(sample.ids) if pad_left or pack else behind - width
            tokens = torch.tensor(sample.ids, dtype=torch.int64)
            ids.view(-1)[start : start + len(tokens)] = tokens
            attention.view(-1)[start : start + len(tokens)] = 1
            wanted = torch.tensor(sample.supervised[1:], dtype=torch.bool).nonzero().flatten()
            predict.append(wanted + start)
            targets.append(tokens[1:][wanted])
            row, offset = divmod(start, width)
            replies += [(row, offset + first, offset + last) for first, last in sample.replies]
            for span in sample.spans:
                items.setdefault(span.modality, []).append((start + span.start, span))
            for thing in sample.made:
                things.setdefault(thing.modality, []).append((start + thing.start, thing))
        # Sorted so that every rank and every run visits the modalities in the same order.
        media = {name: collate_media(self.modalities[name], items[name], width) for name in sorted(items)}
        written = {name for name in things if self.signals[name].group.free}
        made = {
            name: collate_made(self.signals[name], self.modalities.get(name), things[name])
            for name in sorted(things.keys() - written)
        }
        codes = {name: collate_codes(self.signals[name], things[name]) for name in sorted(written)}
        return Batch(
            ids,
            attention,
            torch.cat(predict),
            torch.cat(targets),
            media,
            [sample.id for sample in samples],
            made,
            codes,
            *collate_texts(self._captions, samples, self.modalities),
            torch.tensor(replies, dtype=torch.int64).view(-1, 3),
            torch.tensor(lengths) if pack else None,
        )
