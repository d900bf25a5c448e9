"""Reads the rows of our methods and optimisers from their source, so that the command line lists them without importing torch.

A row is the literal fields of `register(Method(...))` in a file of `methods/`, or of `register(OptimizerRow(...))` in one of `optim/`;
tests/commands/test_start.py holds them against the registries themselves.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Listed:
    """What a list of methods shows of one: as `host.registry.Method`, with the name of the config's class."""

    name: str
    title: str
    paper: str
    summary: str
    foldable: bool
    config: str
    module: str


def listed() -> list[Listed]:
    """The methods of the package by name; those of third parties are in the registry only."""
    trees = _trees("methods")
    classes = {node.name: node for tree in trees.values() for node in tree.body if isinstance(node, ast.ClassDef)}
    rows = [_row(call, stem, classes) for stem, tree in trees.items() for call in _calls(tree, "Method")]
    return sorted(rows, key=lambda row: row.name)


@dataclass(frozen=True)
class ListedOptimizer:
    """What a list of optimisers shows of one: as `optim.registry.OptimizerRow`."""

    name: str
    title: str
    paper: str
    summary: str


def listed_optimizers() -> list[ListedOptimizer]:
    """The optimisers of the package by name; those of third parties are in the registry only."""
    calls = [call for tree in _trees("optim").values() for call in _calls(tree, "OptimizerRow")]
    return sorted((ListedOptimizer(*_words(call)) for call in calls), key=lambda row: row.name)


def _trees(room: str) -> dict[str, ast.Module]:
    return {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in sorted((_HERE / room).glob("*.py"))}


def _calls(tree: ast.Module, called: str) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == called:
            yield node


def _words(call: ast.Call) -> tuple[str, str, str, str]:
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    name, title, paper, summary = (ast.literal_eval(given[f]) for f in ("name", "title", "paper", "summary"))
    return name, title, paper, summary


def _row(call: ast.Call, stem: str, classes: dict[str, ast.ClassDef]) -> Listed:
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    name, title, paper, summary = _words(call)
    config = ast.unparse(given["config"])
    return Listed(name, title, paper, summary, _foldable(config, classes), config, f"rankfold.methods.{stem}")


def _foldable(name: str, classes: dict[str, ast.ClassDef]) -> bool:
    """Whether `fixed` can be true in a config's class: it is, unless the class or the nearest base in `methods/` sets it to False."""
    if name not in classes:
        return True
    for node in classes[name].body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id == "fixed":
            return ast.literal_eval(node.value)  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(node, ast.FunctionDef) and node.name == "fixed":
            return True
    return all(_foldable(ast.unparse(base), classes) for base in classes[name].bases)
