"""Low-rank adaptation beyond LoRA: PEFT methods that fold exactly into a plain LoRA.

from rankfold import RasaConfig
model = peft.get_peft_model(model, RasaConfig(r=8, target_modules="all-linear"))

Importing this package makes the methods known to PEFT, whichever of the two comes first. It imports neither torch nor PEFT:
names are looked up when they are asked for, and the methods register once PEFT has been imported.
"""

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from rankfold.after_import import after_import
from rankfold.moved import keep_old_names
from rankfold.peft_version import check_peft

if TYPE_CHECKING:
    from rankfold.control import AdapterCallback as AdapterCallback
    from rankfold.control import attach as attach
    from rankfold.kernel.factors import Factors as Factors
    from rankfold.methods import *  # noqa: F403

__version__ = "0.1.0"

_HOMES = {"AdapterCallback": "rankfold.control", "attach": "rankfold.control", "Factors": "rankfold.kernel.factors"}


@cache
def _homes() -> dict[str, str]:
    """Where each public name lives; every method's config is one."""
    from rankfold.catalogue import listed

    return _HOMES | {row.config: row.module for row in listed()}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted(_homes())
    home = None if name.startswith("_") else _HOMES.get(name) or _homes().get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(home), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), "__all__", *_homes()})


check_peft()
keep_old_names()
after_import("peft", lambda: import_module("rankfold.methods"))
