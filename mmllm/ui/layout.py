"""The controls of the chat page, where they stand, and their colours. What they do is in ``mmllm.ui.page``."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from mmllm.chat.kept import MAX_CHATS, MAX_MEDIA_BYTES
from mmllm.chat.session import PLURALS, SUFFIXES, file_types
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
# gradio draws what is in a closed accordion (False) only when that is opened, and a frame later puts the first values
# back, over whatever has been typed by then. An accordion that is merely not open is drawn whole from the start.
CLOSED = 0
ABSENT = "absent"  # the class of what the chosen model does not have
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
            with gr.Column(min_width=300), gr.Accordion("Model", open=CLOSED):
                self.model = gr.Radio(choices(names), value=first, label="Model")
                with gr.Row():
                    self.folder = gr.Textbox(label="Open a model folder", placeholder="runs/my-model", scale=1)
                    self.open = gr.Button("Open", size="sm", scale=0)
            with gr.Column(min_width=300), gr.Accordion("Parameters", open=CLOSED):
                self.system = gr.Textbox("", label="System prompt", placeholder="None", lines=2, max_lines=6)
                self.temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0: the likeliest word")
                self.top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", info="1: all words may be drawn")
                self.max_tokens = gr.Slider(1, 1024, 256, step=1, label="Most tokens in an answer")
                self.seed = gr.Number(-1, precision=0, label="Seed", info=ANY_SEED)
            with gr.Column(min_width=300), gr.Accordion("Earlier chats", open=CLOSED) as self.history:
                gr.Markdown(KEPT, elem_id="kept")
                self.earlier = gr.Radio([], label="Open a chat", elem_id="earlier")
                self.forget = gr.Button("Delete these", size="sm")
        with gr.Column(elem_id="small-print"):
            self.status = gr.Markdown(f"Loading {short(first)} …")
            with gr.Column(elem_id="generators"):
                self._lay_out_generators()
            gr.Markdown(f"A thumb up or down saves the words of that exchange (no media) to `{feedback}`.")
        self.making = gr.State({})  # the numbers of the chosen model's generators, once it is there
        self.asked = gr.State(None)  # the settings as they were when the question was sent
        self.saved, self.key, self.kept, self.chosen = [gr.Textbox(visible=False) for _ in range(4)]
        # The page's own events keep what is typed meanwhile; those for programs have simpler results.
        self.programs = {name: gr.Button(visible=False) for name in ("send", "reply", "stop", "clear")}
        self.timer = gr.Timer(0.5)

    def _lay_out_generators(self) -> None:
        """Steps, guidance and seed for each modality; ``generators`` shows those that a model has.

        All of them are there from the start and not drawn for each model, so that their values travel with a question.
        """
        self.panels: dict[str, gr.Accordion] = {}
        self.numbers: dict[tuple[str, str], gr.Slider | gr.Number] = {}
        for name, media in PLURALS.items():
            with gr.Accordion(f"{media.capitalize()} it makes", open=CLOSED, elem_classes=ABSENT) as self.panels[name]:
                for option, (top, step) in RANGES.items():
                    label = f"{option.capitalize()} of {media}"
                    slider = gr.Slider(step, top, step, step=step, label=label, interactive=True)
                    self.numbers[name, option] = slider
                seed = gr.Number(-1, precision=0, label=f"Seed of {media}", info=ANY_SEED, interactive=True)
                self.numbers[name, "seed"] = seed

    def generators(self, making: Mapping[str, Mapping[str, float]]) -> dict[Any, Any]:
        """Updates: the panels of the modalities in ``making``, each at its generator's own numbers; no others."""
        updates = {panel: _present(name in making) for name, panel in self.panels.items()}
        for (name, option), control in self.numbers.items():
            own = making.get(name, {}).get(option)
            if option == "seed":
                updates[control] = -1
            elif own is None:
                updates[control] = _present(False)
            else:
                top, step = RANGES[option]
                limits = {"minimum": min(step, own), "maximum": max(top, own)}
                updates[control] = _present(True, value=own, info=f"its own: {own:g}", **limits)
        return updates

    def wishes(self, making: Mapping[str, Mapping[str, float]], values: Sequence[Any]) -> dict[str, dict[str, Any]]:
        """What ``values``, those of ``numbers``, change of the generators' own numbers ``making``."""
        wishes: dict[str, dict[str, Any]] = {}
        for (name, option), value in zip(self.numbers, values, strict=True) if making else ():
            own, number = making.get(name), seed_of(value) if option == "seed" else value
            if own is not None and (option in own or option == "seed") and number not in (None, own.get(option)):
                wishes.setdefault(name, {})[option] = number
        return wishes

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


def _present(there: bool, **changes: Any) -> Any:
    """``changes`` of a control that the chosen model has or, if not ``there``, has not."""
    return gr.update(elem_classes=[] if there else [ABSENT], **changes)


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
