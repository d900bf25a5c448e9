"""A JSON object with the line on which each of its keys stands."""

from __future__ import annotations

import json
import re
from typing import Any

from rankfold.errors import RankfoldError

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:\n]', re.DOTALL)


def parse(text: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The object, and the line of each key of its first level (the last one where a key is repeated, as JSON readers do).

    Raises:
        ValueError: not JSON, or not an object; RecursionError is turned into it.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise RankfoldError("nested too deeply") from None
    if not isinstance(value, dict):
        raise RankfoldError(f"a {type(value).__name__}, not an object")
    return value, _lines(text)


def _lines(text: str) -> dict[str, int]:
    found: dict[str, int] = {}
    line, depth, last = 1, 0, ("", 1)
    for token in _TOKEN.findall(text):
        if token == "\n":
            line += 1
        elif token in "{[":
            depth += 1
        elif token in "}]":
            depth -= 1
        elif token == ":":
            if depth == 1:
                found[json.loads(last[0], strict=False)] = last[1]
        else:
            last = (token, line)
            line += token.count("\n")
    return found
