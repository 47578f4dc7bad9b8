"""The chat page: what each of its controls does."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import gradio as gr

from mmllm.chat.feedback import FeedbackLog
from mmllm.chat.kept import pack, unpack
from mmllm.chat.session import ChatSession, Sampling, file_types, known_modalities, plural
from mmllm.chat.shelf import ModelShelf, find_models
from mmllm.chat.store import SessionStore
from mmllm.errors import DataError, MmllmError
from mmllm.ui.assets import example_files, script
from mmllm.ui.layout import Controls, alert, busy, choices, idle, seed_of, short
from mmllm.ui.markup import from_markdown
from mmllm.ui.shown import content

BUG = "Something went wrong inside the assistant; details are in the console."
REFUSED = "That did not work: too many people are waiting, or a value on the page is out of range. Please try again."
UPDATE_SECONDS = 0.04  # while an answer streams the page is redrawn at most this often
END_SECONDS = 0.5  # how long a question waits for an answer that has its last word but has not ended yet
Update = dict[Any, Any]
_log = logging.getLogger(__name__)


def build_demo(shelf: ModelShelf, names: list[str], log: FeedbackLog, folder: Path | None = None) -> gr.Blocks:
    """The page as gradio Blocks. ``names``: the models to choose from; ``shelf`` loads them; ``log`` takes thumbs.

    ``folder`` is where conversations put files of their own. The page needs ``script("chats")`` in its head.
    """
    page = _Page(shelf, names, log, folder)
    with gr.Blocks(title="mmllm chat", analytics_enabled=False, fill_height=True) as demo:
        page.lay_out(names, log.path)
        page.connect(demo)
    return demo


class _Page(Controls):
    """One method for each thing a user can do.

    Methods take the visitor's own ``ChatSession`` (None before the first message) and return a dictionary of updates.
    """

    def __init__(self, shelf: ModelShelf, names: list[str], log: FeedbackLog, folder: Path | None) -> None:
        self.shelf = shelf
        self.names = list(names)
        self.log = log
        self.sessions = SessionStore(folder=folder)

    def connect(self, demo: gr.Blocks) -> None:
        # One answer at a time, whoever asks. "multiple", because the button to send is back a moment before the page
        # counts the last answer as complete, and gradio would drop the answer to a question sent in that moment.
        device = {"concurrency_limit": 1, "concurrency_id": "device", "trigger_mode": "multiple"}
        quick = {"queue": False, "show_progress": "hidden"}
        hidden = {**quick, "api_visibility": "private"}
        page = [self.session, self.chat, self.back, self.box, self.alert, self.asked]
        rewound = [*page, self.comment_row]
        settings = [self.model, self.system, self.temperature, self.top_p, self.max_tokens, self.seed]
        # They go with the question, not with the request for its answer: they may be changed between the two.
        asking = [*settings, self.making, *self.numbers.values()]

        def guarded(event: Any, refused: Any = self.refused) -> Any:
            """``event``, with an alert when gradio itself refuses it, before or instead of calling our method."""
            event.failure(refused, self.session, page, **hidden)
            return event

        def settled(event: Any) -> Any:
            """``event``, after which the browser keeps the conversation and what came back stands in the box."""
            drafts = [self.back, self.box]
            event.then(None, drafts, drafts, js=script("give_back"), **{**hidden, "trigger_mode": "multiple"})
            kept = event.then(self.keep, self.session, self.kept, trigger_mode="multiple", **hidden)
            kept.then(None, self.kept, None, js="(chat) => window.mmllmChats.keep(chat)", **hidden)
            return event

        def answers(event: Any) -> None:
            progress = {"show_progress": "minimal", "show_progress_on": self.chat, "api_visibility": "private"}
            answer = settled(guarded(event)).success(self.reply, [self.session, self.asked], page, **progress, **device)
            settled(answer)
            settled(answer.failure(self.unanswered, self.session, page, **hidden))

        # First: the first event to ask for a name gets it.
        results = [self.session, self.chat, self.back, self.alert]
        programs = {name: button.click for name, button in self.programs.items()}
        programs["send"](self.send_of_program, [self.session, self.sent], results, api_name="send", **quick)
        programs["reply"](self.reply_of_program, [self.session, *settings], results, api_name="reply", **device)
        programs["stop"](self.stop_of_program, self.session, results, api_name="stop", **quick)
        programs["clear"](self.clear_of_program, self.session, results, api_name="clear", **quick)

        # The browser empties the box at once: words typed while the question travels are the next message's.
        self.box.submit(None, self.box, [self.sent, self.box], js=script("take"), **hidden)
        question = [self.session, self.sent, *asking]
        sent = self.box.submit(self.send, question, page, trigger_mode="multiple", **hidden)
        sent.failure(None, [self.sent, self.box], [self.sent, self.box], js=script("give_back"), **hidden)
        answers(sent)
        answers(self.chat.example_select(self.send_example, [self.session, *asking], page, **hidden))
        answers(self.chat.retry(self.retry, [self.session, *asking], rewound, **hidden))
        answers(self.chat.edit(self.edit, [self.session, *asking], rewound, **hidden))
        settled(guarded(self.chat.undo(self.undo, self.session, rewound, **hidden)))
        settled(guarded(self.new.click(self.clear, self.session, rewound, **hidden)))
        forgotten = self.chat.clear(None, None, None, js="() => window.mmllmChats.forget()", **hidden)
        settled(guarded(forgotten.then(self.clear, self.session, rewound, **hidden)))
        settled(self.box.stop(self.stop, self.session, page, **hidden))
        commenting = [self.comment_row, self.comment, self.alert]
        guarded(self.chat.like(self.like, self.session, commenting, **hidden))
        for event in (self.comment_send.click, self.comment.submit):
            guarded(event(self.add_comment, [self.session, self.comment], commenting, **hidden))
        self.copy.click(None, self.chat, None, js=script("copy"), **hidden)
        guarded(self.save.click(self.export, [self.session, self.system], self.saved, **hidden)).success(
            None, self.saved, None, js=script("download"), **hidden
        )
        for event in (self.open.click, self.folder.submit):
            guarded(event(self.open_folder, self.folder, [self.model, self.folder, self.alert], **hidden))
        loading = [self.status, self.timer, self.alert, self.making, *self.panels.values(), *self.numbers.values()]
        self.model.change(self.pick, self.model, loading, **hidden)
        settled(demo.load(self.restore, [self.key, self.kept], page, js=script("on_load"), **hidden))
        self.timer.tick(self.poll, self.model, [*loading, self.box], **hidden)

        listing = {"js": script("earlier"), **hidden}
        self.history.expand(None, None, self.earlier, **listing)
        read = self.earlier.input(
            None, self.earlier, self.chosen, js="(id) => window.mmllmChats.read(id)", trigger_mode="multiple", **hidden
        )
        opened = settled(guarded(read.then(self.reopen, [self.session, self.chosen], rewound, **hidden)))
        opened.then(None, None, self.earlier, **listing)
        emptied = self.forget.click(None, None, None, js="() => window.mmllmChats.forgetEarlier()", **hidden)
        emptied.then(None, None, self.earlier, **listing)

    # ---- the conversation

    def restore(self, key: str, kept: str, request: gr.Request) -> Update:
        """The conversation this tab had before it was loaded again; a question without answer goes back to the box.

        If this server does not know it, it is what the browser ``kept``. On a slow start the visitor's first question may
        come before or during this; everything it drew stays then, its Stop button too.
        """
        page = _page_id(request)
        session = self.sessions.open(key, page)
        if self.sessions.asked(page):
            return {self.session: session}
        if session.answering:  # for the page that is gone
            session.stop()
            session.idle.wait(END_SECONDS)
        if not session.messages and kept:
            return self._read(session, kept)
        return {self.session: session, **(self._ended(session) if session.messages else {})}

    def reopen(self, session: ChatSession | None, kept: str, request: gr.Request) -> Update:
        """An earlier conversation, as the browser kept it, in place of the one that is shown."""
        session = session or self.sessions.of_page(_page_id(request))
        if not kept:
            return {self.session: session, self.alert: alert("That chat is open in another tab, or was deleted there.")}
        session.stop()
        session.idle.wait(END_SECONDS)
        return {**self._rewound(session), **self._read(session, kept)}

    def _read(self, session: ChatSession, kept: str) -> Update:
        try:
            unpack(kept, session)
        except DataError as error:
            return {self.session: session, self.alert: alert(str(error))}
        return {self.session: session, **self._ended(session)}

    def keep(self, session: ChatSession | None) -> str:
        """The conversation for the browser to keep."""
        return "" if session is None else pack(session)

    def send(self, session: ChatSession | None, message: dict[str, Any], request: gr.Request, *asked: Any) -> Update:
        """``asked`` are the settings at that moment: the answer is made with them, whenever its turn comes."""
        session = session or self.sessions.of_page(_page_id(request))
        try:
            return self._ask(session, message["text"], message["files"], asked)
        except MmllmError as error:
            return {self.session: session, self.back: gr.update(value=message), self.alert: alert(str(error))}

    def send_example(
        self, session: ChatSession | None, data: gr.SelectData, request: gr.Request, *asked: Any
    ) -> Update:
        session = session or self.sessions.of_page(_page_id(request))
        text = data.value["text"]
        try:
            return self._ask(session, text, example_files(text), asked)
        except MmllmError as error:
            return {self.session: session, self.alert: alert(str(error))}

    def _ask(self, session: ChatSession, text: str, paths: list[str], asked: tuple[Any, ...]) -> Update:
        session.idle.wait(END_SECONDS)
        session.add_user(text, paths)
        return {self.session: session, self.asked: asked, self.box: busy(), **self._settled(session)}

    def reply(self, session: ChatSession | None, asked: tuple[Any, ...]) -> Iterator[Update]:
        if session is None or not session.waiting:  # taken back while it stood in the queue
            yield {self.box: gr.skip()}
            return
        model, system, temperature, top_p, max_tokens, seed, making, *numbers = asked
        session.system_prompt = system or ""
        try:
            sampling = Sampling(max_tokens, temperature, top_p, seed_of(seed), self.wishes(making, numbers))
            note = "…" if self.shelf.ready(model) else "Loading the assistant…"
            yield {self.box: busy(), **self._shown(session, note)}
            assistant = self.shelf.get(model)
            redraw = time.monotonic() + UPDATE_SECONDS
            if session.waiting:  # still: not taken back while the model was loaded
                with closing(session.reply(assistant, sampling)) as pieces:  # a visitor who leaves stops the model too
                    for _ in pieces:
                        if time.monotonic() >= redraw:
                            yield self._shown(session)
                            redraw = time.monotonic() + UPDATE_SECONDS
            yield {self.box: idle(), **self._shown(session)}
        except Exception as error:
            yield self._failed(session, error)

    def _failed(self, session: ChatSession, error: Exception) -> Update:
        """The reason in plain words; a question without any answer goes back into the box, to be sent again."""
        if isinstance(error, MmllmError):
            reason = session.plain(str(error))
        else:
            _log.error("the assistant failed", exc_info=error)
            reason = BUG
        return {**self._ended(session), self.alert: alert(reason)}

    def refused(self, session: ChatSession | None) -> Update:
        return {self.alert: alert(REFUSED)}

    def unanswered(self, session: ChatSession | None) -> Update:
        if session is None:
            return {self.alert: alert(REFUSED)}
        session.stop()
        return {**self._ended(session), self.alert: alert(REFUSED)}

    def stop(self, session: ChatSession | None) -> Update:
        """Ends the answer that runs; a question that still waits for its turn goes back into the box."""
        if session is None:
            return {self.box: idle()}
        if session.answering:
            session.stop()
            return {self.box: gr.skip()}
        return self._ended(session)

    def retry(self, session: ChatSession, data: gr.RetryData, *asked: Any) -> Update:
        session.retry(_index(data.index))
        return {self.asked: asked, self.box: busy(), **self._rewound(session)}

    def edit(self, session: ChatSession, data: gr.EditData, *asked: Any) -> Update:
        try:
            session.edit(_index(data.index), from_markdown(str(data.value)))
        except MmllmError as error:
            return {**self._shown(session), self.alert: alert(str(error))}
        return {self.asked: asked, self.box: busy(), **self._rewound(session)}

    def undo(self, session: ChatSession, data: gr.UndoData) -> Update:
        return {**self._taken_back(session, _index(data.index)), **self._rewound(session)}

    def clear(self, session: ChatSession | None) -> Update:
        session = session or ChatSession()
        session.clear()
        return {self.session: session, self.box: idle(), **self._rewound(session)}

    def _shown(self, session: ChatSession, note: str = "") -> Update:
        """The conversation as the page shows it; ``note`` stands where the answer will come."""
        messages = [{"role": message["role"], "content": content(message)} for message in session.messages]
        if note:
            messages.append({"role": "assistant", "content": note})
        return {self.chat: messages}

    def _settled(self, session: ChatSession) -> Update:
        """The conversation after something that worked: an alert of before has had its time."""
        return {**self._shown(session), self.alert: alert("")}

    def _rewound(self, session: ChatSession) -> Update:
        """The same, and the answer that a comment would be about may be gone."""
        return {**self._settled(session), self.comment_row: gr.update(visible=False)}

    def _taken_back(self, session: ChatSession, index: int | None = None) -> Update:
        text, paths = session.undo(index)
        return {self.box: idle(), self.back: gr.update(value={"text": text, "files": paths}), **self._shown(session)}

    def _ended(self, session: ChatSession) -> Update:
        """No answer is coming: a question without any goes back into the box."""
        return self._taken_back(session) if session.waiting else {self.box: idle(), **self._shown(session)}

    # ---- the same for programs, which have no box and no comments

    def send_of_program(self, session: ChatSession | None, message: dict[str, Any], request: gr.Request) -> Update:
        return self._results(self.send(session, message, request))

    def reply_of_program(self, session: ChatSession | None, *settings: Any) -> Iterator[Update]:
        yield from map(self._results, self.reply(session, (*settings, {})))

    def stop_of_program(self, session: ChatSession | None) -> Update:
        return self._results(self.stop(session))

    def clear_of_program(self, session: ChatSession | None) -> Update:
        return self._results(self.clear(session))

    def _results(self, update: Update) -> Update:
        theirs = (self.box, self.comment_row, self.asked)
        shown = {control: value for control, value in update.items() if control not in theirs}
        return {self.alert: gr.skip(), **shown}  # gradio takes an empty dictionary for a value

    # ---- feedback and files

    def like(self, session: ChatSession | None, data: gr.LikeData) -> Update:
        index = _index(data.index)
        if session is None or not 0 < index < len(session.messages):
            return {self.comment: gr.skip()}
        # The page sends an empty value when a thumb is taken back.
        taken_back = data.liked not in (True, False)
        session.rated = (index, "withdrawn" if taken_back else "up" if data.liked else "down")
        failed = self._record(session)
        if failed or taken_back:
            session.rated = None
        return {self.comment_row: gr.update(visible=session.rated is not None), self.comment: "", **failed}

    def add_comment(self, session: ChatSession | None, comment: str) -> Update:
        failed: Update = {}
        if comment.strip():
            if session is None or session.rated is None:
                failed = {self.alert: alert("The comment was not saved: the answer that it was about is gone.")}
            else:
                failed = self._record(session, comment.strip())
            if failed:
                return failed
        return {self.comment_row: gr.update(visible=False), self.comment: ""}

    def _record(self, session: ChatSession, comment: str = "") -> Update:
        """Writes the judgement down; returns the alert if that fails."""
        try:
            self.log.add(session.feedback(comment))
        except OSError as error:
            return {self.alert: alert(f"This was not saved: {self.log.path}: {error.strerror}.")}
        return {}

    def export(self, session: ChatSession | None, system: str | None) -> str:
        session = session or ChatSession()
        session.system_prompt = system or ""
        return session.export()

    # ---- the model

    def open_folder(self, folder: str) -> Update:
        try:
            found = [str(path.resolve()) for path in find_models(Path(folder.strip() or "."))]
        except (MmllmError, OSError) as error:
            return {self.alert: alert(str(error))}
        known = choices([*dict.fromkeys([*self.names, *found])])
        return {self.model: gr.update(choices=known, value=found[0]), self.folder: "", self.alert: alert("")}

    def pick(self, model: str) -> Update:
        self.shelf.warm(model)
        status = f"Loading {short(model)} …"
        timer = gr.Timer(0.5, active=True)
        return {self.status: status, self.timer: timer, self.alert: alert(""), **self._making({})}

    def poll(self, model: str) -> Update:
        """Called twice a second while a model loads."""
        problem = self.shelf.problem(model)
        if problem is not None:
            reason = str(problem) if isinstance(problem, MmllmError) else BUG
            status = f"{short(model)} could not be loaded. Choose another model below."
            return {self.status: status, self.alert: alert(reason), self.timer: gr.Timer(active=False)}
        if not self.shelf.ready(model):
            self.shelf.warm(model)  # another visitor's choice may have taken its place since
            return {self.status: f"Loading {short(model)} …"}
        assistant = self.shelf.get(model)
        kinds = known_modalities(assistant)
        takes, makes = (", ".join(["text", *map(plural, some)]) for some in (kinds, assistant.making))
        return {
            self.status: f"Model: {short(model)}. It takes {takes}, and answers in {makes}.",
            self.timer: gr.Timer(active=False),
            self.box: gr.update(file_types=file_types(kinds)),
            **self._making(assistant.making),
        }

    def _making(self, making: Mapping[str, Mapping[str, float]]) -> Update:
        """What the chosen model makes, and the panels for it."""
        return {self.making: {name: dict(numbers) for name, numbers in making.items()}, **self.generators(making)}


def _index(index: int | list[int] | tuple[int, int]) -> int:
    return index if isinstance(index, int) else index[0]


def _page_id(request: gr.Request) -> str:
    return str(request.session_hash)
