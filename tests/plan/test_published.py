"""The plan's parameter counts against those of papers and reference code, row by row of `published.yaml`.

python tests/plan/test_published.py     # writes docs/parameters.md
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmllm.cli import CONFIG_FOLDERS, find_config
from mmllm.config.base import BuildContext
from mmllm.config.load import load
from mmllm.plan.parts import count_parts

DOCS = Path(__file__).parent.parent.parent / "docs" / "parameters.md"
HEAD = """# Parameters, here and as published

`mmllm plan` counts every part on the meta device, offline. This page sets its counts beside what papers and reference code
state. It is written by `python tests/plan/test_published.py` from `tests/plan/published.yaml`, and the test of the same name
holds the plan to within 1 % of each row. Papers round; counts in full are those of the named code.

| configuration | part | plan | published | difference | where it is stated |
|---|---|---:|---:|---:|---|
"""


def rows() -> list[tuple[str, str, int, str, str]]:
    """``(configuration, part, count, source, remark)``."""
    table: dict[str, dict[str, list[Any]]] = yaml.safe_load((Path(__file__).parent / "published.yaml").read_text())
    return [
        (name, part, row[0], row[1], "".join(row[2:])) for name, parts in table.items() for part, row in parts.items()
    ]


@cache
def planned(name: str) -> dict[str, int]:
    path = find_config(name)
    return count_parts(load(path), BuildContext(weights=False, root=path.resolve().parent)).parameters


def page() -> str:
    lines = []
    for name, part, count, source, remark in rows():
        found = planned(name)[part]
        link = find_config(name).resolve().relative_to(CONFIG_FOLDERS[1].resolve().parent)
        off = "exact" if found == count else f"{found / count - 1:+.2%}"
        text = f"{source}. {remark[0].upper()}{remark[1:]}" if remark else source
        lines.append(f"| [{name}](../{link}) | `{part}` | {found:,} | {count:,} | {off} | {text} |")
    return HEAD + "\n".join(lines) + "\n"


@pytest.mark.parametrize(("name", "part", "count"), [row[:3] for row in rows()])
def test_a_part_has_the_published_count(name: str, part: str, count: int) -> None:
    assert planned(name)[part] == pytest.approx(count, rel=0.01)


def test_the_page_is_the_table() -> None:
    assert DOCS.read_text(encoding="utf-8") == page(), "run `python tests/plan/test_published.py`"


if __name__ == "__main__":
    DOCS.write_text(page(), encoding="utf-8")
