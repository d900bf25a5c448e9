"""Methods of third parties: packages announce them as entry points; run files and commands name a module or a file."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from rankfold.errors import RankfoldError

#: The entry-point group. Each entry names a `Method`, or a module that registers some.
GROUP = "rankfold.methods"


def load_plugin(name: str | Path) -> ModuleType:
    """Imports a module whose import registers a method. Further calls do nothing.

    Args:
        name: of a module ("my_package.my_method"), or the path of a Python file ("./my_method.py").

    Raises:
        RankfoldError: it cannot be found, or its import fails.
    """
    name = str(name)
    try:
        return _load_file(Path(name)) if is_path(name) else importlib.import_module(name)
    except Exception as error:  # whatever code runs in it
        what = str(error) if isinstance(error, RankfoldError) else f"{type(error).__name__}: {error}"
        fix = "mend it" if is_path(name) else "install it, or give the path of a file such as ./my_method.py"
        raise RankfoldError(f"imports: {name!r} cannot be imported ({what}); {fix}") from error


def is_path(name: str) -> bool:
    """Whether it names a file and not a module."""
    return name.endswith(".py") or "/" in name or os.sep in name


def placed(name: str, folder: Path) -> str:
    """The name made independent of the working directory: a file's path is resolved against `folder`."""
    return str(folder.joinpath(Path(name).expanduser()).resolve()) if is_path(name) else name


def announced() -> Iterator[object]:
    """Imports what the installed packages' entry points name. One that fails gives a warning that names it."""
    for entry in entry_points(group=GROUP):
        try:
            yield entry.load()
        except Exception as error:
            of = f" of {entry.dist.name}" if entry.dist else ""
            warnings.warn(
                f"the entry point '{entry.name} = {entry.value}'{of} in {GROUP} cannot be loaded, so its method is missing: "
                f"{type(error).__name__}: {error}",
                RuntimeWarning,
                stacklevel=2,
            )


def _load_file(path: Path) -> ModuleType:
    path = path.expanduser().resolve()
    if not path.is_file():
        raise RankfoldError(f"there is no file {path}")
    for module in list(sys.modules.values()):  # imported already, perhaps as __main__
        file = getattr(module, "__dict__", {}).get("__file__")
        if isinstance(file, str) and file.endswith(path.name) and Path(file).resolve() == path:
            return module
    name = path.stem
    if name in sys.modules or not name.isidentifier():
        taken = "another module has that name" if name in sys.modules else "that is not a Python name"
        raise RankfoldError(f"{name}: {taken}; rename the file")
    # Beside it may lie what it imports, and pickle must find the module by its name
    sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
