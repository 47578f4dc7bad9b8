"""Media that the assistant makes, on the page: a real model of random weights, its logits alone told what to say."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser.chrome import answered, away, bot, box, kept, marks, say, type_and_send, until, users
from needs import needed
from PIL import Image
from playwright.sync_api import BrowserContext, Page, expect

needed("gradio")
needed("diffusers")

from ui.making import Obedient
from ui.server import Server, free_port, running

pytestmark = marks


@pytest.fixture(scope="module")
def assistant() -> Obedient:
    return Obedient(delay=0.1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, assistant: Obedient) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("making"), assistant=assistant) as server:
        yield server


def bots(page: Page) -> Any:
    return page.locator("#chat [data-testid=bot]")


def pictures(page: Page) -> Any:
    return page.locator("#chat [data-testid=bot] img")


def number(page: Page, label: str) -> Any:
    return page.get_by_label(f"number input for {label}")


def test_pictures_sounds_and_clips_come_inline_with_download(visit: Callable[..., Page]) -> None:
    page = visit()
    expect(page.get_by_text("answers in text, pictures, sounds, clips")).to_be_visible()
    say(page, "Look: [image] listen: [audio] and a clip: [video] done")
    answered(page)
    expect(pictures(page)).to_have_count(2)  # a clip is an animated picture
    for index in range(2):
        until(lambda index=index: pictures(page).nth(index).evaluate("image => image.naturalWidth") > 0)
    expect(page.locator("#chat").get_by_role("button", name="Play")).to_be_visible()
    names = [link.get_attribute("download") for link in page.locator("#chat a[download]").all()]
    assert names == ["image-1.png", "audio-1.wav", "video-1.gif"]
    with page.expect_download() as download:
        page.locator("#chat").get_by_role("link", name="Download").or_(page.locator("#chat a[download]")).first.click()
    with Image.open(download.value.path()) as picture:
        assert picture.format == "PNG"
    expect(page.get_by_role("button", name="Retry")).to_have_count(1)


# Notes the bar's value and how much has been said, whenever the conversation changes while there is a bar.
WATCH = """() => {
    window.seen = [];
    new MutationObserver(() => {
        const bar = document.querySelector("#chat progress[value]");
        const said = document.querySelector("#chat").innerText.length;
        if (bar) window.seen.push([+bar.getAttribute("value"), +bar.getAttribute("max"), said]);
    }).observe(document.querySelector("#chat"), {subtree: true, childList: true, attributes: true, characterData: true});
}"""


def test_a_bar_fills_while_the_text_goes_on(visit: Callable[..., Page], assistant: Obedient) -> None:
    page = visit()
    page.get_by_role("button", name="Pictures it makes").click()
    number(page, "Steps of pictures").fill("100")
    page.evaluate(WATCH)
    say(page, "Here [image] " + " ".join(f"w{i}" for i in range(40)))
    expect(bot(page)).to_contain_text("w39")
    answered(page)
    assert assistant.options[-1]["media"] == {"image": {"steps": 100}}
    steps, totals, said = zip(*page.evaluate("window.seen"), strict=True)
    assert set(totals) == {100}
    assert list(steps) == sorted(steps)
    assert len(set(steps)) > 1, "the bar moves"
    assert said[-1] > said[0] + 3, "the text goes on"
    expect(page.locator("#chat progress")).to_have_count(0)
    expect(pictures(page)).to_have_count(1)


def test_the_numbers_of_each_modality_reach_its_generator(visit: Callable[..., Page], assistant: Obedient) -> None:
    page = visit()
    for media in ("Pictures", "Sounds", "Clips"):
        page.get_by_role("button", name=f"{media} it makes").click()
    expect(number(page, "Guidance of sounds")).to_have_value(str(assistant.making["audio"]["guidance"]))
    fields = {
        "number input for Steps of pictures": ("3", "4"),
        "number input for Guidance of sounds": ("4.5", "5"),
        "Seed of clips": ("7", "8"),
    }
    type_and_send(page, "nothing", fields)
    answered(page)
    expect(bot(page)).to_contain_text("nothing")
    wanted = {"image": {"steps": 3}, "audio": {"guidance": 4.5}, "video": {"seed": 7}}
    assert assistant.options[-1]["media"] == wanted


def test_an_example_is_made_with_the_numbers_on_the_page(visit: Callable[..., Page], assistant: Obedient) -> None:
    page = visit()
    page.get_by_role("button", name="Sounds it makes").click()
    page.get_by_label("Seed of sounds").fill("9")
    asked = len(assistant.options)
    page.get_by_role("button", name="Select example 4").click()
    until(lambda: len(assistant.options) > asked)
    assert assistant.options[-1]["media"] == {"audio": {"seed": 9}}


def test_a_model_that_makes_pictures_alone_has_their_numbers_alone(context: BrowserContext, tmp_path: Path) -> None:
    with running(tmp_path, assistant=Obedient(outputs=["image"])) as server:
        page = context.new_page()
        page.goto(server.url)
        page.get_by_role("button", name="Pictures it makes").click()
        expect(number(page, "Steps of pictures")).to_be_visible()
        expect(page.get_by_role("button", name=re.compile("it makes"))).to_have_count(1)
        page.close()


def seen_pictures(assistant: Obedient) -> int:
    """How many pictures the model looked at in its last prompt."""
    return sum(span.modality == "image" for span in assistant.read[-1].spans)


def test_a_picture_it_made_is_seen_in_the_next_turn(visit: Callable[..., Page], assistant: Obedient) -> None:
    page = visit()
    say(page, "red [image] .")
    answered(page)
    expect(pictures(page)).to_have_count(1)
    assert seen_pictures(assistant) == 0
    say(page, "now blue")
    expect(bot(page)).to_contain_text("now blue")
    answered(page)
    assert seen_pictures(assistant) == 1
    for button in ("Retry", "Undo"):
        before = len(assistant.read)
        page.get_by_role("button", name=button).last.click()
        if button == "Undo":
            expect(box(page)).to_have_value("now blue")
            box(page).press("Enter")
        until(lambda before=before: len(assistant.read) == before + 1)
        answered(page)
        assert seen_pictures(assistant) == 1
    before = len(assistant.read)
    page.locator("#chat").get_by_role("button", name="Edit").last.click()
    page.locator("#chat textarea").fill("now green")
    page.locator("#chat").get_by_role("button", name="Submit").click()
    until(lambda: len(assistant.read) == before + 1)
    assert seen_pictures(assistant) == 1


def test_a_picture_it_made_is_seen_after_the_conversation_was_restored(
    context: BrowserContext, assistant: Obedient, tmp_path: Path
) -> None:
    port = free_port()
    page = context.new_page()
    with running(tmp_path, assistant=assistant, port=port) as server:
        page.goto(server.url)
        say(page, "red [image] .")
        answered(page)
        until(lambda: '"data:image/png' in kept(page))
        away(page)
    with running(tmp_path, assistant=assistant, port=port) as server:
        page.goto(server.url)
        expect(pictures(page)).to_have_count(1)
        expect(users(page)).to_have_count(1)
        say(page, "now blue")
        expect(bot(page)).to_contain_text("now blue")
        assert seen_pictures(assistant) == 1
    page.close()
