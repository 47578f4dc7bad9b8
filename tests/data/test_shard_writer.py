"""``mmllm data shard``: every sample with its media, in an order and in bytes that repeat, with an index that finds damage."""

from __future__ import annotations

import hashlib
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from data_rows import row

from mmllm.cli import main
from mmllm.config.base import BuildContext
from mmllm.config.run import DataSource
from mmllm.data import shard_writer
from mmllm.data.dataset import SampleStream, SkipLog
from mmllm.data.mixture import StageData
from mmllm.data.readers import MessagesConfig
from mmllm.data.shard_writer import write_shards
from mmllm.data.shards import INDEX
from mmllm.data.tables import SampleTable
from mmllm.data.webdataset import WebDatasetConfig
from mmllm.errors import DataError
from mmllm.processing.messages import Sample
from mmllm.processing.sources import Limits, read_media

Write = Callable[..., Path]
CONTEXT = BuildContext()
IMAGE, SOUND = {"type": "image", "path": "red.png"}, {"type": "audio", "path": "tone.wav"}
MADE = {"type": "image", "path": "two.png", "caption": "grey", "source": "retrieved"}


@pytest.fixture
def table(media: Path, write: Write) -> SampleTable:
    (media / "deep").mkdir()
    (media / "deep" / "no-ending").write_bytes((media / "red.png").read_bytes())
    rows = [
        row(
            f"r{i}",
            [IMAGE, SOUND, IMAGE, {"type": "image", "path": "deep/no-ending"}, {"type": "text", "text": f"é {i}?"}],  # type: ignore[arg-type]
            [MADE, {"type": "image", "caption": "only told"}, {"type": "text", "text": "Da."}],  # type: ignore[arg-type]
            type="count",
            level=i,
        )
        for i in range(23)
    ]
    rows[7]["messages"].insert(0, {"role": "system", "content": "Be short."})
    del rows[9]["id"]
    return MessagesConfig(path=str(write(*rows))).open(CONTEXT)


def same(one: Sample, other: Sample) -> None:
    """Equal in all but where media come from."""
    assert (one.id, dict(one.tags)) == (other.id, dict(other.tags))
    for a, b in zip(one.messages, other.messages, strict=True):
        assert a.role == b.role
        for p, q in zip(a.parts, b.parts, strict=True):
            assert (p.type, p.caption, p.source, p.value is None) == (q.type, q.caption, q.source, q.value is None)
            if p.type == "text" or p.value is None:
                assert p.value == q.value
            else:
                assert q.value is not None
                read = [read_media(v, root=s.root, limits=Limits()) for v, s in ((p.value, one), (q.value, other))]
                assert read[0] == read[1]


def test_what_is_written_is_what_is_read(table: SampleTable, tmp_path: Path) -> None:
    written = write_shards(table, tmp_path / "s", samples_per_shard=10)
    assert [path.name for path in written.shards] == ["000000.tar", "000001.tar", "000002.tar"]
    assert (written.samples, written.left_out) == (23, [])
    assert written.bytes == sum(path.stat().st_size for path in written.shards)
    read = WebDatasetConfig(path=str(tmp_path / "s" / "{000000..000002}.tar")).open(CONTEXT)
    assert len(read) == 23
    numbers = list(range(23))
    random.Random(0).shuffle(numbers)
    for number in numbers:
        same(table[number], read[number])
    with tarfile.open(written.shards[1]) as archive:  # for people and other programs
        names = [name for name in archive.getnames() if name.startswith("000012.")]
        assert names == ["000012.json", "000012.0.png", "000012.1.wav", "000012.2.png", "000012.3.png"]
        told = json.loads(archive.extractfile("000012.json").read())  # type: ignore[union-attr]
        assert [part["path"] for part in told["messages"][0]["content"][:4]] == ["0.png", "1.wav", "0.png", "2.png"]


def test_the_same_samples_give_the_same_bytes_with_and_without_their_index(table: SampleTable, tmp_path: Path) -> None:
    one = write_shards(table, tmp_path / "a", samples_per_shard=10)
    two = write_shards(table, tmp_path / "b", samples_per_shard=10)
    assert [p.read_bytes() for p in one.shards] == [p.read_bytes() for p in two.shards]
    index = json.loads((tmp_path / "a" / f"000000.tar{INDEX}").read_text())
    assert index["sha256"] == hashlib.sha256(one.shards[0].read_bytes()).hexdigest()
    assert (index["count"], index["size"]) == (10, one.shards[0].stat().st_size)
    for path in (tmp_path / "b").glob(f"*{INDEX}"):
        path.unlink()
    a, b = (WebDatasetConfig(path=str(tmp_path / name / "*.tar")).open(CONTEXT) for name in "ab")
    assert list(a) == list(b)


def test_shards_of_so_many_bytes(table: SampleTable, tmp_path: Path) -> None:
    written = write_shards(table, tmp_path / "s", bytes_per_shard=40_000)
    sizes = [path.stat().st_size for path in written.shards]
    assert len(sizes) > 2
    assert max(sizes) <= 40_000 + 1024
    assert min(sizes[:-1]) > 40_000 * 0.7
    one_each = write_shards(table, tmp_path / "t", bytes_per_shard=1)
    assert len(one_each.shards) == 23


