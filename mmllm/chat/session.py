"""One conversation: its history, the user's turns, the streamed replies. No user interface here."""

from __future__ import annotations

import base64
import json
import mimetypes
import tempfile
import threading
import uuid
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

from mmllm.chat.feedback import Feedback, Rating
from mmllm.errors import DataError
from mmllm.replies import Media, Truncated

# The file endings offered for each modality. They only sort files into content parts; whether the bytes really are a
# picture or a sound is decided by the media decoders.
SUFFIXES: dict[str, tuple[str, ...]] = {
    "image": (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    "audio": (".wav", ".mp3", ".flac", ".ogg", ".opus"),
    "video": (".mp4", ".mov", ".m4v", ".webm", ".mkv", ".avi", ".mpg", ".mpeg"),
    "point_cloud": (".glb", ".gltf", ".ply", ".obj", ".off", ".stl", ".npy"),
}
PLURALS: dict[str, str] = {"image": "pictures", "audio": "sounds", "video": "clips", "point_cloud": "point clouds"}


POLL_SECONDS = 0.2  # how often a page hears of a medium in the making


class Assistant(Protocol):
    """What the chat needs of a model: the modalities it takes and makes, and replies as a stream of text pieces and media.

    ``options`` are the fields of ``Sampling`` and ``stop``, a ``threading.Event`` that ends the reply within one token.
    ``making`` are the generators' own numbers, ``{"image": {"steps": 50, "guidance": 7.5}}``, for each modality it makes;
    ``media`` changes them, and is only given to an assistant that makes something.
    """

    @property
    def modalities(self) -> tuple[str, ...]: ...

    @property
    def making(self) -> Mapping[str, Mapping[str, float]]: ...

    def chat(
        self,
        messages: Sequence[Any],
        stream: Literal[True],
        *,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_p: float = ...,
        seed: int | None = ...,
        media: Mapping[str, Mapping[str, Any]] | None = ...,
        stop: threading.Event | None = ...,
    ) -> Iterator[str | Media | Truncated]: ...


@dataclass(frozen=True)
class Sampling:
    """How the next words are chosen. ``temperature`` 0 is greedy; ``seed`` None draws a new one each time.

    ``media`` changes how the generators draw, ``{"image": {"steps": 20}}``; modalities that the assistant does not make
    are passed over, so that the numbers can stay when the model changes.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    media: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def options(self, assistant: Assistant) -> dict[str, Any]:
        """The keyword arguments of ``assistant.chat``."""
        words = {item.name: getattr(self, item.name) for item in fields(self)}
        media = {name: options for name, options in words.pop("media").items() if name in assistant.making}
        return {**words, "media": media} if media else words


@dataclass
class ChatSession:
    """A conversation of user and assistant turns by turns, kept as a list of messages with content parts.

    Text parts are ``{"type": "text", "text": …}``, media parts ``{"type": <modality>, "path": …}``; one that the assistant
    is still making has ``"making": Media`` in place of a path, one whose file was not kept ``"missing": <its name>``.
    While a reply streams, what there is of it already stands in ``messages``, so a reply that was stopped or cut off is
    never lost. Files of the session's own lie in a folder that goes away with it, made inside ``folder`` (the system's
    place for temporary files by default).
    """

    folder: Path | None = None
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
        """Answer the last user turn; yields the text so far after each piece of it, and while media are being made.

        Ends early after ``stop()``, also when ``stop()`` came between the user turn and this call. However it ends, the
        model is told to stop. If it fails or is given up before its first piece, the history is as it was before.
        Raises ``DataError`` when there is nothing to answer, the assistant does not take one of the files or its answer
        was cut off within a medium, and whatever the assistant raises. A medium that fails is told when all the others
        are there.
        """
        if not self.waiting:
            raise DataError("There is no question to answer yet.")
        modalities = known_modalities(assistant)
        for path in self.files("user"):
            media_part(path, modalities)
        stop = self._stop
        self.idle.clear()
        asked = [_sendable(message, assistant) for message in self.request()]
        answer: dict[str, Any] = {"role": "assistant", "content": [{"type": "text", "text": ""}]}
        self.messages.append(answer)
        try:
            if stop.is_set():
                return
            for piece in assistant.chat(asked, stream=True, stop=stop, **sampling.options(assistant)):
                _add_piece(answer["content"], piece)
                self._keep_finished(answer["content"])
                yield text_of(answer)
                if stop.is_set():
                    return
            while waiting := [part["making"] for part in answer["content"] if "making" in part]:
                if all(media.failed for media in waiting):
                    waiting[0].result()  # raises
                next(media for media in waiting if not media.failed).wait(POLL_SECONDS)
                self._keep_finished(answer["content"])
                yield text_of(answer)
        except BaseException:
            if is_empty(answer) and self.messages and self.messages[-1] is answer:
                self.messages.pop()
            raise
        finally:
            stop.set()
            self.idle.set()
            answer["content"][:] = [part for part in answer["content"] if "making" not in part]
            if not answer["content"]:
                answer["content"].append({"type": "text", "text": ""})

    def _keep_finished(self, content: list[dict[str, Any]]) -> None:
        """Keep the media that are done as files; what was stopped goes."""
        for part in [part for part in content if "making" in part and part["making"].wait(0)]:
            media = part["making"]
            if media.stopped:
                content.remove(part)
            elif not media.failed:
                number = sum(path.name.startswith(f"{media.type}-") for path in self.files("assistant")) + 1
                path = self.new_file(f"{media.type}-{number}{media.suffix}")
                media.save(path)
                del part["making"]
                part["path"] = str(path)
                if media.path is not None:
                    part["source"] = media.source

    def new_file(self, name: str) -> Path:
        """A path called ``name``, for a file that goes away with the session."""
        place = self._place / uuid.uuid4().hex
        place.mkdir()
        return place / name

    @cached_property
    def _place(self) -> Path:
        # The object deletes its folder when it goes, so it must live as long as the session.
        self._temporary = tempfile.TemporaryDirectory(prefix="mmllm-chat-", dir=self.folder, ignore_cleanup_errors=True)
        return Path(self._temporary.name)

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
        return text_of(taken), [part["path"] for part in taken["content"] if "path" in part]

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

    def files(self, role: str | None = None) -> list[Path]:
        """The files of the whole conversation, or of one side of it, in order."""
        messages = [message for message in self.messages if role in (None, message["role"])]
        return [Path(part["path"]) for message in messages for part in message["content"] if "path" in part]

    def export(self) -> str:
        """The conversation as JSON, ``{"id": …, "messages": […]}``, in the data layout; media as data URLs."""
        messages = []
        for message in self.request():
            content = message["content"]
            parts = content if isinstance(content, str) else [portable(part) for part in content if is_whole(part)]
            messages.append({"role": message["role"], "content": parts})
        return json.dumps({"id": self.id, "messages": messages}, indent=2)


def _add_piece(content: list[dict[str, Any]], piece: str | Media | Truncated) -> None:
    if isinstance(piece, Truncated):
        raise DataError(f"The answer was cut off before its {piece.modality} was complete; allow longer answers.")
    if isinstance(piece, str):
        if content[-1]["type"] != "text":
            content.append({"type": "text", "text": ""})
        content[-1]["text"] += piece
        return
    if content == [{"type": "text", "text": ""}]:
        content.clear()
    content.append({"type": piece.type, "making": piece})


def is_empty(message: dict[str, Any]) -> bool:
    """Whether a message holds nothing, neither words nor media (those that are still being made do not count)."""
    return not any(part.get("text") or "path" in part for part in message["content"])


def text_of(message: dict[str, Any]) -> str:
    """The text parts of a message, joined."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def known_modalities(assistant: Assistant) -> tuple[str, ...]:
    """The modalities of ``assistant`` that a chat can carry as files."""
    return tuple(modality for modality in assistant.modalities if modality in SUFFIXES)


def plural(modality: str) -> str:
    """What people call media of that kind."""
    return PLURALS.get(modality, modality)


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


def is_whole(part: dict[str, Any]) -> bool:
    """Whether a content part is there: text, or a medium with its file."""
    return "text" in part or "path" in part


def portable(part: dict[str, Any]) -> dict[str, Any]:
    """A content part with the file's bytes in it, as a data URL, in place of its path."""
    if part["type"] == "text":
        return part
    path = Path(part["path"])
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return {"type": part["type"], "name": path.name, "data": f"data:{kind};base64,{data}"}


def _sendable(message: dict[str, Any], assistant: Assistant) -> dict[str, Any]:
    """A message as ``assistant`` gets it: without what is not there, and what an other model made that this one cannot."""
    if isinstance(message["content"], str):
        return message
    parts = [part for part in message["content"] if is_whole(part)]
    if message["role"] == "assistant":
        parts = [part for part in parts if part["type"] in ("text", *assistant.making)]
    return {"role": message["role"], "content": parts}
