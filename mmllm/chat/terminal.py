"""Chat in the terminal."""

from __future__ import annotations

import contextlib
from pathlib import Path

from mmllm.chat.session import SUFFIXES, Assistant, ChatSession, Sampling, media_part
from mmllm.errors import DataError, MmllmError

HELP = (
    f"{', '.join(f'/{name} FILE' for name in SUFFIXES)} attach a file to the next message, /detach takes the files off "
    "again, /clear starts anew, /quit (or Ctrl-D) leaves."
)


def run_terminal(assistant: Assistant, system: str | None = None) -> int:
    """Read messages and print replies until the user leaves; Ctrl-C stops a reply. Returns the exit code 0.

    A question that cannot be answered keeps its files for the next one.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # the arrow keys bring earlier questions back
    session = ChatSession(system_prompt=system or "")
    files: list[str] = []
    print(HELP)
    while True:
        try:
            line = input("you> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        command, _, argument = line.partition(" ")
        if command == "/quit":
            return 0
        if command == "/clear":
            session.clear()
            files = []
        elif command == "/detach":
            files = []
        elif command.removeprefix("/") in SUFFIXES:
            try:
                files.append(_attach(command.removeprefix("/"), argument.strip(), assistant))
            except DataError as error:
                print(error)
        elif line.startswith("/"):
            print(HELP)
        elif line or files:
            try:
                session.add_user(line, files, assistant.modalities)
                _print_reply(session, assistant)
                files = []
            except MmllmError as error:
                print(error)
                if files:
                    print(f"Still attached: {', '.join(Path(file).name for file in files)} (/detach takes them off).")
            if session.waiting:  # refused, or interrupted before the first word
                session.undo()


def _attach(modality: str, name: str, assistant: Assistant) -> str:
    """The path of the file called ``name``. Raises ``DataError`` when it is no file of that modality, or not taken."""
    if not name:
        raise DataError(f"/{modality} needs the name of a file: /{modality} FILE")
    path = Path(name).expanduser()
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    kind = media_part(path, assistant.modalities)["type"]
    if kind != modality:
        raise DataError(f"{path.name}: attach it with /{kind}")
    return str(path)


def _print_reply(session: ChatSession, assistant: Assistant) -> None:
    shown = ""
    reply = session.reply(assistant, Sampling())
    try:
        for text in reply:
            print(text[len(shown) :], end="", flush=True)
            shown = text
    except KeyboardInterrupt:
        session.stop()
        reply.close()
    print()
