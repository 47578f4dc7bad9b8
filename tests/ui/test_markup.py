from __future__ import annotations

import pytest

from mmllm.ui.markup import from_markdown, to_markdown

CASES = [
    ("<img src=x onerror=alert(1)>", r"\<img src=x onerror=alert(1)>"),
    ("</p><!-- x --><?php", r"\</p>\<!-- x -->\<?php"),
    ("![a](http://x.org/a.png) and [a link](http://x.org)", r"\![a](http://x.org/a.png) and [a link](http://x.org)"),
    ("a < b, 3<4, <3 and wow! (yes)", "a < b, 3<4, <3 and wow! (yes)"),
    ("**bold** `<b>` <b>", r"**bold** `<b>` \<b>"),
    ("```html\n<b>x</b>\n```\n<i>", "```html\n<b>x</b>\n```\n\\<i>"),
    ("```html\n<b>still streaming", "```html\n<b>still streaming"),
    ("$a<b$ \\(x\\)", r"$a\<b$ \(x\)"),
    ("", ""),
]


@pytest.mark.parametrize(("text", "shown"), CASES)
def test_tags_and_pictures_are_shown_as_typed_and_code_is_left_alone(text: str, shown: str) -> None:
    assert to_markdown(text) == shown
    assert from_markdown(shown) == text
