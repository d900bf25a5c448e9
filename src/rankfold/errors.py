"""The one error that means "the input is wrong": its message names the field, the value and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RankfoldError(ValueError):
    """A user error, in one sentence. The command line prints it without a traceback; any other ValueError is a bug."""


def nearest(name: object, names: Iterable[str], word: str = "known keys") -> str:
    """The end of a message about an unknown name: the nearest one, and all of them if they are few."""
    names = list(names)
    begun = [known for known in names if known.startswith(str(name))]  # adamw: adamw_torch, not grokadamw
    near = begun or difflib.get_close_matches(str(name), names, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return hint if near and len(names) > 12 else f"{hint}; {word}: {', '.join(sorted(names))}"


def short(value: object) -> str:
    """A value as it is shown in a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
