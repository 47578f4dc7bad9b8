"""Tar shards: random access by an index, other programs' layouts, damage, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import tarfile
import time
from pathlib import Path

import pytest
from data_rows import row
from pydantic import ValidationError
from shard_files import odd, picture, sample, shards, tar

from mmllm.cli import main
from mmllm.config.base import BuildContext
from mmllm.data import shards as shards_module
from mmllm.data.shards import INDEX, MAX_MEMBERS, index_folder
from mmllm.data.webdataset import WebDatasetConfig
from mmllm.errors import DataError

CONTEXT = BuildContext()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return index_folder()


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_of_every_tar_format_by_number(tmp_path: Path, format: int) -> None:
    long = "very/" * 40 + "long"  # over 100 bytes: an extended header in GNU's and in the pax format
    keys = ["a", "folder.v1/b", "./c", "é"] + ([long] if format != tarfile.USTAR_FORMAT else [])
    members = [member for number, key in enumerate(keys) for member in sample(key, number)]
    path = tar(tmp_path / "x.tar", members, format)
    table = WebDatasetConfig(path=str(path)).open(CONTEXT)
    assert len(table) == len(keys)
    for number in reversed(range(len(keys))):
        assert table[number].id == f"id-{keys[number]}"
        assert table[number].messages[0].parts[0].value == picture(number)
        assert table[number].root is None
    assert table.where(1) == f"{path}:2"
    assert pickle.loads(pickle.dumps(table))[1] == table[1]
    with pytest.raises(IndexError):
        table[len(keys)]


def test_patterns_name_shards_in_order(tmp_path: Path) -> None:
    shards(tmp_path, 3, 2)
    context = BuildContext(root=tmp_path)
    everything = [f"id-{s}_{n}" for s in range(3) for n in range(2)]
    for path in ("{000..002}.tar", "*.tar", ["000.tar", "{001,002}.tar"]):
        assert [s.id for s in WebDatasetConfig(path=path).read(context)] == everything  # type: ignore[arg-type]
    assert [s.id for s in WebDatasetConfig(path="*.tar", limit=3).read(context)] == everything[:3]
    with pytest.raises(DataError, match=r"003.tar: no such file"):
        WebDatasetConfig(path="{000..003}.tar").open(context)
    for hostile in ("{0..999999999}.tar", "{9..1}.tar", "{00..99}{00..99}{00..99}.tar"):
        with pytest.raises(DataError):
            WebDatasetConfig(path=hostile).open(context)


def test_the_index_is_kept_and_made_anew_when_the_shard_changes(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = shards(tmp_path, 1, 3)
    reader = WebDatasetConfig(path=str(path))
    first = reader.open(CONTEXT)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(shards_module, "scan", lambda *_: pytest.fail("the kept index was not used"))
    assert [s.id for s in reader.open(CONTEXT)] == [s.id for s in first]
    assert reader.open(CONTEXT).contents() == first.contents()
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent.parent))
    tar(path, [m for n in range(5) for m in sample(f"{n}", n)])
    assert len(reader.open(CONTEXT)) == 5
    assert reader.open(CONTEXT).contents() != first.contents()
    with pytest.raises(DataError, match="has changed since it was opened"):
        first[0]


def test_the_kept_digest_sees_other_rows_of_the_same_size(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", sample("a", 1))
    before = WebDatasetConfig(path=str(path)).open(CONTEXT).contents()
    tar(path, sample("a", 2))
    os.utime(path, ns=(1, 1))
    assert WebDatasetConfig(path=str(path)).open(CONTEXT).contents() != before


def test_an_index_that_is_none_is_an_error_with_its_name(tmp_path: Path) -> None:
    (path,) = shards(tmp_path, 1, 2)
    index = path.with_name(path.name + INDEX)
    good = {"version": 1, "sha256": "", "crc32": [], "damage": None}
    for text in (
        "no json",
        "[]",
        json.dumps({"version": 9}),
        json.dumps(good | {"starts": [0], "ends": [1, 2]}),
        json.dumps(good | {"starts": [0, 100], "ends": [1024, 2048]}),
        json.dumps(good | {"starts": ["x"], "ends": [1]}),
        json.dumps(good | {"starts": [2**80], "ends": [2**81]}),
    ):
        index.write_text(text)
        with pytest.raises(DataError, match=r"000.tar.index.json: is no index of a shard .*remove it"):
            WebDatasetConfig(path=str(path)).open(CONTEXT)
    index.write_text(json.dumps(good | {"starts": [512], "ends": [4096]}))  # in the middle of a sample
    with pytest.raises(DataError, match=r"000.tar:1"):
        WebDatasetConfig(path=str(path)).open(CONTEXT)[0]


def test_without_a_writable_home_the_headers_are_read_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (path,) = shards(tmp_path, 1, 2)
    assert len(WebDatasetConfig(path=str(path)).open(CONTEXT)) == 2


def test_pictures_with_captions_beside_them(tmp_path: Path) -> None:
    members = [("1.jpg", picture(9, "JPEG")), ("1.txt", b" A cat.\n"), ("1.json", b'{"title": "Cat", "size": 3}')]
    path = tar(tmp_path / "x.tar", [*members, (".nv-meta/index.json", b"{}"), ("__meta__.json", b"{}")])
    reader = WebDatasetConfig(path=str(path), layout="captions", prompt="What is it?")
    (found,) = reader.read(CONTEXT)
    assert found.id == "1"
    assert [(p.type, p.value) for p in found.messages[0].parts] == [
        ("image", picture(9, "JPEG")),
        ("text", "What is it?"),
    ]
    assert found.messages[1].text == "A cat."
    titled = reader.model_copy(update={"caption": "json.title"})
    assert next(titled.read(CONTEXT)).messages[1].text == "Cat"
    for caption, message in (("json.size", "expected a text"), ("caption", "no member .caption")):
        with pytest.raises(DataError, match=message):
            reader.model_copy(update={"caption": caption}).open(CONTEXT)[0]


def test_rows_in_other_layouts_and_names_of_media(tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    once_a_file = json.dumps({"id": "l", "image": "coco/train2017/1.jpg", "conversations": talk}).encode()
    shared = json.dumps({"messages": [{"role": "user", "content": "<image><image>"}], "images": ["k2.b.png", "a.png"]})
    path = tar(
        tmp_path / "x.tar",
        {
            "k1.json": once_a_file,
            "k1.jpg": picture(1),
            "k2.json": shared.encode(),
            "k2.a.png": picture(2),
            "k2.b.png": picture(3),
        }.items(),
    )
    llava = WebDatasetConfig(path=str(path), layout="llava").open(CONTEXT)
    assert llava[0].messages[0].parts[0].value == picture(1)
    both = WebDatasetConfig(path=str(path), layout="sharegpt").open(CONTEXT)[1]
    assert [part.value for part in both.messages[0].parts] == [picture(3), picture(2)]


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/passwd", "file:///etc/passwd", "none.png", "x/y.png", "pipe:id"]
)
def test_S09_a_row_cannot_name_anything_outside_its_sample(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.png").write_bytes(picture(1))
    content = [{"type": "image", "path": name}, {"type": "image", "path": "0.png"}]
    members = [("a.json", json.dumps(row("a", content)).encode()), ("a.0.png", picture(2))]  # type: ignore[arg-type]
    path = tar(tmp_path / "x.tar", members)
    with pytest.raises(DataError, match=r"x.tar:1: no member .* the sample 'a' has 0.png, json"):
        WebDatasetConfig(path=str(path)).open(CONTEXT)[0]


@pytest.mark.parametrize(
    "name", ["../a.json", "/tmp/a.json", "x/../../a.json", "C:\\a.json", "C:a.json", "\\\\host\\a.json"]
)
def test_S10_names_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    path = tar(tmp_path / "in" / "x.tar", [*sample("a", 1), (name, b"{}")])
    with pytest.raises(DataError, match="leads out of the archive's folder"):
        WebDatasetConfig(path=str(path)).open(CONTEXT)


@pytest.mark.parametrize(
    ("type", "what"),
    [
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.BLKTYPE, "a device"),
        (tarfile.FIFOTYPE, "a named pipe"),
        (b"Z", "a member of type"),
    ],
)
def test_S10_only_regular_files_are_read(tmp_path: Path, type: bytes, what: str) -> None:
    def change(info: tarfile.TarInfo) -> None:
        info.type, info.linkname = type, "/etc/passwd"

    path = odd(tmp_path / "x.tar", "b.json", change)
    with pytest.raises(DataError, match=f"'b.json' is {what}"):
        WebDatasetConfig(path=str(path)).open(CONTEXT)


def test_S10_a_sample_of_too_many_members_or_bytes_is_bad_not_fatal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crowd = [(f"b.{n}.png", b"") for n in range(MAX_MEMBERS + 1)]
    path = tar(tmp_path / "x.tar", [*sample("a", 1), *crowd, *sample("c", 2)])
    table = WebDatasetConfig(path=str(path)).open(CONTEXT)
    assert [table[0].id, table[2].id] == ["id-a", "id-c"]
    with pytest.raises(DataError, match="more than 1,000 members"):
        table[1]
    monkeypatch.setattr(shards_module, "MAX_SAMPLE_BYTES", 1000)
    with pytest.raises(DataError, match="bytes, the limit is 1,000"):
        table[0]


def test_S10_a_hundred_thousand_empty_members_cost_seconds_and_little_memory(tmp_path: Path) -> None:
    import tracemalloc

    header = tarfile.TarInfo("a.json").tobuf()
    path = tmp_path / "x.tar"
    path.write_bytes(header * 100_000 + bytes(1024))
    tracemalloc.start()
    begin = time.process_time()
    table = WebDatasetConfig(path=str(path)).open(CONTEXT)
    assert time.process_time() - begin < 20
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    with pytest.raises(DataError, match=r"the limit is|more than 1,000 members"):
        table[0]


@pytest.mark.parametrize("name", ["a.pkl", "a.pyd", "a.pth", "a.PICKLE", "a.x.pt", "a.ckpt"])
def test_S11_a_shard_with_a_pickle_is_not_opened(tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    payload = b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."
    path = tar(tmp_path / "x.tar", [*sample("a", 1), (name, payload)])
    with pytest.raises(DataError, match="pickles can run code"):
        WebDatasetConfig(path=str(path)).open(CONTEXT)
    assert not canary.exists()


@pytest.mark.parametrize(
    "path", ["pipe:touch canary", " pipe: touch canary", "https://host/x.tar", "s3://b/x.tar", "file:x.tar"]
)
def test_S11_commands_and_urls_are_config_errors(tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValidationError, match="shards are local files"):
        WebDatasetConfig(path=path)
    with pytest.raises(ValidationError, match="shards are local files"):
        WebDatasetConfig(path=["x.tar", path])
    assert not (tmp_path / "canary").exists()


def test_D02_a_shard_that_breaks_off_gives_what_is_whole_and_one_bad_sample(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = shards(tmp_path, 12, 4)
    data = paths[5].read_bytes()
    with tarfile.open(paths[5]) as archive:
        third = archive.getmembers()[4].offset
    paths[5].write_bytes(data[: third + 600])  # in the JSON of its third sample
    table = WebDatasetConfig(path=str(tmp_path / "*.tar")).open(CONTEXT)
    assert "005.tar" in caplog.text
    assert len(table) == 11 * 4 + 2  # its second sample may lack members, so it does not count as whole
    assert table[20].id == "id-5_0"
    assert table[22].id == "id-6_0"
    with pytest.raises(DataError, match=r"005.tar: '5_2.json' begins at byte .* the file ends at"):
        table[21]


@pytest.mark.parametrize("cut", [0.0, 0.01, 0.3, 0.5, 0.9, 0.999])
def test_D02_damaged_shards_above_the_limit_are_fatal_with_their_causes(tmp_path: Path, cut: float) -> None:
    paths = shards(tmp_path, 4, 4)
    for path in paths[:2]:
        data = path.read_bytes()
        path.write_bytes(data[: int(4 * 2048 * cut)])
    with pytest.raises(
        DataError, match=r"2 of 4 shards are damaged, the limit is 10%; the first causes:\n  .*000.tar"
    ) as error:
        WebDatasetConfig(path=str(tmp_path / "*.tar")).open(CONTEXT)
    assert str(error.value).count("\n") == 2


def test_D02_a_damaged_header_in_the_middle_is_not_the_end(tmp_path: Path) -> None:
    paths = shards(tmp_path, 20, 4)
    data = bytearray(paths[0].read_bytes())
    with tarfile.open(paths[0]) as archive:
        at = archive.getmembers()[4].offset
    data[at + 3] ^= 0x40
    paths[0].write_bytes(data)
    table = WebDatasetConfig(path=str(tmp_path / "*.tar")).open(CONTEXT)
    with pytest.raises(DataError, match=f"no header at byte {at:,}; the archive is damaged from there"):
        table[1]


def test_what_is_no_plain_tar_says_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    tar(tmp_path / "y.tar", sample("a", 1))
    for data, message in (
        (b"\x1f\x8b" + bytes(2000), "compressed .gzip., so it has no random access"),
        (b'{"id": 1}\n' * 100, "is no tar archive"),
        ((tmp_path / "y.tar").read_bytes() * 2, "several archives joined into one file"),
        (b"", "breaks off at byte 0"),
    ):
        path.write_bytes(data)
        with pytest.raises(DataError, match=message):
            WebDatasetConfig(path=str(path)).open(CONTEXT)
    tar(path, [("readme", b"text")])
    with pytest.raises(DataError, match="holds no samples"):
        WebDatasetConfig(path=str(path)).open(CONTEXT)


def test_rows_that_cannot_be_used_name_shard_and_number(tmp_path: Path) -> None:
    members = [("a.png", picture(1)), ("b.json", b"{"), ("c.txt", b"x"), ("c.png", picture(1)), *sample("d", 4)]
    path = tar(tmp_path / "x.tar", members)
    table = WebDatasetConfig(path=str(path)).open(CONTEXT)
    for number, message in enumerate(("no member .json; the sample has png", "not valid JSON", "layout: captions")):
        with pytest.raises(DataError, match=message) as error:
            table[number]
        assert str(error.value).startswith(f"{path}:{number + 1}: ")
    assert table[3].id == "id-d"


def test_validate_names_every_fault_of_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = sample("a", 1)
    bad = [("b.json", good[0][1].replace(b"a.0.png", b"0.png")), ("b.0.png", b"no picture")]
    silent = ("c.json", json.dumps(row("c", " ")).encode())
    tar(tmp_path / "0.tar", [*good, *bad, silent])
    cut = tar(tmp_path / "1.tar", [*sample("d", 1), *sample("e", 2)])
    cut.write_bytes(cut.read_bytes()[:3000])
    assert main(["data", "validate", str(tmp_path / "{0..1}.tar")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0].removeprefix(f"{tmp_path}/") for line in lines[:4]] == [
        "0.tar:2",
        "0.tar:2",
        "0.tar:3",
        "1.tar:2",
    ]
    assert "id 'id-a' is used before" in lines[0]
    assert "0.png" not in lines[1]
    assert "the user says nothing" in lines[2]
    assert "breaks off" in lines[3] or "the file ends at" in lines[3]
    assert lines[-1].endswith("format webdataset, 5 rows, 3 image media, 4 faults")
    assert main(["data", "validate", "--fast", str(tmp_path / "0.tar")]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 4  # two faults, a note, the summary
    assert main(["data", "validate", str(odd(tmp_path / "2.tar", "x", _link))]) == 1
    assert "2.tar:1: 'x' is a symbolic link" in capsys.readouterr().out
    assert main(["data", "validate", "pipe:touch canary.tar"]) == 1
    assert "are never opened" in capsys.readouterr().out
    tar(tmp_path / "3.tar", [("a.jpg", picture(1, "JPEG")), ("a.txt", b"A cat.")])
    assert main(["data", "validate", str(tmp_path / "3.tar")]) == 0
    assert "rows have the layout captions" in capsys.readouterr().out


def _link(info: tarfile.TarInfo) -> None:
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
