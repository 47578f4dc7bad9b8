"""A trained model with everything it needs to talk: ``mmllm.load`` returns one."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, overload

import torch

from mmllm.config.base import BuildContext
from mmllm.config.load import load as load_config
from mmllm.errors import CheckpointError, MediaError, MmllmError, brief
from mmllm.generation import Decoding, TextStream, decode
from mmllm.making import Maker
from mmllm.model import MultimodalLM
from mmllm.outputs import Output
from mmllm.processing.batch import Encoded
from mmllm.processing.processor import Processor
from mmllm.replies import Media, Reply, Truncated
from mmllm.retrieval import MediaIndex, Retrieval, Rule, load_index

EMBEDDED = Path(__file__).parent / "embedded"


class Assistant:
    """A model and its processor. ``modalities`` names what it takes beside text.

    ``retrieval`` holds the existing media that it may answer with, by modality; see ``use_index``.
    """

    def __init__(self, model: MultimodalLM, processor: Processor) -> None:
        self.model = model.eval()
        self.processor = processor
        # Both are tried out on the model: here, not while the first answer is waited for.
        model.backbone.start_packing(instead_of=("sdpa", "eager"))
        model.backbone.take_short_cuts()
        model.backbone.quick = False
        self.retrieval: dict[str, Retrieval] = {}
        self._prepared, self._preparing = False, threading.Lock()

    def prepare(self) -> None:
        """Take the short cuts and lay the weights out as it is fastest to answer with them; the first answer does so by itself.

        Until then the model computes what the trained one did; from then on rounding differs.
        """
        with self._preparing:
            if not self._prepared:
                self.model.backbone.quicken(self.model.inputs)
                self.model.backbone.quick = self._prepared = True

    def use_index(self, index: MediaIndex | str | Path, rule: Rule = "auto", threshold: float = 0.5) -> None:
        """Let all replies from now on show media of an index (or of its folder), where the rule says so: ``auto`` by
        ``threshold``, ``trained`` by the decision head, ``retrieve`` always, ``generate`` never.

        Raises ``CheckpointError`` when there is no index, ``MmllmError`` when it is not this model's.
        """
        retrieval = Retrieval(index if isinstance(index, MediaIndex) else load_index(index), rule, threshold)
        retrieval.check(self.model)
        self.retrieval[retrieval.index.modality] = retrieval

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.processor.modalities)

    @property
    def makes(self) -> tuple[str, ...]:
        """The modalities it makes beside text."""
        return tuple(self.processor.signals)

    @property
    def making(self) -> dict[str, dict[str, float]]:
        """The generators' own numbers by modality, ``{"image": {"steps": 50, "guidance": 7.5}}``: what ``media`` can change.

        A number that a generator does not have is left out.
        """
        return {name: cast(Output, self.model.outputs[name]).frozen().defaults() for name in self.makes}

    @overload
    def chat(
        self,
        messages: Sequence[Any],
        stream: Literal[True],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        media: Mapping[str, Mapping[str, Any]] | None = None,
        stop: threading.Event | None = None,
    ) -> Iterator[str | Media | Truncated]: ...
    @overload
    def chat(
        self,
        messages: Sequence[Any],
        stream: Literal[False] = False,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        media: Mapping[str, Mapping[str, Any]] | None = None,
        stop: threading.Event | None = None,
    ) -> Reply: ...
    def chat(
        self,
        messages: Sequence[Any],
        stream: bool = False,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        media: Mapping[str, Mapping[str, Any]] | None = None,
        stop: threading.Event | None = None,
    ) -> Reply | Iterator[str | Media | Truncated]:
        """The reply to a conversation: a ``Reply``, or with ``stream`` an iterator of text deltas and ``Media``, in order.

        Text goes on while a generator runs: a ``Media`` comes at its place in the text, its ``result()`` later. A group of
        signal tokens that is cut off makes nothing; a stream then ends with ``Truncated``.

        ``messages`` as in the chat layout (see ``mmllm.processing.messages.parse_messages``), media as paths, bytes or data
        URLs. ``media`` changes the generators' sampling by modality, ``{"image": {"steps": 20, "guidance": 5.0}}``. Setting
        ``stop`` ends the reply within one token and a generator within one step. Raises ``DataError`` or ``MediaError``
        before the first delta.
        """
        maker = Maker(self.model, media, seed, stop, self.retrieval)
        how = Decoding(max_new_tokens, temperature, top_p, seed)
        parts = (part for _, part in self._stream([messages], how, maker, stop))
        return parts if stream else collect(parts)

    @overload
    def chat_batch(
        self,
        conversations: Sequence[Sequence[Any]],
        stream: Literal[True],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        media: Mapping[str, Mapping[str, Any]] | None = None,
        stop: threading.Event | None = None,
    ) -> Iterator[tuple[int, str | Media | Truncated]]: ...
    @overload
    def chat_batch(
        self,
        conversations: Sequence[Sequence[Any]],
        stream: Literal[False] = False,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        media: Mapping[str, Mapping[str, Any]] | None = None,
        stop: threading.Event | None = None,
    ) -> list[Reply]: ...
    def chat_batch(
        self,
        conversations: Sequence[Sequence[Any]],
        stream: bool = False,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        media: Mapping[str, Mapping[str, Any]] | None = None,
        stop: threading.Event | None = None,
    ) -> list[Reply] | Iterator[tuple[int, str | Media | Truncated]]:
        """The replies to several conversations, decoded together: a list, or with ``stream`` an iterator of ``(index, part)``.

        The parts of one index are those that ``chat`` streams for that conversation, each as soon as it is there; a
        conversation that has been answered leaves the batch. Arguments are those of ``chat``, for all of them. With
        temperature 0 each gets the reply that it gets alone. Of what is drawn, by ``temperature`` or by a generator, the
        batch draws with one ``seed``: the i-th medium made gets ``seed + i``.
        """
        maker = Maker(self.model, media, seed, stop, self.retrieval)
        how = Decoding(max_new_tokens, temperature, top_p, seed)
        parts = self._stream(conversations, how, maker, stop)
        if stream:
            return parts
        found: list[list[str | Media | Truncated]] = [[] for _ in conversations]
        for index, part in parts:
            found[index].append(part)
        return [collect(iter(own)) for own in found]

    def generate(
        self,
        conversations: Sequence[Sequence[Any]],
        *,
        root: Path | None = None,
        ids: Sequence[str] | None = None,
        media: Mapping[str, Mapping[str, Any]] | None = None,
        **decoding: Any,
    ) -> list[Reply]:
        """The replies to several conversations, decoded together. Keyword arguments are those of ``Decoding``.

        With ``root`` the conversations come from a data file: media paths must lie inside that folder. ``ids`` are what
        errors call them, ``media`` as in ``chat``.
        """
        self.prepare()
        prompts = self._prompts(conversations, ids, root)
        how = Decoding(**decoding)
        maker = Maker(self.model, media, how.seed, retrieval=self.retrieval)
        words: list[list[int]] = [[] for _ in prompts]
        made: list[list[Media]] = [[] for _ in prompts]
        unfinished: dict[int, str] = {}
        for step in decode(self.model, self.processor, prompts, how) if prompts else ():
            for reply, token in zip(words, step.ids, strict=True):
                if token is not None and token < self.processor.vocab_rows:
                    reply.append(token)
            for group in step.groups:
                made[group.row].append(maker.make(group.modality, group.signals, group.row))
            unfinished = step.unfinished
        maker.close()
        return [
            Reply.of(
                self.processor.tokenizer.decode(reply, skip_special_tokens=True).strip(),
                media,
                [unfinished[row]] if row in unfinished else [],
            )
            for row, (reply, media) in enumerate(zip(words, made, strict=True))
        ]

    def _prompts(
        self, conversations: Sequence[Sequence[Any]], ids: Sequence[str] | None = None, root: Path | None = None
    ) -> list[Encoded]:
        prompts = []
        for id, messages in zip(
            ids or [f"conversation {i}" for i in range(len(conversations))], conversations, strict=True
        ):
            try:
                prompts.append(self.processor.encode_prompt(messages, id=id, root=root))
            except MediaError as error:
                raise MediaError(f"{id}: {error}") from error
        return prompts

    def _stream(
        self, conversations: Sequence[Sequence[Any]], decoding: Decoding, maker: Maker, stop: threading.Event | None
    ) -> Iterator[tuple[int, str | Media | Truncated]]:
        """The parts of all replies with their conversations' indices, as they come."""
        try:
            self.prepare()
            alone = len(conversations) == 1
            prompts = [self.processor.encode_prompt(conversations[0])] if alone else self._prompts(conversations)
            texts = [(TextStream(self.processor.tokenizer), Stripper()) for _ in prompts]
            going = set(range(len(prompts)))
            unfinished: dict[int, str] = {}
            for step in decode(self.model, self.processor, prompts, decoding, stop) if prompts else ():
                for group in step.groups:
                    yield group.row, maker.make(group.modality, group.signals, group.row)
                for row in sorted(going):
                    (text, stripper), token = texts[row], step.ids[row]
                    if token is None:
                        going.remove(row)
                        new = text.rest()
                    else:
                        new = text.add(token) if token < self.processor.vocab_rows else ""
                    if delta := stripper.add(new):
                        yield row, delta
                unfinished = step.unfinished
            for row in sorted(going):
                text, stripper = texts[row]
                if delta := stripper.add(text.rest()):
                    yield row, delta
            for row, modality in unfinished.items():
                yield row, Truncated(modality)
        finally:
            maker.close()


