"""Streams: what stands at a position is a function of seed and files, whoever reads and wherever reading began."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader, Dataset

from mmllm.config.base import BuildContext
from mmllm.config.families import ReaderConfig
from mmllm.config.run import DataSource
from mmllm.data.dataset import SampleStream
from mmllm.data.mixture import StageData
from mmllm.data.streams import RowCounts, StreamTable
from mmllm.data.tables import SampleTable, TableReaderConfig
from mmllm.errors import DataError, MmllmError
from mmllm.processing.messages import Message, Part, Sample


@dataclass
class Rows:
    """Some rows, as Arrow has them."""

    values: list[dict[str, Any]]

    @property
    def num_rows(self) -> int:
        return len(self.values)

    def slice(self, offset: int, length: int) -> Rows:
        return Rows(self.values[offset : offset + length])

    def to_pylist(self) -> list[dict[str, Any]]:
        return list(self.values)


class Files(StreamTable):
    """Files of the given lengths; row n of file f is ``f.n``. Files in ``broken`` end with an error after so many rows."""

    def __init__(self, sizes: list[int], *, rows: int, buffer: int = 4, lanes: int = 1, **broken: int) -> None:
        super().__init__(
            [(f"/data/{n}.rows", f"digest{n}") for n in range(len(sizes))], rows=rows, buffer=buffer, lanes=lanes
        )
        self.sizes, self.broken, self.opened, self.far = sizes, broken, Counter[int](), False

    @property
    def remote(self) -> bool:
        return self.far

    def batches(self, file: int) -> Iterator[Rows]:
        self.opened[file] += 1
        end = self.broken.get(f"f{file}", self.sizes[file])
        for start in range(0, end, 3):
            yield Rows([{"name": f"{file}.{n}"} for n in range(start, min(start + 3, end))])
        if f"f{file}" in self.broken:
            raise ValueError("the rest is missing")

    def convert(self, row: dict[str, Any], where: str, id: str) -> Sample:
        if row["name"].endswith(".bad"):
            raise DataError(f"{where}: bad")
        return Sample(row["name"], (Message("user", (Part("text", id),)),))


class FilesConfig(TableReaderConfig):
    """Hands out a stream that is there already."""

    kind: str = "files"
    stream: Any

    def open(self, context: BuildContext) -> SampleTable:
        stream: SampleTable = self.stream
        return stream

    def tiny(self) -> FilesConfig:
        return self


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mmllm" / "streams"


def data(*streams: StreamTable, seed: int = 0, weights: list[float] | None = None) -> StageData:
    sources = [
        DataSource.model_construct(reader=FilesConfig(stream=stream), weight=weight)
        for stream, weight in zip(streams, weights or [1.0] * len(streams), strict=True)
    ]
    return StageData(sources, seed)


def ids(samples: StageData, epoch: int) -> list[str]:
    return [samples[index].id for index in samples.order(epoch)]


@pytest.mark.parametrize("buffer", [1, 3, 4, 100])
def test_a_pass_is_every_row_once_in_a_new_order(buffer: int) -> None:
    samples = data(Files([5, 7, 3, 5], rows=20, buffer=buffer))
    passes = [ids(samples, epoch) for epoch in range(3)]
    everything = {f"{f}.{n}" for f, size in enumerate([5, 7, 3, 5]) for n in range(size)}
    assert all(len(one) == 20 and set(one) == everything for one in passes)
    assert len({tuple(one) for one in passes}) == 3
    assert ids(data(Files([5, 7, 3, 5], rows=20), seed=1), 0) != passes[0]
    assert samples.where(samples.order(0)[0]) == "/data/{}.rows:{}".format(
        passes[0][0].split(".")[0], int(passes[0][0].split(".")[1]) + 1
    )


def test_an_epoch_goes_on_where_the_last_one_ended() -> None:
    samples = data(Files([9, 9], rows=4))
    epochs = [ids(samples, epoch) for epoch in range(4)]
    assert len({id for epoch in epochs for id in epoch}) == 16
    halves = data(Files([9, 9], rows=8, buffer=4), weights=[0.5])
    assert [ids(halves, epoch) for epoch in range(4)] == epochs


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_any_position_may_be_read_first(lanes: int) -> None:
    sizes = [5, 7, 3, 6, 1, 8]
    stream = Files(sizes, rows=30, lanes=lanes).seeded(3, 0)
    forwards = [stream.at(position).id for position in range(90)]
    for position in (89, 0, 45, 44, 17, 88, 3):
        fresh = Files(sizes, rows=30, lanes=lanes).seeded(3, 0)
        fresh._counts.known = {}
        assert fresh.at(position).id == forwards[position]
    backwards = Files(sizes, rows=30, lanes=lanes).seeded(3, 0)
    assert [backwards.at(position).id for position in reversed(range(90))] == forwards[::-1]
    again = pickle.loads(pickle.dumps(stream))
    assert again.at(50).id == forwards[50]


def test_lanes_have_their_own_files() -> None:
    stream = Files([8] * 4, rows=32, lanes=2).seeded(0, 0)
    for lane in (0, 1):
        read = Files([8] * 4, rows=32, lanes=2).seeded(0, 0)
        names = [read.at(position).id for position in range(lane, 32, 2)]
        assert {int(name[0]) % 2 for name in names} == {lane}
        assert set(read.opened) == {lane, lane + 2}
        assert names == [stream.at(position).id for position in range(lane, 32, 2)]
    with pytest.raises(DataError, match="4 files cannot be dealt out to 5 lanes"):
        Files([8] * 4, rows=30, lanes=5)


def test_files_read_before_are_passed_over_unopened(cache: Path) -> None:
    first = Files([6] * 5, rows=30).seeded(0, 0)
    names = [first.at(position).id for position in range(60)]
    assert len(list(cache.iterdir())) == 5
    later = Files([6] * 5, rows=30).seeded(0, 0)
    assert later.at(55).id == names[55]
    assert sum(later.opened.values()) <= 2  # of nine files before that position
    for file in cache.iterdir():
        file.write_text("what?")
    unknowing = Files([6] * 5, rows=30).seeded(0, 0)
    assert unknowing.at(55).id == names[55]
    assert sum(unknowing.opened.values()) >= 6  # the first pass is read, and then known


def test_row_counts_belong_to_a_files_content(cache: Path) -> None:
    RowCounts(cache).put("a", "one", 5)
    assert RowCounts(cache).get("a", "one") == 5
    assert RowCounts(cache).get("a", "two") is None


def test_a_stream_keeps_its_order_in_a_mixture_and_others_theirs() -> None:
    one, two = Files([40, 40], rows=20), Files([10], rows=10, buffer=2)
    mixed = data(one, two, weights=[1.0, 0.5])
    for epoch in range(3):
        order = mixed.order(epoch)
        assert len(order) == 25
        sources = [mixed.source_of(index) for index in order]
        assert Counter(sources) == {0: 20, 1: 5}
        assert sources != sorted(sources)
        own = [mixed[index].id for index, source in zip(order, sources, strict=True) if source == 0]
        alone = Files([40, 40], rows=20).seeded(0, 0)
        assert own == [alone.at(position).id for position in range(20 * epoch, 20 * epoch + 20)]
    with pytest.raises(IndexError):
        mixed[30]


def test_D01_a_bad_row_is_replaced_from_what_is_at_hand() -> None:
    class Processor:
        def encode_sample(self, sample: Sample, max_length: int) -> Sample:
            if sample.id.endswith(("1", "4")):
                raise DataError("bad")
            return sample

    samples = data(Files([30, 30], rows=60, buffer=10))
    loads = {}
    for index in samples.order(1):
        loaded = SampleStream(samples).load(index, Processor(), 5)  # type: ignore[arg-type]
        loads[index] = (loaded.encoded.id, tuple(f.index for f in loaded.failures))
    fresh = SampleStream(data(Files([30, 30], rows=60, buffer=10)))
    some = list(loads)[37]
    again = fresh.load(some, Processor(), 5)  # type: ignore[arg-type]
    assert (again.encoded.id, tuple(f.index for f in again.failures)) == loads[some]
    table = samples.tables[0]
    assert isinstance(table, Files)
    assert sum(table.opened.values()) <= 4  # none of it went back to the beginning


@pytest.mark.parametrize("buffer", [1, 4])
def test_D01_a_whole_block_of_bad_rows_is_passed_over(buffer: int) -> None:
    class Processor:
        def encode_sample(self, sample: Sample, max_length: int) -> Sample:
            if 10 <= int(sample.id.split(".")[1]) < 20:
                raise DataError("bad")
            return sample

    samples = data(Files([60], rows=60, buffer=buffer))
    found = [SampleStream(samples).load(index, Processor(), 5) for index in samples.order(0)]  # type: ignore[arg-type]
    assert sum(bool(loaded.failures) for loaded in found) == 10


def test_D02_a_file_that_breaks_off_counts_as_one_bad_row(caplog: pytest.LogCaptureFixture, cache: Path) -> None:
    stream = Files([6, 6, 6], rows=16, f1=3).seeded(0, 0)
    seen: Counter[str] = Counter()
    for position in range(16):
        try:
            seen[stream.at(position).id] += 1
        except DataError:
            seen["bad"] += 1
            bad = position
    with pytest.raises(DataError, match=r"^/data/1.rows:4: the file cannot be read further \(ValueError: the rest is"):
        stream.at(bad)
    assert seen == Counter(["bad"] + [f"{f}.{n}" for f in range(3) for n in range(3 if f == 1 else 6)])
    assert "/data/1.rows" in caplog.text
    stream.at(40)
    assert len(list(cache.iterdir())) == 2  # what broke off may be mended: its length is not kept


def test_D02_a_far_file_that_fails_ends_the_run_instead_of_changing_the_order() -> None:
    stream = Files([6, 6, 6], rows=16, f1=3).seeded(0, 0)
    stream.far = True
    with pytest.raises(MmllmError, match="--resume goes on") as error:
        [stream.at(position) for position in range(18)]
    assert not isinstance(error.value, DataError)


def test_files_without_rows_are_an_error_not_an_endless_search() -> None:
    with pytest.raises(MmllmError, match="hold no rows"):
        Files([0, 0], rows=4).seeded(0, 0).at(0)


class ById(Dataset[str]):
    def __init__(self, samples: StageData, order: list[int]) -> None:
        self.samples, self.order = samples, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> str:
        return self.samples[self.order[place]].id


def test_T21_workers_and_processes_see_the_same_rows() -> None:
    def make() -> StageData:
        return data(Files([11, 13, 7, 9], rows=40, lanes=2), seed=5)

    order = make().order(1)
    expected = [make()[index].id for index in order]
    begun = make()
    begun[begun.order(0)[3]]  # files are open when the workers start
    for workers in (0, 1, 2):
        assert list(DataLoader(ById(begun, order), batch_size=None, num_workers=workers)) == expected
    ranks = [[make()[index].id for index in order[rank::4]] for rank in range(4)]
    assert [ranks[place % 4][place // 4] for place in range(40)] == expected
    for step in (1, 17, 39):  # a resumed run begins anywhere
        resumed = make()
        assert [resumed[index].id for index in order[step:]] == expected[step:]


def test_readers_of_streams_are_readers() -> None:
    assert issubclass(FilesConfig, ReaderConfig)
    assert len(data(Files([5], rows=3))) == 3
