"""A trained model that gets more inputs or outputs: the rows of its new tokens move, and what they stand for says where to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mmllm.errors import CheckpointError
from mmllm.processing.processor import Processor

NEW_TOKENS = "backbone.new_tokens"


def grown(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tokens: Mapping[str, Any], processor: Processor
) -> dict[str, Tensor]:
    """The rows of new tokens in ``found``, put where the model with ``processor`` has them; its other rows are as in
    ``expected``. ``tokens`` is the ``processor.json`` that ``found`` was saved with.

    Raises ``CheckpointError`` when the model has no place for a row that was there: what was learned is never dropped.
    """
    before = rows_of(tokens, processor.vocab_rows)
    after = rows_of(processor.own_tokens(), processor.vocab_rows)
    if before == after:
        return {}
    if lost := [f"{kind} {index} of {name}" for kind, name, index in before if (kind, name, index) not in after]:
        raise CheckpointError(
            f"the model has no place for new tokens that were trained: {', '.join(lost[:4])} ({len(lost)} in all); "
            "give every input and output at least the markers and signal tokens that it had"
        )
    placed = {}
    for name in (name for name in expected if name.startswith(f"{NEW_TOKENS}.") and name in found):
        old, new = found[name], expected[name].clone()
        # The table of the head has rows for signal tokens alone, and they come first in both.
        moved = [what for what in before if before[what] < len(old) and after[what] < len(new)]
        new[[after[what] for what in moved]] = old[[before[what] for what in moved]].to(new)
        placed[name] = new
    return placed


def rows_of(tokens: Mapping[str, Any], vocab_rows: int) -> dict[tuple[str, str, int], int]:
    """The row of every new token of a ``processor.json``, by what it stands for: ("signal", output, which of them) or
    ("marker", input, 0 for the start and 1 for the end).
    """
    rows: dict[tuple[str, str, int], int] = {}
    for name, group in tokens.get("signal_tokens", {}).items():
        # Before there were codes, every id was written down.
        ids = group if isinstance(group, list) else range(group["first"], group["first"] + group["rows"])
        rows |= {("signal", name, index): token - vocab_rows for index, token in enumerate(ids)}
    for name, own in tokens["new_tokens"].items():
        rows |= {("marker", name, index): token - vocab_rows for index, token in enumerate(own["markers"] or ())}
    return rows
