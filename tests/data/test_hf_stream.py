"""Streams of files by `datasets`: the rows that random access gives, in another order; files that break off."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from needs import needed
from test_hf_datasets import rows

from mmllm.config.base import BuildContext
from mmllm.data.hf_datasets import HFDatasetsConfig
from mmllm.data.streams import StreamTable
from mmllm.errors import DataError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four parquet files of 100 rows, and the same as JSON Lines without their media."""
    datasets = needed("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    for n in range(4):
        some = rows(100, 100 * n)
        table = datasets.Dataset.from_list(some).cast_column("images", datasets.List(datasets.Image()))
        table.to_parquet(tmp_path / f"{n}.parquet", batch_size=30)
        talk = [{"id": row["id"], "messages": [{"role": "user", "content": "x"}, row["messages"][1]]} for row in some]
        (tmp_path / f"{n}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talk))
    return tmp_path


def stream(folder: Path, **options: Any) -> StreamTable:
    reader = HFDatasetsConfig(**{"path": "{0..3}.parquet", "streaming": True, "rows": 400, "buffer": 32} | options)
    opened = reader.open(BuildContext(root=folder))
    assert isinstance(opened, StreamTable)
    return opened.seeded(1, 0)


@pytest.mark.parametrize("lanes", [1, 2])
def test_a_pass_holds_the_rows_of_random_access(folder: Path, lanes: int) -> None:
    table = {s.id: s for s in HFDatasetsConfig(path="{0..3}.parquet").open(BuildContext(root=folder))}
    samples = stream(folder, lanes=lanes)
    read = [samples.at(position) for position in range(400)]
    assert [s.id for s in read] != sorted(table)
    assert {s.id for s in read} == set(table)
    assert all(s.messages == table[s.id].messages for s in read)
    second = [samples.at(position).id for position in range(400, 800)]
    assert set(second) == set(table)
    assert second != [s.id for s in read]
    for position in (399, 250, 64, 0):
        assert stream(folder, lanes=lanes).at(position).id == read[position].id
    assert pickle.loads(pickle.dumps(samples)).at(7) == read[7]
    name, number = samples.where(0).rsplit(":", 1)
    assert int(read[0].id[1:]) == int(Path(name).stem) * 100 + int(number) - 1


def test_streams_of_json_lines(folder: Path) -> None:
    samples = stream(folder, path="*.jsonl")
    assert {samples.at(position).id for position in range(400)} == {f"r{i}" for i in range(400)}


def test_D02_a_parquet_file_that_breaks_off_is_one_bad_row(folder: Path) -> None:
    data = (folder / "2.parquet").read_bytes()
    (folder / "2.parquet").write_bytes(data[: len(data) // 2])
    samples = stream(folder, rows=301)
    found, bad = set(), []
    for position in range(301):
        try:
            found.add(samples.at(position).id)
        except DataError as error:
            bad.append(str(error))
    assert found == {f"r{i}" for i in range(400) if not 200 <= i < 300}
    assert len(bad) == 1
    assert bad[0].startswith(f"{folder / '2.parquet'}:1: the file cannot be read further")


def test_a_saved_folder_is_not_streamed(folder: Path) -> None:
    (folder / "saved").mkdir()
    with pytest.raises(DataError, match="leave `streaming` out"):
        stream(folder, path="saved")


def test_data_sets_of_the_hub_are_known_by_their_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder stands for the hub here: the library finds files, splits and readers in both in the same way."""
    import datasets

    for name in ("good", "other"):
        (folder / name / "data").mkdir(parents=True)
    for n in range(2):
        (folder / f"{n}.parquet").rename(folder / "good" / "data" / f"train-{n}-of-2.parquet")
    (folder / "other" / "data" / "train.xml").write_text("<x/>")
    build, load = datasets.load_dataset_builder, datasets.load_dataset

    def place(id: str) -> str:
        return str(folder / id.split("/")[1]) if id.startswith("someone/") else id

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda id, *a, **k: build(place(id), *a, **k))
    monkeypatch.setattr(datasets, "load_dataset", lambda id, *a, **k: load(place(id), *a, **k))
    context = BuildContext()
    table = HFDatasetsConfig(hub="someone/good").open(context)
    assert {sample.id for sample in table} == {f"r{i}" for i in range(200)}
    assert [name.rpartition("/")[2] for name, _ in table.contents()] == ["train-0-of-2.parquet", "train-1-of-2.parquet"]
    flow = HFDatasetsConfig(hub="someone/good", streaming=True, rows=200, lanes=2).open(context)
    assert isinstance(flow, StreamTable)
    assert flow.remote
    assert {flow.at(position).id for position in range(200)} == {f"r{i}" for i in range(200)}
    for reader in (
        HFDatasetsConfig(hub="someone/other"),
        HFDatasetsConfig(hub="someone/other", streaming=True, rows=1),
    ):
        with pytest.raises(DataError, match="its files are read by Xml"):
            reader.open(context)
    with pytest.raises(DataError, match="no split 'test'; it has train"):
        HFDatasetsConfig(hub="someone/good", split="test").open(context)
    with pytest.raises(DataError, match="cannot be opened"):
        HFDatasetsConfig(hub="someone/gone").open(context)
    with pytest.raises(DataError, match="is on the hub, which is not asked here"):  # `mmllm plan` is offline
        HFDatasetsConfig(hub="someone/good").open(BuildContext(weights=False))
