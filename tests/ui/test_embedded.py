"""The examples of the page, asked of the assistant that ships with mmllm."""

from __future__ import annotations

import pytest

import mmllm
from mmllm.chat import ChatSession, Sampling
from mmllm.chat.session import text_of
from mmllm.ui.assets import EXAMPLES, example_files

EXPECTED = {
    "What colour is the star?": ("blue",),
    "Is there a star in the picture and a bell in the sound?": ("yes",),
    "Which sound comes first?": ("bell",),
    "What can you do?": ("picture", "sound"),
    "Draw a blue star. Also, play a siren.": ("blue star", "siren"),
}


@pytest.fixture(scope="module")
def assistant() -> mmllm.Assistant:
    return mmllm.load("embedded", device="cpu")


def test_every_example_has_an_expected_answer() -> None:
    assert [text for text, _ in EXAMPLES] == list(EXPECTED)


@pytest.mark.parametrize("question", EXPECTED)
def test_every_example_is_answered(assistant: mmllm.Assistant, question: str) -> None:
    session = ChatSession()
    session.add_user(question, example_files(question), assistant.modalities)
    list(session.reply(assistant, Sampling()))
    assert text_of(session.messages[-1]).strip()


@pytest.mark.parametrize("question", EXPECTED)
def test_the_examples_are_answered_rightly(assistant: mmllm.Assistant, question: str) -> None:
    session = ChatSession()
    session.add_user(question, example_files(question), assistant.modalities)
    list(session.reply(assistant, Sampling()))
    answer = text_of(session.messages[-1]).lower()
    assert all(word in answer for word in EXPECTED[question]), answer


def test_stop_ends_the_answer_within_one_piece(assistant: mmllm.Assistant) -> None:
    session = ChatSession()
    session.add_user("What can you do?")
    reply = session.reply(assistant, Sampling())
    first = next(reply)
    session.stop()
    assert list(reply) == []
    assert text_of(session.messages[-1]) == first
