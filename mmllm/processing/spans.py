"""Rendering a conversation through the backbone's own chat template, and finding in the text what is whose.

The template sees every message's content as one string in which a media item is a short mark that occurs in no message.
The rendered text is then cut at the marks and tokenised piece by piece, as a tokenizer does around a special token.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from mmllm.errors import DataError
from mmllm.processing.messages import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PRIVATE_USE = range(0xF000, 0xF8FF)
Interval = tuple[int, int]


@dataclass(frozen=True)
class Piece:
    """Tokens of a stretch of text, or (``media`` set) the place of the media item with that index."""

    ids: list[int]
    supervised: list[bool]
    media: int | None = None


@dataclass(frozen=True)
class Rendered:
    """``text`` is the whole rendering, media marks included; ``supervised`` are character intervals of it."""

    text: str
    supervised: list[Interval]
    pieces: list[Piece]


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, generation_prompt: bool) -> Rendered:
    """Token ids and supervised tokens of a conversation.

    ``generation_prompt`` ends the text where the assistant is to begin. Raises ``DataError`` when the template refuses the
    conversation (a role it does not know, say) or does not show every message once and in order.
    """
    mark = _unused_character(messages)
    contents = _contents(messages, mark)
    text, generated = _apply(tokenizer, messages, contents, generation_prompt)
    spans, literals = _content_spans(tokenizer, messages, contents, text, mark, generation_prompt)
    control = sorted(
        set(tokenizer.all_special_tokens) | {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    )
    supervised = generated or _reply_spans(messages, spans, literals, control)
    # Control tokens spelled out by a user (or by data) stay plain text: such a content is tokenised on its own, literally.
    literal = [span for span in spans if any(token in text[slice(*span)] for token in control)]
    pieces = list(_tokenise(tokenizer, text, mark, supervised, literal))
    return Rendered(text, supervised, pieces)


def _unused_character(messages: Sequence[Message]) -> str:
    used = {
        char
        for m in messages
        for part in m.parts
        if part.type == "text"
        for char in str(part.value)
        if char >= "\uf000"
    }
    for code in PRIVATE_USE:
        if chr(code) not in used:
            return chr(code)
    raise DataError(
        "the conversation uses every private-use character from U+F000 on; there is none left to mark media with"
    )


def _contents(messages: Sequence[Message], mark: str) -> list[str]:
    """Each message as one string; a media item becomes ``mark index mark`` on a line of its own."""
    contents, media = [], 0
    for message in messages:
        text, after_media = "", False
        for part in message.parts:
            if part.type == "text":
                # Lone surrogates are not text: no tokenizer takes them.
                value = str(part.value).encode("utf-8", "replace").decode("utf-8")
                text += f"\n{value}" if after_media and value and not value.startswith("\n") else value
            else:
                text += f"\n{mark}{media}{mark}" if text and not text.endswith("\n") else f"{mark}{media}{mark}"
                media += 1
            after_media = part.type != "text"
        contents.append(text)
    return contents


def _apply(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], contents: Sequence[str], generation_prompt: bool
) -> tuple[str, list[Interval]]:
    """The rendered text, and the template's own ``{% generation %}`` intervals (none when it has no such block)."""
    from jinja2.exceptions import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    conversation = [{"role": m.role, "content": text} for m, text in zip(messages, contents, strict=True)]
    template = tokenizer.get_chat_template()
    marks_replies = re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None
    try:
        texts, intervals = render_jinja_template(
            conversations=[conversation],
            chat_template=template,
            return_assistant_tokens_mask=marks_replies,
            add_generation_prompt=generation_prompt,
            **tokenizer.special_tokens_map,
        )
    except TemplateError as error:
        raise DataError(f"the backbone's chat template refuses this conversation: {error}") from error
    return texts[0], [tuple(i) for i in intervals[0]] if marks_replies else []


def _content_spans(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    contents: Sequence[str],
    text: str,
    mark: str,
    generation_prompt: bool,
) -> tuple[list[Interval], list[str]]:
    """Where each message's content stands in ``text``, and the template's own words before, between and after them.

    The template is rendered a second time with a mark for each content; its own words are then matched in the real text.
    """
    names = [f"{mark}c{i}{mark}" for i in range(len(contents))]
    skeleton, _ = _apply(tokenizer, messages, names, generation_prompt)
    parts = re.split(f"{mark}c(\\d+){mark}", skeleton)
    literals, order = parts[::2], [int(i) for i in parts[1::2]]
    if order != list(range(len(contents))):
        raise DataError(
            f"the backbone's chat template shows messages {order} of {len(contents)}; expected each message once and in order"
        )
    spans: list[Interval] = []
    at = len(literals[0])
    for content, following in zip(contents, literals[1:], strict=True):
        for candidate in (content, content.strip(), content.lstrip(), content.rstrip()):
            end = at + len(candidate)
            if text.startswith(candidate, at) and text.startswith(following, end):
                break
        else:
            raise DataError(
                "the backbone's chat template rewrites message contents; the reply's tokens cannot be told apart"
            )
        spans.append((at, end))
        at = end + len(following)
    return spans, literals


def _reply_spans(
    messages: Sequence[Message], spans: Sequence[Interval], literals: Sequence[str], control: Sequence[str]
) -> list[Interval]:
    """For a template without ``{% generation %}``: each reply with the control token that ends its turn."""
    supervised = []
    for message, (start, end), following in zip(messages, spans, literals[1:], strict=True):
        if message.role == "assistant":
            closing = following.lstrip()
            token = max((t for t in control if closing.startswith(t)), key=len, default="")
            supervised.append((start, end + (len(following) - len(closing) + len(token) if token else 0)))
    return supervised


def _tokenise(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    mark: str,
    supervised: Sequence[Interval],
    literal: Sequence[Interval],
) -> Iterator[Piece]:
    cuts: list[tuple[int, int, int | None]] = [
        (m.start(), m.end(), int(m[1])) for m in re.finditer(f"{mark}(\\d+){mark}", text)
    ]
    edges = sorted({0, len(text), *(e for cut in cuts for e in cut[:2]), *(e for span in literal for e in span)})
    media = {start: index for start, _, index in cuts}
    for start, end in pairwise(edges):
        if start in media:
            yield Piece([], [], media[start])
        else:
            plain = any(a <= start and end <= b for a, b in literal)
            yield _piece(tokenizer, text[start:end], start, supervised, plain)


def _piece(
    tokenizer: PreTrainedTokenizerBase, text: str, start: int, supervised: Sequence[Interval], plain: bool
) -> Piece:
    out: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=plain)
    flags = []
    index = bisect_right(supervised, start, key=itemgetter(1))
    for begin, end in out["offset_mapping"]:
        while index < len(supervised) and start + begin >= supervised[index][1]:
            index += 1
        flags.append(index < len(supervised) and start + end > supervised[index][0] and end > begin)
    return Piece(list(out["input_ids"]), flags)
