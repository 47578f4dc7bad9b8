from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from chat.fake import FakeAssistant
from PIL import Image

from mmllm.chat.session import ChatSession, Sampling, file_types, known_modalities, text_of
from mmllm.errors import DataError, MediaError
from mmllm.processing.messages import check_turns, parse_messages
from mmllm.replies import Media

GREEDY = Sampling()


def answer(session: ChatSession, assistant: FakeAssistant) -> list[str]:
    return list(session.reply(assistant, GREEDY))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "cat.png"
    Image.new("RGB", (8, 6), "red").save(path)
    return path


def test_a_turn_puts_files_before_text_and_streams_growing_answers(picture: Path) -> None:
    session, assistant = ChatSession(), FakeAssistant()
    session.add_user("  hello ", [picture])
    texts = answer(session, assistant)
    assert texts[0] == "You"
    assert texts[-1] == "You said hello with 1 files."
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert session.messages == [
        {"role": "user", "content": [{"type": "image", "path": str(picture)}, {"type": "text", "text": "hello"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "You said hello with 1 files."}]},
    ]
    check_turns(parse_messages(session.request()), training=True)


def test_the_assistant_gets_the_system_prompt_the_history_and_the_sampling() -> None:
    session, assistant = ChatSession(system_prompt="Be kind."), FakeAssistant()
    for text in ("one", "two"):
        session.add_user(text)
        list(session.reply(assistant, Sampling(7, 0.5, 0.9, 3)))
    assert [message["role"] for message in assistant.requests[1]] == ["system", "user", "assistant", "user"]
    assert assistant.requests[1][0]["content"] == "Be kind."
    assert assistant.options[1] == {"max_new_tokens": 7, "temperature": 0.5, "top_p": 0.9, "seed": 3}


def test_a_blank_system_prompt_is_left_out() -> None:
    session = ChatSession(system_prompt="  ")
    session.add_user("hi")
    assert [message["role"] for message in session.request()] == ["user"]


@pytest.mark.parametrize("text", ["", "  \n "])
def test_an_empty_turn_is_refused(text: str) -> None:
    session = ChatSession()
    with pytest.raises(DataError, match="empty"):
        session.add_user(text)
    assert session.messages == []


def test_a_file_of_another_kind_is_refused_by_name_and_nothing_is_added(picture: Path) -> None:
    session = ChatSession()
    with pytest.raises(DataError, match=r"report\.pdf: this assistant takes pictures and sounds") as caught:
        session.add_user("look", [picture, picture.with_name("report.pdf")])
    assert str(picture.parent) not in str(caught.value)
    with pytest.raises(DataError, match=r"cat\.png: this assistant takes sounds"):
        session.add_user("look", [picture], ("audio",))
    with pytest.raises(DataError, match=r"takes text only"):
        session.add_user("look", [picture], ())
    assert session.messages == []


def test_a_second_question_waits_for_the_first_answer() -> None:
    session = ChatSession()
    session.add_user("one")
    with pytest.raises(DataError, match="still being answered"):
        session.add_user("two")
    reply = session.reply(FakeAssistant(), GREEDY)
    next(reply)
    with pytest.raises(DataError, match="still being answered"):
        session.add_user("two")
    list(reply)
    session.add_user("two")


def test_there_is_no_answer_without_a_question() -> None:
    session = ChatSession()
    with pytest.raises(DataError, match="no question"):
        answer(session, FakeAssistant())
    assert session.messages == []


def test_stop_from_another_thread_ends_the_production_of_tokens() -> None:
    session, assistant = ChatSession(), FakeAssistant(delay=0.005)
    session.add_user("long")
    threading.Timer(0.1, session.stop).start()
    started = time.monotonic()
    texts = answer(session, assistant)
    produced = assistant.produced
    assert 0 < produced < 1000
    assert time.monotonic() - started < 5
    time.sleep(0.05)
    assert assistant.produced == produced
    assert text_of(session.messages[-1]) == texts[-1]
    session.add_user("and now?")


