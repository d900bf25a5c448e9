"""Imports point downwards only (docs/architecture.md)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src" / "rankfold"

#: Lower number, lower room; a module may import its own room or one below. Packages count as one room.
FLOOR = {
    "factors": 0, "peft_types": 0, "folders": 0, "model_folder": 0, "products": 0, "scratch": 0, "dropout": 0, "contraction": 1, "gated_mlp": 1, "reconstruction": 1, "config": 2, "adapter": 3, "siblings": 4, "fused_mlp": 4, "layer": 4, "tuner": 5,
    "registry": 6, "subspace": 6, "control": 7, "methods": 7, "fold": 8, "doctor": 9, "inspect": 8, "plan": 9, "train": 9, "compare": 10, "cli": 11, "__main__": 12,
}  # fmt: skip
TORCH_ALONE = {"factors", "products", "scratch", "dropout", "contraction", "gated_mlp"}


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "rankfold"


def imports(path: Path) -> set[str]:
    """rankfold modules a file imports at run time; `if TYPE_CHECKING` does not count, imports inside functions do."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(n) for b in ast.walk(tree) if isinstance(b, ast.If) and getattr(b.test, "id", "") == "TYPE_CHECKING" for n in ast.walk(b)
    }  # fmt: skip
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{a.name}" if node.module == "rankfold" else node.module for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
    return found


FILES = sorted(p for p in SRC.rglob("*.py") if p != SRC / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_downwards_only(path: Path) -> None:
    own = path.relative_to(SRC).parts[0].removesuffix(".py")
    for module in imports(path):
        if module.startswith("rankfold."):
            assert FLOOR[room(module)] <= FLOOR[own], f"{own} imports {module}, which is above it"


@pytest.mark.parametrize("name", sorted(TORCH_ALONE))
def test_the_algebra_imports_torch_alone(name: str) -> None:
    outside = {m.split(".")[0] for m in imports(SRC / f"{name}.py")} - {
        "__future__", "collections", "contextlib", "dataclasses", "functools", "math", "pathlib", "platform", "threading", "typing", "weakref",
    }  # fmt: skip
    assert outside <= {"torch", "rankfold"}
