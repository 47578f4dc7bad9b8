"""Runs on shards and streams: the same samples on any number of processes and workers, and after any interruption."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import systems
from needs import needed
from systems import Killed, final_state, kill_after, metrics

from mmllm.config.base import BuildContext
from mmllm.config.run import RunConfig
from mmllm.data.dataset import open_stage
from mmllm.data.readers import MessagesConfig
from mmllm.data.shard_writer import pack, write_shards
from mmllm.processing.processor import Processor
from mmllm.processing.sources import Limits
from mmllm.training.batches import StepDataset, loader
from mmllm.training.run import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The 17 samples of ``systems`` in three shards, of which one sample is damaged, and in four parquet files."""
    datasets = needed("datasets")
    folder = tmp_path_factory.mktemp("scale")
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    datasets.disable_progress_bars()
    table = MessagesConfig(path=str(systems.write_data(folder))).open(BuildContext())
    third = write_shards(table, folder / "shards", samples_per_shard=6).shards[2]
    data = bytearray(third.read_bytes())
    data[700] ^= 1
    third.write_bytes(data)
    rows: list[dict[str, Any]] = []
    for sample in table:
        told = dict(pack(sample, Limits()))
        del told["json"]
        listed: dict[str, list[dict[str, Any]]] = {"images": [], "audios": []}
        for name, medium in told.items():
            listed["images" if name.endswith("png") else "audios"].append({"bytes": medium, "path": None})
        turns = [{"role": message.role, "content": message.text} for message in sample.messages]
        rows.append({"id": sample.id.replace("s", "p"), "messages": turns, **listed})
    for n in range(4):
        datasets.Dataset.from_list(rows[4 * n : 4 * n + 4]).to_parquet(folder / f"{n}.parquet")
    yield folder
    patch.undo()


def system(folder: Path, at: Path, **changes: Any) -> tuple[RunConfig, BuildContext]:
    """A run of two stages on shards, a stream (12 of its rows an epoch) and rows, in ``at``."""
    data = [
        {"reader": {"kind": "webdataset", "path": str(folder / "shards" / "*.tar")}, "weight": 0.5},
        {
            "reader": {
                "kind": "hf_datasets",
                "path": str(folder / "{0..3}.parquet"),
                "streaming": True,
                "rows": 12,
                "buffer": 3,
                "lanes": 2,
            },
            "weight": 0.75,
        },
        {"reader": {"kind": "messages", "path": "data.jsonl"}, "weight": 0.25},
    ]
    one = systems.stage(data=data, save_every=1, **changes)
    two = systems.stage("instruct", data=deepcopy(data), train=["inputs.*.projector"], epochs=1, mixture="tokens")
    return systems.system(at, one, two, keep_last=50)


def steps(folder: Path, at: Path, *, rank: int = 0, world: int = 1) -> StepDataset:
    config, context = system(folder, at)
    processor = Processor.from_config(config.model, context)
    stage = config.stages[0]
    return StepDataset(open_stage(stage, config.seed, context), processor, stage, rank=rank, world=world)


def test_T21_workers_give_the_same_batches_of_shards_and_streams(folder: Path, tmp_path: Path) -> None:
    whole = steps(folder, tmp_path)
    expected = [whole[step].ids for step in range(len(whole))]
    assert {id[0] for id in chain.from_iterable(expected)} == {"s", "p"}
    for workers in (1, 2):
        dataset = steps(folder, tmp_path)
        dataset[0]  # its files are open when the workers begin
        assert [found.ids for found in loader(dataset, range(len(dataset)), workers)] == expected
    assert [found.ids for found in loader(steps(folder, tmp_path), range(5, len(whole)), 0)] == expected[5:]


def test_T20_any_number_of_processes_takes_the_same_samples(folder: Path, tmp_path: Path) -> None:
    whole = steps(folder, tmp_path / "whole")
    expected = [sorted(whole[step].ids) for step in range(len(whole))]
    for world in (2, 3):
        ranks = [steps(folder, tmp_path / f"{world}-{rank}", rank=rank, world=world) for rank in range(world)]
        assert [sorted(id for rank in ranks for id in rank[step].ids) for step in range(len(whole))] == expected


@pytest.fixture(scope="module")
def uninterrupted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("whole")
    train(*system(folder, at))
    return at / "run"


@pytest.mark.parametrize(("forward", "workers"), [(3, 0), (13, 1), (25, 0)])
def test_T01_a_killed_run_on_shards_and_streams_resumes_bit_for_bit(
    folder: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forward: int, workers: int
) -> None:
    with monkeypatch.context() as patch:
        kill_after(patch, forward)
        with pytest.raises(Killed):
            train(*system(folder, tmp_path))
    train(*system(folder, tmp_path, num_workers=workers), resume=True)
    assert final_state(tmp_path / "run") == final_state(uninterrupted)
    assert metrics(tmp_path / "run") == metrics(uninterrupted)
    text = (tmp_path / "run" / "run.md").read_text()
    assert "000002.tar" in text or "DataError" in text
