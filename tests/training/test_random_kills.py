"""A run that is killed at any moment ends in the same bits: pictures and sounds, packing, accumulation, saving at once or
meanwhile."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from typing import Any

import children
import pytest
import systems

from mmllm.config.base import BuildContext
from mmllm.config.load import load
from mmllm.training import checkpoint
from mmllm.training.run import train

# Two stages of four and two steps; two micro-batches a step; LoRA has dropout. One checkpoint is kept.
STAGES = (
    systems.stage(train=["inputs.*.projector", "backbone.new_tokens"], save_every=1, max_steps=4, epochs=None),
    systems.stage("instruct", train=["inputs.*.projector", "backbone.adapter"], save_every=1, max_steps=2, epochs=None),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """The folder of an uninterrupted run, and how many calls it makes: see ``children.count_events``."""
    folder = tmp_path_factory.mktemp("whole")
    systems.write_config(folder, *STAGES, keep_last=1)
    counting = children.start(folder, (children.count_events, folder / "counts.json"), (children.train, folder))
    assert children.exit_codes(counting) == [0], children.output(folder)
    return folder, json.loads((folder / "counts.json").read_text())


def killed_and_resumed(folder: Path, whole: tuple[Path, dict[str, int]], seed: int) -> None:
    """Kill with SIGKILL at random calls, half of them while a checkpoint is written, until a run comes through."""
    uninterrupted, counts = whole
    draw = random.Random(seed)
    kind = ("all", "saving")[seed % 2]
    changes: dict[str, Any] = {"save_async": True} if seed % 4 >= 2 else {}
    systems.write_config(folder, *STAGES, keep_last=1, **changes)
    at = draw.randrange(1, counts[kind] + 1)
    dying = children.start(folder, (children.count_events, None, kind, at), (children.train, folder))
    (code,) = children.exit_codes(dying)
    # With a thread that writes, the number of calls differs from run to run, and the last may never come.
    assert code == -signal.SIGKILL or (changes and code == 0), children.output(folder)
    found = checkpoint.checkpoints(folder / "run")
    assert all(checkpoint.verify(path) is None for path in found)
    train(load(folder / "config.yaml"), BuildContext(root=folder), resume=True)
    assert systems.final_state(folder / "run") == systems.final_state(uninterrupted / "run"), (kind, at)
    assert systems.metrics(folder / "run") == systems.metrics(uninterrupted / "run"), (kind, at)
    left = [path.name for path in (folder / "run").rglob(".*") if path.is_dir()]
    assert not left, f"{kind} {at}: {left}"


@pytest.mark.parametrize("seed", range(6))
def test_T01_killed_anywhere(whole: tuple[Path, dict[str, int]], tmp_path: Path, seed: int) -> None:
    killed_and_resumed(tmp_path, whole, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6, 56))
def test_T01_killed_at_fifty_places(whole: tuple[Path, dict[str, int]], tmp_path: Path, seed: int) -> None:
    killed_and_resumed(tmp_path, whole, seed)