def collect(parts: Iterator[str | Media | Truncated]) -> Reply:
    """A streamed reply as a whole."""
    text, media, truncated = "", list[Media](), list[str]()
    for part in parts:
        if isinstance(part, str):
            text += part
        elif isinstance(part, Media):
            media.append(part)
        else:
            truncated.append(part.modality)
    return Reply.of(text, media, truncated)


class Stripper:
    """The deltas of ``text.strip()``, given those of ``text``: many templates begin a reply with a space."""

    def __init__(self) -> None:
        self.begun, self.held = False, ""

    def add(self, delta: str) -> str:
        """What can be shown now; space is held back until something follows."""
        self.held += delta
        if not self.held.strip():
            return ""
        text = (self.held if self.begun else self.held.lstrip()).rstrip()
        self.begun, self.held = True, self.held[len(self.held.rstrip()) :]
        return text


def stripped(parts: Iterator[str | Media | Truncated]) -> Iterator[str | Media | Truncated]:
    """The parts of a streamed reply without space at both ends of its text."""
    stripper = Stripper()
    for part in parts:
        if not isinstance(part, str):
            yield part
        elif delta := stripper.add(part):
            yield delta


def model_folder(name: str | Path) -> Path:
    """The folder of a model: ``embedded`` for the one that ships with mmllm, else a checkpoint or run directory."""
    if str(name) == "embedded":
        return EMBEDDED
    folder = Path(name)
    for candidate in (folder, folder / "final"):
        if (candidate / "config.yaml").is_file() and (candidate / "manifest.json").is_file():
            return candidate
    raise CheckpointError(
        f"{folder}: no model there (expected a folder with config.yaml and manifest.json, or `embedded`)"
    )


def usable_device(name: str | torch.device) -> torch.device:
    """The device of that name. Raises ``MmllmError`` when there is none on this machine."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise MmllmError(f"device {str(name)!r} cannot be used here: {brief(error, 200)}") from error


def load(
    name: str | Path = "embedded",
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> Assistant:
    """Load a trained model: ``embedded``, a checkpoint folder, or a run directory (its final model).

    ``device`` defaults to CUDA where there is one; ``dtype`` to bfloat16 there and float32 on the CPU. Frozen parts are read
    from where the checkpoint refers to. Raises ``CheckpointError`` when files are missing or altered.
    """
    from mmllm.training.checkpoint import load_parts
    from mmllm.training.references import check_references, pinned

    folder = model_folder(name)
    device = usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    context = BuildContext(dtype=dtype, root=folder.resolve(), trust_remote_code=trust_remote_code)
    check_references(folder)  # before anything is built from them: a missing folder would be taken for a hub id
    config = pinned(load_config(folder / "config.yaml"), folder).model
    model = MultimodalLM.from_config(config, context)
    load_parts(model, folder)
    return Assistant(model.to(device), Processor.from_config(config, context))
