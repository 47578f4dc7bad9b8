"""What tests of the page share: what a visitor does, and the browser that does it."""

from __future__ import annotations

import io
import re
import shutil
import time
from collections.abc import Callable
from typing import Any

import pytest
from needs import ON_CI, needed
from PIL import Image

needed("playwright.sync_api")

from playwright.sync_api import Page, expect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
marks = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None and not ON_CI, reason="Chromium is not installed"),
]
WAIT = 120_000  # milliseconds; a busy machine takes its time, a free one never waits this long

expect.set_options(timeout=WAIT)


def box(page: Page) -> Any:
    return page.get_by_role("textbox", name="Message", exact=True)


def bot(page: Page) -> Any:
    return page.locator("#chat [data-testid=bot]").last


def say(page: Page, text: str) -> None:
    box(page).fill(text)
    box(page).press("Enter")


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT / 1000
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def picture_file(size: tuple[int, int] = (40, 10)) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, "PNG")
    return {"name": "red.png", "mimeType": "image/png", "buffer": buffer.getvalue()}


def attach(page: Page, file: dict[str, Any]) -> None:
    with page.expect_response(re.compile("/upload")):
        page.locator("#box input[type=file]").set_input_files(file)


def answered(page: Page) -> None:
    """Wait until the next message can be sent."""
    expect(page.get_by_role("button", name="Submit")).to_be_visible()


def kept(page: Page) -> str:
    """The conversation as the browser keeps it; empty if it does not."""
    return str(page.evaluate("mmllmChats.kept()"))


def away(page: Page) -> None:
    """Leave the page before its server ends: a page that stays open loads itself again as soon as there is a server, which
    would cut off the test's own visit.
    """
    page.goto("about:blank")


def users(page: Page) -> Any:
    return page.locator("#chat [data-testid=user]")


# Types into fields and sends what is in the box in one task of the browser, so that nothing can happen in between; types
# other things in the next task, which is as soon as any visitor could.
TYPE_AND_SEND = """([before, message, after]) => {
    const type = ([field, value]) => {
        field.value = value;
        field.dispatchEvent(new Event("input", {bubbles: true}));
    };
    before.forEach(type);
    type([document.querySelector("#box textarea"), message]);
    document.querySelector("#box .submit-button").click();
    setTimeout(() => after.forEach(type));
}"""


def type_and_send(page: Page, message: str, fields: dict[str, tuple[str, str]]) -> None:
    """``fields``: by label, what is typed just before and just after ``message`` is sent."""
    handles = {label: page.get_by_label(label, exact=True).element_handle() for label in fields}
    before, after = ([[handles[label], values[i]] for label, values in fields.items()] for i in (0, 1))
    page.evaluate(TYPE_AND_SEND, [before, message, after])
