"""How many tokens the samples of a source have on average, for mixtures by tokens."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from mmllm.config.run import StageConfig
from mmllm.data.mixture import Lengths
from mmllm.data.orders import permutation
from mmllm.data.streams import StreamTable
from mmllm.errors import DataError, MediaError
from mmllm.processing.messages import Sample

if TYPE_CHECKING:
    from mmllm.processing.processor import Processor

SAMPLED = 256
"""So many rows of a source are encoded; the error of the mean is then a sixteenth of the lengths' own spread."""


def token_lengths(stage: StageConfig, processor: Processor | None) -> Lengths | None:
    """What a stage's ``mixture`` counts in: None for rows. Raises ``ValueError`` without the processor that it needs."""
    if stage.mixture == "rows":
        return None
    if processor is None:
        raise ValueError(
            f"stage {stage.name!r}: mixture {stage.mixture!r} is counted by the processor, and there is none"
        )
    counts = processor

    def lengths(table: Sequence[Sample]) -> Fraction:
        return mean_length(table, counts, stage.max_length, supervised=stage.mixture == "supervised_tokens")

    return lengths


def mean_length(table: Sequence[Sample], processor: Processor, max_length: int, *, supervised: bool) -> Fraction:
    """The mean number of tokens (of those with a label, when ``supervised``) of ``SAMPLED`` rows of a source, exactly.

    The rows are drawn from the number of rows alone; of a stream they are its first. Those that cannot be used, too long ones
    among them, do not count, since training leaves them out as well. Raises ``DataError`` when none of them can be used.
    """
    rows = range(min(len(table), SAMPLED))
    drawn = list(rows) if isinstance(table, StreamTable) else permutation(0, len(table), 5)[: len(rows)].tolist()
    tokens, used, cause = 0, 0, ""
    for row in drawn:
        try:
            encoded = processor.encode_sample(table[row], max_length)
        except (DataError, MediaError) as error:
            cause = cause or str(error)
            continue
        tokens += encoded.num_supervised if supervised else len(encoded.ids)
        used += 1
    if not tokens:
        raise DataError(f"none of {len(drawn)} rows can be used to count tokens; the first cause: {cause}")
    return Fraction(tokens, used)
