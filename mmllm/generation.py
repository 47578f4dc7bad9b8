"""Decoding: the reply to one conversation or to a batch of them, token by token."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from mmllm.errors import MmllmError
from mmllm.model import Input, MultimodalLM
from mmllm.processing.batch import Encoded
from mmllm.processing.messages import Message, Part
from mmllm.processing.processor import Processor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mmllm.backbones.base import BackboneOutput
    from mmllm.backbones.reading_module import Reading
    from mmllm.fusion.base import Fusion


@dataclass(frozen=True)
class Decoding:
    """How replies are decoded. ``temperature`` 0 is greedy; ``top_p`` and ``seed`` matter only above it."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        wrong = []
        if self.max_new_tokens < 1:
            wrong.append(f"the longest answer must have at least 1 token (max_new_tokens), not {self.max_new_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            wrong.append(f"the temperature must be 0 or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            wrong.append(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            wrong.append(f"the seed must be a whole number from 0 to 2**63 - 1, not {self.seed}")
        if wrong:
            raise MmllmError("; ".join(wrong))


@dataclass(frozen=True)
class Step:
    """What one step of decoding gave: the next token id of every prompt (None for one that has ended), and the groups of
    signal tokens that it completed. ``unfinished`` maps prompts to the modality of a group that is still being written.
    """

    ids: list[int | None]
    groups: list[Group]
    unfinished: dict[int, str]


@dataclass(frozen=True)
class Group:
    """A complete group of signal tokens of prompt ``row``: ``signals``, the states ``(1, K, D_llm)`` there, for the output
    ``modality``; or the codes ``(1, P)``, int64, where it takes those.
    """

    row: int
    modality: str
    signals: Tensor


class SignalWriter:
    """Keeps signal tokens in whole groups: the first one is the model's choice, and the rest of its group follows, with a
    choice only among codes.

    ``open`` maps a prompt to the modality of its unfinished group. A group counts once the states at all its tokens are
    known; so it is never half-used.
    """

    def __init__(self, processor: Processor, rows: int) -> None:
        self.outputs = processor.signals
        self.first = {signals.first: name for name, signals in self.outputs.items()}
        self.rows = list(range(rows))  # the prompts that the rows of a batch belong to
        self.ids: list[list[int]] = [[] for _ in range(rows)]
        self.states: list[list[Tensor]] = [[] for _ in range(rows)]
        self.open: dict[int, str] = {}

    def restrict(self, logits: Tensor) -> Tensor:
        """``logits (B, V)`` in which a group can only be begun, or gone on with where it is open."""
        if not self.outputs:
            return logits
        masked = logits.clone()
        for signals in self.outputs.values():
            masked[:, signals.first + 1 : signals.stop] = -torch.inf
        for at, row in enumerate(self.rows):
            if row in self.open:
                allowed = self.outputs[self.open[row]].allowed(len(self.states[row]))
                masked[at] = -torch.inf
                masked[at, allowed] = logits[at, allowed]
        return masked

    def written(self, ids: Sequence[int | None]) -> None:
        """Tell which ids were chosen, for every prompt."""
        for row, id in enumerate(ids):
            if id in self.first and row not in self.open:
                self.open[row] = self.first[id]
            if id is not None and row in self.open:
                self.ids[row].append(id)

    def read(self, states: Tensor) -> list[Group]:
        """Take the ``states (B, D_llm)`` at the newest tokens; the groups that are complete now."""
        complete = []
        for at, row in enumerate(self.rows):
            if (name := self.open.get(row)) is None:
                continue
            self.states[row].append(states[at])
            if len(self.states[row]) == self.outputs[name].count:
                complete.append(Group(row, name, self.outputs[name].told(self.ids[row], torch.stack(self.states[row]))))
                self.ids[row], self.states[row] = [], []
                del self.open[row]
        return complete


@torch.inference_mode()
def decode(
    model: MultimodalLM,
    processor: Processor,
    prompts: Sequence[Encoded],
    decoding: Decoding,
    stop: threading.Event | None = None,
) -> Iterator[Step]:
    """Decode all prompts together, token by token; those that have ended leave the batch.

    Ends when all have ended, at ``max_new_tokens``, or within one step of ``stop`` being set. Raises ``MmllmError`` when the
    longest prompt leaves no room in the backbone's context.
    """
    device = next(model.parameters()).device
    ends = stop_ids(model, processor)
    lengths = [len(prompt.ids) for prompt in prompts]
    room = context_length(model) - max(lengths)
    if room < 1:
        raise MmllmError(
            f"the conversation has {max(lengths)} tokens, the model reads at most {max(lengths) + room - 1}; start a new chat or "
            "send less"
        )
    generator = None if decoding.seed is None else torch.Generator(device).manual_seed(decoding.seed)
    reading, out = read(model, processor, prompts, device)
    writer, groups = SignalWriter(processor, len(prompts)), list[Group]()
    done = [False] * len(prompts)  # of the rows of the batch, which are those of `writer.rows`
    for left in range(min(decoding.max_new_tokens, room), 0, -1):
        chosen = choose(writer.restrict(out.logits), decoding, generator)
        shown: list[int | None] = [None] * len(prompts)
        for at, id in enumerate(chosen.tolist()):
            done[at] = done[at] or id in ends
            shown[writer.rows[at]] = None if done[at] else id
        writer.written(shown)
        yield Step(shown, groups, dict(writer.open))
        if left == 1 or all(done) or (stop is not None and stop.is_set()):
            return
        if 4 * sum(done) >= len(done):  # less often it would cost more than the rows that have ended do
            kept = torch.tensor([at for at, over in enumerate(done) if not over], device=device)
            reading.keep(kept)
            _see_rows(model, kept)
            chosen, done = chosen[kept], [False] * len(kept)
            writer.rows = [writer.rows[at] for at in kept.tolist()]
        embeddings = model.backbone.embed(chosen[:, None])
        out = reading.step(embeddings)
        groups = writer.read(cast(Tensor, out.states) + embeddings[:, 0])


def read(
    model: MultimodalLM, processor: Processor, prompts: Sequence[Encoded], device: torch.device
) -> tuple[Reading, BackboneOutput]:
    """Read the prompts: what was read, with logits ``(B, V)`` and states ``(B, D_llm)`` at their last positions.

    Behind each other in one row where the backbone can, so that nothing is computed for padding; else padded in front.
    """
    lengths = [len(prompt.ids) for prompt in prompts]
    alike = len(set(lengths)) == 1
    # What fused media are seen by is told by rows and columns.
    if model.backbone.reads_rows(lengths) and (alike or not _fusions(model)):
        batch = model.with_codes(processor.collate(prompts, pack=not alike).to(device))
        reading = model.backbone.row_reading(lengths)
    else:
        batch = model.with_codes(processor.collate(prompts, pad_left=True).to(device))
        reading = model.backbone.reading(batch.attention_mask)
    return reading, reading.begin(model.splice(batch.ids, batch.media))


def _fusions(model: MultimodalLM) -> list[Fusion]:
    return [fusion for one in model.inputs.values() if (fusion := cast(Input, one).fusion) is not None]


def _see_rows(model: MultimodalLM, rows: Tensor) -> None:
    """Let fused media be seen by these rows alone."""
    for fusion in _fusions(model):
        fusion.look(None if fusion.seen is None else fusion.seen.at(rows))


def choose(logits: Tensor, decoding: Decoding, generator: torch.Generator | None) -> Tensor:
    """Next token ids ``(B,)`` from logits ``(B, V)``: the largest, or a sample from the smallest set of mass ``top_p``."""
    if decoding.temperature == 0:
        return logits.argmax(dim=-1)
    order, index = (logits.float() / decoding.temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    # A token is kept while the mass before it is below top_p, so the most likely one always is.
    order = order.masked_fill(order.cumsum(dim=-1) - order >= decoding.top_p, 0.0)
    pick = torch.multinomial(order, 1, generator=generator)
    return index.gather(1, pick)[:, 0]


def context_length(model: MultimodalLM) -> int:
    """Tokens that the backbone can attend to; practically unlimited where its config names none (state-space models)."""
    config: Any = model.backbone.model.config
    taken = 0 if model.backbone.adapter is None else model.backbone.adapter.positions
    return int(config.max_position_embeddings) - taken if hasattr(config, "max_position_embeddings") else 2**31


def stop_ids(model: MultimodalLM, processor: Processor) -> set[int]:
    """The ids that end a reply: the tokenizer's and the model's own end tokens, and what the chat template ends a turn with."""
    tokenizer = processor.tokenizer
    own = cast(Any, model.backbone.model).generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    turn = processor.encode_messages(
        (Message("user", (Part("text", "a"),)), Message("assistant", (Part("text", "b"),)))
    )
    replies = [i for i, flag in zip(turn.ids, turn.supervised, strict=True) if flag]
    return ends | (set(replies[-1:]) & set(tokenizer.all_special_ids))


class TextStream:
    """Turns token ids into text as they come, holding back bytes of unfinished characters."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.shown = 0
        self.start = 0
        self.held = 0

    def add(self, token: int) -> str:
        """The new text that ``token`` completes; empty while a character is unfinished."""
        self.ids.append(token)
        text = self._text()
        # A character has at most four bytes: what is still broken after four tokens will stay so, and is shown.
        self.held = self.held + 1 if text.endswith("\ufffd") else 0
        if 0 < self.held < 4:
            return ""
        delta = text[self.shown :]
        self.shown = len(text)
        # Decode only from a recent word start on: a long reply would cost quadratic time otherwise.
        if len(self.ids) - self.start > 64 and delta.startswith((" ", "\n")):
            self.start, self.shown = (
                len(self.ids) - 1,
                len(self.tokenizer.decode(self.ids[-1:], skip_special_tokens=True)),
            )
        return delta

    def rest(self) -> str:
        """What was held back, at the end of the reply."""
        return self._text()[self.shown :]

    def _text(self) -> str:
        return str(self.tokenizer.decode(self.ids[self.start :], skip_special_tokens=True))
