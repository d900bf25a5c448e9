"""Paths as people write them: `~` and `$NAME` are expanded here and nowhere else."""

from __future__ import annotations

import os
import re
from typing import Any

from rankfold.errors import RankfoldError

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")


def expand(text: str) -> str:
    """The path with the home folder and environment variables put in.

    Raises:
        RankfoldError: a variable that is not set.
    """

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if name not in os.environ:
            raise RankfoldError(f"'{text}' names the environment variable {name}, which is not set")
        return os.environ[name]

    return os.path.expanduser(_VARIABLE.sub(value, text))


def with_home(argument: Any) -> Any:
    """An argument of the command line; a shell leaves `--out=~/x` as it is."""
    if isinstance(argument, list):
        return [with_home(part) for part in argument]
    return os.path.expanduser(argument) if isinstance(argument, str) else argument
