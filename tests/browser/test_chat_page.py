"""The chat page as people see it, in headless Chromium."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser.chrome import attach, bot, box, marks, picture_file, say, type_and_send, until
from needs import needed
from playwright.sync_api import BrowserContext, Page, expect

needed("gradio")

from ui.server import Server, running

from mmllm.chat.session import ChatSession
from mmllm.chat.store import SessionStore

pytestmark = marks


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("browser"), delay=0.02) as server:
        yield server


def test_a_typed_question_gets_a_streamed_answer(visit: Callable[..., Page]) -> None:
    page = visit()
    words = " ".join(f"w{i}" for i in range(80))
    say(page, f"say {words}")
    expect(bot(page)).to_contain_text("w3")
    assert "w79" not in bot(page).inner_text()
    expect(bot(page)).to_contain_text("w79")
    expect(box(page)).to_have_value("")
    expect(page.get_by_role("button", name="Submit")).to_be_visible()


def test_stop_really_stops_the_model(visit: Callable[..., Page], server: Server) -> None:
    page = visit()
    say(page, "long")
    expect(bot(page)).to_contain_text("word5")
    box(page).press_sequentially("typing goes on")  # the focus stays in the box while the answer streams
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(page.get_by_role("button", name="Submit")).to_be_visible()
    produced = server.assistant.produced
    time.sleep(0.3)
    assert server.assistant.produced == produced < 9000
    expect(box(page)).to_have_value("typing goes on")
    say(page, "after")
    expect(bot(page)).to_contain_text("You said after with 0 files.")


def test_who_has_to_wait_sees_the_queue(visit: Callable[..., Page]) -> None:
    first, second = visit(), visit()
    say(first, "long")
    expect(bot(first)).to_contain_text("word5")
    say(second, "me too")
    expect(second.get_by_text("queue: 1/1")).to_be_visible()
    first.get_by_role("button", name="Stop", exact=True).click()
    expect(bot(second)).to_contain_text("You said me too with 0 files.")


def test_an_example_can_be_clicked_or_reached_by_keyboard(visit: Callable[..., Page]) -> None:
    page = visit()
    page.get_by_role("button", name="Select example 2").click()
    expect(bot(page)).to_contain_text("You said Is there a star in the picture and a bell in the sound? with 2 files.")
    page.get_by_role("button", name="New chat").click()
    page.get_by_role("button", name="Select example 4").focus()
    page.keyboard.press("Enter")
    expect(bot(page)).to_contain_text("You said What can you do? with 0 files.")


@pytest.mark.parametrize("late", ["request", "response"])
def test_a_question_asked_while_the_page_still_loads_is_answered(
    server: Server, context: BrowserContext, monkeypatch: pytest.MonkeyPatch, late: str
) -> None:
    restore = SessionStore.open

    def slow(store: SessionStore, *names: str) -> Any:
        time.sleep(1.5 if late == "request" else 0)
        found = restore(store, *names)
        time.sleep(1.5 if late == "response" else 0)
        return found

    monkeypatch.setattr(SessionStore, "open", slow)
    page = context.new_page()
    page.goto(server.url)
    say(page, "long")
    expect(bot(page)).to_contain_text("word5")
    page.wait_for_timeout(2000)
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(page.get_by_role("button", name="Submit")).to_be_visible()
    expect(bot(page)).to_contain_text("word5")
    say(page, "and now?")
    expect(bot(page)).to_contain_text("You said and now? with 0 files.")
    page.close()


def test_a_picture_shows_before_and_after_sending(visit: Callable[..., Page]) -> None:
    page = visit()
    attach(page, picture_file())
    thumbnail = page.locator("#box img")
    expect(thumbnail).to_be_visible()
    assert thumbnail.evaluate("image => image.naturalWidth") == 40
    say(page, "what is it?")
    expect(bot(page)).to_contain_text("You said what is it? with 1 files.")
    assert page.locator("#chat [data-testid=user] img").evaluate("image => image.naturalWidth") == 40
    expect(thumbnail).to_have_count(0)


def test_an_attached_file_can_be_removed_before_sending(visit: Callable[..., Page]) -> None:
    page = visit()
    attach(page, picture_file())
    page.locator("#box").get_by_role("button", name=re.compile("delete|remove", re.IGNORECASE)).first.click()
    expect(page.locator("#box img")).to_have_count(0)
    say(page, "nothing")
    expect(bot(page)).to_contain_text("with 0 files")


def test_a_sound_is_uploaded_and_played_in_the_conversation(visit: Callable[..., Page]) -> None:
    page = visit()
    page.get_by_role("button", name="Select example 3").click()
    expect(bot(page)).to_contain_text("with 1 files")
    expect(page.locator("#chat").get_by_role("button", name="Play")).to_be_visible()
    expect(page.get_by_role("button", name="Record audio")).to_be_visible()


def test_a_pasted_picture_is_attached(visit: Callable[..., Page]) -> None:
    page = visit()
    paste = """(element, bytes) => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], "pasted.png", {type: "image/png"}));
        element.dispatchEvent(new ClipboardEvent("paste", {clipboardData: data, bubbles: true, cancelable: true}));
    }"""
    with page.expect_response(re.compile("/upload")):
        box(page).evaluate(paste, list(picture_file()["buffer"]))
    expect(page.locator("#box img")).to_be_visible()


def test_a_file_dropped_on_the_conversation_is_attached(visit: Callable[..., Page]) -> None:
    page = visit()
    drop = """(element, bytes) => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], "dropped.png", {type: "image/png"}));
        element.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
    }"""
    with page.expect_response(re.compile("/upload")):
        page.locator("#chat").evaluate(drop, list(picture_file()["buffer"]))
    expect(page.locator("#box img")).to_be_visible()


def test_nothing_is_sent_while_the_microphone_records(visit: Callable[..., Page], server: Server) -> None:
    page = visit()
    box(page).fill("what is this sound?")
    page.get_by_role("button", name="Record audio").click()
    page.get_by_role("button", name="Start recording").click()
    stop = page.get_by_role("button", name="Stop recording")
    expect(stop).to_be_visible()
    asked = len(server.assistant.requests)
    box(page).press("Enter")
    expect(page.get_by_text("Stop and attach the recording first")).to_be_visible()
    page.wait_for_timeout(500)
    stop.click()
    attach = page.get_by_role("button", name="Attach audio")
    expect(attach).to_be_visible()
    box(page).press("Enter")
    page.wait_for_timeout(500)
    assert len(server.assistant.requests) == asked
    attach.click()
    expect(page.locator("#box .thumbnail-item")).to_be_visible()
    box(page).press("Enter")
    expect(bot(page)).to_contain_text("You said what is this sound? with 1 files.")
    expect(page.get_by_text("Stop and attach the recording first")).to_have_count(0)


def test_a_broken_file_is_told_in_plain_words_and_the_message_is_kept(visit: Callable[..., Page]) -> None:
    page = visit()
    attach(page, {"name": "broken.png", "mimeType": "image/png", "buffer": b"\x89PNG\r\n\x1a\n nothing"})
    say(page, "what is it?")
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("broken.png: ")
    assert not re.search(r"Traceback|Error|/tmp|0x", alert.inner_text())
    expect(box(page)).to_have_value("what is it?")
    page.get_by_role("button", name="New chat").click()
    expect(alert).to_have_count(0)


def test_a_bug_shows_no_inside(visit: Callable[..., Page]) -> None:
    page = visit()
    say(page, "crash")
    expect(page.get_by_role("alert")).to_contain_text("Something went wrong inside the assistant")
    assert "secret detail" not in page.content()


def test_an_empty_message_is_told(visit: Callable[..., Page]) -> None:
    page = visit()
    page.get_by_role("button", name="Submit").click()
    expect(page.get_by_role("alert")).to_contain_text("The message is empty")


def test_a_model_that_cannot_be_loaded_is_told_once(context: BrowserContext, tmp_path: Path) -> None:
    with running(tmp_path, broken="weights.bin is no safetensors file") as server:
        page = context.new_page()
        failures: list[int] = []
        page.on("response", lambda response: failures.append(response.status) if response.status >= 400 else None)
        page.goto(server.url)
        expect(page.get_by_role("alert")).to_contain_text("weights.bin is no safetensors file")
        expect(page.get_by_text("embedded could not be loaded")).to_be_visible()
        page.wait_for_timeout(1500)
        assert failures == []
        page.close()


@pytest.mark.parametrize("seed", ["-7", "", "1e30", "5"])
def test_every_seed_is_answered(visit: Callable[..., Page], server: Server, seed: str) -> None:
    page = visit()
    page.get_by_role("button", name="Parameters").click()
    page.get_by_role("spinbutton", name="Seed", exact=True).fill(seed)
    page.get_by_role("spinbutton", name="Seed", exact=True).press("Tab")
    say(page, "seed")
    expect(bot(page)).to_contain_text("You said seed with 0 files.")
    used = server.assistant.options[-1]["seed"]
    assert used == {"-7": None, "": None, "5": 5}.get(seed, used)
    assert used is None or 0 <= used < 2**63


# Opens a panel with the browser too busy to draw, types as soon as the fields are there, and lets it draw again.
TYPE_WHILE_OPENING = """([panel, values]) => new Promise((done) => {
    const held = [];
    const draw = window.requestAnimationFrame.bind(window);
    window.requestAnimationFrame = (callback) => held.push(callback);
    const name = (field) => field.getAttribute("aria-label") ?? field.labels?.[0]?.textContent.trim();
    const type = () => {
        const all = [...document.querySelectorAll("#settings :is(input, textarea)")];
        const fields = Object.keys(values).map((label) => all.find((field) => name(field) === label));
        if (!fields.every(Boolean)) return setTimeout(type);
        fields.forEach((field) => {
            field.value = values[name(field)];
            field.dispatchEvent(new Event("input", {bubbles: true}));
        });
        window.requestAnimationFrame = draw;
        held.forEach((callback) => draw(callback));
        setTimeout(() => done(fields.map((field) => field.value)), 500);
    };
    [...document.querySelectorAll("#settings button")].find((button) => button.innerText.includes(panel)).click();
    type();
})"""


@pytest.mark.parametrize(
    ("panel", "values"),
    [
        ("Parameters", {"Seed": "5", "System prompt": "Be kind.", "number input for Temperature": "0.7"}),
        ("Model", {"Open a model folder": "runs/mine"}),
    ],
)
def test_what_is_typed_while_a_panel_opens_stays(
    visit: Callable[..., Page], panel: str, values: dict[str, str]
) -> None:
    assert visit().evaluate(TYPE_WHILE_OPENING, [panel, values]) == list(values.values())


def test_the_answer_is_made_with_the_settings_that_were_there_when_it_was_asked_for(
    visit: Callable[..., Page], server: Server
) -> None:
    page = visit()
    page.get_by_role("button", name="Parameters").click()
    words = {"System prompt": ("Be kind.", "Be rude."), "Seed": ("5", "6")}
    numbers = {"Temperature": ("0.7", "0.8"), "Top-p": ("0.9", "0.5"), "Most tokens in an answer": ("33", "44")}
    type_and_send(page, "hello", {**words, **{f"number input for {key}": value for key, value in numbers.items()}})
    expect(bot(page)).to_contain_text("You said hello with 0 files.")
    assert server.assistant.options[-1] == {"max_new_tokens": 33, "temperature": 0.7, "top_p": 0.9, "seed": 5}
    assert server.assistant.requests[-1][0] == {"role": "system", "content": "Be kind."}
    asked = len(server.assistant.requests)
    page.get_by_role("button", name="Retry").click()
    until(lambda: len(server.assistant.requests) > asked)
    assert server.assistant.options[-1] == {"max_new_tokens": 44, "temperature": 0.8, "top_p": 0.5, "seed": 6}
    assert server.assistant.requests[-1][0] == {"role": "system", "content": "Be rude."}


def test_a_question_that_waits_keeps_its_settings(
    visit: Callable[..., Page], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()

    def hold(*_: Any) -> Iterator[str]:
        go.wait()
        yield "at last"

    monkeypatch.setattr(server.assistant, "_words", hold)
    asked = len(server.assistant.requests)
    first, second = visit(), visit()
    try:
        say(first, "one")
        until(lambda: len(server.assistant.requests) > asked)
        second.get_by_role("button", name="Parameters").click()
        second.get_by_role("spinbutton", name="Seed", exact=True).fill("5")
        say(second, "me too")
        expect(second.get_by_text("queue: 1/1")).to_be_visible()
        second.get_by_role("spinbutton", name="Seed", exact=True).fill("6")
        say(second, "and this?")
        expect(second.get_by_role("alert")).to_contain_text("still being answered")
    finally:
        go.set()
    expect(bot(second)).to_contain_text("at last")
    assert server.assistant.options[-1]["seed"] == 5


def test_a_value_that_gradio_refuses_is_told_and_the_question_comes_back(
    visit: Callable[..., Page], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise ValueError("out of range")

    page = visit()
    with monkeypatch.context() as patch:
        patch.setattr("gradio.Number.preprocess", refuse)
        say(page, "hello?")
        expect(page.get_by_role("alert")).to_contain_text("a value on the page is out of range")
    expect(box(page)).to_have_value("hello?")
    box(page).press("Enter")
    expect(bot(page)).to_contain_text("You said hello? with 0 files.")
    expect(page.get_by_role("alert")).to_have_count(0)


def test_a_very_long_pasted_text_stays_text(visit: Callable[..., Page], server: Server) -> None:
    page = visit()
    paste = """element => {
        const data = new DataTransfer();
        data.setData("text/plain", "word ".repeat(21000));
        element.dispatchEvent(new ClipboardEvent("paste", {clipboardData: data, bubbles: true, cancelable: true}));
    }"""
    box(page).evaluate(paste)
    page.wait_for_timeout(500)
    expect(page.locator("#box .thumbnail-item")).to_have_count(0)
    say(page, "x" * 105_000)
    until(lambda: bool(server.assistant.requests) and len(str(server.assistant.requests[-1])) > 105_000)


def test_enter_while_an_answer_runs_is_told_and_loses_nothing(visit: Callable[..., Page]) -> None:
    page = visit()
    say(page, "long")
    expect(bot(page)).to_contain_text("word5")
    say(page, "too early")
    expect(page.get_by_role("alert")).to_contain_text("still being answered")
    expect(box(page)).to_have_value("too early")
    page.wait_for_timeout(500)  # some redraws later
    expect(page.get_by_role("alert")).to_be_visible()
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(page.get_by_role("button", name="Submit")).to_be_visible()
    box(page).press("Enter")
    expect(bot(page)).to_contain_text("You said too early")
    expect(page.get_by_role("alert")).to_have_count(0)


def test_words_typed_while_a_question_travels_stay(visit: Callable[..., Page], monkeypatch: pytest.MonkeyPatch) -> None:
    page = visit()
    ask = ChatSession.add_user

    def slow(*arguments: Any, **named: Any) -> None:
        time.sleep(1)
        ask(*arguments, **named)

    monkeypatch.setattr(ChatSession, "add_user", slow)
    say(page, "first")
    expect(box(page)).to_have_value("")
    box(page).press_sequentially("next")
    expect(bot(page)).to_contain_text("You said first")
    expect(box(page)).to_have_value("next")


def test_stop_takes_a_question_out_of_the_queue(visit: Callable[..., Page], server: Server) -> None:
    first, second = visit(), visit()
    say(first, "long")
    expect(bot(first)).to_contain_text("word5")
    attach(second, picture_file())
    say(second, "me too")
    expect(second.get_by_text("queue: 1/1")).to_be_visible()
    second.get_by_role("button", name="Stop", exact=True).click()
    expect(second.get_by_role("button", name="Submit")).to_be_visible()
    expect(box(second)).to_have_value("me too")
    expect(second.locator("#box img")).to_be_visible()
    asked = len(server.assistant.requests)
    first.get_by_role("button", name="Stop", exact=True).click()
    expect(first.get_by_role("button", name="Submit")).to_be_visible()
    second.wait_for_timeout(500)
    assert len(server.assistant.requests) == asked
    box(second).press("Enter")
    expect(bot(second)).to_contain_text("You said me too with 1 files.")


PAYLOADS = (
    "<img src=x onerror=alert(1)>",
    "<script>alert(2)</script>",
    "<svg/onload=alert(3)>",
    "<iframe src='http://example.org'></iframe>",
    "![a](http://example.org/a.png)",
    "[click](javascript:alert(4))",
    "<a href='javascript:alert(5)'>x</a>",
    '<b style="position:fixed">bold</b>',
    "<style>*{display:none}</style>",
)


def test_html_of_users_and_models_is_inert(visit: Callable[..., Page]) -> None:
    page = visit()
    for number, payload in enumerate(PAYLOADS):
        say(page, f"say {payload} end {number}")
        expect(bot(page)).to_contain_text(f"end {number}")
        expect(page.get_by_role("button", name="Submit")).to_be_visible()
    page.wait_for_timeout(500)
    for side in ("user", "bot"):
        messages = page.locator(f"#chat [data-testid={side}]")
        assert messages.count() == len(PAYLOADS)
        assert messages.locator("img, script, svg, iframe, style, b, [style*=fixed], [onerror]").count() == 0
        assert messages.locator("a[href^=javascript]").count() == 0


def test_markdown_and_code_are_rendered(visit: Callable[..., Page]) -> None:
    page = visit()
    say(page, "say **bold** and `<i>` end")
    expect(bot(page).locator("strong")).to_have_text("bold")
    expect(bot(page).locator("code")).to_have_text("<i>")


@pytest.mark.parametrize(("text", "rightwards"), [("hello world!", True), ("שלום עולם!", False)])
def test_words_run_as_their_script_does(visit: Callable[..., Page], text: str, rightwards: bool) -> None:
    page = visit()
    say(page, f"say {text}")
    expect(bot(page)).to_contain_text(text)
    first, last = (
        bot(page)
        .locator("p")
        .evaluate("""paragraph => {
        const place = (index) => {
            const range = document.createRange();
            range.setStart(paragraph.firstChild, index);
            range.setEnd(paragraph.firstChild, index + 1);
            return range.getBoundingClientRect().left;
        };
        return [place(0), place(paragraph.firstChild.length - 1)];
    }""")
    )
    assert (first < last) is rightwards


def test_undo_keeps_the_draft(visit: Callable[..., Page]) -> None:
    page = visit()
    attach(page, picture_file())
    say(page, "first")
    expect(bot(page)).to_contain_text("You said first with 1 files.")
    expect(page.get_by_role("button", name="Submit")).to_be_visible()
    box(page).fill("a draft")
    attach(page, picture_file((30, 30)))
    page.get_by_role("button", name="Undo").last.click()
    expect(box(page)).to_have_value("first\na draft")
    expect(page.locator("#box img")).to_have_count(2)
    box(page).press("Enter")
    expect(bot(page)).to_contain_text("a draft with 2 files.")
    expect(box(page)).to_have_value("")


def test_stop_in_the_queue_keeps_the_draft(visit: Callable[..., Page]) -> None:
    first, second = visit(), visit()
    say(first, "long")
    expect(bot(first)).to_contain_text("word5")
    say(second, "me too")
    expect(second.get_by_text("queue: 1/1")).to_be_visible()
    box(second).press_sequentially("a draft")
    second.get_by_role("button", name="Stop", exact=True).click()
    expect(box(second)).to_have_value("me too\na draft")
    first.get_by_role("button", name="Stop", exact=True).click()
    expect(first.get_by_role("button", name="Submit")).to_be_visible()
    second.wait_for_timeout(500)
    expect(box(second)).to_have_value("me too\na draft")


def test_the_copied_conversation_names_files_and_spells_what_was_typed(visit: Callable[..., Page]) -> None:
    page = visit()
    attach(page, picture_file())
    say(page, "say <b> and `\\<`")
    expect(page.get_by_role("button", name="Retry")).to_be_visible()
    page.get_by_role("button", name="Copy conversation").click()
    said = "say <b> and `\\<`"
    wanted = f"user: [red.png]\n{said}\n\nassistant: {said.removeprefix('say ')}"
    until(lambda: page.evaluate("navigator.clipboard.readText()") == wanted)


@pytest.mark.parametrize("files", [0, 1])
def test_retry_undo_and_edit(visit: Callable[..., Page], server: Server, files: int) -> None:
    page = visit()
    say(page, "before")
    expect(bot(page)).to_contain_text("You said before")
    for _ in range(files):
        attach(page, picture_file())
    say(page, "first <b>")
    expect(bot(page)).to_contain_text(f"You said first <b> with {files} files.")
    before = len(server.assistant.requests)
    page.get_by_role("button", name="Retry").last.click()
    until(lambda: len(server.assistant.requests) == before + 1)
    expect(bot(page)).to_contain_text(f"with {files} files.")
    expect(box(page)).to_be_focused()

    page.locator("#chat").get_by_role("button", name="Edit").last.click()
    editor = page.locator("#chat textarea")
    expect(editor).to_have_value("first \\<b>")
    editor.fill("changed <i>")
    page.locator("#chat").get_by_role("button", name="Submit").click()
    expect(bot(page)).to_contain_text(f"You said changed <i> with {files} files.")
    assert [len(messages) for messages in server.assistant.requests[before:]] == [3, 3]

    page.get_by_role("button", name="Undo").last.click()
    expect(box(page)).to_have_value("changed <i>")
    expect(box(page)).to_be_focused()
    expect(page.locator("#box img")).to_have_count(files)
    expect(page.locator("#chat [data-testid=user]")).to_have_count(1)


def test_a_thumb_and_a_comment_are_saved_with_consent_stated(visit: Callable[..., Page], server: Server) -> None:
    page = visit()
    expect(page.get_by_text("A thumb up or down saves the words of that exchange")).to_be_visible()
    expect(page.get_by_text(str(server.feedback))).to_be_visible()
    say(page, "rate me")
    expect(bot(page)).to_contain_text("with 0 files.")
    page.get_by_role("button", name="Dislike").click()
    page.get_by_label("What was good or bad about it?").fill("=too short")
    page.get_by_role("button", name="Add comment").click()
    expect(page.get_by_role("button", name="Add comment")).to_have_count(0)
    records = [json.loads(line) for line in server.feedback.read_text().splitlines()][-2:]
    assert [(record["rating"], record["comment"]) for record in records] == [("down", ""), ("down", "'=too short")]
    assert records[0]["question"] == "rate me"
    assert records[0]["conversation"] == records[1]["conversation"]


def test_a_thumb_that_is_taken_back_is_not_a_thumb_down(visit: Callable[..., Page], server: Server) -> None:
    page = visit()
    say(page, "rate me again")
    expect(bot(page)).to_contain_text("with 0 files.")
    thumb = page.get_by_role("button", name=re.compile("^Liked?$"))
    thumb.click()
    expect(page.get_by_role("button", name="Add comment")).to_be_visible()
    thumb.click()
    expect(page.get_by_role("button", name="Add comment")).to_have_count(0)
    records = [json.loads(line) for line in server.feedback.read_text().splitlines()][-2:]
    assert [record["rating"] for record in records] == ["up", "withdrawn"]
    assert {record["question"] for record in records} == {"rate me again"}


def test_feedback_that_cannot_be_saved_is_told(visit: Callable[..., Page], server: Server) -> None:
    page = visit()
    say(page, "rate me")
    expect(bot(page)).to_contain_text("with 0 files.")
    kept = server.feedback.rename(server.feedback.with_suffix(".kept")) if server.feedback.exists() else None
    server.feedback.mkdir()
    page.get_by_role("button", name="Dislike").click()
    expect(page.get_by_role("alert")).to_contain_text("This was not saved")
    expect(page.get_by_role("button", name="Add comment")).to_have_count(0)
    server.feedback.rmdir()
    if kept:
        kept.rename(server.feedback)


@pytest.mark.parametrize("turn", ["New chat", "Undo"])
def test_no_comment_is_asked_about_an_answer_that_is_gone(visit: Callable[..., Page], turn: str) -> None:
    page = visit()
    say(page, "rate me")
    expect(bot(page)).to_contain_text("with 0 files.")
    page.get_by_role("button", name="Dislike").click()
    expect(page.get_by_role("button", name="Add comment")).to_be_visible()
    page.get_by_role("button", name=turn).click()
    expect(page.get_by_role("button", name="Add comment")).to_have_count(0)


def test_a_reload_keeps_the_conversation_and_other_tabs_do_not_see_it(visit: Callable[..., Page]) -> None:
    page = visit()
    say(page, "remember me")
    expect(bot(page)).to_contain_text("remember me with 0 files.")
    page.reload()
    expect(page.locator("#chat [data-testid=user]")).to_contain_text("remember me")
    with page.context.browser.new_context() as other_browser:
        for other in (visit(), other_browser.new_page()):
            other.goto(page.url)
            expect(other.get_by_role("button", name="Select example 1")).to_be_visible()
            assert "remember me" not in other.content()


def test_a_copy_of_a_tab_begins_a_conversation_of_its_own(visit: Callable[..., Page]) -> None:
    page = visit()
    say(page, "mine")
    expect(bot(page)).to_contain_text("You said mine")
    with page.expect_popup() as popup:  # a popup gets a copy of the tab's storage, as a duplicated tab does
        page.evaluate("window.open(location.href)")
    copy = popup.value
    expect(copy.get_by_text("It takes text, pictures, sounds")).to_be_visible()
    copy.wait_for_timeout(1500)
    expect(copy.get_by_role("button", name="Select example 1")).to_be_visible()
    say(copy, "copied")
    expect(bot(copy)).to_contain_text("You said copied")
    page.reload()
    expect(page.locator("#chat [data-testid=user]")).to_have_text(["mine"])
    copy.reload()
    expect(copy.locator("#chat [data-testid=user]")).to_have_text(["copied"])
    copy.close()


def test_the_conversation_is_saved_as_a_file(visit: Callable[..., Page]) -> None:
    page = visit()
    page.get_by_role("button", name="Select example 1").click()
    expect(bot(page)).to_contain_text("with 1 files.")
    with page.expect_download() as download:
        page.get_by_role("button", name="Save").click()
    saved = json.loads(Path(download.value.path()).read_text())
    assert [message["role"] for message in saved["messages"]] == ["user", "assistant"]
    assert saved["messages"][0]["content"][0]["data"].startswith("data:image/png;base64,")


def test_a_folder_without_a_model_is_told(visit: Callable[..., Page], tmp_path: Path) -> None:
    page = visit()
    page.get_by_role("button", name="Model").click()
    page.get_by_label("Open a model folder").fill(str(tmp_path))
    page.get_by_role("button", name="Open", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("no trained model here")


def test_a_model_folder_is_opened_and_answers(visit: Callable[..., Page], tmp_path: Path) -> None:
    for name in ("config.yaml", "manifest.json"):
        (tmp_path / name).write_text("{}")
    page = visit()
    page.get_by_role("button", name="Model").click()
    page.get_by_label("Open a model folder").fill(str(tmp_path))
    page.get_by_role("button", name="Open", exact=True).click()
    expect(page.get_by_text(f"Model: {'/'.join(tmp_path.parts[-2:])}.")).to_be_visible()
    say(page, "hi")
    expect(bot(page)).to_contain_text("You said hi with 0 files.")


@pytest.mark.parametrize("dialogue", [False, True])
def test_a_phone_needs_no_sideways_scrolling(visit: Callable[..., Page], dialogue: bool) -> None:
    page = visit(360, 740)
    if dialogue:
        say(page, "say " + "unbreakable" * 30 + " end")
        expect(bot(page)).to_contain_text("end")
        for name in ("Model", "Parameters"):
            page.get_by_role("button", name=name, exact=False).first.click()
        expect(page.get_by_role("spinbutton", name="Seed", exact=True)).to_be_visible()
    else:  # the greeting and all examples are seen at once
        assert page.locator("#chat .bubble-wrap").evaluate("wrap => wrap.scrollHeight <= wrap.clientHeight")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.get_by_role("button", name="Submit").bounding_box()["x"] < 340


def test_every_control_has_a_name(visit: Callable[..., Page]) -> None:
    page = visit()
    for name in ("Model", "Parameters"):
        page.get_by_role("button", name=name).first.click()
    expect(page.get_by_role("spinbutton", name="Seed", exact=True)).to_be_visible()
    nameless = page.evaluate("""() => [...document.querySelectorAll("button, input, textarea, select")]
        .filter(e => e.offsetParent && !e.disabled)
        .filter(e => !(e.getAttribute("aria-label") || e.innerText || e.title || e.labels?.length
                       || e.getAttribute("aria-labelledby")))
        .map(e => e.outerHTML.slice(0, 200))""")
    assert nameless == []
    assert page.locator("#chat [role=log][aria-live=polite]").count() == 1
