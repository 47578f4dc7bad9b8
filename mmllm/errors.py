"""The exceptions users see. All derive from ``ValueError``; their text says what was found, what was expected, what to do."""

from __future__ import annotations

from collections.abc import Sequence


class MmllmError(ValueError):
    """Base of every error that mmllm raises on purpose."""


class MediaError(MmllmError):
    """A picture or sound cannot be opened, or breaks a limit."""


class DataError(MmllmError):
    """A sample or a data file does not have the documented form."""


class SampleTooLong(DataError):
    """A sample has more tokens than ``max_length``; media spans are never cut, so the sample is refused whole."""


class CheckpointError(MmllmError):
    """A checkpoint folder is missing, incomplete, altered, or does not fit the model."""


class TrainingError(MmllmError):
    """A run cannot start or go on: nothing to train, non-finite loss, a declared part without gradient."""


def brief(error: BaseException, limit: int = 300) -> str:
    """A library's error in one line of at most ``limit`` characters: some list everything they know."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 2].rstrip() + " …"


class ConfigError(MmllmError):
    """All mistakes of a configuration at once.

    ``problems`` holds one ``(dotted path, message)`` per mistake; ``str(error)`` lists them line by line.
    """

    def __init__(self, problems: Sequence[tuple[str, str]], source: str = "config") -> None:
        self.problems = list(problems)
        self.source = source
        count = len(self.problems)
        lines = [f"{source}: {count} problem{'s' if count != 1 else ''}"]
        lines += [f"  {path}: {message}" if path else f"  {message}" for path, message in self.problems]
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[tuple[str, str]], str]]:
        """What it is made of again in another process: not of its text, as other exceptions."""
        return type(self), (self.problems, self.source)
