"""The files of the page: styles, scripts, and the examples it offers."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

EXAMPLES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("What colour is the star?", ("shapes.png",)),
    ("Is there a star in the picture and a bell in the sound?", ("shapes.png", "bell_then_siren.wav")),
    ("Which sound comes first?", ("bell_then_siren.wav",)),
    ("What can you do?", ()),
    ("Draw a blue star. Also, play a siren.", ()),
)
"""Questions to click, each with the files in ``assets/examples`` that go with it."""


def asset(*names: str) -> Path:
    """The path of a file in ``mmllm/assets``."""
    return Path(str(files("mmllm") / "assets")).joinpath(*names)


def script(name: str) -> str:
    """The JavaScript function in ``mmllm/assets/<name>.js``, without its comments."""
    lines = asset(f"{name}.js").read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.startswith("//"))


def example_files(text: str) -> list[str]:
    """The paths of the files that go with the example question ``text``. Raises ``KeyError`` for other questions."""
    return [str(asset("examples", name)) for name in dict(EXAMPLES)[text]]