def test_stop_before_the_reply_begins_produces_nothing() -> None:
    session, assistant = ChatSession(), FakeAssistant()
    session.add_user("long")
    session.stop()
    assert answer(session, assistant) == []
    assert assistant.requests == []
    assert session.messages[-1] == {"role": "assistant", "content": [{"type": "text", "text": ""}]}


def test_an_abandoned_reply_tells_the_model_to_stop_and_keeps_what_was_said() -> None:
    session, assistant = ChatSession(), FakeAssistant()
    session.add_user("long")
    reply = session.reply(assistant, GREEDY)
    next(reply)
    next(reply)
    reply.close()
    assert text_of(session.messages[-1]) == "word0 word1"
    assert not session.answering


def test_an_error_before_the_first_word_leaves_the_question_to_be_taken_back(tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    session = ChatSession()
    session.add_user("what is it?", [broken])
    with pytest.raises(MediaError) as caught:
        answer(session, FakeAssistant())
    assert session.waiting
    reason = session.plain(str(caught.value))
    assert reason.startswith("broken.png: ")
    assert str(tmp_path) not in reason
    assert session.undo() == ("what is it?", [str(broken)])
    assert session.messages == []


@pytest.mark.parametrize("end", [KeyboardInterrupt, GeneratorExit])
def test_an_answer_given_up_before_its_first_word_leaves_no_empty_turn(end: type[BaseException]) -> None:
    class Interrupted(FakeAssistant):
        def _words(self, messages: Sequence[Any], stop: threading.Event) -> Iterator[str]:
            raise end

    session = ChatSession()
    session.add_user("one")
    with pytest.raises(end):
        answer(session, Interrupted())
    assert session.waiting
    assert not session.answering
    assert session.undo() == ("one", [])


def test_who_asks_can_wait_for_the_end_of_the_running_reply() -> None:
    session = ChatSession()
    session.add_user("one")
    reply = session.reply(FakeAssistant(), GREEDY)
    next(reply)
    assert not session.idle.wait(0)
    threading.Timer(0.1, lambda: list(reply)).start()
    assert session.idle.wait(30)
    session.add_user("two")


def test_a_rating_goes_with_its_answer() -> None:
    session = ChatSession()
    for text in ("one", "two"):
        session.add_user(text)
        answer(session, FakeAssistant())
    session.rated = (1, "up")
    session.undo()
    assert session.rated == (1, "up")
    session.retry()
    assert session.rated is None


def test_retry_answers_the_same_question_again() -> None:
    session, assistant = ChatSession(), FakeAssistant()
    for text in ("one", "two"):
        session.add_user(text)
        answer(session, assistant)
    session.retry()
    assert [message["role"] for message in session.messages] == ["user", "assistant", "user"]
    answer(session, assistant)
    assert text_of(session.messages[-1]) == "You said two with 0 files."
    session.retry(1)
    assert [text_of(message) for message in session.messages] == ["one"]
    with pytest.raises(DataError, match="nothing to answer"):
        ChatSession().retry()


def test_undo_gives_back_text_and_files(picture: Path) -> None:
    session, assistant = ChatSession(), FakeAssistant()
    session.add_user("one")
    answer(session, assistant)
    session.add_user("two", [picture])
    answer(session, assistant)
    assert session.undo() == ("two", [str(picture)])
    assert [text_of(message) for message in session.messages] == ["one", "You said one with 0 files."]
    assert session.undo(1) == ("one", [])
    assert session.messages == []


def test_edit_changes_the_words_keeps_the_files_and_drops_what_follows(picture: Path) -> None:
    session, assistant = ChatSession(), FakeAssistant()
    session.add_user("one", [picture])
    answer(session, assistant)
    session.add_user("two")
    answer(session, assistant)
    session.edit(0, " three ")
    assert session.messages == [
        {"role": "user", "content": [{"type": "image", "path": str(picture)}, {"type": "text", "text": "three"}]}
    ]
    answer(session, assistant)
    for index in (1, 9):
        with pytest.raises(DataError, match="Only your own messages"):
            session.edit(index, "x")
    session.edit(0, "")
    assert text_of(session.messages[0]) == ""


def test_retry_while_an_answer_streams_ends_that_answer_first() -> None:
    session, assistant = ChatSession(), FakeAssistant()
    session.add_user("long")
    old = session.reply(assistant, GREEDY)
    next(old)
    session.retry()
    list(old)
    assert assistant.produced < 5
    assert [message["role"] for message in session.messages] == ["user"]
    assert next(session.reply(assistant, GREEDY)) == "word0"


def test_clear_starts_a_conversation_with_another_id() -> None:
    session = ChatSession(system_prompt="Be kind.")
    session.add_user("one")
    answer(session, FakeAssistant())
    session.rated = (1, "up")
    before = session.id
    session.clear()
    assert (session.messages, session.rated, session.system_prompt) == ([], None, "Be kind.")
    assert session.id != before


def test_export_is_self_contained_and_reads_back_as_messages(picture: Path) -> None:
    session = ChatSession(system_prompt="Be kind.")
    session.add_user("what — is it?", [picture])
    answer(session, FakeAssistant())
    exported = json.loads(session.export())
    assert exported["id"] == session.id
    assert str(picture.parent) not in session.export()
    messages = parse_messages(exported["messages"])
    check_turns(messages, training=True)
    assert [message.role for message in messages] == ["system", "user", "assistant"]
    assert messages[1].parts[0].type == "image"
    assert str(messages[1].parts[0].value).startswith("data:image/png;base64,iVBOR")
    assert messages[1].text == "what — is it?"


def test_a_file_that_this_assistant_does_not_take_is_refused_before_it_is_asked(picture: Path) -> None:
    class Blind(FakeAssistant):
        modalities = ("audio",)

    session, assistant = ChatSession(), Blind()
    session.add_user("look", [picture])
    with pytest.raises(DataError, match=r"cat\.png: this assistant takes sounds"):
        answer(session, assistant)
    assert assistant.requests == []
    assert session.waiting
    assert not session.answering


def test_two_sessions_share_nothing() -> None:
    first, second = ChatSession(), ChatSession()
    first.add_user("secret")
    first.stop()
    assert second.messages == []
    second.add_user("hello")
    assert answer(second, FakeAssistant())[-1] == "You said hello with 0 files."


def test_file_types_follow_the_assistant() -> None:
    class Deaf(FakeAssistant):
        modalities = ("image", "smell")

    assert known_modalities(Deaf()) == ("image",)
    assert ".png" in file_types(known_modalities(Deaf()))
    assert ".wav" not in file_types(known_modalities(Deaf()))


class Drawing(FakeAssistant):
    """Says a word, draws a picture in three steps, says another word; ``failure`` comes instead of the picture."""

    making = {"image": {"steps": 3}}

    def __init__(self, failure: Exception | None = None, stopped: bool = False) -> None:
        super().__init__()
        self.failure, self.stopped = failure, stopped

    def chat(self, messages: Any, stream: Any = True, **options: Any) -> Iterator[Any]:
        self.requests.append(messages)
        media = Media("image", ".png")

        def draw() -> None:
            for step in (1, 2, 3):
                media.progress = (step, 3)
                time.sleep(0.25)
            if self.failure is not None:
                media._future.set_exception(self.failure)
            else:
                media._future.set_result(None if self.stopped else Image.new("RGB", (4, 4), "red"))

        yield "Here:"
        threading.Thread(target=draw).start()
        yield media
        yield "there"


def test_a_made_picture_comes_in_its_place_and_is_kept_as_a_file() -> None:
    session, assistant = ChatSession(), Drawing()
    session.add_user("draw")
    seen = []
    for text in session.reply(assistant, GREEDY):
        part = session.messages[-1]["content"][-1 if text == "Here:" else 1]
        seen.append((text, part["making"].progress[0] if "making" in part else None))
    assert seen[0] == ("Here:", None)
    assert ("Here:there", 1) in seen, "the text goes on while the picture is made"
    assert ("Here:there", 3) in seen, "the page hears of the steps"
    first, picture, last = session.messages[-1]["content"]
    assert (first["text"], picture["type"], last["text"]) == ("Here:", "image", "there")
    with Image.open(picture["path"]) as kept:
        assert kept.size == (4, 4)
    assert "data:image/png;base64," in session.export()
    session.add_user("again")
    list(session.reply(assistant, GREEDY))
    assert assistant.requests[1][1]["content"][1] == {"type": "image", "path": picture["path"]}


def test_a_stopped_picture_leaves_the_words() -> None:
    session = ChatSession()
    session.add_user("draw")
    list(session.reply(Drawing(stopped=True), GREEDY))
    assert session.messages[-1]["content"] == [{"type": "text", "text": "Here:"}, {"type": "text", "text": "there"}]


def test_a_picture_that_fails_is_told_and_the_words_stay() -> None:
    session = ChatSession()
    session.add_user("draw")
    with pytest.raises(MediaError, match="no paint"):
        list(session.reply(Drawing(MediaError("no paint")), GREEDY))
    assert text_of(session.messages[-1]) == "Here:there"
    assert not session.answering


class Painter(FakeAssistant):
    """Gives the media it was made with, then says many words."""

    making = {"image": {"steps": 3}}

    def __init__(self, *media: Media) -> None:
        super().__init__()
        self.media = media

    def chat(self, messages: Any, stream: Any = True, **options: Any) -> Iterator[Any]:
        self.requests.append(messages)
        self.options.append(options)
        yield "Here:"
        yield from self.media
        for _ in range(1000):
            if options["stop"].is_set():
                return
            yield " word"


def medium(done: bool = True, failure: Exception | None = None) -> Media:
    media = Media("image", ".png")
    if failure is not None:
        media._future.set_exception(failure)
    elif done:
        media._future.set_result(Image.new("RGB", (4, 4), "red"))
    return media


def test_a_finished_picture_is_shown_while_the_text_goes_on_and_stays_when_it_is_stopped() -> None:
    session = ChatSession()
    session.add_user("draw")
    for text in session.reply(Painter(medium()), GREEDY):
        if text.endswith("word"):
            assert Path(session.messages[-1]["content"][1]["path"]).name == "image-1.png"
            session.stop()
    assert [part["type"] for part in session.messages[-1]["content"]] == ["text", "image", "text"]


def test_a_failing_picture_takes_neither_the_words_nor_the_other_picture_away() -> None:
    session = ChatSession()
    session.add_user("draw")
    with pytest.raises(MediaError, match="no paint"):
        list(session.reply(Painter(medium(failure=MediaError("no paint")), medium()), GREEDY))
    first, picture, last = session.messages[-1]["content"]
    assert (first["text"], picture["type"], last["text"].count("word")) == ("Here:", "image", 1000)


def test_numbers_for_media_reach_who_makes_them() -> None:
    session, painter = ChatSession(), Painter()
    session.add_user("draw")
    list(session.reply(painter, Sampling(media={"image": {"steps": 7}, "audio": {"steps": 9}})))
    assert painter.options[-1]["media"] == {"image": {"steps": 7}}


def test_an_assistant_that_makes_nothing_can_go_on_with_a_conversation_that_has_made_pictures(tmp_path: Path) -> None:
    session, assistant = ChatSession(folder=tmp_path), FakeAssistant()
    session.add_user("draw")
    list(session.reply(Painter(medium()), GREEDY))
    assert tmp_path in session.files()[0].parents
    session.add_user("and now?")
    list(session.reply(assistant, GREEDY))
    assert [part["type"] for part in assistant.requests[-1][1]["content"]] == ["text", "text"]
    assert session.messages[1]["content"][1]["type"] == "image", "it is still shown"


def test_what_was_not_kept_is_not_sent() -> None:
    session, assistant = ChatSession(), FakeAssistant()
    session.add_user("look")
    session.messages[0]["content"].insert(0, {"type": "image", "missing": "cat.png"})
    list(session.reply(assistant, GREEDY))
    assert assistant.requests[-1][0]["content"] == [{"type": "text", "text": "look"}]
    assert "cat.png" not in session.export()
