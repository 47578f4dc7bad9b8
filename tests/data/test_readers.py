"""Readers: paths, patterns, limits, ids, tags, media folders; and the messages layout."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_rows import row
from pydantic import ValidationError

from mmllm.config.base import BuildContext
from mmllm.data.readers import MessagesConfig
from mmllm.errors import DataError, MediaError
from mmllm.processing.messages import Part
from mmllm.processing.sources import Limits, read_media

Write = Callable[..., Path]


def test_messages_become_samples_with_tags_and_the_files_folder(write: Write, tmp_path: Path) -> None:
    content = [{"type": "image", "path": "red.png"}, {"type": "text", "text": "How <image> many?"}]
    first = {**row("a", type="count", level=2), "messages": [{"role": "user", "content": content}]}
    write(first, row("b"), name="sub/data.jsonl")
    one, two = MessagesConfig(path="sub/data.jsonl").read(BuildContext(root=tmp_path))
    assert one.messages[0].parts == (Part("image", "red.png"), Part("text", "How <image> many?"))
    assert (one.id, one.root, one.tags) == ("a", tmp_path / "sub", {"type": "count", "level": 2})
    assert (two.id, two.messages[1].text, two.tags) == ("b", "three", {})


def test_a_row_without_id_is_called_by_file_and_line(write: Write) -> None:
    path = write("", {"messages": row("x")["messages"]}, {**row("x"), "id": 7})
    assert [sample.id for sample in MessagesConfig(path=str(path)).read(BuildContext())] == ["data.jsonl:2", "7"]


@pytest.mark.parametrize("bad", [True, "", 1.5, ["a"]])
def test_an_id_is_text_or_a_whole_number(write: Write, bad: Any) -> None:
    path = write({**row("x"), "id": bad})
    with pytest.raises(DataError, match=r"data.jsonl:1: id is .*; expected a text or a whole number"):
        list(MessagesConfig(path=str(path)).read(BuildContext()))


def test_patterns_lists_and_limits(write: Write, tmp_path: Path) -> None:
    for name in ("c", "a", "b"):
        write(row(f"{name}1"), row(f"{name}2"), name=f"{name}.jsonl")
    context = BuildContext(root=tmp_path)
    ids = [sample.id for sample in MessagesConfig(path="?.jsonl").read(context)]
    assert ids == ["a1", "a2", "b1", "b2", "c1", "c2"]
    table = MessagesConfig(path=["c.jsonl", "a.jsonl"], limit=3).open(context)
    assert [sample.id for sample in table] == ["c1", "c2", "a1"]
    assert table.where(2) == f"{tmp_path / 'a.jsonl'}:1"
    with pytest.raises(IndexError):
        table[3]
    assert len(MessagesConfig(path="?.jsonl").tiny().open(context)) == 6


def test_a_file_name_with_brackets_is_a_file_name(write: Write, tmp_path: Path) -> None:
    write(row("a"), name="run[1].jsonl")
    assert len(MessagesConfig(path="run[1].jsonl").open(BuildContext(root=tmp_path))) == 1


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none.jsonl", "none.jsonl: no such file; a path in a config starts from the config's folder"),
        ("*.none", "no file matches this pattern"),
        (".", "is a folder"),
        ("empty.jsonl", "empty.jsonl: holds no rows"),
        ("cut.json", "cut.json:2: not valid JSON"),
    ],
)
def test_files_that_cannot_serve_are_refused_at_once(write: Write, tmp_path: Path, path: str, message: str) -> None:
    write(name="empty.jsonl")
    (tmp_path / "cut.json").write_text('[{"messages": []},\n{"mess')
    with pytest.raises(DataError) as error:
        MessagesConfig(path=path).open(BuildContext(root=tmp_path))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": None}, "messages: expected a list of messages, found NoneType"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0]: content is NoneType"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "messages[0]: role 'bot'"),
        ({"messages": ["x"]}, "messages[0]: expected a mapping"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0]: a image part"),
        ({"images": ["a.png"]}, "media in a list 'images' beside the messages; use the sharegpt reader"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(write: Write, change: dict[str, Any], message: str) -> None:
    path = write(row("a"), {**row("b"), **change})
    table = MessagesConfig(path=str(path)).open(BuildContext())
    assert table[0].id == "a"
    with pytest.raises(DataError) as error:
        table[1]
    assert str(error.value).startswith(f"{path}:2: ")
    assert message in str(error.value)


def test_another_layout_is_recognised(write: Write) -> None:
    path = write({"id": "a", "conversations": []})
    with pytest.raises(DataError, match="are read by the llava or sharegpt reader"):
        MessagesConfig(path=str(path)).open(BuildContext())[0]


@pytest.mark.parametrize(
    "source",
    [
        "../secret.png",
        "/etc/passwd",
        "link.png",
        "a/../../secret.png",
        "file:///etc/passwd",
        "C:\\x.png",
        "%2e%2e/s",
        "x\0y",
    ],
)
def test_media_stay_in_the_folder_of_the_data(write: Write, tmp_path: Path, source: str) -> None:
    (tmp_path / "secret.png").write_bytes(b"x")
    content = [{"type": "image", "path": source}]
    path = write({"id": "a", "messages": [{"role": "user", "content": content}]}, name="inner/data.jsonl")
    (tmp_path / "inner" / "link.png").symlink_to(tmp_path / "secret.png")
    sample = MessagesConfig(path=str(path)).open(BuildContext())[0]
    with pytest.raises(MediaError):
        read_media(sample.messages[0].parts[0].value, root=sample.root, limits=Limits())


def test_root_moves_the_media_folder(write: Write, tmp_path: Path) -> None:
    path = write(row("a"), name="annotations/data.jsonl")
    context = BuildContext(root=tmp_path)
    assert MessagesConfig(path=str(path), root="media").open(context)[0].root == tmp_path / "media"


def test_ten_thousand_turns_take_bounded_time(write: Write) -> None:
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"turn {i}"} for i in range(10_000)]
    path = write({"id": "long", "messages": turns})
    begin = time.perf_counter()
    sample = MessagesConfig(path=str(path)).open(BuildContext())[0]
    assert time.perf_counter() - begin < 2
    assert [message.text for message in sample.messages[::5000]] == ["turn 0", "turn 5000"]


def test_a_table_goes_to_workers_small_and_whole(write: Write) -> None:
    path = write(*(row(f"r{i}") for i in range(1000)))
    table = MessagesConfig(path=str(path)).open(BuildContext())
    data = pickle.dumps(table)
    assert len(data) < path.stat().st_size / 3
    assert pickle.loads(data)[999] == table[999]


@pytest.mark.parametrize("wrong", [{"path": []}, {"path": "x", "limit": 0}, {"path": "x", "shuffle": True}, {}])
def test_wrong_options_are_config_errors(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        MessagesConfig.model_validate(wrong)


def test_reader_configs_import_no_torch() -> None:
    code = "import sys, mmllm.data.readers; print(json.dumps([m in sys.modules for m in ('torch', 'numpy')]))"
    done = subprocess.run([sys.executable, "-c", "import json; " + code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [False, False]
