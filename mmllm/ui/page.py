"""The chat page: what each of its controls does."""

from __future__ import annotations

import html
import logging
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import gradio as gr

from mmllm.chat.feedback import FeedbackLog
from mmllm.chat.session import PLURALS, ChatSession, Sampling, file_types, known_modalities
from mmllm.chat.shelf import ModelShelf, find_models
from mmllm.chat.store import SessionStore
from mmllm.errors import MmllmError
from mmllm.ui.assets import example_files, script
from mmllm.ui.layout import Controls, choices, short
from mmllm.ui.markup import from_markdown, to_markdown

BUG = "Something went wrong inside the assistant; details are in the console."
REFUSED = "That did not work: too many people are waiting, or a value on the page is out of range. Please try again."
UPDATE_SECONDS = 0.04  # while an answer streams the page is redrawn at most this often
END_SECONDS = 0.5  # how long a question waits for an answer that has its last word but has not ended yet
Update = dict[Any, Any]
_log = logging.getLogger(__name__)


def build_demo(shelf: ModelShelf, names: list[str], log: FeedbackLog) -> gr.Blocks:
    """The page as gradio Blocks. ``names``: the models to choose from; ``shelf`` loads them; ``log`` takes thumbs."""
    page = _Page(shelf, names, log)
    with gr.Blocks(title="mmllm chat", analytics_enabled=False, fill_height=True) as demo:
        page.lay_out(names, log.path)
        page.connect(demo)
    return demo


