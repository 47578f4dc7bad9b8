"""The store of tensors: what was put or nothing, whatever happens to writers, files and disk; bounded; many processes."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mmllm.cache import store as module
from mmllm.cache.store import Room, TensorStore, pack, unpack

MEGABYTE = 10**6


@pytest.fixture(autouse=True)
def _look_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_EVERY", 0.0)


def writer(folder: Path, limit: int = MEGABYTE) -> TensorStore:
    return TensorStore(folder, Room(folder, limit))


def found(store: TensorStore, key: str) -> torch.Tensor:
    got = store.get(key)
    assert got is not None
    return got[0]


VALUES = {
    "float32": torch.randn(3, 5),
    "bfloat16": torch.randn(7, 2).bfloat16(),
    "float16": torch.randn(1, 33).half(),
    "int64": torch.arange(6).view(2, 3),
    "bool": torch.tensor([True, False]),
    "empty": torch.empty(0, 4),
    "number": torch.tensor(2.5),
    "strided": torch.randn(4, 6).t()[1:],
}


@pytest.mark.parametrize("name", list(VALUES))
def test_what_was_put_comes_back(name: str, tmp_path: Path) -> None:
    store = writer(tmp_path)
    store.put("other", torch.randn(3), {})
    store.put(name, VALUES[name], {"tokens": 3, "grid": [1, 2], "members": None})
    store.commit()
    for reader in (store, TensorStore(tmp_path), pickle.loads(pickle.dumps(store))):
        got = reader.get(name)
        assert got is not None
        assert torch.equal(got[0], VALUES[name])
        assert got[0].dtype == VALUES[name].dtype
        assert got[1] == {"tokens": 3, "grid": [1, 2], "members": None}
    assert store.get("never put") is None


@pytest.mark.parametrize(
    ("storage", "bound", "share"), [("float16", 5e-4, 0.5), ("bfloat16", 4e-3, 0.5), ("int8", 4e-3, 0.27)]
)
def test_narrower_storage_costs_little_precision(storage: Any, bound: float, share: float) -> None:
    value = torch.randn(50, 384) * torch.logspace(-3, 3, 50)[:, None]
    packed = pack(value, storage)
    again = unpack(packed)
    assert again.dtype == torch.float32
    assert float(((again - value).abs() / value.abs().amax(dim=1, keepdim=True)).max()) <= bound
    assert len(packed.payload) <= share * 4 * value.numel()
    assert torch.equal(unpack(pack(again, storage)), again) or storage == "int8"


def test_what_is_beyond_a_narrow_dtype_is_kept_exactly() -> None:
    for storage in ("float16", "int8"):
        for value in (torch.tensor([[1e6, float("inf")]]), torch.arange(3), torch.zeros(2, 3)):
            assert torch.equal(unpack(pack(value, storage)), value)
    assert torch.equal(unpack(pack(torch.tensor([[1e6, 1.0]]), "float16")), torch.tensor([[1e6, 1.0]]))


def test_others_see_all_of_a_commit_or_nothing(tmp_path: Path) -> None:
    ours, theirs = writer(tmp_path), TensorStore(tmp_path)
    for number in range(3):
        ours.put(str(number), torch.full((4,), float(number)), {})
    assert found(ours, "1")[0] == 1, "its writer does"
    assert all(theirs.get(str(number)) is None for number in range(3))
    ours.commit()
    assert [float(found(theirs, str(number))[0]) for number in range(3)] == [0, 1, 2]
    ours.put("3", torch.ones(1), {})
    ours.commit()
    assert found(theirs, "3") == 1, "also what came when the file was mapped already"


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "shape", "facts", "line", "words"])
def test_a_damaged_entry_is_made_again(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, value = writer(tmp_path), torch.randn(4, 6)
    store.put("a", value, {"tokens": 4})
    store.close()
    (data,), (index,) = tmp_path.glob("*.bin"), tmp_path.glob("*.jsonl")
    content, line = bytearray(data.read_bytes()), index.read_text()
    content[9] ^= 1
    if damage in ("cut", "flipped"):
        data.write_bytes(content if damage == "flipped" else content[:40])
    elif damage == "gone":
        data.unlink()
    else:
        changed = {
            "shape": line.replace("[4, 6]", "[6, 4]"),
            "facts": line.replace('"tokens": 4', '"tokens": 5'),
            "line": line[:-9] + "\n",
            "words": "[1, {}]\n",
        }[damage]
        assert changed != line
        index.write_text(changed)
    store = writer(tmp_path)
    assert store.get("a") is None
    store.put("a", value, {"tokens": 4})
    store.close()
    assert torch.equal(found(TensorStore(tmp_path), "a"), value)


def test_a_file_cut_short_under_a_reader_does_not_kill_it(tmp_path: Path) -> None:
    store = writer(tmp_path)
    store.put("a", torch.randn(5000), {})
    store.put("b", torch.randn(5000), {})
    store.commit()
    reader = TensorStore(tmp_path)
    found(reader, "b")
    (data,) = tmp_path.glob("*.bin")
    os.truncate(data, 25_000)
    assert reader.get("b") is None
    assert reader.get("a") is not None


def test_the_first_of_two_values_counts(tmp_path: Path) -> None:
    """Two processes met the same medium; whoever reads later sees one value, in this run and in the next."""
    one, other = writer(tmp_path), writer(tmp_path)
    one.put("a", torch.zeros(3), {})
    other.put("a", torch.ones(3), {})
    other.commit()
    one.commit()
    assert torch.equal(found(TensorStore(tmp_path), "a"), torch.zeros(3))


def test_the_limit_holds_over_all_processes_and_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        rooms = [Room(tmp_path, 10_000, processes=2) for _ in range(2)]
        stores = [TensorStore(tmp_path / str(place), room) for place, room in enumerate(rooms)]
        for number in range(20):
            for store in stores:
                store.put(f"{number}", torch.zeros(250), {})
        for store in stores:
            store.close()
    kept = sum(path.stat().st_size for path in tmp_path.rglob("*.bin"))
    assert 8000 <= kept <= 10_000
    assert caplog.text.count("the limit") == 4, "said once by each"


def test_a_disk_that_refuses_costs_the_cache_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = writer(tmp_path)
    store.put("a", torch.zeros(3), {})
    real = os.write
    # A full disk takes a part of what is written.
    monkeypatch.setattr(module.os, "write", lambda file, data: real(file, data[: len(data) // 2]))
    store.put("b", torch.zeros(3), {})
    store.put("c", torch.zeros(3), {})
    store.commit()
    assert caplog.text.count("cannot write") == 1
    assert TensorStore(tmp_path).get("b") is None


def write_for_ever(folder: Path) -> None:
    store = TensorStore(folder, Room(folder, 10**10))
    for turn in range(10**6):
        for piece in range(3):
            store.put(f"{turn}.{piece}", torch.full((100, 300), float(turn)), {"tokens": turn})
        store.commit()


def test_writers_killed_half_way_leave_nothing_half(tmp_path: Path) -> None:
    """D-row of the faults: kill -9 of two writers at work in one folder; every commit is there whole, or not at all."""
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=write_for_ever, args=(tmp_path,)) for _ in range(2)]
    for one in writers:
        one.start()
    reader, deadline = TensorStore(tmp_path), time.monotonic() + 600
    while (len(list(tmp_path.glob("*.jsonl"))) < 2 or reader.get("6.2") is None) and time.monotonic() < deadline:
        time.sleep(0.02)
    for one in writers:
        one.kill()
        one.join()
    store = TensorStore(tmp_path)
    assert len(store) >= 21
    for turn in range(len(store) // 3):
        for piece in range(3):
            got = store.get(f"{turn}.{piece}")
            assert got is not None
            assert torch.equal(got[0], torch.full((100, 300), float(turn)))
            assert got[1] == {"tokens": turn}
    again = writer(tmp_path, 10**10)
    again.put("new", torch.ones(2), {})
    again.close()
    assert torch.equal(found(TensorStore(tmp_path), "new"), torch.ones(2))
