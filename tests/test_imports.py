"""Imports point downwards only, between rooms and inside them (docs/architecture.md); `if TYPE_CHECKING` counts too."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src" / "rankfold"

#: Lower number, lower room; a module may import its own room or one below.
FLOOR = {
    "errors": 0, "text": 0, "peft_version": 0, "after_import": 0, "moved": 0, "catalogue": 0, "pages": 0, "kernel": 0,
    "host": 1, "io": 2, "control": 3, "optim": 3, "methods": 4, "tasks": 5, "runfile": 6,
    "fold": 7, "algebra": 8, "inspect": 8, "train": 9, "gelora": 10, "continual": 10, "plan": 11, "compare": 12, "doctor": 12, "commands": 13, "cli": 14, "__main__": 15,
}  # fmt: skip


def module_of(path: Path) -> str:
    parts = ["rankfold", *path.relative_to(SRC).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(p): p for p in sorted(SRC.rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """The rankfold modules that a file imports, at its top, inside functions and under TYPE_CHECKING."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "rankfold":
            found |= {
                f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in FILES else node.module for a in node.names
            }
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.split(".")[0] == "rankfold"}
    return found - {module_of(path)}


def outside(path: Path) -> set[str]:
    """The packages that a file imports, by their first name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[0] for a in node.names}
    return found


def room(module: str) -> str:
    return [*module.split("."), "rankfold"][1]


def test_downwards_only() -> None:
    upwards = [
        f"{module} imports {other}"
        for module, path in FILES.items()
        if module != "rankfold"
        for other in imports(path) - {"rankfold"}
        if FLOOR[room(other)] > FLOOR[room(module)]
    ]
    assert not upwards


def test_no_circles() -> None:
    graph = {m: {i for i in imports(p) if i in FILES} for m, p in FILES.items() if m != "rankfold"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("module", [m for m in FILES if room(m) == "kernel"])
def test_the_kernel_imports_torch_alone(module: str) -> None:
    import sys

    assert outside(FILES[module]) <= {"torch", "rankfold", *sys.stdlib_module_names}
    assert {room(m) for m in imports(FILES[module])} <= {"kernel"}


#: The one file of the package that may import private names of a library.
DOORS = {"peft": "rankfold.host.peft_api", "transformers": "rankfold.train.hf_api", "trl": "rankfold.train.hf_api"}


def test_private_names_of_libraries_come_through_one_door() -> None:
    found = []
    for module, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                library, *inside = node.module.split(".")
                names = [*(alias.name for alias in node.names), *inside]
                private = [name for name in names if name.startswith("_")]
                if library in DOORS and private and module != DOORS[library]:
                    found.append(f"{module} imports {', '.join(private)} of {node.module}")
    assert not found
