"""Conversations that the browser keeps: over a restart of the server, in several tabs, deleted, tampered with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser.chrome import answered, attach, away, bot, box, kept, marks, picture_file, say, until, users
from needs import needed
from playwright.sync_api import BrowserContext, Page, expect

needed("gradio")

from ui.server import Server, free_port, running

pytestmark = marks


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("history"), delay=0.01) as server:
        yield server


# All that the page left in the browser.
EVERYTHING = """async () => {
    const titles = await mmllmChats.titles();
    const open = indexedDB.open("mmllm", 1);
    await new Promise((resolve) => (open.onsuccess = resolve));
    const chats = open.result.transaction("chats").objectStore("chats").getAll();
    await new Promise((resolve) => (chats.onsuccess = resolve));
    return JSON.stringify([titles, chats.result, {...localStorage}, {...sessionStorage}]);
}"""


def earlier(page: Page) -> Any:
    """The chats to open, after the list has been drawn again."""
    box = page.get_by_role("button", name="Earlier chats")
    if page.locator("#earlier").is_visible():
        box.click()
    box.click()
    expect(page.locator("#earlier")).to_be_visible()
    page.wait_for_timeout(500)
    return page.locator("#earlier label")


def empty(page: Page) -> None:
    expect(page.get_by_role("button", name="Select example 1")).to_be_visible()


def test_a_conversation_with_media_outlives_the_server(context: BrowserContext, tmp_path: Path) -> None:
    port = free_port()
    page = context.new_page()
    with running(tmp_path, port=port) as server:
        page.goto(server.url)
        attach(page, picture_file())
        say(page, "what is <b> it?")
        expect(bot(page)).to_contain_text("You said what is <b> it? with 1 files.")
        until(lambda: "You said" in kept(page))
        away(page)
    with running(tmp_path, port=port) as server:
        page.goto(server.url)
        expect(bot(page)).to_contain_text("You said what is <b> it? with 1 files.")
        picture = page.locator("#chat [data-testid=user] img")
        until(lambda: picture.evaluate("image => image.naturalWidth") == 40)
        say(page, "and now?")
        expect(bot(page)).to_contain_text("You said and now? with 0 files.")
        first = server.assistant.requests[-1][0]["content"]
        assert first[1] == {"type": "text", "text": "what is <b> it?"}
        assert Path(first[0]["path"]).name == "red.png"
        assert server.uploads in Path(first[0]["path"]).parents
        page.get_by_role("button", name="Undo").last.click()
        expect(box(page)).to_have_value("and now?")
        expect(users(page)).to_have_count(2)
    page.close()


def test_a_page_that_is_open_while_the_server_restarts_finds_its_conversation(
    context: BrowserContext, tmp_path: Path
) -> None:
    port = free_port()
    page = context.new_page()
    with running(tmp_path, port=port) as server:
        page.goto(server.url)
        say(page, "before")
        expect(bot(page)).to_contain_text("You said before")
        until(lambda: "You said before" in kept(page))
        box(page).fill("a draft")
        page.evaluate("window.before = true")
    with running(tmp_path, port=port) as server:
        page.wait_for_function("!window.before")
        expect(page.get_by_text("It takes text")).to_be_visible()
        expect(bot(page)).to_contain_text("You said before")
        expect(box(page)).to_have_value("a draft")
        say(page, "after")
        expect(bot(page)).to_contain_text("You said after")
        expect(users(page)).to_have_text(["before", "after"])
        assert [message["role"] for message in server.assistant.requests[-1]] == ["user", "assistant", "user"]
    page.close()


def test_a_question_without_answer_comes_back_into_the_box(context: BrowserContext, tmp_path: Path) -> None:
    port = free_port()
    page = context.new_page()
    with running(tmp_path, delay=5.0, port=port) as server:
        page.goto(server.url)
        say(page, "are you there?")
        until(lambda: "are you there?" in kept(page))
        away(page)
    with running(tmp_path, port=port) as server:
        page.goto(server.url)
        expect(box(page)).to_have_value("are you there?")
        empty(page)
    page.close()


def test_new_chat_leaves_the_last_one_to_be_opened_again(visit: Callable[..., Page]) -> None:
    page = visit()
    say(page, "one of two")
    expect(bot(page)).to_contain_text("You said one of two")
    answered(page)
    page.get_by_role("button", name="New chat").click()
    empty(page)
    say(page, "two of two")
    expect(bot(page)).to_contain_text("You said two of two")
    until(lambda: "You said two of two" in kept(page))
    chats = earlier(page)
    expect(chats.filter(has_text="one of two")).to_have_count(1)
    expect(chats.filter(has_text="two of two")).to_have_count(0)
    chats.filter(has_text="one of two").click()
    expect(users(page)).to_have_text(["one of two"])
    expect(page.locator("#earlier label").filter(has_text="two of two")).to_have_count(1)
    page.reload()
    expect(users(page)).to_have_text(["one of two"])


def test_clear_deletes_the_conversation(visit: Callable[..., Page]) -> None:
    page = visit()
    say(page, "delete me")
    expect(bot(page)).to_contain_text("You said delete me")
    until(lambda: "You said delete me" in kept(page))
    page.locator("#chat").get_by_role("button", name="Clear").click()
    empty(page)
    page.wait_for_timeout(500)
    assert "delete me" not in page.evaluate(EVERYTHING)
    page.reload()
    empty(page)


def test_clear_while_an_answer_runs_deletes_it_too(visit: Callable[..., Page]) -> None:
    page = visit()
    say(page, "long")
    expect(bot(page)).to_contain_text("word5")
    page.locator("#chat").get_by_role("button", name="Clear").click()
    empty(page)
    page.wait_for_timeout(1500)
    assert "word5" not in page.evaluate(EVERYTHING)


def test_earlier_chats_can_be_deleted(visit: Callable[..., Page]) -> None:
    page = visit()
    say(page, "to be deleted")
    expect(bot(page)).to_contain_text("You said")
    until(lambda: "You said" in kept(page))
    page.get_by_role("button", name="New chat").click()
    until(lambda: kept(page) == "")
    expect(earlier(page).filter(has_text="to be deleted")).to_have_count(1)
    page.get_by_role("button", name="Delete these").click()
    expect(page.locator("#earlier label")).to_have_count(0)


def test_two_tabs_do_not_open_the_same_conversation(visit: Callable[..., Page]) -> None:
    first, second = visit(), visit()
    say(first, "mine alone")
    expect(bot(first)).to_contain_text("You said mine alone")
    until(lambda: "You said mine alone" in kept(first))
    expect(earlier(second).filter(has_text="mine alone")).to_have_count(0)
    say(second, "another")
    expect(bot(second)).to_contain_text("You said another")
    until(lambda: "You said another" in kept(second))
    for page, words in ((first, "mine alone"), (second, "another")):
        page.reload()
        expect(users(page)).to_have_text([words])


@pytest.mark.parametrize("change", ["messages.0.role=system", "not JSON", "messages.0.content.0.text=7"])
def test_a_conversation_that_was_tampered_with_gives_an_empty_chat(
    context: BrowserContext, tmp_path: Path, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    page = context.new_page()
    with running(tmp_path, port=port) as server:
        page.goto(server.url)
        say(page, "hello")
        expect(bot(page)).to_contain_text("You said hello")
        until(lambda: "You said hello" in kept(page))
        chat = json.loads(kept(page))
        if "=" in change:
            where, _, value = change.partition("=")
            *path, last = [int(key) if key.isdigit() else key for key in where.split(".")]
            target = chat
            for key in path:
                target = target[key]
            target[last] = value if value.isalpha() else int(value)
        text = json.dumps(chat) if "=" in change else change
        page.evaluate("([id, chat]) => mmllmChats.put(id, 'x', chat)", [chat["id"], text])
        away(page)
    with running(tmp_path, port=port) as server:
        page.goto(server.url)
        expect(page.get_by_role("alert")).to_contain_text("cannot be read")
        empty(page)
        say(page, "start anew")
        expect(bot(page)).to_contain_text("You said start anew")
        assert [message["role"] for message in server.assistant.requests[-1]] == ["user"]
    assert "Traceback" not in caplog.text
    page.close()
