"""Tables of Hugging Face `datasets`: folders, parquet and JSON files; columns of turns and of media."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from needs import needed
from pydantic import ValidationError
from shard_files import picture

from mmllm.config.base import BuildContext
from mmllm.data.hf_datasets import HFDatasetsConfig
from mmllm.data.table_rows import to_sample
from mmllm.errors import DataError, MediaError
from mmllm.processing.messages import Sample
from mmllm.processing.sources import Limits, read_media

TEXT = {"type": "text", "text": "What?"}
REPLY = {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    datasets = needed("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    return datasets


def rows(count: int, first: int = 0) -> list[dict[str, Any]]:
    """TRL's columns: turns with parts, and pictures in a list."""
    asked = [{"type": "image", "text": None}, TEXT]
    return [
        {
            "id": f"r{i}",
            "messages": [{"role": "user", "content": asked}, REPLY],
            "images": [{"bytes": picture(i % 200), "path": None}],
            "source": "made",
        }
        for i in range(first, first + count)
    ]


def convert(row: dict[str, Any], root: Path | None = None, **options: Any) -> Sample:
    return to_sample(row, "t:1", HFDatasetsConfig(path="t", **options), root, "t:1")


def values(sample: Sample, message: int = 0) -> list[Any]:
    return [part.value for part in sample.messages[message].parts]


def test_a_saved_folder_parquet_and_json_give_the_same_samples(library: Any, tmp_path: Path) -> None:
    table = library.Dataset.from_list(rows(20)).cast_column("images", library.List(library.Image()))
    table.save_to_disk(tmp_path / "saved", num_shards=2)
    library.DatasetDict({"train": table, "test": table.select([3])}).save_to_disk(tmp_path / "splits")
    for n in range(2):
        table.shard(2, n).to_parquet(tmp_path / f"p-{n}.parquet")
    context = BuildContext(root=tmp_path)
    opened = [
        HFDatasetsConfig(path=path).open(context)
        for path in ("saved", "splits", "p-{0..1}.parquet", str(tmp_path / "p-*"))
    ]
    for samples in opened:
        assert [samples[i].id for i in (19, 0, 7)] == ["r19", "r0", "r7"]
        assert values(samples[7]) == [picture(7), "What?"]
        assert samples[7].messages[1].text == "A cat."
        assert samples[7].tags == {"source": "made"}
        assert pickle.loads(pickle.dumps(samples))[7].messages == samples[7].messages
    assert opened[2].where(7) == "p-{0..1}.parquet:8"
    (test,) = HFDatasetsConfig(path="splits", split="test").open(context)
    assert test.id == "r3"
    assert len(HFDatasetsConfig(path="saved", limit=5).open(context)) == 5
    with pytest.raises(DataError, match="no split 'valid'; it has train, test"):
        HFDatasetsConfig(path="splits", split="valid").open(context)


