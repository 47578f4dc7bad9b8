"""The chat page: its layout, and what each control does. The only file that imports gradio."""

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
from mmllm.chat.session import PLURALS, SUFFIXES, ChatSession, Sampling, file_types, known_modalities, text_of
from mmllm.chat.shelf import EMBEDDED, ModelShelf, find_models
from mmllm.chat.store import SessionStore
from mmllm.errors import MmllmError
from mmllm.ui.assets import EXAMPLES, example_files, script
from mmllm.ui.markup import from_markdown, to_markdown

BUG = "Something went wrong inside the assistant; details are in the console."
ABOUT = (
    "Ask about a picture or a sound. The embedded assistant is very small: it knows simple shapes, everyday sounds and "
    "spoken digits, not the wide world, and it makes mistakes. Everything stays on this computer."
)
UPDATE_SECONDS = 0.04  # while an answer streams the page is redrawn at most this often
Update = dict[Any, Any]
_log = logging.getLogger(__name__)


def build_demo(shelf: ModelShelf, names: list[str], log: FeedbackLog) -> gr.Blocks:
    """The page as gradio Blocks. ``names``: the models to choose from; ``shelf`` loads them; ``log`` takes thumbs."""
    page = _Page(shelf, names, log)
    with gr.Blocks(title="mmllm chat", analytics_enabled=False, fill_height=True) as demo:
        page.lay_out()
        page.connect(demo)
    return demo


