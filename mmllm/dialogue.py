"""The questions of ``mmllm new`` at a terminal. The answers offered are what is registered."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mmllm.config.base import kinds, summary
from mmllm.errors import MmllmError
from mmllm.new import DEFAULTS, NONE, STAGES, Choices, Way, is_code_generator, modalities

Read = Callable[[str], str]
Say = Callable[[str], None]


def dialogue(read: Read, say: Say) -> Choices:
    """Ask for everything by ``read``, which shows a prompt and returns a line, and ``say``.

    Raises ``MmllmError`` when the input ends before that.
    """
    try:
        return _asked(read, say)
    except (EOFError, KeyboardInterrupt) as error:
        raise MmllmError("stopped before the last question; nothing was written") from error


def _asked(read: Read, say: Say) -> Choices:
    def kind(question: str, family: str, default: str | None = None, only: list[str] | None = None) -> str:
        offered = {name: summary(family, name) for name in only or kinds(family)}
        return one(question, offered, default or next(iter(offered)), read, say)

    choices = Choices()
    encoders, generators = modalities("encoder"), modalities("generator")
    for name in several("What goes in, beside text?", dict.fromkeys(encoders, ""), ["image"], read, say):
        encoder = kind(f"Encoder of {name}", "encoder", only=encoders[name])
        choices.inputs.append(Way(name, encoder, kind("Its projector", "input_projector", DEFAULTS["input_projector"])))
    choices.backbone = kind("Language model", "backbone", DEFAULTS["backbone"])
    adapters = {name: summary("adapter", name) for name in kinds("adapter")}
    adapters[NONE] = "all weights of the language model are trained"
    choices.adapter = one("Its adapter", adapters, DEFAULTS["adapter"], read, say)
    for name in several("What comes out, beside text?", dict.fromkeys(generators, ""), [], read, say):
        generator = kind(f"Generator of {name}", "generator", only=generators[name])
        projector = None
        if not is_code_generator("generator", generator):
            projector = kind("Its projector", "output_projector", DEFAULTS["output_projector"])
        choices.outputs.append(Way(name, generator, projector))
    stages = {name: stage.about for name, stage in STAGES.items() if stage.applies(choices)}
    choices.stages = several("Stages", stages, list(stages), read, say)
    return choices


def one(question: str, offered: Mapping[str, str], default: str, read: Read, say: Say) -> str:
    """One of ``offered`` (name: description), by name or number; an empty line is the default."""
    while True:
        found = _words(question, offered, [default], read, say)
        if len(found) == 1:
            return found[0]
        say("  one of them, please")


def several(question: str, offered: Mapping[str, str], default: list[str], read: Read, say: Say) -> list[str]:
    """Any of ``offered``, in the order of the answer; an empty line is the default, ``none`` none."""
    return _words(f"{question} (several with commas, {NONE})", offered, default, read, say)


def _words(question: str, offered: Mapping[str, str], default: list[str], read: Read, say: Say) -> list[str]:
    names = list(offered)
    say(question)
    for number, (name, about) in enumerate(offered.items(), start=1):
        say(f"  {number:>2}  {name:<18} {about}".rstrip())
    while True:
        line = read(f"[{', '.join(default) or NONE}] ").strip()
        words = [word.strip() for word in line.split(",") if word.strip()]
        if not words:
            return default
        if words == [NONE] and NONE not in offered:
            return []
        found = [names[int(word) - 1] if word.isdigit() and 0 < int(word) <= len(names) else word for word in words]
        if wrong := [word for word in found if word not in offered]:
            say(f"  {', '.join(wrong)}: not among the answers")
            continue
        return list(dict.fromkeys(found))
