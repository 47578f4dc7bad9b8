"""Order and weights: functions of seed and epoch; every row as often as its weight says."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from data_rows import row
from pydantic import ValidationError

from mmllm.config.base import BuildContext
from mmllm.config.run import DataSource
from mmllm.data.mixture import StageData
from mmllm.data.readers import MessagesConfig
from mmllm.errors import ConfigError, DataError

Write = Callable[..., Path]


def source(write: Write, name: str, count: int, weight: float = 1.0) -> DataSource:
    path = write(*(row(f"{name}{i}") for i in range(count)), name=f"{name}.jsonl")
    return DataSource(reader=MessagesConfig(path=str(path)), weight=weight)


def test_weight_one_is_every_row_once_in_a_new_order(write: Write) -> None:
    data = StageData([source(write, "a", 17), source(write, "b", 5)], seed=3)
    orders = [data.order(epoch) for epoch in range(4)]
    assert all(sorted(order) == list(range(22)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert [data.epoch_size(epoch) for epoch in range(4)] == [22] * 4
    assert {data[i].id for i in orders[0]} == {f"a{i}" for i in range(17)} | {f"b{i}" for i in range(5)}


def test_weights_are_exact_over_the_epochs(write: Write) -> None:
    data = StageData([source(write, "a", 10, 2.0), source(write, "b", 10, 0.25), source(write, "c", 7, 0.1)], seed=0)
    counts: Counter[int] = Counter()
    for epoch in range(20):
        order = data.order(epoch)
        assert len(order) == data.epoch_size(epoch)
        assert Counter(order)[0] == 2
        assert max(Counter(i for i in order if 10 <= i < 20).values()) == 1
        counts.update(order)
    assert [counts[i] for i in range(27)] == [40] * 10 + [5] * 10 + [2] * 7


def test_order_depends_on_seed_and_epoch_only(write: Write) -> None:
    sources = [source(write, "a", 50), source(write, "b", 20, 0.5)]
    data = StageData(sources, seed=7)
    assert data.order(2) == StageData(sources, seed=7).order(2)
    assert data.order(2) == pickle.loads(pickle.dumps(data)).order(2)
    assert data.order(2) != StageData(sources, seed=8).order(2)
    assert StageData(sources, seed=-1).order(0) != data.order(0)
    # A change of the hash seed, or of what was drawn before, changes nothing.
    code = (
        "import sys, json; from mmllm.config.run import DataSource; from mmllm.data.mixture import StageData;"
        "s = [DataSource.model_validate(x) for x in json.loads(sys.argv[1])];"
        "print(json.dumps(StageData(s, 7).order(2)))"
    )
    arguments = json.dumps([s.model_dump(mode="json") for s in sources])
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code, arguments],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert json.loads(done.stdout) == data.order(2)


def test_the_order_of_a_release_is_that_of_the_next(write: Write) -> None:
    # Recorded: a resumed run must find the order it began with, whatever numpy is installed by then.
    assert StageData([source(write, "a", 10)], seed=1).order(0) == [8, 1, 5, 2, 3, 4, 7, 6, 9, 0]


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_weights_that_mean_nothing_are_config_errors(write: Write, weight: float) -> None:
    with pytest.raises((ValidationError, ConfigError), match="weight"):
        StageData([source(write, "a", 3, weight)], seed=0)


def test_no_source_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="no source"):
        StageData([], seed=0)


def test_where_a_sample_comes_from(write: Write) -> None:
    a, b = source(write, "a", 3), source(write, "b", 2)
    data = StageData([a, b], seed=0)
    assert [data.source_of(i) for i in range(5)] == [0, 0, 0, 1, 1]
    assert data.where(4).endswith("b.jsonl:2")
    for index in (-1, 5):
        with pytest.raises(IndexError):
            data[index]


def test_a_missing_file_ends_the_run_before_it_begins(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        StageData([DataSource(reader=MessagesConfig(path="none.jsonl"))], 0, BuildContext(root=tmp_path))


def test_replacements_stay_in_the_source_and_depend_on_the_index(write: Write) -> None:
    data = StageData([source(write, "a", 50), source(write, "b", 30)], seed=0)

    def first(index: int) -> list[int]:
        stream = data.replacements(index)
        return [next(stream) for _ in range(20)]

    assert first(60) == first(60)
    assert first(60) != first(61)
    assert all(50 <= index < 80 for index in first(60))


def test_the_fingerprint_changes_with_what_changes_the_order(write: Write) -> None:
    sources = [source(write, "a", 5), source(write, "b", 5)]
    prints = [
        StageData(sources, 0).fingerprint(),
        StageData(sources, 1).fingerprint(),
        StageData(sources[::-1], 0).fingerprint(),
        StageData([sources[0], source(write, "b", 5, 0.5)], 0).fingerprint(),
        StageData([sources[0], source(write, "b", 6)], 0).fingerprint(),
    ]
    assert len(set(prints)) == 5
    source(write, "b", 5)
    assert StageData(sources, 0).fingerprint() == prints[0]


@pytest.mark.parametrize("text", ['{"id": "x"}\n{"id": "y"}\n', '[{"id": "x"},\n{"id": "y"}]\n'])
def test_the_fingerprint_changes_with_the_content_at_the_same_size(tmp_path: Path, text: str) -> None:
    path = tmp_path / "data.json"
    sources = [DataSource.model_validate(str(path))]
    path.write_text(text)
    before = StageData(sources, 0).fingerprint()
    path.write_text(text.replace("y", "z"))
    assert StageData(sources, 0).fingerprint() != before
