"""The command line: help, list, errors and exit codes. Commands with a model run in their own areas' tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmllm.cli import build_parser, find_config, main


def test_list_shows_every_kind_with_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    listing = json.loads(capsys.readouterr().out)
    assert {"clip", "whisper"} <= set(listing["components"]["encoder"])
    assert {"linear", "mlp", "qformer", "cross_attention"} <= set(listing["components"]["input_projector"])
    assert all(text for kinds in listing["components"].values() for text in kinds.values())
    assert "llava/llava-1.5-7b" in listing["configs"]
    assert listing["packages"].keys() == listing["components"].keys()
    assert not any(listing["packages"].values())


def test_shipped_configurations_are_found_by_name() -> None:
    assert find_config("llava-1.5-7b").is_file()
    assert find_config("my.yaml") == Path("my.yaml")


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["plan", "nowhere.yaml"], 2, "cannot read the file"),
        (["generate", "--model", "nowhere", "--prompt", "x"], 1, "no model there"),
        (["eval", "--model", "nowhere", "--data", "x"], 1, "no model there"),
        (["data", "validate", "nowhere.jsonl"], 1, "nowhere.jsonl"),
        (["plan", "/nonexistent/x"], 2, "cannot read the file"),
        (["plan", "*"], 2, "cannot read the file"),
        (["train", "clip-qformer-whisper-mlp", "output=/proc/nope"], 1, "output: cannot make the folder /proc/nope"),
        (["train", "clip-qformer-whisper-mlp", f"output={__file__}"], 1, "output: cannot make the folder"),
        (["generate", "--prompt", "x", "--device", "bogus"], 1, "device 'bogus' cannot be used here"),
        (["generate", "--prompt", "x", "--device", "cuda:99"], 1, "device 'cuda:99' cannot be used here"),
        (["plan", "clip-qformer-whisper-mlp", "--json", "seed=x"], 2, "seed: Input should be a valid integer"),
    ],
)
def test_faults_are_sentences_not_tracebacks(
    arguments: list[str], code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert text in captured.out + captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["plan", "clip-qformer-whisper-mlp", "--json", "--jsn"], "unrecognized arguments: --jsn"),
        (["plan", "clip-qformer-whisper-mlp", "--json", "word"], "unrecognized arguments: word"),
        (["list", "a.b=c"], "unrecognized arguments: a.b=c"),
        (["eval", "--data", "x", "--batch-size", "-1"], "-1; expected at least 1"),
        (["eval", "--data", "x", "--batch-size", "0"], "0; expected at least 1"),
        (["data", "show", "c.yaml", "--n", "0"], "0; expected at least 1"),
    ],
)
def test_wrong_usage_is_told(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert text in capsys.readouterr().err


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("list", "new", "plan", "train", "chat", "generate", "eval", "demo", "data"):
        with pytest.raises(SystemExit) as exit:
            build_parser().parse_args([command, "--help"])
        assert exit.value.code == 0
        assert command in capsys.readouterr().out


def test_no_command_prints_help_and_version_prints_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("mmllm ")
