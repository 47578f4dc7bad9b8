"""Who may import whom (DESIGN §2): read off the syntax tree, so that a wrong import fails even where it never runs."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mmllm"

# Each layer may import itself, those named for it, and `errors`. `TYPE_CHECKING` imports are types only and do not count.
ALLOWED = {
    "errors": set(),
    "pretrained": set(),
    "cache": {"config"},
    "config": set(),
    "adapters": {"config", "pretrained"},
    "encoders": {"config", "pretrained"},
    "projectors": {"config", "pretrained"},
    "fusion": {"config"},
    "backbones": {"config", "pretrained"},
    "generators": {"config", "pretrained"},
    "processing": {"config", "cache"},
    "aligning": {"config", "projectors", "backbones"},
    "outputs": {"cache", "config", "generators", "projectors", "processing"},
    "model": {
        "config",
        "cache",
        "outputs",
        "aligning",
        "adapters",
        "encoders",
        "projectors",
        "fusion",
        "backbones",
        "generators",
        "processing",
    },
    "generation": {"config", "model", "processing"},
    "data": {"config", "processing"},
    "plan": {"outputs", "config", "model", "processing", "generators", "data", "training"},
    "training": {
        "config",
        "cache",
        "outputs",
        "generators",
        "adapters",
        "model",
        "processing",
        "data",
        "generation",
        "backbones",
        "pretrained",
    },
    "replies": {"generators"},
    "retrieval": {"outputs", "model", "processing", "generators", "projectors", "pretrained"},
    "making": {"outputs", "config", "model", "generators", "replies", "retrieval"},
    "assistant": {
        "outputs",
        "config",
        "model",
        "processing",
        "generation",
        "making",
        "replies",
        "retrieval",
        "training",
    },
    "listing": {"config"},
    "new": {"config", "dialogue", "plan"},
    "dialogue": {"config", "new"},
    "synthetic": set(),
    "dry_run": {
        "config",
        "processing",
        "model",
        "training",
        "assistant",
        "making",
        "replies",
        "retrieval",
        "synthetic",
        "pretrained",
    },
    "evaluation": {"config", "processing", "assistant"},
    "chat": {"config", "processing", "assistant", "replies"},
    "contract": {"config"},
    "contract_of_fusion": {"config", "contract", "fusion"},
    "contract_of_generators": {"config", "contract", "generators"},
    "testing": {
        "config",
        "contract",
        "contract_of_fusion",
        "contract_of_generators",
        "adapters",
        "encoders",
        "fusion",
        "projectors",
        "backbones",
        "generators",
        "model",
        "processing",
    },
    "ui": {"config", "processing", "assistant", "chat"},
}
HEAVY = {"transformers", "diffusers", "peft", "gradio", "open_clip", "whisper", "accelerate", "av", "trimesh"}
HEAVY |= {"datasets", "pyarrow"}
MODULES = sorted(
    path
    for path in PACKAGE.rglob("*.py")
    if (path.name not in ("cli.py",) and path.parent != PACKAGE) or path.stem in ALLOWED
)


def imports(tree: ast.AST, *, top_level_only: bool = False) -> list[str]:
    found: list[str] = []
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            stack += node.orelse
            continue
        if top_level_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        stack += ast.iter_child_nodes(node)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_left(path: Path) -> None:
    layer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    used = {name.split(".")[1] for name in imports(ast.parse(path.read_text())) if name.startswith("mmllm.")}
    assert used - {layer, "errors"} <= ALLOWED[layer], f"{layer} may not import {sorted(used - ALLOWED[layer])}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_libraries_are_imported_where_they_are_used(path: Path) -> None:
    if path.relative_to(PACKAGE).parts[0].removesuffix(".py") == "ui":
        return  # the one place that is nothing without gradio
    top = {name.split(".")[0] for name in imports(ast.parse(path.read_text()), top_level_only=True)}
    assert not top & HEAVY


def test_configs_do_not_import_torch() -> None:
    for path in PACKAGE.glob("*/*.py"):
        if (
            path.parent.name in ("adapters", "encoders", "projectors", "fusion", "backbones", "generators")
            and (path.parent / f"{path.stem}_module.py").exists()
        ):
            assert "torch" not in imports(ast.parse(path.read_text()), top_level_only=True), path
