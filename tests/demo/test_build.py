"""The order of the build's steps, and which of them are passed over."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "demo"))

import build


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Runs the build with steps that only write down their names; `broken` is one that fails."""
    done: list[str] = []

    def start(*words: str, broken: str = "") -> list[str]:
        def step(name: str) -> Callable[..., None]:
            def act(arguments: object) -> None:
                if name == broken:
                    raise subprocess.CalledProcessError(1, name)
                done.append(name)

            return act

        monkeypatch.setattr(build, "STEPS", {name: step(name) for name in build.STEPS})
        sets = [word for name in ("nlvr", "fsdd", "esc10") for word in (f"--{name}", str(tmp_path))]
        monkeypatch.setattr(sys, "argv", ["build.py", *sets, "--work", str(tmp_path / "work"), *words])
        done.clear()
        build.main()
        return list(done)

    return start


def test_every_step_follows_those_it_needs(start: Callable[..., list[str]]) -> None:
    order = start()
    assert sorted(order) == sorted(build.STEPS)
    assert order[0] == "prepare"
    assert order[-3:] == ["stages", "evaluate", "package"]
    assert order.index("whisper") < order.index("llm") < order.index("data")


def test_what_is_done_is_not_done_again_unless_asked(start: Callable[..., list[str]]) -> None:
    start("--steps", "prepare", "clip")
    assert "clip" not in start()
    assert start() == []
    assert start("--again", "--steps", "clip") == ["clip"]


def test_a_step_that_fails_ends_the_build_and_is_done_again(start: Callable[..., list[str]]) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        start(broken="llm")
    assert start()[0] in ("llm", "clip")
    assert start() == []


def test_a_smoke_build_does_every_step_at_little_cost_and_leaves_what_ships_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, argparse.Namespace] = {}
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "STEPS", {name: partial(given.__setitem__, name) for name in build.STEPS})
    sets = [word for name in ("nlvr", "fsdd", "esc10") for word in (f"--{name}", str(tmp_path))]
    monkeypatch.setattr(sys, "argv", ["build.py", *sets, "--smoke"])
    build.main()
    assert len(given) == 11
    arguments = given["stages"]
    assert arguments.work == tmp_path / "runs" / "smoke"
    assert arguments.package == arguments.work / "embedded"

    commands: list[list[str]] = []
    monkeypatch.setattr(build, "run", lambda *command: commands.append([str(word) for word in command]))
    build.llm(arguments)
    assert float(commands[-1][commands[-1].index("--minutes") + 1]) < 1
    for name in ("nlvr", "fsdd", "esc10"):
        (arguments.work / "sets" / name).mkdir(parents=True)
        (arguments.work / "sets" / name / "validation.jsonl").touch()
    commands.clear()
    build.evaluate(arguments)
    counts = [command[command.index("--limit" if "--limit" in command else "--count") + 1] for command in commands]
    assert [command[0] for command in commands] == [f"demo/evaluate{name}.py" for name in build.SMOKE_TRIALS]
    assert max(map(int, counts)) < 10
    arguments.smoke = False
    build.evaluate(arguments)
    assert not any(word in command for command in commands[4:] for word in ("--limit", "--count"))
