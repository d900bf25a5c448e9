"""The one place that touches what PEFT does not offer as an interface: a new member of its `PeftType` enum.

PEFT's public `register_peft_method` refuses names that the enum lacks, and there is no entry point for third parties.
The versions it is tested with stand in `rankfold.peft_version`, which importing rankfold checks.
"""

from __future__ import annotations

from peft.utils import PeftType


def peft_name(method: str) -> str:
    """The name PEFT knows a method by; prefixed, so that PEFT may add a method of the same name."""
    return f"rankfold_{method}"


def add_peft_type(name: str) -> PeftType:
    """The `PeftType` member called `name` in upper case, added if it is not there yet."""
    key = name.upper()
    if key in PeftType.__members__:
        return PeftType[key]
    member = str.__new__(PeftType, key)
    member._name_, member._value_ = key, key
    member.__objclass__ = PeftType  # pyright: ignore[reportAttributeAccessIssue]
    member._sort_order_ = len(PeftType._member_names_)  # pyright: ignore[reportAttributeAccessIssue]
    PeftType._member_names_.append(key)
    PeftType._member_map_[key] = PeftType._value2member_map_[key] = member
    type.__setattr__(PeftType, key, member)
    return member
