"""The code that readers copy: Python runs as printed, shell lines parse, YAML is a run file or a piece of one.

A page's blocks of Python run one after the other in one empty folder. Where they name a bundled model a small random one takes its place,
and `STEPS` is 2. A block that cannot run says why in a comment on the line before it: `<!-- not run: it starts an engine -->`.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from generate.commands import parser
from pages import PAGES, ROOT, Block, blocks, named, prose

from rankfold.cli import COMMANDS

ELSEWHERE = {
    "CONTRIBUTING.md": "tests/test_contributing.py",
    "docs/serving.md": "tests/fold/test_llama_cpp.py, with llama.cpp itself",
}
"""Pages whose Python another test runs."""

WITH_PYTHON = [page for page in PAGES if blocks(page, "python") and named(page) not in ELSEWHERE]


def code_of(page: Path) -> list[Block]:
    """The Python of a page; of a page that is a notebook too, the notebook's cells (test_made_pages.py compares the two)."""
    if not (notebook := page.with_suffix(".ipynb")).exists():
        return blocks(page, "python")
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    found = [(i, "".join(cell["source"])) for i, cell in enumerate(cells) if cell["cell_type"] == "code"]
    return [Block("python", text, number, "") for number, text in found]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=named)
@pytest.mark.usefixtures("own_registry")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_python(page: Path, snippets: Callable[[str], dict[str, Any]]) -> None:
    names: dict[str, Any] = {}
    for block in code_of(page):
        compile(block.text, named(page), "exec")
        if block.comment.startswith("not run:"):
            assert block.comment.removeprefix("not run:").strip(), "say why it is not run"
            continue
        code = re.sub(r"^STEPS = \d+", "STEPS = 2", block.text, flags=re.M)
        try:
            names = snippets(code)
        except Exception as e:
            raise AssertionError(f"{named(page)}, the block at line {block.line}: {type(e).__name__}: {e}") from e

    if page.parent.name in ("methods", "optimisers") and "optimizer" in names:
        _train(names["model"], names["optimizer"])


def _train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Two steps, before which a schedule without its controller would be refused."""
    ids = torch.randint(5, 50, (2, 8))
    for _ in range(2):
        output = model(input_ids=ids)
        loss = output.logits.float().pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.isfinite(loss)


# --- shell ----------------------------------------------------------------------------------------------------------------


def lines(page: Path, *, whole: bool) -> list[str]:
    """The calls of rankfold on a page, without what explains them: those of its blocks, or what stands between backticks in its text."""
    if whole:
        found = [line for block in blocks(page, "", "bash", "sh") for line in block.text.splitlines()]
    else:
        found = re.findall(r"`(rankfold [^`]+)`", re.sub(r"^#.*$", "", prose(page), flags=re.M))
    calls = [re.split(r"\s{2,}|\s#", line.strip())[0] for line in found]
    return [call for call in calls if call.startswith("rankfold ")]


class _Refused(Exception):
    pass


def _wrong(call: str, whole: bool) -> str | None:
    """Why the command line would not take a call, or None.

    Args:
        whole: it has all that it needs, so it is parsed; else its command and its flags must exist.
    """
    words = shlex.split(call)[1:]
    if words[0] in ("--version", "--help", "COMMAND"):
        return None
    if words[0] not in COMMANDS:
        return f"there is no command {words[0]!r}"
    made: argparse.ArgumentParser = parser(words[0])
    known = {flag for action in made._actions for flag in action.option_strings}
    if unknown := [flag for flag in re.findall(r"(?<=[\s\[|])-{1,2}[a-z][a-z_-]*", call) if flag not in known]:
        return f"it has no {unknown[0]}"
    if not whole or re.search(r"\.\.\.|…|\[-|\[[a-z]|\|", call):  # the latter is a form, not a call
        return None
    made.error = _refuse  # pyright: ignore[reportAttributeAccessIssue]
    try:
        made.parse_intermixed_args(words[1:])
    except _Refused as refused:
        return str(refused)
    return None


def _refuse(message: str) -> None:
    raise _Refused(message)


@pytest.mark.parametrize("page", [p for p in PAGES if lines(p, whole=True) or lines(p, whole=False)], ids=named)
def test_command_lines(page: Path) -> None:
    assert not {
        call: why for whole in (True, False) for call in lines(page, whole=whole) if (why := _wrong(call, whole))
    }


# --- YAML -----------------------------------------------------------------------------------------------------------------

YAML = [(page, block) for page in PAGES for block in blocks(page, "yaml")]


@pytest.mark.parametrize(("page", "block"), YAML, ids=[f"{named(page)}:{block.line}" for page, block in YAML])
def test_yaml(page: Path, block: Block, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from rankfold.compare import file as compare_file
    from rankfold.continual import file as continual_file
    from rankfold.runfile import load
    from rankfold.runfile.schema import RunFile
    from rankfold.runfile.yaml import read

    monkeypatch.chdir(ROOT)
    values, _ = read(block.text)
    whole = {"model", "task", "data", "output"} <= values.keys()
    if whole:
        (compare_file.parse if "methods" in values else load.parse)(values)
        return
    # a piece: put into a file that is right without it
    values.pop("imports", None)
    if values.get("method", {}).get("name") == "scaled":
        values["method"]["name"] = "lora"  # of the walk-throughs, which other tests run
    sections = {"model": "m", "task": "classification", "data": "d.jsonl", "output": "out"}
    if {"split", "tasks"} & values.keys():
        of_classes = {"task": "image-classification"} if "split" in values else {}
        continual_file.parse(sections | {"method": "lora"} | of_classes | values)
    elif "methods" in values:
        compare_file.parse(sections | {"rates": [1e-3], "seeds": [0, 1, 2]} | values)
    else:
        assert isinstance(load.parse(sections | {"method": "lora"} | values), RunFile)


# --- messages -------------------------------------------------------------------------------------------------------------


def test_the_messages_in_troubleshooting_are_ours() -> None:
    """Every quoted message of a heading is found in the source, with … for what changes."""
    import ast

    source = []
    for file in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                source.append("".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                source.append(node.value)
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = [m for heading in re.findall(r"^### (.*)$", page, re.M) for m in re.findall(r"`([^`]+)`", heading)]
    foreign = {"command not found: rankfold", "KeyError: 'RANKFOLD_RASA'", "--max-lora-rank"}
    missing = [m for m in messages if m not in foreign and not any(_said(m, text) for text in source)]
    assert not missing


def _said(message: str, text: str) -> bool:
    parts = [re.escape(part) for part in re.split("…", message)]
    return re.search(".*?".join(parts), text, re.S) is not None
