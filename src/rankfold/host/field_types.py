"""Whether the value of a config's field has the declared type, and that type in words.

fits(2.5, int)                     # False
in_words(int | None)               # "an integer or null"
"""

from __future__ import annotations

import dataclasses
import re
import types
from functools import cache
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from peft import PeftConfig

_WORDS = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
    list: "a list",
    set: "a list",
    tuple: "a list",
    dict: "a mapping",
}
_LISTS = (list, set, tuple, frozenset)


@cache
def field_types(config: type) -> dict[str, Any]:
    """Name to declared type of the fields that rankfold's configs add to PEFT's."""
    hints = get_type_hints(config)
    theirs = {f.name for f in dataclasses.fields(PeftConfig)}
    return {
        f.name: hints[f.name]
        for f in dataclasses.fields(config)
        if f.name not in theirs and get_origin(hints[f.name]) is not ClassVar
    }


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has a declared type; a bool is not an integer, an integer is a number, and any collection is a list. What
    a mapping holds is for the field's own check, which can name the entry."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, choice) for choice in args)
    if origin is Literal:
        return value in args
    kind = origin or hint
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind in _LISTS:
        return isinstance(value, _LISTS) and all(fits(item, args[0]) for item in value if args)
    return isinstance(value, kind)


def in_words(hint: Any) -> str:
    """A declared type as a sentence names it."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(in_words(choice) for choice in args))
    if origin is Literal:
        return " or ".join(f'"{choice}"' for choice in args)
    if origin is list and args:
        return f"a list of {_WORDS.get(args[0], 'values').removeprefix('an ').removeprefix('a ')}"
    return _WORDS.get(origin or hint, str(hint))


def bad_pattern(key: str, value: Any) -> str:
    """What is wrong with a field that PEFT takes for regular expressions, which it finds out in the model; "" for nothing."""
    if key not in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
        return ""
    for pattern in [value] if isinstance(value, str) else value if isinstance(value, dict) else []:
        try:
            re.compile(str(pattern))
        except re.error as error:
            return f"{pattern!r} is not a valid regular expression: {error}"
    return ""
