"""Lets the tests of this folder import ``squares``, and spares them the plots."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmllm.training.report.plot_losses", lambda rows, file: None)