class _Page:
    """The controls, and one method for each thing a user can do.

    Methods take the visitor's own ``ChatSession`` (None before the first message) and return a dictionary of updates.
    """

    def __init__(self, shelf: ModelShelf, names: list[str], log: FeedbackLog) -> None:
        self.shelf = shelf
        self.names = list(names)
        self.log = log
        self.sessions = SessionStore()

    # ---- layout

    def lay_out(self) -> None:
        first = self.names[0]
        self.session = gr.State(None)
        with gr.Row(elem_id="title"):
            gr.Markdown("# mmllm")
            self.save = gr.Button("Save chat", size="sm", scale=0)
            self.new = gr.Button("New chat", size="sm", scale=0)
        gr.Markdown(ABOUT, elem_id="about")
        self.chat = gr.Chatbot(
            label="Conversation",
            show_label=False,
            elem_id="chat",
            height="max(340px, calc(100dvh - 330px))",
            layout="bubble",
            editable="user",
            buttons=["copy", "copy_all"],
            sanitize_html=True,
            allow_tags=False,
            examples=[{"text": text, "files": example_files(text)} for text, _ in EXAMPLES],
            placeholder="### What would you like to know?\nTry one of these, or add a picture or a sound.",
            latex_delimiters=[
                {"left": "$$", "right": "$$", "display": True},
                {"left": "\\[", "right": "\\]", "display": True},
                {"left": "\\(", "right": "\\)", "display": False},
            ],
        )
        self.alert = gr.HTML(visible=False, elem_id="alert")
        self.box = gr.MultimodalTextbox(
            label="Message",
            show_label=False,
            elem_id="box",
            placeholder="Ask about a picture or a sound",
            sources=["upload", "microphone"],
            file_types=file_types(tuple(SUFFIXES)),
            file_count="multiple",
            max_plain_text_length=100_000,
        )
        with gr.Row(visible=False, elem_id="comment-row") as self.comment_row:
            self.comment = gr.Textbox(
                label="Thank you, saved. What was good or bad about it? (optional)", max_lines=3, scale=1
            )
            self.comment_send = gr.Button("Add comment", size="sm", scale=0)
        with gr.Row(elem_id="settings"):
            with gr.Column(min_width=300), gr.Accordion("Model", open=False):
                self.model = gr.Radio(_choices(self.names), value=first, label="Model")
                with gr.Row():
                    self.folder = gr.Textbox(label="Open a model folder", placeholder="runs/my-model", scale=1)
                    self.open = gr.Button("Open", size="sm", scale=0)
            with gr.Column(min_width=300), gr.Accordion("Parameters", open=False):
                self.system = gr.Textbox("", label="System prompt", placeholder="None", lines=2, max_lines=6)
                self.temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0: the likeliest word")
                self.top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", info="1: all words may be drawn")
                self.max_tokens = gr.Slider(1, 1024, 256, step=1, label="Most tokens in an answer")
                self.seed = gr.Number(-1, precision=0, minimum=-1, label="Seed", info="-1: a new one each time")
        with gr.Column(elem_id="small-print"):
            self.status = gr.Markdown(f"Loading {_short(first)} …")
            gr.Markdown(f"A thumb up or down saves the words of that exchange (no media) to `{self.log.path}`.")
        self.saved = gr.Textbox(visible=False)
        self.key = gr.Textbox(visible=False)
        self.timer = gr.Timer(0.5)

    def connect(self, demo: gr.Blocks) -> None:
        # One answer at a time, whoever asks. "multiple", because the button to send is back a moment before the page
        # counts the last answer as complete, and gradio would drop the answer to a question sent in that moment.
        device = {"concurrency_limit": 1, "concurrency_id": "device", "trigger_mode": "multiple"}
        quick = {"queue": False, "show_progress": "hidden"}
        hidden = {**quick, "api_visibility": "private"}
        page = [self.session, self.chat, self.box, self.alert]
        asking = [self.session, self.model, self.system, self.temperature, self.top_p, self.max_tokens, self.seed]

        def answers(event: gr.events.Dependency, **names: Any) -> None:
            event.success(
                self.reply, asking, page, show_progress="minimal", show_progress_on=self.chat, **device, **names
            )

        sent = self.box.submit(self.send, [self.session, self.box], page, api_name="send", **quick)
        answers(sent, api_name="reply")
        private = {"api_visibility": "private"}
        answers(self.chat.example_select(self.send_example, self.session, page, **hidden), **private)
        answers(self.chat.retry(self.retry, self.session, page, **hidden), **private)
        answers(self.chat.edit(self.edit, self.session, page, **hidden), **private)
        self.chat.undo(self.undo, self.session, page, **hidden)
        self.chat.clear(self.clear, self.session, page, **hidden)
        self.new.click(self.clear, self.session, page, api_name="clear", **quick)
        self.box.stop(self.stop, self.session, None, api_name="stop", **quick)
        self.chat.like(self.like, self.session, [self.comment_row, self.comment], **hidden)
        comments = [self.session, self.comment]
        for event in (self.comment_send.click, self.comment.submit):
            event(self.add_comment, comments, [self.comment_row, self.comment], **hidden)
        self.save.click(self.export, [self.session, self.system], self.saved, **hidden).then(
            None, self.saved, None, js=script("download"), **hidden
        )
        for event in (self.open.click, self.folder.submit):
            event(self.open_folder, self.folder, [self.model, self.folder, self.alert], **hidden)
        self.model.change(self.pick, self.model, [self.status, self.timer], **hidden)
        demo.load(self.restore, self.key, page, js=script("on_load"), **hidden)
        self.timer.tick(self.poll, self.model, [self.status, self.timer, self.box], **hidden)

    # ---- the conversation

    def restore(self, key: str, request: gr.Request) -> Update:
        """The conversation this tab had before it was loaded again; a question without answer goes back to the box.

        On a slow start the visitor's first question may come before this does; it stays then.
        """
        session, asked = self.sessions.open(key, _page_id(request))
        if asked:
            return {self.session: session}
        box = _idle()
        if session.waiting:
            text, paths = session.undo()
            box = _idle(value={"text": text, "files": paths})
        return {self.session: session, self.box: box, **self._shown(session)}

    def send(self, session: ChatSession | None, message: dict[str, Any], request: gr.Request) -> Update:
        return self._ask(session or self.sessions.of_page(_page_id(request)), message["text"], message["files"])

    def send_example(self, session: ChatSession | None, data: gr.SelectData, request: gr.Request) -> Update:
        text = data.value["text"]
        return self._ask(session or self.sessions.of_page(_page_id(request)), text, example_files(text))

    def _ask(self, session: ChatSession, text: str, paths: list[str]) -> Update:
        try:
            session.add_user(text, paths)
        except MmllmError as error:
            return {self.session: session, self.alert: _alert(str(error))}
        return {self.session: session, self.box: _busy(value=None), **self._shown(session)}

    def reply(
        self,
        session: ChatSession | None,
        model: str,
        system: str | None,
        temperature: float,
        top_p: float,
        max_tokens: int,
        seed: int,
    ) -> Iterator[Update]:
        if session is None or not session.waiting:
            yield {self.box: gr.skip()}
            return
        session.system_prompt = system or ""
        try:
            sampling = Sampling(max_tokens, temperature, top_p, None if seed < 0 else seed)
            yield {
                self.box: _busy(),
                **self._shown(session, "Loading the assistant…" if not self.shelf.ready(model) else "…"),
            }
            assistant = self.shelf.get(model)
            redraw = time.monotonic() + UPDATE_SECONDS
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
        if not session.waiting:
            return {self.box: _idle(), **self._shown(session), self.alert: _alert(reason)}
        text, paths = session.undo()
        return {
            self.box: _idle(value={"text": text, "files": paths}),
            **self._shown(session),
            self.alert: _alert(reason),
        }

    def stop(self, session: ChatSession | None) -> None:
        if session is not None:
            session.stop()

    def retry(self, session: ChatSession, data: gr.RetryData) -> Update:
        session.retry(_index(data.index))
        return {self.box: _busy(), **self._shown(session)}

    def edit(self, session: ChatSession, data: gr.EditData) -> Update:
        try:
            session.edit(_index(data.index), from_markdown(str(data.value)))
        except MmllmError as error:
            return {**self._shown(session), self.alert: _alert(str(error))}
        return {self.box: _busy(), **self._shown(session)}

    def undo(self, session: ChatSession, data: gr.UndoData) -> Update:
        text, paths = session.undo(_index(data.index))
        return {self.box: _idle(value={"text": text, "files": paths}), **self._shown(session)}

    def clear(self, session: ChatSession | None) -> Update:
        session = session or ChatSession()
        session.clear()
        return {self.session: session, self.box: _idle(), **self._shown(session)}

    def _shown(self, session: ChatSession, note: str = "") -> Update:
        """The conversation as the page shows it, and no alert; ``note`` stands where the answer will come."""
        messages = [{"role": message["role"], "content": _content(message)} for message in session.messages]
        if note:
            messages.append({"role": "assistant", "content": note})
        return {self.chat: messages, self.alert: gr.update(value="", visible=False)}

    # ---- feedback and files

    def like(self, session: ChatSession | None, data: gr.LikeData) -> Update:
        index = _index(data.index)
        if session is None or not 0 < index < len(session.messages):
            return {self.comment: gr.skip()}
        session.rated = (index, "up" if data.liked else "down")
        self.log.add(session.feedback())
        return {self.comment_row: gr.update(visible=True), self.comment: ""}

    def add_comment(self, session: ChatSession | None, comment: str) -> Update:
        if session is not None and session.rated is not None and comment.strip():
            self.log.add(session.feedback(comment.strip()))
        return {self.comment_row: gr.update(visible=False), self.comment: ""}

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
        choices = _choices([*dict.fromkeys([*self.names, *found])])
        return {self.model: gr.update(choices=choices, value=found[0]), self.folder: "", self.alert: _alert("")}

    def pick(self, model: str) -> Update:
        self.shelf.warm(model)
        return {self.status: f"Loading {_short(model)} …", self.timer: gr.Timer(0.5, active=True)}

    def poll(self, model: str) -> Update:
        """Called twice a second while a model loads."""
        problem = self.shelf.problem(model)
        if problem is not None:
            reason = str(problem) if isinstance(problem, MmllmError) else BUG
            return {self.status: "", self.alert: _alert(reason), self.timer: gr.Timer(active=False)}
        if not self.shelf.ready(model):
            self.shelf.warm(model)  # another visitor's choice may have taken its place since
            return {self.status: f"Loading {_short(model)} …"}
        kinds = known_modalities(self.shelf.get(model))
        takes = ", ".join(["text", *(PLURALS[kind] for kind in kinds)])
        return {
            self.status: f"Model: {_short(model)}. It takes {takes}, and answers in text.",
            self.timer: gr.Timer(active=False),
            self.box: gr.update(file_types=file_types(kinds)),
        }


