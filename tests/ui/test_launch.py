from __future__ import annotations

import ast
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from needs import needed

import mmllm
from mmllm.errors import CheckpointError, MmllmError
from mmllm.ui import launch

PACKAGE = Path(mmllm.__file__).parent
ENDLESS = 600  # seconds; on a busy machine an interpreter takes long to end


def test_importing_the_module_brings_in_neither_gradio_nor_torch() -> None:
    code = "import sys, mmllm.ui; sys.exit(bool({'gradio', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_two_files_import_gradio() -> None:
    importing = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "gradio" for name in names):
                importing.add(str(path.relative_to(PACKAGE)))
    assert importing == {"ui/layout.py", "ui/page.py"}


def test_a_model_that_is_not_there_is_told_before_the_page_opens(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no model there"):
        launch(str(tmp_path / "missing"))
    with pytest.raises(CheckpointError, match="no such folder"):
        launch(models_dir=tmp_path / "missing")


def test_a_missing_gradio_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mmllm.ui.serve", "mmllm.ui.page", "mmllm.ui.layout"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(MmllmError, match=r"pip install 'mmllm\[demo\]'"):
        launch()


def test_a_taken_port_is_told(tmp_path: Path) -> None:
    needed("gradio")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(MmllmError, match=f"port {port} is taken on 127.0.0.1"):
            launch(port=port, feedback=tmp_path / "feedback.jsonl")


@pytest.mark.parametrize("port", [-1, 0, 65536, 99999])
def test_a_port_that_cannot_be_is_told(port: int) -> None:
    with pytest.raises(MmllmError, match=f"port {port}: there is no such port"):
        launch(port=port)


# Under nohup a test run ignores SIGHUP, and its children would too.
SERVER = """
import signal
import sys
from pathlib import Path
from chat.fake import FakeAssistant
from mmllm.chat import FeedbackLog, ModelShelf
from mmllm.ui.serve import serve

signal.signal(signal.SIGHUP, signal.SIG_DFL)
serve(ModelShelf(lambda name: FakeAssistant()), ["embedded"], FeedbackLog(Path(sys.argv[1])), int(sys.argv[2]))
"""


@contextmanager
def started(temporary: Path) -> Iterator[subprocess.Popen[str]]:
    """A server in a process of its own, ready for visitors, with uploads in ``temporary``."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    tests = str(Path(__file__).parent.parent)
    path = os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(temporary / "feedback.jsonl"), str(port)],
        env={**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            assert "mmllm chat is open" in process.stdout.readline()
            yield process
        finally:
            process.kill()


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_uploads_go_away_with_the_process_however_it_ends(tmp_path: Path) -> None:
    needed("gradio")
    for number in (signal.SIGTERM, signal.SIGHUP):
        with started(tmp_path) as process:
            (folder,) = tmp_path.glob("mmllm-demo-*")
            (folder / "photo.png").write_text("private")
            process.send_signal(number)
            assert process.wait(ENDLESS) == 128 + number
            assert not folder.exists()
    with started(tmp_path) as killed:
        (folder,) = tmp_path.glob("mmllm-demo-*")
        killed.kill()
        killed.wait(ENDLESS)
        assert folder.exists()
    with started(tmp_path):
        assert not folder.exists()
        (lives,) = tmp_path.glob("mmllm-demo-*")
        with started(tmp_path):
            assert lives.exists()
