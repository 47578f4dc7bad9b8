"""Text as the conversation shows it: Markdown, but no HTML and no pictures from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Callable

# Fenced code (closed or still streaming) and code spans; inside them Markdown shows every character as it is.
_CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]+`)", re.DOTALL)
_ACTIVE = re.compile(r"<(?=[A-Za-z/!?])|!(?=\[)")
_ESCAPED = re.compile(r"\\([<!])")


def to_markdown(text: str) -> str:
    """``text`` with a backslash before every ``<`` that could open a tag and every ``!`` that could fetch a picture.

    The page then shows them as typed. gradio's sanitiser and the page's content policy stand behind this.
    """
    return _outside_code(text, lambda piece: _ACTIVE.sub(r"\\\g<0>", piece))


def from_markdown(text: str) -> str:
    """What ``to_markdown`` was given: the inverse, for text that comes back from the page to be edited."""
    return _outside_code(text, lambda piece: _ESCAPED.sub(r"\1", piece))


def _outside_code(text: str, change: Callable[[str], str]) -> str:
    pieces = _CODE.split(text)
    return "".join(piece if index % 2 else change(piece) for index, piece in enumerate(pieces))
