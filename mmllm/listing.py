"""``mmllm list``: the kinds of every family, where those from elsewhere come from, and the configurations that ship."""

from __future__ import annotations

import json
from pathlib import Path

from mmllm.config.base import BUILTIN, kinds, package, summary


def run_list(folder: Path, *, as_json: bool) -> int:
    """Print what is known, with the configurations of ``folder``; 0."""
    table = {family: {kind: summary(family, kind) for kind in kinds(family)} for family in BUILTIN}
    packages = {
        family: {kind: name for kind in entries if (name := package(family, kind)) is not None}
        for family, entries in table.items()
    }
    configs = sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))
    if as_json:
        print(json.dumps({"components": table, "packages": packages, "configs": configs}, indent=2))
        return 0
    for family, entries in table.items():
        print(family.replace("_", " "))
        for kind, about in entries.items():
            name = packages[family].get(kind)
            print(f"  {kind:<18} {about}" + ("" if name is None else f" [{name}]"))
    print("configs\n" + "\n".join(f"  {name}" for name in configs))
    return 0
