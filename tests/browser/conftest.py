"""One browser for all tests of the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
from browser.chrome import CHROMIUM, WAIT
from playwright.sync_api import BrowserContext, Page, Request, expect, sync_playwright

if TYPE_CHECKING:
    from ui.server import Server


@pytest.fixture(scope="session")
def context() -> Iterator[BrowserContext]:
    """One browser for all tests, so that it keeps the page's scripts; each tab has a conversation of its own."""
    with sync_playwright() as playwright:
        arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        arguments += ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        context = browser.new_context(
            accept_downloads=True, permissions=["clipboard-read", "clipboard-write", "microphone"]
        )
        context.set_default_timeout(WAIT)
        yield context
        browser.close()


@pytest.fixture
def visit(server: Server, context: BrowserContext) -> Iterator[Callable[..., Page]]:
    """Opens the page in a new tab; at the end checks that no tab asked another host for anything or ran a script."""
    pages: list[Page] = []
    strangers: list[str] = []

    def watch(request: Request) -> None:
        if not request.url.startswith((server.url, "data:", "blob:")):
            strangers.append(request.url)

    def open_page(width: int = 1200, height: int = 860) -> Page:
        page = context.new_page()
        pages.append(page)
        page.set_viewport_size({"width": width, "height": height})
        page.on("request", watch)
        page.on("dialog", lambda dialog: (strangers.append(dialog.message), dialog.dismiss()))
        page.goto(server.url)
        expect(page.get_by_text("It takes text, pictures")).to_be_visible()
        return page

    yield open_page
    for page in pages:
        page.close()
    assert strangers == []