def test_json_files_with_paths_below_their_folder(library: Any, media: Path) -> None:
    talk = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Red."}]
    rows = [{"messages": talk, "images": ["red.png"]}, {"messages": talk, "images": ["../x.png"]}]
    (media / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = HFDatasetsConfig(path="rows.jsonl").open(BuildContext(root=media))
    good, bad = table[0], table[1]
    assert values(good) == ["red.png", "What?"]  # no part asks for it: it stands before the text
    assert good.id == "rows.jsonl:1"
    assert read_media("red.png", root=good.root, limits=Limits()) == (media / "red.png").read_bytes()
    with pytest.raises(MediaError, match=r"\.\."):
        read_media(values(bad)[0], root=bad.root, limits=Limits())


def test_the_contents_change_with_the_files(library: Any, tmp_path: Path) -> None:
    prints = []
    for number in (20, 20, 21):
        library.Dataset.from_list(rows(number)).to_parquet(tmp_path / "x.parquet")
        prints.append(HFDatasetsConfig(path=str(tmp_path / "x.parquet")).open(BuildContext()).contents())
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"x.parquet": b"no parquet"}, "cannot be opened"),
        ({"x.pkl": b""}, "found .pkl"),
        ({"x.parquet": b"", "x.json": b"{}"}, "found .json, .parquet"),
        ({"folder/x.txt": b""}, "cannot be opened"),
        ({"x.jsonl": b""}, "cannot be opened|holds no rows"),
    ],
)
def test_what_is_no_table_is_an_error_of_ours(
    library: Any, tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    path = "folder" if "folder/x.txt" in files else "x.*"
    with pytest.raises(DataError, match=message):
        HFDatasetsConfig(path=path).open(BuildContext(root=tmp_path))


def test_parts_take_media_in_order_or_by_index() -> None:
    one, two = b"one", b"two"
    image = {"type": "image"}
    turns = [{"role": "user", "content": [image, TEXT, image]}, REPLY]
    assert values(convert({"messages": turns, "images": [one, two]})) == [one, "What?", two]
    turns[0]["content"] = [image | {"index": 1}, TEXT, image | {"index": 0}]
    assert values(convert({"messages": turns, "images": [one, two]})) == [two, "What?", one]
    later = [{"role": "user", "content": "Hello"}, REPLY, {"role": "user", "content": [image]}, REPLY]
    assert values(convert({"messages": later, "image": {"bytes": one, "path": "x"}}), 2) == [one]
    own = [{"role": "user", "content": [image | {"path": "data:image/png;base64,AA=="}]}, REPLY]
    assert values(convert({"messages": own, "images": []})) == ["data:image/png;base64,AA=="]


def test_prompts_and_completions() -> None:
    told = convert({"prompt": "What?", "completion": "A cat.", "audios": [b"x"]})
    assert [(m.role, [p.type for p in m.parts]) for m in told.messages] == [
        ("user", ["audio", "text"]),
        ("assistant", ["text"]),
    ]
    turns = [{"role": "system", "content": "Short."}, {"role": "user", "content": "What?"}]
    talked = convert({"prompt": turns, "completion": [REPLY], "images": None, "score": 3})
    assert [m.role for m in talked.messages] == ["system", "user", "assistant"]
    assert talked.tags == {"score": 3}


def test_other_layouts_name_media_by_their_columns() -> None:
    talk = [{"from": "human", "value": "<image>What? <image>"}, {"from": "gpt", "value": "A cat."}]
    both = {"id": 4, "conversations": talk, "image": [b"one", b"two"], "nothing": None}
    assert values(convert(both, layout="llava")) == [b"one", "What? ", b"two"]
    lists = {"messages": [{"role": "user", "content": "<image><audio>"}, REPLY], "images": [b"one"], "audios": [b"two"]}
    lists["messages"][1] = {"role": "assistant", "content": "x"}  # type: ignore[index]
    assert values(convert(lists, layout="sharegpt")) == [b"one", b"two"]
    pair = convert({"image": {"bytes": b"one"}, "text": " A cat. "}, layout="captions", prompt="Say.")
    assert (values(pair), pair.messages[1].text) == ([b"one", "Say."], "A cat.")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "expected columns messages, or prompt and completion; found text"),
        ({"messages": "x", "images": "y"}, "images is str, expected a list"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, REPLY]},
            "asks for image 0 .* the row gives 0",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, REPLY], "images": [b"a", b"b"]},
            "1 image parts, but the row gives 2",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "index": 5}]}, REPLY], "images": [b"a"]},
            "asks for image 5",
        ),
        ({"messages": [{"role": "user", "content": "x"}, REPLY], "images": ["/etc/passwd"]}, "a path without bytes"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "path": "x"}]}, REPLY]}, "a path without bytes"),
        ({"messages": [{"role": "user", "content": "x"}, REPLY], "images": [3]}, "found int, expected bytes or a path"),
        ({"messages": [REPLY], "images": [b"a"]}, "no user's turn to show them in"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "role 'wizard'"),
        ({"messages": [{"role": "user", "content": None}]}, "content is NoneType"),
        ({"messages": 3}, "found int, expected a list of turns"),
        ({"id": [1], "messages": [{"role": "user", "content": "x"}, REPLY]}, "id is"),
    ],
)
def test_rows_that_cannot_be_used_say_why(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        convert(row)
    assert str(error.value).startswith("t:1: ")


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"path": "x", "hub": "a/b"},
        {"path": "x", "revision": "main"},
        {"hub": "https://host/x"},
        {"hub": "a/../b"},
        {"path": "x", "rows": 10},
        {"path": "x", "streaming": True},
        {"path": "x", "streaming": True, "rows": 10, "limit": 5},
        {"path": "x", "streaming": True, "rows": 10, "lanes": 4},
        {"path": []},
        {"path": "x", "layout": "guess"},
    ],
)
def test_contradictions_are_config_errors(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        HFDatasetsConfig.model_validate(wrong)


def test_validate_and_show_read_tables(
    library: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], write: Callable[..., Path]
) -> None:
    from mmllm.cli import main

    bad = [*rows(3), rows(1)[0] | {"images": [{"bytes": b"no picture", "path": None}]}]
    library.Dataset.from_list(bad).to_parquet(tmp_path / "x.parquet")
    assert main(["data", "validate", str(tmp_path / "x.parquet")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith(f"{tmp_path / 'x.parquet'}:4: ")
    assert "id 'r0' is used before" in lines[0]
    assert "format hf_datasets, 4 rows, 4 image media, 2 faults" in lines[-1]
