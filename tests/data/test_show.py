"""``mmllm data show``: supervised text stands out, media are one short bracket, bad samples are named."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_rows import row
from rich.console import Console

from mmllm.config.base import BuildContext
from mmllm.config.load import parse
from mmllm.config.run import RunConfig
from mmllm.data.readers import MessagesConfig
from mmllm.data.shard_writer import write_shards
from mmllm.data.show import run_show
from mmllm.errors import ConfigError

Write = Callable[..., Path]
IMAGE, SOUND = {"type": "image", "path": "red.png"}, {"type": "audio", "path": "tone.wav"}


def config(path: Path, **stage: Any) -> RunConfig:
    tree = {
        "inputs": {
            "image": {"encoder": {"kind": "clip", "arch": "ViT-B-32"}, "projector": {"kind": "mlp"}},
            "audio": {
                "encoder": {"kind": "whisper", "pretrained": "tiny"},
                "projector": {"kind": "linear"},
                "markers": True,
            },
        },
        "backbone": {"kind": "causal_lm", "pretrained": "x"},
    }
    model = parse({"model": tree}).model
    inputs = {n: p.model_copy(update={"encoder": p.encoder.tiny()}) for n, p in model.inputs.items()}
    tiny = model.model_copy(update={"inputs": inputs, "backbone": model.backbone.tiny()})
    data = [{"reader": {"kind": "messages", "path": str(path)}}]
    first = {"name": "align", "train": ["inputs.*.projector"], "lr": 1e-3, "data": data, "max_length": 4096, **stage}
    return RunConfig(model=tiny, stages=[first])  # type: ignore[list-item]


def shown(config: RunConfig, *, colour: bool = False, **options: Any) -> tuple[int, str]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=colour, color_system="standard" if colour else None, width=200)
    status = run_show(config, BuildContext(weights=False), console=console, **options)
    return status, out.getvalue()


def test_supervised_text_media_and_counts(media: Path, write: Write) -> None:
    path = write(row("s1", [IMAGE, {"type": "text", "text": "How wide?"}, SOUND], "forty", type="size"))
    status, text = shown(config(path))
    assert status == 0
    assert f"s1 ({path}:1) type='size'" in text
    assert "tokens, 40x10, red.png]" in text
    assert "<audio_start>[audio: " in text
    assert "0.10 s, tone.wav]<audio_end>" in text
    assert text.count("«") == 2  # the legend, and the one reply
    reply = text.rpartition("«")[2].partition("»")[0]
    assert reply.startswith("forty")
    assert "How wide?" not in reply
    # "batch of 1 x T: T tokens, S supervised": bytes are this tokenizer's tokens, plus what ends the turn.
    words = text.rpartition("batch of 1 x ")[2].replace(":", "").replace(",", "").split()
    assert words[0] == words[1]
    assert int(words[3]) == len("forty") + 1


def test_the_reply_is_coloured_and_nothing_else_is(media: Path, write: Write) -> None:
    _, text = shown(config(write(row("s1", "question", "answer"))), colour=True)
    green = [part.partition("\x1b[0m")[0] for part in text.split("\x1b[1;32m")[1:]]
    assert green[0] == "supervised text"
    assert any(part.startswith("answer") for part in green[1:])
    assert not any("question" in part for part in green)


def test_bad_samples_are_named_and_others_shown(media: Path, write: Write) -> None:
    path = write("{broken", row("long", "x" * 5000), row("gone", [{"type": "image", "path": "none.png"}]), row("good"))
    status, text = shown(config(path))
    assert status == 0
    for line, message in ((1, "not valid JSON"), (2, "max_length is 4096"), (3, "no such file")):
        assert any(f"{path}:{line}" in out and message in out for out in text.splitlines())
    assert "batch of 1 x " in text
    assert shown(config(write("{broken")))[0] == 1


def test_data_cannot_steer_the_terminal(write: Write) -> None:
    _, text = shown(config(write(row("s1", "a\x1b[2Jb [bold]c", "d"))))
    assert "\x1b" not in text
    assert "[bold]c" in text


def test_n_and_stage(write: Write) -> None:
    path = write(*(row(f"s{i}") for i in range(5)))
    _, text = shown(config(path), n=2)
    assert "batch of 2 x " in text
    with pytest.raises(ConfigError, match="no stage 'algn'; did you mean 'align'"):
        shown(config(path), stage="algn")


def test_shards_are_shown_as_files_are(media: Path, write: Write) -> None:
    path = write(row("s1", [IMAGE, {"type": "text", "text": "How wide?"}, SOUND], "forty", type="size"))
    write_shards(MessagesConfig(path=str(path)).open(BuildContext()), media / "shards")
    shards = {"kind": "webdataset", "path": str(media / "shards" / "*.tar")}
    told = config(path, data=[{"reader": shards}])
    status, text = shown(told)
    assert status == 0
    assert f"s1 ({media / 'shards' / '000000.tar'}:1) type='size'" in text
    size = (media / "red.png").stat().st_size
    assert f"tokens, 40x10, {size:,} bytes]" in text
    assert text.rpartition("batch of")[2] == shown(config(path))[1].rpartition("batch of")[2]
    mixed = config(
        path, mixture="tokens", data=[{"reader": shards}, {"reader": {"kind": "messages", "path": str(path)}}]
    )
    assert "2 samples in 2 sources, 2 samples an epoch" in shown(mixed)[1]
