"""Lets the tests of this folder import ``systems``, and ``squares`` of the retrieval tests; spares them the plots
(``test_report`` draws them)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "retrieval"))


@pytest.fixture(autouse=True)
def _no_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.module.__name__ != "test_report":
        monkeypatch.setattr("mmllm.training.report.plot_losses", lambda rows, file: None)
