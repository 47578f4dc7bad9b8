"""Chat in the terminal."""

from __future__ import annotations

from mmllm.chat.session import Assistant, ChatSession, Sampling
from mmllm.errors import MmllmError

HELP = "/image FILE and /audio FILE attach a file to the next message, /clear starts anew, /quit (or Ctrl-D) leaves."


def run_terminal(assistant: Assistant, system: str | None = None) -> int:
    """Read messages and print replies until the user leaves; Ctrl-C stops a reply. Returns the exit code 0."""
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
        elif command in ("/image", "/audio"):
            files.append(argument.strip())
        elif line.startswith("/"):
            print(HELP)
        elif line or files:
            try:
                session.add_user(line, files, assistant.modalities)
                _print_reply(session, assistant)
            except MmllmError as error:
                print(error)
                if session.waiting:
                    session.undo()
            files = []


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
