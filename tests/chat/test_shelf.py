from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from chat.fake import FakeAssistant

from mmllm.chat.session import ChatSession, Sampling
from mmllm.chat.shelf import ModelShelf, find_models
from mmllm.chat.store import SessionStore
from mmllm.errors import CheckpointError


def make_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("config.yaml", "manifest.json"):
        (folder / name).write_text("{}")
    return folder


def test_model_folders_are_found_a_few_levels_down(tmp_path: Path) -> None:
    wanted = [make_model(tmp_path / "a"), make_model(tmp_path / "b" / "final"), make_model(tmp_path / "c" / "d" / "e")]
    make_model(tmp_path / ".hidden")
    make_model(tmp_path / "1" / "2" / "3" / "4")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.yaml").write_text("{}")
    assert find_models(tmp_path) == wanted
    assert find_models(wanted[0]) == [wanted[0]]


def test_folders_without_models_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no trained model here"):
        find_models(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        find_models(tmp_path / "missing")


def test_a_folder_that_may_not_be_read_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = make_model(tmp_path / "mine")
    (tmp_path / "theirs").mkdir()
    listed = Path.iterdir

    def iterdir(folder: Path) -> Iterator[Path]:  # as for a user; tests may run as root, who may read everything
        if folder.name == "theirs":
            raise PermissionError(13, "Permission denied", str(folder))
        return listed(folder)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert find_models(tmp_path) == [wanted]


def test_a_model_is_loaded_once_however_many_ask() -> None:
    loads = []

    def load(name: str) -> FakeAssistant:
        loads.append(name)
        time.sleep(0.05)
        return FakeAssistant()

    shelf = ModelShelf(load)
    assert not shelf.ready("one")
    threads = [threading.Thread(target=shelf.get, args=("one",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shelf.ready("one")
    assert shelf.get("one") is shelf.get("one")
    assert loads == ["one"]
    shelf.get("two")
    assert (shelf.ready("one"), shelf.ready("two"), loads) == (False, True, ["one", "two"])


def test_a_failed_background_load_is_kept_and_told_again() -> None:
    broken = True

    def load(name: str) -> FakeAssistant:
        if broken:
            raise CheckpointError("runs/x: weights.safetensors is missing")
        return FakeAssistant()

    shelf = ModelShelf(load)
    shelf.warm("runs/x").join()
    assert not shelf.ready("runs/x")
    assert "is missing" in str(shelf.problem("runs/x"))
    with pytest.raises(CheckpointError, match="is missing"):
        shelf.get("runs/x")
    broken = False
    shelf.get("runs/x")
    assert shelf.problem("runs/x") is None


def opened(store: SessionStore, key: str) -> ChatSession:
    """The conversation of the tab with ``key``, loaded anew."""
    return store.open(key, page=uuid.uuid4().hex)


def test_a_tab_finds_its_conversation_again_and_no_other() -> None:
    store = SessionStore(capacity=2)
    mine = opened(store, "a" * 32)
    assert opened(store, "a" * 32) is mine
    assert opened(store, "b" * 32) is not mine


def test_a_short_key_opens_nothing_twice() -> None:
    store = SessionStore()
    assert opened(store, "") is not opened(store, "")
    assert opened(store, "guess") is not opened(store, "guess")


def test_a_question_that_comes_before_the_key_of_its_tab_stays() -> None:
    store = SessionStore()
    opened(store, "a" * 32)
    asked = store.of_page("page")
    assert store.of_page("page") is asked
    assert store.open("a" * 32, "page") is asked
    assert store.asked("page")
    assert opened(store, "a" * 32) is asked


def test_a_question_that_comes_after_the_key_joins_the_conversation_of_its_tab() -> None:
    store = SessionStore()
    mine = store.open("a" * 32, "page")
    assert not store.asked("page")
    assert store.of_page("page") is mine


def test_the_oldest_conversation_goes_first_and_its_answer_is_stopped() -> None:
    store = SessionStore(capacity=2)
    oldest, newer = opened(store, "a" * 32), opened(store, "b" * 32)
    oldest.add_user("long")
    assistant = FakeAssistant()
    reply = oldest.reply(assistant, Sampling())
    next(reply)
    opened(store, "b" * 32)
    opened(store, "c" * 32)
    assert list(reply) == []
    assert opened(store, "b" * 32) is newer
    assert opened(store, "a" * 32) is not oldest