class _Page(Controls):
    """One method for each thing a user can do.

    Methods take the visitor's own ``ChatSession`` (None before the first message) and return a dictionary of updates.
    """

    def __init__(self, shelf: ModelShelf, names: list[str], log: FeedbackLog) -> None:
        self.shelf = shelf
        self.names = list(names)
        self.log = log
        self.sessions = SessionStore()

    def connect(self, demo: gr.Blocks) -> None:
        # One answer at a time, whoever asks. "multiple", because the button to send is back a moment before the page
        # counts the last answer as complete, and gradio would drop the answer to a question sent in that moment.
        device = {"concurrency_limit": 1, "concurrency_id": "device", "trigger_mode": "multiple"}
        quick = {"queue": False, "show_progress": "hidden"}
        private = {"api_visibility": "private"}
        hidden = {**quick, **private}
        page = [self.session, self.chat, self.box, self.alert]
        rewound = [*page, self.comment_row]
        asking = [self.session, self.model, self.system, self.temperature, self.top_p, self.max_tokens, self.seed]

        def guarded(event: Any, refused: Any = self.refused) -> Any:
            """``event``, with an alert when gradio itself refuses it, before or instead of calling our method."""
            event.failure(refused, self.session, page, **hidden)
            return event

        def answers(event: Any, **names: Any) -> None:
            progress = {"show_progress": "minimal", "show_progress_on": self.chat}
            guarded(guarded(event).success(self.reply, asking, page, **progress, **device, **names), self.unanswered)

        # The browser empties the box at once: words typed while the question travels are the next message's.
        self.box.submit(None, self.box, [self.sent, self.box], js=script("take"), **hidden)
        sending = {"api_name": "send", "trigger_mode": "multiple", **quick}
        sent = self.box.submit(self.send, [self.session, self.sent], page, **sending)
        sent.failure(None, self.sent, self.box, js="(message) => message", **hidden)
        answers(sent, api_name="reply")
        answers(self.chat.example_select(self.send_example, self.session, page, **hidden), **private)
        answers(self.chat.retry(self.retry, self.session, rewound, **hidden), **private)
        answers(self.chat.edit(self.edit, self.session, rewound, **hidden), **private)
        guarded(self.chat.undo(self.undo, self.session, rewound, **hidden))
        guarded(self.chat.clear(self.clear, self.session, rewound, api_name="clear_icon", **hidden))
        guarded(self.new.click(self.clear, self.session, rewound, api_name="clear", **quick))
        self.box.stop(self.stop, self.session, page, api_name="stop", **quick)
        commenting = [self.comment_row, self.comment, self.alert]
        guarded(self.chat.like(self.like, self.session, commenting, **hidden))
        for event in (self.comment_send.click, self.comment.submit):
            guarded(event(self.add_comment, [self.session, self.comment], commenting, **hidden))
        guarded(self.save.click(self.export, [self.session, self.system], self.saved, **hidden)).success(
            None, self.saved, None, js=script("download"), **hidden
        )
        for event in (self.open.click, self.folder.submit):
            guarded(event(self.open_folder, self.folder, [self.model, self.folder, self.alert], **hidden))
        self.model.change(self.pick, self.model, [self.status, self.timer, self.alert], **hidden)
        demo.load(self.restore, self.key, page, js=script("on_load"), **hidden)
        self.timer.tick(self.poll, self.model, [self.status, self.timer, self.box, self.alert], **hidden)

    # ---- the conversation

    def restore(self, key: str, request: gr.Request) -> Update:
        """The conversation this tab had before it was loaded again; a question without answer goes back to the box.

        On a slow start the visitor's first question may come before or during this; everything it drew stays then,
        its Stop button too.
        """
        page = _page_id(request)
        session = self.sessions.open(key, page)
        if self.sessions.asked(page):
            return {self.session: session}
        if session.answering:  # for the page that is gone
            session.stop()
            session.idle.wait(END_SECONDS)
        if session.waiting:
            return {self.session: session, **self._taken_back(session)}
        return {self.session: session, **(self._shown(session) if session.messages else {})}

    def send(self, session: ChatSession | None, message: dict[str, Any], request: gr.Request) -> Update:
        session = session or self.sessions.of_page(_page_id(request))
        try:
            return self._ask(session, message["text"], message["files"])
        except MmllmError as error:
            return {self.session: session, self.box: gr.update(value=message), self.alert: _alert(str(error))}

    def send_example(self, session: ChatSession | None, data: gr.SelectData, request: gr.Request) -> Update:
        session = session or self.sessions.of_page(_page_id(request))
        text = data.value["text"]
        try:
            return self._ask(session, text, example_files(text))
        except MmllmError as error:
            return {self.session: session, self.alert: _alert(str(error))}

    def _ask(self, session: ChatSession, text: str, paths: list[str]) -> Update:
        session.idle.wait(END_SECONDS)
        session.add_user(text, paths)
        return {self.session: session, self.box: _busy(), **self._settled(session)}

    def reply(
        self,
        session: ChatSession | None,
        model: str,
        system: str | None,
        temperature: float,
        top_p: float,
        max_tokens: int,
        seed: int | None,
    ) -> Iterator[Update]:
        if session is None or not session.waiting:  # taken back while it stood in the queue
            yield {self.box: gr.skip()}
            return
        session.system_prompt = system or ""
        try:
            # Numbers of any size are seeds; torch takes 63 bits of them.
            sampling = Sampling(max_tokens, temperature, top_p, None if seed is None or seed < 0 else seed % 2**63)
            note = "…" if self.shelf.ready(model) else "Loading the assistant…"
            yield {self.box: _busy(), **self._shown(session, note)}
            assistant = self.shelf.get(model)
            redraw = time.monotonic() + UPDATE_SECONDS
            if session.waiting:  # still: not taken back while the model was loaded
                with closing(session.reply(assistant, sampling)) as pieces:  # a visitor who leaves stops the model too
                    for _ in pieces:
                        if time.monotonic() >= redraw:
                            yield self._shown(session)
                            redraw = time.monotonic() + UPDATE_SECONDS
            yield {self.box: _idle(), **self._shown(session)}
        except Exception as error:
            yield self._failed(session, error)

    def _failed(self, session: ChatSession, error: Exception) -> Update:
        """The reason in plain words; a question without any answer goes back into the box, to be sent again."""
        if isinstance(error, MmllmError):
            reason = session.plain(str(error))
        else:
            _log.error("the assistant failed", exc_info=error)
            reason = BUG
        return {**self._ended(session), self.alert: _alert(reason)}

    def refused(self, session: ChatSession | None) -> Update:
        return {self.alert: _alert(REFUSED)}

    def unanswered(self, session: ChatSession | None) -> Update:
        if session is None:
            return {self.alert: _alert(REFUSED)}
        session.stop()
        return {**self._ended(session), self.alert: _alert(REFUSED)}

    def stop(self, session: ChatSession | None) -> Update:
        """Ends the answer that runs; a question that still waits for its turn goes back into the box."""
        if session is None:
            return {self.box: _idle()}
        if session.answering:
            session.stop()
            return {self.box: gr.skip()}
        return self._ended(session)

    def retry(self, session: ChatSession, data: gr.RetryData) -> Update:
        session.retry(_index(data.index))
        return {self.box: _busy(), **self._rewound(session)}

    def edit(self, session: ChatSession, data: gr.EditData) -> Update:
        try:
            session.edit(_index(data.index), from_markdown(str(data.value)))
        except MmllmError as error:
            return {**self._shown(session), self.alert: _alert(str(error))}
        return {self.box: _busy(), **self._rewound(session)}

    def undo(self, session: ChatSession, data: gr.UndoData) -> Update:
        return {**self._taken_back(session, _index(data.index)), **self._rewound(session)}

    def clear(self, session: ChatSession | None) -> Update:
        session = session or ChatSession()
        session.clear()
        return {self.session: session, self.box: _idle(), **self._rewound(session)}

    def _shown(self, session: ChatSession, note: str = "") -> Update:
        """The conversation as the page shows it; ``note`` stands where the answer will come."""
        messages = [{"role": message["role"], "content": _content(message)} for message in session.messages]
        if note:
            messages.append({"role": "assistant", "content": note})
        return {self.chat: messages}

    def _settled(self, session: ChatSession) -> Update:
        """The conversation after something that worked: an alert of before has had its time."""
        return {**self._shown(session), self.alert: _alert("")}

    def _rewound(self, session: ChatSession) -> Update:
        """The same, and the answer that a comment would be about may be gone."""
        return {**self._settled(session), self.comment_row: gr.update(visible=False)}

    def _taken_back(self, session: ChatSession, index: int | None = None) -> Update:
        text, paths = session.undo(index)
        return {self.box: _idle(value={"text": text, "files": paths}), **self._shown(session)}

    def _ended(self, session: ChatSession) -> Update:
        """No answer is coming: a question without any goes back into the box."""
        return self._taken_back(session) if session.waiting else {self.box: _idle(), **self._shown(session)}

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
                failed = {self.alert: _alert("The comment was not saved: the answer that it was about is gone.")}
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
            return {self.alert: _alert(f"This was not saved: {self.log.path}: {error.strerror}.")}
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
            return {self.alert: _alert(str(error))}
        known = choices([*dict.fromkeys([*self.names, *found])])
        return {self.model: gr.update(choices=known, value=found[0]), self.folder: "", self.alert: _alert("")}

    def pick(self, model: str) -> Update:
        self.shelf.warm(model)
        status = f"Loading {short(model)} …"
        return {self.status: status, self.timer: gr.Timer(0.5, active=True), self.alert: _alert("")}

    def poll(self, model: str) -> Update:
        """Called twice a second while a model loads."""
        problem = self.shelf.problem(model)
        if problem is not None:
            reason = str(problem) if isinstance(problem, MmllmError) else BUG
            status = f"{short(model)} could not be loaded. Choose another model below."
            return {self.status: status, self.alert: _alert(reason), self.timer: gr.Timer(active=False)}
        if not self.shelf.ready(model):
            self.shelf.warm(model)  # another visitor's choice may have taken its place since
            return {self.status: f"Loading {short(model)} …"}
        kinds = known_modalities(self.shelf.get(model))
        takes = ", ".join(["text", *(PLURALS[kind] for kind in kinds)])
        return {
            self.status: f"Model: {short(model)}. It takes {takes}, and answers in text.",
            self.timer: gr.Timer(active=False),
            self.box: gr.update(file_types=file_types(kinds)),
        }


def _index(index: int | list[int] | tuple[int, int]) -> int:
    return index if isinstance(index, int) else index[0]


def _page_id(request: gr.Request) -> str:
    return str(request.session_hash)


def _content(message: dict[str, Any]) -> list[Any]:
    shown = [_part(part) for part in message["content"] if part.get("text") != ""]
    return shown or ["*Stopped before the first word.*"]


def _part(part: dict[str, Any]) -> Any:
    if part["type"] == "text":
        return to_markdown(part["text"])
    if "path" in part:
        return {"path": part["path"]}
    done, total = part["making"].progress
    return f"*Making the {part['type']}: {f'step {done} of {total}' if total else 'waiting'} …*"


def _busy() -> Any:
    return gr.update(submit_btn=False, stop_btn=True)


def _idle(**update: Any) -> Any:
    return gr.update(submit_btn=True, stop_btn=False, **update)


def _alert(reason: str) -> Any:
    return gr.update(value=f'<p role="alert">{html.escape(reason)}</p>', visible=bool(reason))
