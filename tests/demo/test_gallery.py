"""The gallery: nothing on it but what the assistant makes, in the order of the test, written anew each time."""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[2] / "demo"), str(Path(__file__).parent)]

import gallery
import gallery_pictures
from drawing_trials import Drawn, held_out_wishes
from drawings import caption, place_items
from gallery_page import Page, escape
from PIL import Image
from scene_model import render
from scripted import answers, tiny_assistant

import mmllm
from mmllm.assistant import Assistant

ARGUMENTS = ["--model", "nowhere/tiny", "--count", "3", "--shown", "2", "--searched", "30", "--seed", "4"]


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    return tiny_assistant("image", "sketch")


def make(folder: Path, assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> str:
    """The page that the command writes into ``folder``."""
    with monkeypatch.context() as patch:
        patch.setattr(mmllm, "load", lambda name: assistant, raising=False)
        patch.setattr("mmllm.assistant.model_folder", Path)
        patch.setattr(sys, "argv", ["gallery.py", *ARGUMENTS, "--output", str(folder / "page.md")])
        folder.mkdir(exist_ok=True)
        gallery.main()
    return (folder / "page.md").read_text(encoding="utf-8")


def shown_on(text: str) -> set[str]:
    return set(re.findall(r'src="page/([^"]+)"', text))


def test_the_page_shows_the_first_held_out_requests_with_all_files_beside_it(
    tmp_path: Path, assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(assistant, monkeypatch, "image")
    text = make(tmp_path, assistant, monkeypatch)
    drawn = text.split("### Asked for and drawn")[1].split("###")[0]
    first, second, third = (caption(wish) for wish in held_out_wishes(3, 4))
    assert drawn.index(first) < drawn.index(second)
    assert third not in drawn
    assert "The first 2 of 3 requests" in drawn
    assert "3 of 3 pictures; here are the first 2." in text  # noise is never what was asked for
    assert shown_on(text) == {path.name for path in (tmp_path / "page").iterdir()}
    assert sum(path.stat().st_size for path in (tmp_path / "page").iterdir()) < 100_000
    assert "It also makes sketch" in text
    assert "nowhere" not in text


def test_the_same_seed_gives_the_same_page(
    tmp_path: Path, assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(assistant, monkeypatch, "image")
    pages = [make(tmp_path / name, assistant, monkeypatch) for name in ("one", "two")]
    assert pages[0] == pages[1]
    for name in shown_on(pages[0]):
        assert (tmp_path / "one" / "page" / name).read_bytes() == (tmp_path / "two" / "page" / name).read_bytes(), name


def test_a_reply_without_a_picture_is_a_failure_and_not_hidden(
    tmp_path: Path, assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(assistant, monkeypatch)
    text = make(tmp_path, assistant, monkeypatch)
    failures = text.split("### Failures")[1]
    assert failures.count("no picture") == 2 * 2  # shown, and read by the parser
    assert all("generator" in name for name in shown_on(text))


@pytest.mark.parametrize("outputs", [(), ("sketch",)])
def test_an_assistant_without_anything_to_show_is_told_so(
    tmp_path: Path, outputs: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as stopped:
        make(tmp_path, tiny_assistant(*outputs), monkeypatch)
    assert f"tiny makes {', '.join(outputs) or 'text alone'}: there is nothing to show" in str(stopped.value.code)
    assert not list(tmp_path.iterdir())


def test_failures_are_those_of_the_parser(tmp_path: Path) -> None:
    rng, page = random.Random(1), Page(tmp_path / "page.md")
    wishes = held_out_wishes(4, 1)
    true = [Drawn(w, f"Paint {i}.", "", render(place_items(w, rng))) for i, w in enumerate(wishes)]
    empty = Drawn(wishes[0], "Paint none.", "", Image.new("RGB", (64, 64), (255, 255, 255)))
    gallery_pictures.failures(page, [true[0], empty, *true[1:]], 3)
    assert "1 of 5 pictures" in page.blocks[1]
    assert "Paint none." in page.blocks[2]
    assert "nothing; white background" in page.blocks[2]
    assert not any(one.request in page.blocks[2] for one in true)
    gallery_pictures.failures(page, true, 3)
    assert page.blocks[-1] == "The parser found none in 4 pictures."


def test_a_page_takes_away_only_what_it_showed_before(tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 4))
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "mine.png").write_bytes(b"")
    for name in ("old.png", "new.png"):
        page = Page(tmp_path / "page.md")
        page.add(page.picture(name, picture, "a picture"))
        assert page.file("again.png", picture) == f"page/{name}"
        page.save()
    assert {path.name for path in (tmp_path / "page").iterdir()} == {"mine.png", "new.png"}
    with pytest.raises(ValueError, match="another file"):
        page.file("new.png", picture.copy())


def test_words_of_an_assistant_stay_words() -> None:
    assert escape('a|b <b>"x"</b> [y](z) `c`\n*d*') == (
        "a&#124;b &lt;b&gt;&quot;x&quot;&lt;/b&gt; &#91;y&#93;(z) &#96;c&#96; &#42;d&#42;"
    )