def test_changed_bytes_are_found_by_the_index(table: SampleTable, tmp_path: Path) -> None:
    path = write_shards(table, tmp_path / "s").shards[0]
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        at = archive.getmember("000003.1.wav").offset_data
    data[at + 100] ^= 1
    path.write_bytes(data)
    read = WebDatasetConfig(path=str(path)).open(CONTEXT)
    assert read[4].id == "r4"
    with pytest.raises(DataError, match=r"000000.tar:4: .*CRC-32 differs"):
        read[3]
    path.write_bytes(data[: len(data) // 2])
    cut = WebDatasetConfig(path=str(path)).open(CONTEXT)
    assert len(cut) == 23  # the index knows what is missing
    with pytest.raises(DataError, match=r"000000.tar:23: the shard breaks off"):
        cut[22]


class ById:
    """A processor that only wants the sample."""

    def encode_sample(self, sample: Sample, max_length: int) -> Sample:
        return sample


def test_D02_a_ruined_shard_is_counted_and_fatal_with_its_first_causes(table: SampleTable, tmp_path: Path) -> None:
    good = write_shards(table, tmp_path / "good").shards[0]
    bad = write_shards(table, tmp_path / "bad").shards[0]
    bad.write_bytes(b"\xff" * bad.stat().st_size)
    sources = [{"reader": {"kind": "webdataset", "path": str(path)}} for path in (good, bad)]
    stream = SampleStream(StageData([DataSource.model_validate(s) for s in sources], 0))
    log = SkipLog()
    assert stream.load(5, ById(), 100).encoded.id == "r5"  # type: ignore[arg-type]

    def epoch() -> None:
        for index in stream.data.order(0):
            log.add(stream.load(index, ById(), 100))  # type: ignore[arg-type]

    with pytest.raises(DataError, match="100 samples in a row cannot be used") as error:
        epoch()
    assert str(error.value).count("CRC-32 differs") == 5


def test_samples_that_cannot_be_read_are_left_out_by_name(media: Path, write: Write, tmp_path: Path) -> None:
    path = write(row("a", [IMAGE]), "{", row("b", [{"type": "image", "path": "none.png"}]), row("c", [SOUND]))  # type: ignore[arg-type]
    written = write_shards(MessagesConfig(path=str(path)).open(CONTEXT), tmp_path / "s")
    assert [failure.where for failure in written.left_out] == [f"{path}:2", f"{path}:3"]
    assert [s.id for s in WebDatasetConfig(path=str(tmp_path / "s/*.tar")).read(CONTEXT)] == ["a", "c"]
    ruined = write(*["{"] * 150, name="ruined.jsonl")
    with pytest.raises(DataError, match="100 samples in a row"):
        write_shards(MessagesConfig(path=str(ruined)).open(CONTEXT), tmp_path / "t")
    few = write("{", name="few.jsonl")
    with pytest.raises(DataError, match=r"no sample can be used.*\n.*few.jsonl:1"):
        write_shards(MessagesConfig(path=str(few)).open(CONTEXT), tmp_path / "u")


def test_an_interrupted_shard_never_has_its_name(
    table: SampleTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = shard_writer.pack

    def full(sample: Sample, limits: Limits) -> list[tuple[str, bytes]]:
        if sample.id == "r15":
            raise OSError(28, "No space left on device")
        return pack(sample, limits)

    monkeypatch.setattr(shard_writer, "pack", full)
    with pytest.raises(OSError, match="No space left"):
        write_shards(table, tmp_path / "s", samples_per_shard=10)
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["000000.tar", f"000000.tar{INDEX}"]
    with pytest.raises(DataError, match="already holds 000000"):
        write_shards(table, tmp_path / "s")


def test_the_command_shards_files_and_configurations(
    media: Path, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
    llava = write({"id": "l", "image": "red.png", "conversations": talk}, name="llava.jsonl")
    write(row("a", [SOUND]), row("b"), name="own.jsonl")  # type: ignore[arg-type]
    assert main(["data", "shard", str(llava), "--output", str(tmp_path / "one")]) == 0
    text = capsys.readouterr().out
    told = yaml.safe_load(text[text.index("data:") :])["data"]
    (found,) = WebDatasetConfig.model_validate(told[0]["reader"]).read(CONTEXT)
    assert found.messages[0].parts[0].value == (media / "red.png").read_bytes()
    config = {
        "model": {"backbone": {"kind": "causal_lm", "pretrained": "x/y"}},
        "stages": [
            {"name": "other", "train": ["backbone"], "lr": 1e-3, "data": ["none.jsonl"]},
            {
                "name": "s",
                "train": ["backbone"],
                "lr": 1e-3,
                "data": ["own.jsonl", {"reader": {"kind": "llava", "path": "llava.jsonl"}, "weight": 0.5}],
            },
        ],
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    command = ["data", "shard", str(tmp_path / "run.yaml"), "--stage", "s", "--output", str(tmp_path / "two")]
    assert main([*command, "--samples-per-shard", "1"]) == 0
    text = capsys.readouterr().out
    assert "2 samples in 2 shards" in text
    told = yaml.safe_load(text[text.index("data:") :])["data"]
    assert [source.get("weight", 1) for source in told] == [1, 0.5]
    assert [len(WebDatasetConfig.model_validate(s["reader"]).open(CONTEXT)) for s in told] == [2, 1]
    assert main([*command[:3], "--stage", "x", "--output", str(tmp_path / "three")]) == 2
    assert main(command) == 1  # the folder is not empty


@pytest.mark.parametrize(("text", "size"), [("500MB", 500_000_000), ("1GiB", 2**30), ("4096", 4096), ("1.5kB", 1500)])
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    from mmllm.data_command import byte_size

    assert byte_size(text) == size


@pytest.mark.parametrize("text", ["0", "-1", "x", "5XB", ""])
def test_other_sizes_are_wrong_usage(text: str) -> None:
    with pytest.raises(SystemExit):
        main(["data", "shard", "x", "--output", "y", "--bytes-per-shard", text])
