"""Which samples make which batch: every id once an epoch, for any number of processes and workers."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
import systems

from mmllm.config.run import StageConfig
from mmllm.data.mixture import StageData
from mmllm.processing.processor import Processor
from mmllm.training.batches import EvalDataset, StepDataset, epoch_ends, loader


@pytest.fixture
def parts(tmp_path: Path) -> tuple[StageData, Processor, StageConfig]:
    config, context = systems.system(tmp_path)
    stage = config.stages[0]
    return StageData(stage.data, 0, context), Processor.from_config(config.model, context), stage


def ids_of(parts: tuple[StageData, Processor, StageConfig], world: int, steps: range) -> list[list[str]]:
    """Ids per step, over all processes."""
    data, processor, stage = parts
    sets = [StepDataset(data, processor, stage, rank=rank, world=world) for rank in range(world)]
    return [[id for dataset in sets for id in dataset[step].ids] for step in steps]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_every_sample_once_an_epoch_on_any_number_of_processes(
    parts: tuple[StageData, Processor, StageConfig], world: int
) -> None:
    """17 samples in batches of 4: the last batch holds one, and all processes but one run a filler (accelerate #4071)."""
    first, second = ids_of(parts, world, range(5)), ids_of(parts, world, range(5, 10))
    everything = {f"s{i:02d}": 1 for i in range(17)}
    assert Counter(chain.from_iterable(first)) == everything
    assert Counter(chain.from_iterable(second)) == everything
    assert first != second
    alone = ids_of(parts, 1, range(5))
    assert [sorted(step) for step in first] == [sorted(step) for step in alone]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_all_processes_take_equally_many_micro_batches(
    parts: tuple[StageData, Processor, StageConfig], world: int
) -> None:
    data, processor, stage = parts
    sets = [StepDataset(data, processor, stage, rank=rank, world=world) for rank in range(world)]
    for step in range(5):
        shares = [dataset[step] for dataset in sets]
        assert len({len(share.micro) for share in shares}) == 1
        assert all(batch.tokens > 0 for share in shares for batch, _ in share.micro)
    last = [dataset[4] for dataset in sets]
    assert [sum(weight for _, weight in share.micro) for share in last] == [1.0] + [0.0] * (world - 1)
    assert [share.tokens > 0 for share in last] == [True] + [False] * (world - 1)


def test_workers_change_nothing(parts: tuple[StageData, Processor, StageConfig]) -> None:
    data, processor, stage = parts
    dataset = StepDataset(data, processor, stage, rank=0, world=1)
    alone = [(step.ids, step.micro[0][0].ids.tolist()) for step in loader(dataset, range(3, 7), 0)]
    with_workers = [(step.ids, step.micro[0][0].ids.tolist()) for step in loader(dataset, range(3, 7), 2)]
    assert alone == with_workers


def test_a_bad_sample_is_replaced_and_counted(tmp_path: Path, parts: tuple[StageData, Processor, StageConfig]) -> None:
    (tmp_path / "red.png").write_bytes(b"not a picture")
    data, processor, stage = parts
    dataset = StepDataset(data, processor, stage, rank=0, world=1)
    steps = [dataset[step] for step in range(5)]
    failures = {
        failure.where: failure.reason for step in steps for loaded in step.loaded for failure in loaded.failures
    }
    assert failures
    assert set(failures.values()) == {"MediaError"}
    assert [len(step.ids) for step in steps] == [4, 4, 4, 4, 1]


@pytest.mark.parametrize(
    ("epochs", "max_steps", "ends"),
    [
        (None, None, [5]),
        (2.0, None, [5, 10]),
        (1.5, None, [5, 8]),  # half of 17 samples: 8.5, so 3 batches
        (0.2, None, [1]),
        (2.0, 7, [5, 7]),
        (None, 12, [5, 10, 12]),
        (None, 5, [5]),
    ],
)
def test_length_of_a_stage(
    parts: tuple[StageData, Processor, StageConfig], epochs: float | None, max_steps: int | None, ends: list[int]
) -> None:
    data, _, stage = parts
    assert epoch_ends(data, stage.model_copy(update={"epochs": epochs, "max_steps": max_steps})) == ends


def test_evaluation_takes_every_sample_once_in_file_order(parts: tuple[StageData, Processor, StageConfig]) -> None:
    data, processor, stage = parts
    sets = [EvalDataset(data, processor, stage, rank=rank, world=2) for rank in range(2)]
    batches = [dataset[number] for dataset in sets for number in range(len(dataset))]
    ids = [batch.sample_ids for batch in batches if batch is not None]
    assert sorted(chain.from_iterable(ids)) == [f"s{i:02d}" for i in range(17)]
    assert ids[0] == ["s00", "s01"]


def test_evaluation_leaves_bad_samples_out(tmp_path: Path, parts: tuple[StageData, Processor, StageConfig]) -> None:
    (tmp_path / "300.wav").write_bytes(b"")
    (tmp_path / "900.wav").write_bytes(b"")
    data, processor, stage = parts
    dataset = EvalDataset(data, processor, stage.model_copy(update={"micro_batch_size": 1}), rank=0, world=1)
    assert [dataset[number] is None for number in range(3)] == [False, True, False]
