"""The example package: built, installed beside mmllm, found, planned, tried, trained and talked to, with mmllm as it is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mmllm

PACKAGE = Path(__file__).parent.parent / "examples" / "colour-encoder"
MARK = "====="

# Everything that the package's README runs, in one process: each would import torch anew.
COMMANDS = """
import io, runpy, sys
import pytest
from mmllm.cli import main

def run(*words):
    code = main(words)
    print("=====", words[0], code, flush=True)

sys.path.insert(0, ".")
assert pytest.main(["-q", "-p", "no:cacheprovider", "tests"]) == 0
print("===== pytest 0")
runpy.run_path("make_data.py", run_name="__main__")
run("list")
run("plan", "colours.yaml")
run("train", "colours.yaml", "--dry-run")
run("train", "colours.yaml")
for name in ("red", "green", "blue"):
    picture = next(str(p) for p in sorted(__import__("pathlib").Path("data").glob(f"*-{name}.png")))
    run("generate", "--model", "runs/colours", "--image", picture, "--prompt", "Which colour?")
sys.stdin = io.StringIO(f"/image {picture}\\nWhich colour?\\n/quit\\n")
run("chat", "--model", "runs/colours")
run("new", "mine.yaml", "--input", "image=colour:linear")
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What each command printed, in order."""
    folder = tmp_path_factory.mktemp("example")
    copy, target = folder / "colour-encoder", folder / "installed"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("runs", "data", "__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(target), str(copy)], check=True, timeout=300)
    # Only what was installed may be found, not the folder with the sources.
    shutil.rmtree(copy / "colour_encoder")
    paths = [str(target), str(Path(mmllm.__file__).parent.parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS], cwd=copy, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout.split(MARK)


def test_every_command_of_its_readme_succeeds(told: list[str]) -> None:
    ends = [part.splitlines()[0].split() for part in told[1:]]
    assert ends == [
        *(["pytest", "0"], ["list", "0"], ["plan", "0"], ["train", "0"], ["train", "0"]),
        *[["generate", "0"]] * 3,
        *(["chat", "0"], ["new", "0"]),
    ]


def test_its_kind_is_listed_with_its_package(told: list[str]) -> None:
    (line,) = [line for line in told[1].splitlines() if line.split()[:1] == ["colour"]]
    assert "Mean colours" in line
    assert line.endswith("[colour-encoder 0.1.0]")


def test_it_is_planned_tried_and_trained(told: list[str]) -> None:
    assert "colour" in told[2]
    assert "everything works" in told[3]
    assert "the model is in runs/colours/final" in told[4].replace("\n", "")


def test_it_answers_by_what_it_sees(told: list[str]) -> None:
    assert [part.splitlines()[1] for part in told[5:8]] == ["red", "green", "blue"]
    assert "blue" in told[8]
    assert "mine.yaml is written" in told[9]


def test_the_readme_names_the_commands_that_were_run() -> None:
    readme = (PACKAGE / "README.md").read_text()
    for words in (
        "plan colours.yaml",
        "train colours.yaml --dry-run",
        "generate --model runs/colours",
        "python make_data.py",
    ):
        assert words in readme
        assert words in (PACKAGE / "colours.yaml").read_text() or words.startswith("plan")
