"""Captions as tokens of a BERT-like text side, which has a tokenizer of its own beside the backbone's."""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mmllm.config.alignment import CaptionConfig
from mmllm.config.base import BuildContext, problems_at
from mmllm.config.run import ModelConfig
from mmllm.errors import CheckpointError, ConfigError, brief
from mmllm.processing.batch import CaptionBatch, Encoded
from mmllm.processing.messages import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class CaptionReader:
    """From captions to padded ids. Picklable."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length

    @classmethod
    def from_config(cls, config: CaptionConfig, context: BuildContext) -> CaptionReader:
        """Raises ``CheckpointError`` when the tokenizer cannot be read, ``ConfigError`` when it is not as ``config`` says."""
        tokenizer = letters() if config.tokenizer is None else _read(config.tokenizer, config.revision, context)
        if len(tokenizer) > config.vocab_size:
            text = f"{config.vocab_size}, but {config.tokenizer} has {len(tokenizer)} tokens; set it to that"
            raise ConfigError([("vocab_size", text)])
        marks = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id
        if None in marks:
            text = (
                f"{config.tokenizer} lacks a class, separator, padding or mask token; expected a tokenizer like BERT's"
            )
            raise ConfigError([("tokenizer", text)])
        return cls(tokenizer, config.max_length)

    def __call__(self, items: Sequence[int], captions: Sequence[str]) -> CaptionBatch:
        """Captions of the media ``items`` of a batch: ``[CLS]``, at most ``max_length`` - 2 tokens, ``[SEP]``, padding."""
        found = self.tokenizer(
            list(captions), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        chosen, ids = torch.tensor(items, dtype=torch.int64), found["input_ids"]
        return CaptionBatch(chosen, ids, found["attention_mask"].bool(), self.tokenizer.mask_token_id)


def caption_readers(config: ModelConfig, context: BuildContext) -> dict[str, CaptionReader]:
    """The readers of all parts that read captions, by the part: ``inputs.image.alignment``, ``inputs.image.prompt``.

    Raises ``ConfigError`` or ``CheckpointError``.
    """
    problems: list[tuple[str, str]] = []
    readers = {}
    for name, one in config.inputs.items():
        for part, reading in {"alignment": one.alignment, "prompt": one.prompt}.items():
            if reading is not None:
                with problems_at(f"model.inputs.{name}.{part}", problems, context):
                    readers[f"inputs.{name}.{part}"] = CaptionReader.from_config(reading, context)
    if problems:
        raise ConfigError(problems)
    return readers


def collate_texts(
    readers: Mapping[str, CaptionReader], samples: Sequence[Encoded], modalities: Iterable[str]
) -> tuple[dict[str, CaptionBatch], dict[str, CaptionBatch], dict[str, CaptionBatch]]:
    """A batch's ``captions``, ``prompted`` and ``sentences`` (see ``Batch``), by modality: those that one of ``readers`` reads."""
    captions: dict[str, list[str | None]] = {}
    for span in (span for sample in samples for span in sample.spans):
        captions.setdefault(span.modality, []).append(span.caption)
    told = {name: captions[name] for name in sorted(captions)}
    said = [sample.said for sample in samples]
    return (
        _read_all(readers, "alignment", told),
        _read_all(readers, "prompt", told),
        _read_all(readers, "prompt", dict.fromkeys(modalities, said)),
    )


def _read_all(
    readers: Mapping[str, CaptionReader], part: str, texts: Mapping[str, Sequence[str | None]]
) -> dict[str, CaptionBatch]:
    """The ``texts`` of each modality as its ``part`` reads them, numbered, without the empty ones and those that none reads."""
    found = {}
    for name, told in texts.items():
        some = [(index, text) for index, text in enumerate(told) if text]
        if some and (reader := readers.get(f"inputs.{name}.{part}")):
            found[name] = reader([index for index, _ in some], [text for _, text in some])
    return found


def said_in(messages: Sequence[Message]) -> str:
    """What the assistant says in a conversation."""
    return " ".join(m.text.strip() for m in messages if m.role == "assistant").strip()


def captions_of(messages: Sequence[Message]) -> list[str | None]:
    """The caption of every medium of a conversation, in order: what the assistant writes right after a user's medium that is
    alone of its modality in its message; None for others.
    """
    captions: list[str | None] = []
    for message, reply in zip(messages, (*messages[1:], None), strict=True):
        types = [part.type for part in message.parts if part.type != "text"]
        said = reply.text.strip() if message.role == "user" and reply is not None else ""
        captions += [said if said and types.count(kind) == 1 else None for kind in types]
    return captions


def _read(name: str, revision: str | None, context: BuildContext) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    path = context.resolve(name)
    if Path(path).is_absolute() and not Path(path).exists():
        raise CheckpointError(f"found no folder {path}; expected the tokenizer of captions there")
    try:
        return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=context.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"cannot read the tokenizer {name}: {brief(error)}") from error


@cache
def letters() -> PreTrainedTokenizerBase:
    """A WordPiece tokenizer whose pieces are single letters, for models that are built without files."""
    from transformers import BertTokenizer

    known = [c for c in string.printable if not c.isspace() and not c.isupper()]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *known, *(f"##{c}" for c in known)]
    return BertTokenizer(vocab={word: index for index, word in enumerate(words)})
