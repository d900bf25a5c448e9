"""Runs a function as soon as anyone imports a package. This registers our methods with PEFT without importing PEFT.

A finder stands first in `sys.meta_path` and knows one package. It leaves the search to the other finders and wraps the
`exec_module` of the loader that they find, so `importlib.util.find_spec` and reloading work as usual. The function
runs after the package's own body, while its import lock is held: whoever waits for the package finds everything done.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def after_import(package: str, call: Callable[[], object]) -> None:
    """Calls `call` when the top-level `package` has been imported: now, if it is imported already.

    An error of `call` is the error of the import, and the next import of the package tries again.
    """
    if package in sys.modules:
        call()
    else:
        sys.meta_path.insert(0, _Finder(package, call))


class _Finder(MetaPathFinder):
    def __init__(self, package: str, call: Callable[[], object]) -> None:
        self.package, self.call = package, call

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.package:
            return None
        # those after this one: another of our kind before it may be asking
        others = sys.meta_path[sys.meta_path.index(self) + 1 :]
        found = (finder.find_spec(fullname, path, target) for finder in others if hasattr(finder, "find_spec"))
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_then_call(module: ModuleType) -> None:
                execute(module)
                self.call()
                if self in sys.meta_path:
                    sys.meta_path.remove(self)

            spec.loader.exec_module = execute_then_call
        return spec