def _index(index: int | list[int] | tuple[int, int]) -> int:
    return index if isinstance(index, int) else index[0]


def _page_id(request: gr.Request) -> str:
    return str(request.session_hash)


def _content(message: dict[str, Any]) -> list[Any]:
    shown = [
        to_markdown(part["text"]) if part["type"] == "text" else {"path": part["path"]} for part in message["content"]
    ]
    return shown if message["role"] == "user" or text_of(message) else ["*Stopped before the first word.*"]


def _busy(**update: Any) -> Any:
    return gr.update(submit_btn=False, stop_btn=True, **update)


def _idle(**update: Any) -> Any:
    return gr.update(submit_btn=True, stop_btn=False, **update)


def _alert(reason: str) -> Any:
    return gr.update(value=f'<p role="alert">{html.escape(reason)}</p>', visible=bool(reason))


def _choices(names: list[str]) -> list[tuple[str, str]]:
    return [(_short(name), name) for name in names]


def _short(name: str) -> str:
    """A model's name for people: the last two levels of its folder."""
    return name if name == EMBEDDED else "/".join(Path(name).parts[-2:])


def theme() -> gr.themes.Base:
    """Quiet greys, one teal accent, and the fonts the computer already has."""
    sans = ["ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]
    mono = ["ui-monospace", "Cascadia Code", "Menlo", "Consolas", "monospace"]
    soft = gr.themes.Soft(primary_hue="teal", secondary_hue="teal", neutral_hue="slate", font=sans, font_mono=mono)
    return soft.set(
        body_background_fill="white",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_shadow="none",
        block_border_width="1px",
        block_title_background_fill="none",
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_200",
        block_title_text_weight="500",
        block_title_padding="0",
        color_accent="*primary_700",
        slider_color="*primary_600",
        checkbox_label_background_fill_selected="*primary_50",
        checkbox_label_text_color_selected="*primary_800",
        button_secondary_shadow="none",
        button_secondary_border_color="*neutral_200",
        input_shadow="none",
        input_border_width="1px",
        input_border_color="*neutral_200",
    )
