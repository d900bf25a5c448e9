"""Schedules: controllers that act around the optimiser's step, and the callback that attaches them."""

from typing import TYPE_CHECKING, Any

import peft  # noqa: F401  (first: see after_import.py)

from rankfold.control.attach import Attached, attach
from rankfold.control.controller import Controller

if TYPE_CHECKING:
    from rankfold.control.callback import AdapterCallback

__all__ = ["AdapterCallback", "Attached", "Controller", "attach"]


def __getattr__(name: str) -> Any:
    # transformers' trainer imports PEFT, and so this package, while it is half imported itself; the callback derives from a class of it
    if name == "AdapterCallback":
        from rankfold.control.callback import AdapterCallback

        return AdapterCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
