"""Optional parts that a test needs: where they are missing it is skipped, but on CI it fails."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

import pytest

ON_CI = bool(os.environ.get("CI"))


def needed(module: str) -> Any:
    """The module, as ``pytest.importorskip`` gives it; on CI an ``ImportError`` when it is missing."""
    return import_module(module) if ON_CI else pytest.importorskip(module)
