"""The whole assistant on a fold that nothing was trained on: what it is trained on, and what is left as it is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "demo"))

import audio_model
import held_out_esc10
import train_audio_encoder
from evaluate import media_of

RATE = 16_000
MADE = [f"made-{index}" for index in range(12)]
FOLDERS = {"dog bark": "001 - Dog bark", "rain": "002 - Rain"}


def tone(path: Path, pitch: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * pitch / RATE * np.arange(RATE)), RATE, subtype="PCM_16")


def row(name: str, *media: tuple[str, str]) -> dict[str, Any]:
    content = [{"type": kind, "path": path} for kind, path in media] + [{"type": "text", "text": "What do you hear?"}]
    return {"id": name, "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "rain"}]}


def write(path: Path, *rows: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))


@pytest.fixture
def arguments(tmp_path: Path) -> Any:
    """A source of eight clips in four folds, and a work folder whose dialogues hold folds 1 to 3."""
    source, work = tmp_path / "source", tmp_path / "work"
    for fold in range(1, 5):
        for index, folder in enumerate(FOLDERS.values()):
            tone(source / folder / f"{fold}-{fold}{index}-A.wav", 200 * fold + 50 * index)
    tone(work / "data" / "audio" / "sound" / "1.flac", 1000)
    clips = [row(f"esc10-{fold}-{fold}{index}-A", ("audio", "x.wav")) for fold in (1, 2, 3) for index in (0, 1)]
    write(work / "sets" / "esc10" / "train.jsonl", *clips)
    made = [row(name, ("audio", "audio/sound/1.flac")) for name in MADE]
    real = row("real", ("audio", "audio/esc10/1.flac"))
    both = row("both", ("image", "images/1.png"), ("audio", "audio/sound/1.flac"))
    (work / "data" / "images").mkdir()
    Image.new("RGB", (64, 64), "red").save(work / "data" / "images" / "1.png")
    write(work / "data" / "pretrain.jsonl", *made, real, both, row("words"))
    write(work / "data" / "instruct.jsonl", *made, real, both, row("seen", ("image", "images/1.png")))
    words = ["--esc10", str(source), "--work", str(work), "--output", str(tmp_path / "out")]
    return held_out_esc10.parse([*words, "--align", "1", "--instruct", "1"])


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_dialogues_have_sounds_and_none_of_the_sets_clips(arguments: Any, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    tone(folder / "audio" / "a.wav", 300)
    write(folder / "train.jsonl", row("esc10-1-10-A", ("audio", "audio/a.wav")))
    held_out_esc10.dialogues(arguments.work / "data", folder, tmp_path, 0)
    assert [one["id"] for one in rows_of(tmp_path / "pretrain.jsonl")] == MADE
    assert [one["id"] for one in rows_of(tmp_path / "instruct.jsonl")] == [*MADE, "both"]
    paths = [part["path"] for one in rows_of(tmp_path / "esc10.jsonl") for part in media_of(one)]
    assert len(set(paths)) == held_out_esc10.ESC10[0]
    assert all((tmp_path / path).exists() for path in paths)


def test_a_fold_that_the_dialogues_hold_is_refused_before_anything_is_trained(
    arguments: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    run = held_out_esc10.run

    def only_prepare(*command: Any) -> None:
        begun.append(str(command[0]))
        run(*command)

    monkeypatch.setattr(held_out_esc10, "run", only_prepare)
    arguments.fold = 2
    with pytest.raises(ValueError, match=r"2 recordings .*20, 21.* choose the fold"):
        held_out_esc10.measure(arguments)
    assert begun == ["training/prepare_esc10.py"]


def test_another_take_of_a_recording_counts_as_the_recording() -> None:
    with pytest.raises(ValueError, match=r"1 recordings .*77"):
        held_out_esc10.check_apart([row("esc10-1-77-A")], [row("esc10-4-77-B"), row("esc10-4-78-A")], "split it again")
    held_out_esc10.check_apart([row("esc10-1-77-A")], [row("esc10-4-78-A")], "")


def test_only_what_hears_is_trained_and_the_fold_alone_is_asked(
    arguments: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, trained_on = held_out_esc10.run, []

    def with_a_random_encoder(*command: Any) -> None:
        if command[0] != "demo/train_audio_encoder.py":
            return run(*command)
        trained_on.extend(rows_of(command[command.index("--esc10") + 1] / "train.jsonl"))
        torch.manual_seed(7)
        folder = command[command.index("--output") + 1] / "whisper"
        return train_audio_encoder.export(audio_model.Encoder("eager"), audio_model.LogMel(), folder)

    monkeypatch.setattr(held_out_esc10, "run", with_a_random_encoder)
    scores = held_out_esc10.measure(arguments)

    assert sorted(one["id"] for one in trained_on) == [f"esc10-{f}-{f}{i}-A" for f in (1, 2, 3) for i in (0, 1)]
    (found,) = scores.values()
    assert found["n"] == 2
    assert found["majority"] == 0.5
    assert set(found) == {"n", "accuracy", "interval", "majority", "blind"}
    assert json.loads((arguments.output / "esc10.json").read_text()).keys() == scores.keys()

    final = arguments.output / "run" / "final"
    before, after = load_file(arguments.model / "parts.safetensors"), load_file(final / "parts.safetensors")
    # Frozen matrices are cast to bfloat16 while others are trained.
    changed = {name for name in before if not torch.equal(before[name].bfloat16(), after[name].bfloat16())}
    assert changed
    assert all(name.startswith("inputs.audio.projector.") for name in changed)
    new = json.loads((final / "references.json").read_text())["inputs.audio.encoder"]["pretrained"]
    assert Path(new) == arguments.output / "encoder" / "whisper"
