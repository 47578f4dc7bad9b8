"""Scoring a model's answers on a data file."""

from __future__ import annotations

import math
import string
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from mmllm.config.base import suggest
from mmllm.errors import DataError
from mmllm.processing.messages import Message, Sample, check_turns

if TYPE_CHECKING:
    from mmllm.assistant import Assistant


def normalise(answer: str) -> str:
    """Lower case, single spaces, without punctuation (of any script) and space at both ends.

    An answer of punctuation alone is kept as it is: ``...`` is not the same as saying nothing.
    """
    text = " ".join(answer.lower().split())
    inner = [i for i, char in enumerate(text) if not _is_edge(char)]
    return text[inner[0] : inner[-1] + 1] if inner else text


def _is_edge(char: str) -> bool:
    return char.isspace() or char in string.punctuation or unicodedata.category(char).startswith("P")


def exact_match(answer: str, reference: str) -> float:
    """1.0 when both are equal after ``normalise``, else 0.0."""
    return float(normalise(answer) == normalise(reference))


METRICS: dict[str, Callable[[str, str], float]] = {"exact_match": exact_match}


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a share of n trials (E. B. Wilson, JASA 1927); ``z`` 1.96 gives 95 %."""
    if n == 0:
        return 0.0, 1.0
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def question_and_reference(sample: Sample) -> tuple[tuple[Message, ...], str]:
    """The conversation up to its last user turn, and the reply that the data gives to it. Raises ``DataError``."""
    check_turns(sample.messages, sample.id, training=True)
    return sample.messages[:-1], sample.messages[-1].text


def evaluate(
    assistant: Assistant,
    samples: Iterable[Sample],
    metric: str = "exact_match",
    *,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    group_by: str | None = None,
) -> dict[str, Any]:
    """Answer every sample's last user turn greedily and compare with the reference.

    Returns ``{"n": …, "<metric>": mean, "interval": [low, high]}`` (95 %, Wilson); with ``group_by`` (an extra field of the
    samples) also ``"groups": {value: {"n", "<metric>"}}``. Raises ``DataError`` when there is no sample or a faulty one, or
    none has that field.
    """
    score = METRICS[metric]
    samples = list(samples)  # texts and references to media; a fault in the last one is told before the first answer
    fields = {field for sample in samples for field in sample.tags}
    if samples and group_by and group_by not in fields:
        known = f"the fields are {', '.join(sorted(fields))}{suggest(group_by, fields)}" if fields else "they have none"
        raise DataError(f"no sample has a field {group_by!r} to group by; {known}")
    results: list[tuple[str, float]] = []
    for batch in _batches(samples, batch_size):
        pairs = [question_and_reference(sample) for sample in batch]
        roots = {sample.root for sample in batch}
        if len(roots) != 1:
            raise DataError(f"samples of one evaluation come from one file; found folders {sorted(map(str, roots))}")
        answers = assistant.generate(
            [question for question, _ in pairs],
            root=roots.pop(),
            ids=[sample.id for sample in batch],
            max_new_tokens=max_new_tokens,
        )
        for sample, answer, (_, reference) in zip(batch, answers, pairs, strict=True):
            results.append((str(sample.tags.get(group_by)) if group_by else "", score(answer, reference)))
    if not results:
        raise DataError("the data file holds no sample; nothing to evaluate")
    report = _summary(metric, [value for _, value in results])
    if group_by:
        names = sorted({name for name, _ in results})
        report["groups"] = {name: _summary(metric, [v for group, v in results if group == name]) for name in names}
    return report


def _summary(metric: str, values: list[float]) -> dict[str, Any]:
    mean = sum(values) / len(values)
    return {"n": len(values), metric: mean, "interval": list(wilson(mean, len(values)))}


def _batches(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    iterator = iter(samples)
    while batch := list(islice(iterator, size)):
        yield batch
