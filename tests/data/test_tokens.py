"""Mixtures by tokens: shares of what is learned from, not of rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import pytest
from data_rows import row

from mmllm.config.base import BuildContext
from mmllm.config.run import StageConfig
from mmllm.data.dataset import open_stage
from mmllm.data.readers import MessagesConfig
from mmllm.data.tokens import SAMPLED, mean_length
from mmllm.errors import DataError
from mmllm.processing.batch import Encoded
from mmllm.processing.messages import Sample
from mmllm.processing.processor import Processor

Write = Callable[..., Path]


class Counting:
    """A token for every character; those of the reply are supervised."""

    def encode_sample(self, sample: Sample, max_length: int) -> Encoded:
        texts = [message.text for message in sample.messages]
        if sum(map(len, texts)) > max_length:
            raise DataError("too long")
        told = [message.role == "assistant" for message in sample.messages for _ in message.text]
        return Encoded(sample.id, [0] * len(told), told, [])


PROCESSOR = cast(Processor, Counting())


def stage(write: Write, mixture: str, *weights: float) -> StageConfig:
    """Short rows (10 characters asked, 10 told) 300 times, and long ones (10 and 90) 100 times."""
    short = write(*(row(f"s{i}", "q" * 10, "a" * 10) for i in range(300)), name="short.jsonl")
    long = write(*(row(f"l{i}", "q" * 10, "a" * 90) for i in range(100)), name="long.jsonl")
    data: list[Any] = [
        {"reader": {"kind": "messages", "path": str(path)}, "weight": weight}
        for path, weight in zip((short, long), weights, strict=True)
    ]
    return StageConfig(name="s", train=["backbone"], lr=1e-3, data=data, mixture=mixture, batch_size=4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mixture", "weights", "short", "long"),
    [
        ("rows", (1, 1), 300, 100),
        ("tokens", (1, 1), 400, 80),  # 300 * 20 + 100 * 100 = 16,000: 8,000 each
        ("tokens", (3, 1), 600, 40),
        ("tokens", (0.3, 0.1), 600, 40),  # shares: only their ratio counts
        ("supervised_tokens", (1, 1), 600, 66),  # 12,000: 6,000 of 10 a row, 6,000 of 90
    ],
)
def test_sources_give_their_share_of_the_tokens(
    write: Write, mixture: str, weights: tuple[float, float], short: int, long: int
) -> None:
    data = open_stage(stage(write, mixture, *weights), 0, BuildContext(), PROCESSOR)
    order = data.order(0)
    counted = Counter(data[index].id[0] for index in order)
    assert (counted["s"], counted["l"]) == (short, long)
    assert data.epoch_size(0) == len(order) == short + long
    rows = Counter(order)
    assert max(rows.values()) == -(-short // 300)  # whole passes, and a part of one
    again = open_stage(stage(write, mixture, *weights), 0, BuildContext(), PROCESSOR)
    assert (again.order(3), again.fingerprint()) == (data.order(3), data.fingerprint())


def test_shares_are_exact_over_the_epochs(write: Write) -> None:
    data = open_stage(stage(write, "supervised_tokens", 1, 1), 0, BuildContext(), PROCESSOR)
    assert data.shares == [Fraction(600), Fraction(200, 3)]
    assert [data.epoch_size(epoch) for epoch in range(3)] == [666, 667, 667]


def test_what_it_comes_to_is_told(write: Write) -> None:
    data = open_stage(stage(write, "tokens", 1, 1), 0, BuildContext(), PROCESSOR)
    assert data.amounts() == [
        "weight 1, 20.0 tokens each, 400 samples an epoch",
        "weight 1, 100.0 tokens each, 80 samples an epoch",
    ]


def test_the_mean_is_of_a_fixed_sample_of_usable_rows(write: Write) -> None:
    path = write(*("bad" if i % 3 == 0 else row(f"{i}", "q" * (i % 7 + 1), "a" * 2) for i in range(2000)))
    table = MessagesConfig(path=str(path)).open(BuildContext())
    mean = mean_length(table, PROCESSOR, 1000, supervised=False)
    assert mean == mean_length(table, PROCESSOR, 1000, supervised=False)
    assert mean.denominator <= SAMPLED
    assert abs(mean - 6) < 0.5  # of all usable rows: 6
    assert mean_length(table, PROCESSOR, 1000, supervised=True) == 2
    short = mean_length(table, PROCESSOR, 6, supervised=False)  # longer ones are left out of training too
    assert short < 5
    with pytest.raises(DataError, match="none of 256 rows can be used to count tokens; the first cause: too long"):
        mean_length(table, PROCESSOR, 0, supervised=False)


def test_D22_a_mixture_that_is_none_is_a_config_error(write: Write) -> None:
    with pytest.raises(ValueError, match="mixture"):
        stage(write, "bytes", 1, 1)
    for weight in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weight"):
            stage(write, "tokens", 1, weight)
    with pytest.raises(ValueError, match="there is none"):
        open_stage(stage(write, "tokens", 1, 1), 0, BuildContext())
