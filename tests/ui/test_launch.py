from __future__ import annotations

import ast
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import mmllm
from mmllm.errors import CheckpointError, MmllmError
from mmllm.ui import launch

PACKAGE = Path(mmllm.__file__).parent


def test_importing_the_module_brings_in_neither_gradio_nor_torch() -> None:
    code = "import sys, mmllm.ui; sys.exit(bool({'gradio', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_one_file_imports_gradio() -> None:
    importing = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "gradio" for name in names):
                importing.add(str(path.relative_to(PACKAGE)))
    assert importing == {"ui/page.py"}


def test_a_model_that_is_not_there_is_told_before_the_page_opens(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no model there"):
        launch(str(tmp_path / "missing"))
    with pytest.raises(CheckpointError, match="no such folder"):
        launch(models_dir=tmp_path / "missing")


def test_a_missing_gradio_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mmllm.ui.serve", "mmllm.ui.page"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(MmllmError, match=r"pip install 'mmllm\[demo\]'"):
        launch()


def test_a_taken_port_is_told(tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(MmllmError, match=f"port {port} is taken on 127.0.0.1"):
            launch(port=port, feedback=tmp_path / "feedback.jsonl")
