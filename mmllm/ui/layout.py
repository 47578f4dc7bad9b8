"""The controls of the chat page, where they stand, and their colours. What they do is in ``mmllm.ui.page``."""

from __future__ import annotations

import html
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from mmllm.chat.kept import MAX_CHATS, MAX_MEDIA_BYTES
from mmllm.chat.session import SUFFIXES, file_types, plural
from mmllm.chat.shelf import EMBEDDED
from mmllm.ui.assets import EXAMPLES, example_files

ABOUT = (
    "Ask about a picture or a sound. The embedded assistant is very small: it knows simple shapes, everyday sounds and "
    "spoken digits, not the wide world, and it makes mistakes. Everything stays on this computer."
)
KEPT = (
    f"This browser keeps the latest {MAX_CHATS} chats, each with up to {MAX_MEDIA_BYTES // 2**20} MB of its latest pictures "
    "and sounds; of older ones the name stays. Whoever uses this browser can read them. The bin above deletes the open chat. "
    "Settings and thumbs are not kept."
)
ANY_SEED = "empty or below 0: a new one each time"
RANGES = {"steps": (100, 1), "guidance": (20, 0.5)}
# A longer pasted text would silently become a file, of a kind that no model takes. As text it gets an answer or a reason.
LONGEST_TEXT = 10**9


class Controls:
    """The controls, by name. Made inside a ``gr.Blocks``; ``names`` are the models to choose from, the first is chosen."""

    def lay_out(self, names: list[str], feedback: Path) -> None:
        first = names[0]
        self.session = gr.State(None)
        with gr.Row(elem_id="title"):
            gr.Markdown("# mmllm")
            self.save = gr.Button("Save chat", size="sm", scale=0)
            self.new = gr.Button("New chat", size="sm", scale=0)
        gr.Markdown(ABOUT, elem_id="about")
        # gradio's own button for this copies the addresses of files on this computer.
        self.copy = gr.Button("Copy conversation")
        self.chat = gr.Chatbot(
            label="Conversation",
            show_label=False,
            elem_id="chat",
            height="max(340px, calc(100dvh - 330px))",
            layout="bubble",
            editable="user",
            group_consecutive_messages=False,  # the editor of a group takes a file for its text
            buttons=["copy", self.copy],
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
        self.alert = gr.HTML(label="Alert", visible=False, elem_id="alert")
        self.box = self._message_box(elem_id="box")
        self.sent = self._message_box(visible=False)  # what was in the box when it was sent
        self.back = self._message_box(visible=False)  # what comes back into the box, unanswered
        with gr.Row(visible=False, elem_id="comment-row") as self.comment_row:
            self.comment = gr.Textbox(
                label="Thank you, saved. What was good or bad about it? (optional)", max_lines=3, scale=1
            )
            self.comment_send = gr.Button("Add comment", size="sm", scale=0)
        with gr.Row(elem_id="settings"):
            with gr.Column(min_width=300), gr.Accordion("Model", open=False):
                self.model = gr.Radio(choices(names), value=first, label="Model")
                with gr.Row():
                    self.folder = gr.Textbox(label="Open a model folder", placeholder="runs/my-model", scale=1)
                    self.open = gr.Button("Open", size="sm", scale=0)
            with gr.Column(min_width=300), gr.Accordion("Parameters", open=False):
                self.system = gr.Textbox("", label="System prompt", placeholder="None", lines=2, max_lines=6)
                self.temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0: the likeliest word")
                self.top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", info="1: all words may be drawn")
                self.max_tokens = gr.Slider(1, 1024, 256, step=1, label="Most tokens in an answer")
                self.seed = gr.Number(-1, precision=0, label="Seed", info=ANY_SEED)
            with gr.Column(min_width=300), gr.Accordion("Earlier chats", open=False) as self.history:
                gr.Markdown(KEPT, elem_id="kept")
                self.earlier = gr.Radio([], label="Open a chat", elem_id="earlier")
                self.forget = gr.Button("Delete these", size="sm")
        self.making, self.media = gr.State({}), gr.State({})
        panels = (
            gr.Column()
        )  # not in an accordion: gradio draws what changes in an open one only when it is opened again
        with gr.Column(elem_id="small-print"):
            self.status = gr.Markdown(f"Loading {short(first)} …")
            with (
                panels
            ):  # when the status changes, since a state that an unqueued event sets does not tell of its change
                gr.render(inputs=self.making, triggers=[self.status.change], queue=False)(self._draw_generators)
            gr.Markdown(f"A thumb up or down saves the words of that exchange (no media) to `{feedback}`.")
        self.saved, self.key, self.kept, self.chosen = [gr.Textbox(visible=False) for _ in range(4)]
        # The page's own events keep what is typed meanwhile; those for programs have simpler results.
        self.programs = {name: gr.Button(visible=False) for name in ("send", "reply", "stop", "clear")}
        self.timer = gr.Timer(0.5)

    def _draw_generators(self, making: dict[str, dict[str, float]]) -> None:
        """Steps, guidance and seed for each modality that is made."""
        hidden = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        for name, numbers in making.items():
            with gr.Accordion(f"{plural(name).capitalize()} it makes", open=False):
                controls = {option: _slider(option, value, plural(name)) for option, value in numbers.items()}
                seed = f"Seed of {plural(name)}"
                controls["seed"] = gr.Number(-1, precision=0, label=seed, info=ANY_SEED, interactive=True)
            for option, control in controls.items():
                control.change(partial(_changed, name, option), [self.media, control], self.media, **hidden)

    def _message_box(self, **where: object) -> gr.MultimodalTextbox:
        return gr.MultimodalTextbox(
            label="Message",
            show_label=False,
            placeholder="Type a question",
            sources=["upload", "microphone"],
            file_types=file_types(tuple(SUFFIXES)),
            file_count="multiple",
            max_plain_text_length=LONGEST_TEXT,
            **where,
        )


def _slider(option: str, value: float, media: str) -> gr.Slider:
    top, step = RANGES[option]
    return gr.Slider(
        min(step, value),
        max(top, value),
        value,
        step=step,
        label=f"{option.capitalize()} of {media}",
        info=f"its own: {value:g}",
        interactive=True,
    )


def _changed(name: str, option: str, media: dict[str, dict[str, Any]], value: float | None) -> dict[str, Any]:
    """``media`` with ``option`` of ``name`` changed, or without it where ``value`` says "as you like"."""
    options = {**media.get(name, {}), option: seed_of(value) if option == "seed" else value}
    return {**media, name: {key: found for key, found in options.items() if found is not None}}


def seed_of(value: float | None) -> int | None:
    """The seed that a field of the page asks for: none when it is empty or negative. torch takes 63 bits of it."""
    return None if value is None or value < 0 else int(value) % 2**63


def busy() -> Any:
    """The box while an answer runs."""
    return gr.update(submit_btn=False, stop_btn=True)


def idle() -> Any:
    """The box when a message can be sent."""
    return gr.update(submit_btn=True, stop_btn=False)


def alert(reason: str) -> Any:
    """The line above the box; none for an empty ``reason``."""
    return gr.update(value=f'<p role="alert">{html.escape(reason)}</p>', visible=bool(reason))


def choices(names: list[str]) -> list[tuple[str, str]]:
    """The models called ``names`` as a chooser shows them."""
    return [(short(name), name) for name in names]


def short(name: str) -> str:
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
