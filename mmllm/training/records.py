"""What somebody needs who wants to repeat a run: its data files with their hashes, and where it was run.

``data.json``: for every stage its sources, and of each the files with size and SHA-256. Media are not in it: the rows name
them, and hashing them would mean reading all of them.

``environment.json``: one entry for each start of the run (a resumed one has several): versions, machine, commit.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import mmllm
from mmllm.config.families import ReaderConfig
from mmllm.config.run import DataSource, RunConfig
from mmllm.data.mixture import StageData
from mmllm.data.readers import Table
from mmllm.data.tables import SampleTable
from mmllm.pretrained import read_json
from mmllm.training.references import file_hash
from mmllm.training.report import write_whole

if TYPE_CHECKING:
    from accelerate import Accelerator

# Settings of the process that can change its numbers.
VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG", "CUDA_VISIBLE_DEVICES", "MKL_NUM_THREADS", "NVIDIA_TF32_OVERRIDE", "OMP_NUM_THREADS",
    "PYTHONHASHSEED", "PYTORCH_CUDA_ALLOC_CONF", "TORCHINDUCTOR_FREEZING",
)  # fmt: skip


def record_data(folder: Path, stage: str, data: StageData, eval_data: StageData | None) -> None:
    """Write a stage's sources to ``data.json`` of the run in ``folder``."""
    file = folder / "data.json"
    sets = {"data": data} | ({} if eval_data is None else {"eval_data": eval_data})
    entry = {name: [_source(*pair) for pair in zip(one.sources, one.tables, strict=True)] for name, one in sets.items()}
    found = (read_json(file) if file.is_file() else {}) | {stage: {"fingerprint": data.fingerprint(), **entry}}
    _write(file, found)


def record_start(folder: Path, accelerator: Accelerator, config: RunConfig, source: Path | None) -> None:
    """Add this start to ``environment.json`` of the run in ``folder``; ``source`` is where its weights came from, if from
    anywhere.
    """
    file = folder / "environment.json"
    weights = None
    if source is not None:
        weights = {"path": str(source.absolute()), "manifest_sha256": file_hash(source / "manifest.json")}
    _write(file, [*starts(folder), environment(accelerator, config) | {"weights_from": weights}])


def starts(folder: Path) -> list[dict[str, Any]]:
    """What ``environment.json`` of a run says, oldest start first."""
    file = folder / "environment.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []


def environment(accelerator: Accelerator, config: RunConfig) -> dict[str, Any]:
    """Versions, machine and settings of this process."""
    device = accelerator.device
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "git": {name: found for name, place in _places().items() if (found := commit(place)) is not None},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": accelerator.num_processes,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": config.precision,
        "seed": config.seed,
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "packages": _packages(),
    }


def _places() -> dict[str, Path]:
    own = Path(mmllm.__file__).parent
    # In site-packages an outer repository would be somebody else's.
    return {"working directory": Path.cwd()} | ({} if "site-packages" in own.parts else {"mmllm": own})


@lru_cache
def commit(folder: Path) -> str | None:
    """The commit checked out in ``folder``, with ``+changes`` where files differ from it; None outside of a repository."""

    def git(*words: str) -> str | None:
        try:
            run = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return run.stdout.strip() if run.returncode == 0 else None

    head = git("rev-parse", "HEAD")
    return None if head is None else head + ("+changes" if git("status", "--porcelain", "-uno") else "")


@lru_cache
def _packages() -> dict[str, str]:
    found = {one.metadata["Name"]: one.version for one in importlib.metadata.distributions()}
    return dict(sorted((name, version) for name, version in found.items() if name))


def _source(source: DataSource, opened: Sequence[Any]) -> dict[str, Any]:
    reader: ReaderConfig = source.reader
    files: list[dict[str, Any]] = []
    if isinstance(opened, Table):
        files = [
            {"path": str(rows.path.absolute()), "size": rows.stamp[0], "sha256": rows.digest} for rows in opened.files
        ]
    elif isinstance(opened, SampleTable):  # shards, tables and streams, which have digests of their own kinds
        files = [{"path": name, "digest": digest} for name, digest in opened.contents()]
    return {
        "reader": reader.model_dump(mode="json"),
        "weight": source.weight,
        "samples": len(opened),
        "files": files,
    }


def _write(file: Path, value: Any) -> None:
    write_whole(file, [json.dumps(value, indent=2), "\n"])
