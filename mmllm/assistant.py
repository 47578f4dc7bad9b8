"""A trained model with everything it needs to talk: ``mmllm.load`` returns one."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import torch

from mmllm.config.base import BuildContext
from mmllm.config.load import load as load_config
from mmllm.errors import CheckpointError, MediaError, MmllmError, brief
from mmllm.generation import Decoding, TextStream, decode
from mmllm.model import MultimodalLM
from mmllm.processing.processor import Processor

EMBEDDED = Path(__file__).parent / "embedded"


class Assistant:
    """A model and its processor. ``modalities`` names what it takes beside text."""

    def __init__(self, model: MultimodalLM, processor: Processor) -> None:
        self.model = model.eval()
        self.processor = processor

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.processor.modalities)

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
        stop: threading.Event | None = None,
    ) -> Iterator[str]: ...
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
        stop: threading.Event | None = None,
    ) -> str: ...
    def chat(
        self,
        messages: Sequence[Any],
        stream: bool = False,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: threading.Event | None = None,
    ) -> str | Iterator[str]:
        """The reply to a conversation: a string, or with ``stream`` an iterator of text deltas.

        ``messages`` as in the chat layout (see ``mmllm.processing.messages.parse_messages``), media as paths, bytes or data
        URLs. Setting ``stop`` ends the reply within one token. Raises ``DataError`` or ``MediaError`` before the first delta.
        """
        deltas = stripped(self._stream(messages, Decoding(max_new_tokens, temperature, top_p, seed), stop))
        return deltas if stream else "".join(deltas)

    def generate(
        self,
        conversations: Sequence[Sequence[Any]],
        *,
        root: Path | None = None,
        ids: Sequence[str] | None = None,
        **decoding: Any,
    ) -> list[str]:
        """The replies to several conversations, decoded together. Keyword arguments are those of ``Decoding``.

        With ``root`` the conversations come from a data file: media paths must lie inside that folder. ``ids`` are what
        errors call them.
        """
        names = ids or [f"conversation {i}" for i in range(len(conversations))]
        prompts = []
        for id, messages in zip(names, conversations, strict=True):
            try:
                prompts.append(self.processor.encode_prompt(messages, id=id, root=root))
            except MediaError as error:
                raise MediaError(f"{id}: {error}") from error
        replies: list[list[int]] = [[] for _ in prompts]
        for step in decode(self.model, self.processor, prompts, Decoding(**decoding)) if prompts else ():
            for reply, token in zip(replies, step, strict=True):
                if token is not None:
                    reply.append(token)
        return [str(self.processor.tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in replies]

    def _stream(self, messages: Sequence[Any], decoding: Decoding, stop: threading.Event | None) -> Iterator[str]:
        prompt = self.processor.encode_prompt(messages)
        text = TextStream(self.processor.tokenizer)
        for (token,) in decode(self.model, self.processor, [prompt], decoding, stop):
            if token is not None and (delta := text.add(token)):
                yield delta
        if rest := text.rest():
            yield rest


def stripped(deltas: Iterator[str]) -> Iterator[str]:
    """The deltas of ``text.strip()``, given those of ``text``: many templates begin a reply with a space."""
    begun, held = False, ""
    for delta in deltas:
        held += delta
        if held.strip():
            text = (held if begun else held.lstrip()).rstrip()
            begun, held = True, held[len(held.rstrip()) :]
            yield text


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
