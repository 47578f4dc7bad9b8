"""How messages are shown: in gradio's terms, but without gradio."""

from __future__ import annotations

import html
import mimetypes
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmllm.ui.markup import to_markdown

if TYPE_CHECKING:
    from mmllm.replies import Media


def content(message: dict[str, Any]) -> list[Any]:
    """A message's parts as gradio's chat takes them."""
    shown = [_part(part) for part in message["content"] if part.get("text") != ""]
    return shown or ["*Stopped before the first word.*"]


def _part(part: dict[str, Any]) -> Any:
    if part["type"] == "text":
        return to_markdown(part["text"])
    if "path" in part:
        name = Path(part["path"]).name
        kind = mimetypes.guess_type(name)[0]
        return {"file": {"path": part["path"], "orig_name": name, "mime_type": kind}, "alt_text": name}
    if "missing" in part:
        return f"*{to_markdown(part['missing'])}: not kept by this browser*"
    return _progress(part["making"])


def _progress(media: Media) -> str:
    """A bar that fills with the steps of ``media``."""
    done, total = media.progress
    value = f'value="{done}" max="{total}"' if total else ""
    step = f"step {done} of {total}" if total else "waiting"
    name = html.escape(media.type)
    return f'<label class="making">Making the {name}: {step} <progress {value} aria-label="{name}"></progress></label>'
