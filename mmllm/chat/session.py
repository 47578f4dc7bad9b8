"""One conversation: its history, the user's turns, the streamed replies. No user interface here."""

from __future__ import annotations

import base64
import json
import mimetypes
import threading
import uuid
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from mmllm.chat.feedback import Feedback, Rating
from mmllm.errors import DataError

# The file endings offered for each modality. They only sort files into content parts; whether the bytes really are a
# picture or a sound is decided by the media decoders.
SUFFIXES: dict[str, tuple[str, ...]] = {
    "image": (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    "audio": (".wav", ".mp3", ".flac", ".ogg", ".opus"),
}
PLURALS: dict[str, str] = {"image": "pictures", "audio": "sounds"}


class Assistant(Protocol):
    """What the chat needs of a model: the modalities it takes, and replies as a stream of text pieces.

    ``options`` are the fields of ``Sampling`` and ``stop``, a ``threading.Event`` that ends the reply within one token.
    """

    @property
    def modalities(self) -> tuple[str, ...]: ...

    def chat(
        self,
        messages: Sequence[Any],
        stream: Literal[True],
        *,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_p: float = ...,
        seed: int | None = ...,
        stop: threading.Event | None = ...,
    ) -> Iterator[str]: ...


@dataclass(frozen=True)
class Sampling:
    """How the next words are chosen. ``temperature`` 0 is greedy; ``seed`` None draws a new one each time."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass
class ChatSession:
    """A conversation of user and assistant turns by turns, kept as a list of messages with content parts.

    Text parts are ``{"type": "text", "text": …}``, media parts ``{"type": <modality>, "path": …}``. While a reply
    streams, its text so far already stands in ``messages``, so a reply that was stopped or cut off is never lost.
    """

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    messages: list[dict[str, Any]] = field(default_factory=list)
    system_prompt: str = ""
    rated: tuple[int, Rating] | None = None
    idle: threading.Event = field(default_factory=threading.Event)
    _stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.idle.set()

    @property
    def answering(self) -> bool:
        """Whether a reply is running: ``idle`` is not set."""
        return not self.idle.is_set()

    def add_user(
        self, text: str, files: Sequence[str | Path] = (), modalities: Sequence[str] = tuple(SUFFIXES)
    ) -> None:
        """Add a user turn: the files first, in their order, then the text.

        Raises ``DataError`` for an empty turn, for a file of another kind than ``modalities``, and while the previous
        user turn waits for its reply; the history is unchanged then.
        """
        if self.answering or self.waiting:
            raise DataError(
                "Not sent: the last message was still being answered. Send it after the answer, or press Stop."
            )
        parts: list[dict[str, Any]] = [media_part(Path(path), modalities) for path in files]
        if text.strip():
            parts.append({"type": "text", "text": text.strip()})
        if not parts:
            raise DataError("The message is empty: type a question, or add a file.")
        self.messages.append({"role": "user", "content": parts})
        self._stop = threading.Event()

    @property
    def waiting(self) -> bool:
        """Whether the conversation ends with a user turn that has no answer."""
        return bool(self.messages) and self.messages[-1]["role"] == "user"

    def reply(self, assistant: Assistant, sampling: Sampling) -> Generator[str, None, None]:
        """Answer the last user turn; yields the whole answer so far after each piece of text.

        Ends early after ``stop()``, also when ``stop()`` came between the user turn and this call. However it ends, the
        model is told to stop. If it fails or is given up before its first piece, the history is as it was before.
        Raises ``DataError`` when there is nothing to answer or the assistant does not take one of the files, and whatever
        the assistant raises.
        """
        if not self.waiting:
            raise DataError("There is no question to answer yet.")
        modalities = known_modalities(assistant)
        for path in self.files():
            media_part(path, modalities)
        stop = self._stop
        self.idle.clear()
        asked = self.request()
        part = {"type": "text", "text": ""}
        answer = {"role": "assistant", "content": [part]}
        self.messages.append(answer)
        try:
            if stop.is_set():
                return
            for piece in assistant.chat(asked, stream=True, stop=stop, **asdict(sampling)):
                part["text"] += piece
                yield part["text"]
                if stop.is_set():
                    return
        except BaseException:
            if not part["text"] and self.messages and self.messages[-1] is answer:
                self.messages.pop()
            raise
        finally:
            stop.set()
            self.idle.set()

    def request(self) -> list[dict[str, Any]]:
        """The messages as the assistant gets them: the system prompt, if any, then the conversation."""
        system = self.system_prompt.strip()
        return [{"role": "system", "content": system}, *self.messages] if system else list(self.messages)

    def stop(self) -> None:
        """Stop the reply that is running, or the one about to start."""
        self._stop.set()

    def retry(self, index: int | None = None) -> None:
        """Drop the answer at ``index`` (default: the last) and all that follows, so that ``reply`` can answer again."""
        self.stop()
        position = len(self.messages) - 1 if index is None else index
        while position >= 0 and self.messages[position]["role"] != "user":
            position -= 1
        if position < 0:
            raise DataError("There is nothing to answer again yet.")
        del self.messages[position + 1 :]
        if self.rated is not None and self.rated[0] > position:
            self.rated = None
        self._stop = threading.Event()

    def undo(self, index: int | None = None) -> tuple[str, list[str]]:
        """Take back the user turn at or before ``index`` (the last one by default) and all that follows.

        Returns its text and the paths of its files, to be edited and sent again.
        """
        self.retry(index)
        self.stop()
        taken = self.messages.pop()
        return text_of(taken), [part["path"] for part in taken["content"] if part["type"] != "text"]

    def edit(self, index: int, text: str) -> None:
        """Change the text of the user turn at ``index`` and drop all that follows; its files stay."""
        if not 0 <= index < len(self.messages) or self.messages[index]["role"] != "user":
            raise DataError("Only your own messages can be edited.")
        media = [part for part in self.messages[index]["content"] if part["type"] != "text"]
        if not text.strip() and not media:
            raise DataError("The message is empty: type a question, or undo it.")
        self.retry(index)
        words = [{"type": "text", "text": text.strip()}] if text.strip() else []
        self.messages[index] = {"role": "user", "content": [*media, *words]}

    def clear(self) -> None:
        """Forget the conversation and start a new one under a new id; the system prompt stays."""
        self.stop()
        self.id = uuid.uuid4().hex
        self.messages = []
        self.rated = None

    def feedback(self, comment: str = "") -> Feedback:
        """The judgement ``rated``, which is (index of the answer, rating), with the words of that exchange."""
        if self.rated is None or not 0 < self.rated[0] < len(self.messages):
            raise DataError("Rate an answer first.")
        index, rating = self.rated
        question, answer = text_of(self.messages[index - 1]), text_of(self.messages[index])
        return Feedback(self.id, index, rating, question, answer, comment)

    def plain(self, text: str) -> str:
        """``text`` (an error's) with the paths of this conversation's files shortened to their names."""
        for path in self.files():
            text = text.replace(str(path), path.name)
        return text

    def files(self) -> list[Path]:
        """The files of the whole conversation, in order."""
        parts = [part for message in self.messages for part in message["content"]]
        return [Path(part["path"]) for part in parts if part["type"] != "text"]

    def export(self) -> str:
        """The conversation as JSON, ``{"id": …, "messages": […]}``, in the data layout; media as data URLs."""
        messages = []
        for message in self.request():
            content = message["content"]
            parts = content if isinstance(content, str) else [_portable(part) for part in content]
            messages.append({"role": message["role"], "content": parts})
        return json.dumps({"id": self.id, "messages": messages}, indent=2)


def text_of(message: dict[str, Any]) -> str:
    """The text parts of a message, joined."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def known_modalities(assistant: Assistant) -> tuple[str, ...]:
    """The modalities of ``assistant`` that a chat can carry as files."""
    return tuple(modality for modality in assistant.modalities if modality in SUFFIXES)


def file_types(modalities: Sequence[str]) -> list[str]:
    """The file endings a file chooser should offer for ``modalities``."""
    return [suffix for modality in modalities for suffix in SUFFIXES[modality]]


def media_part(path: Path, modalities: Sequence[str]) -> dict[str, str]:
    """The content part for the file at ``path``. Raises ``DataError`` when its ending is of none of ``modalities``."""
    modalities = [modality for modality in modalities if modality in SUFFIXES]
    for modality in modalities:
        if path.suffix.lower() in SUFFIXES[modality]:
            return {"type": modality, "path": str(path)}
    takes = " and ".join(PLURALS[modality] for modality in modalities) or "text only"
    endings = " ".join(file_types(modalities))
    raise DataError(f"{path.name}: this assistant takes {takes}{f' ({endings})' if endings else ''}.")


def _portable(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return part
    path = Path(part["path"])
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return {"type": part["type"], "name": path.name, "data": f"data:{kind};base64,{data}"}
