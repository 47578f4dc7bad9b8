"""Tiny random diffusers folders, written once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from mmllm.generators.tiny import tiny_pipeline


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of the tiny pipeline of a diffusers class."""

    @cache
    def save(name: str) -> Path:
        path: Path = tmp_path_factory.mktemp(name)
        tiny_pipeline(name).save_pretrained(path)
        return path

    return save


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, saved: Callable[[str], Path]) -> Path:
    """The same, of the class that the test is parametrised with (``indirect``)."""
    return saved(request.param)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with a ``folder`` runs on every family of its module, unless it names some itself."""
    marks = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "folder" in metafunc.fixturenames and "folder" not in marks:
        metafunc.parametrize("folder", metafunc.module.FAMILIES, indirect=True, scope="module")
