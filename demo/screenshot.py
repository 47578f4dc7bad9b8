"""Take the picture of the demo that the README shows: a real conversation about a picture and with one, in headless Chromium.

    python demo/screenshot.py [--model embedded] [--output docs/images/demo.png]

Needs the `dev` extra (playwright) and Chromium. Look at the result before you publish it.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

import mmllm
from mmllm.chat import FeedbackLog, ModelShelf
from mmllm.ui.serve import serve

REPOSITORY = Path(__file__).parents[1]
QUESTION = "Draw a red circle above a blue star. Then play a siren."
WAIT = 30_000  # milliseconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "docs" / "images" / "demo.png")
    options = parser.parse_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    feedback = FeedbackLog(Path(tempfile.mkdtemp()) / "feedback.jsonl")
    demo = serve(ModelShelf(mmllm.load), [options.model], feedback, block=False)
    with sync_playwright() as playwright:
        arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
        page = browser.new_page(viewport={"width": 1100, "height": 1060}, device_scale_factor=1.5)
        page.goto(demo.local_url)
        page.get_by_role("button", name="Select example 1").click()
        expect(page.get_by_role("button", name="Retry")).to_be_visible(timeout=WAIT)
        box = page.get_by_role("textbox", name="Message", exact=True)
        expect(page.get_by_role("button", name="Submit")).to_be_visible(timeout=WAIT)
        page.wait_for_timeout(1000)  # Enter does nothing in the instant in which the box turns from Stop back to Submit
        box.fill(QUESTION)
        page.get_by_role("button", name="Submit").click()
        expect(page.locator("#chat [data-testid=bot]")).to_have_count(3, timeout=WAIT)  # words and picture apart
        expect(page.get_by_role("button", name="Submit")).to_be_visible(timeout=WAIT)
        page.wait_for_timeout(1000)
        # The feedback line names a file of the machine that takes the picture, so the picture ends above it.
        bottom = page.locator("#settings").bounding_box()
        clip = {"x": 90, "y": 0, "width": 920, "height": bottom["y"] + bottom["height"] + 12}
        page.screenshot(path=options.output, clip=clip)
        browser.close()
    demo.close()


if __name__ == "__main__":
    main()
