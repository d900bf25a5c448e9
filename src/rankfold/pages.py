"""The documentation's pages: in a wheel they lie in the package, in a checkout in docs/; messages cite them by name."""

from __future__ import annotations

from pathlib import Path

from rankfold.errors import RankfoldError, nearest

_PACKAGE = Path(__file__).parent
_WHEEL, _CHECKOUT = _PACKAGE / "pages", _PACKAGE.parents[1] / "docs"


def cite(page: str) -> str:
    """How a message names a page to somebody who may have no docs folder: the command that prints it.

    >>> cite("planning")
    '`rankfold docs planning`'
    """
    return f"`rankfold docs {page}`"


def pages() -> dict[str, Path]:
    """Name ("planning", "methods/lora") → file, sorted by name.

    Raises:
        RankfoldError: the package was copied without them.
    """
    root = next((folder for folder in (_WHEEL, _CHECKOUT) if folder.is_dir()), None)
    if root is None:
        raise RankfoldError(
            f"{_WHEEL} does not exist: this copy of rankfold has no documentation; pip install rankfold again"
        )
    names = {str(file.relative_to(root).with_suffix("").as_posix()): file for file in root.rglob("*.md")}
    return dict(sorted(names.items(), key=lambda item: ("/" in item[0], item[0])))


def page(name: str) -> str:
    """The Markdown of a page. A method or an optimiser can be named without its folder.

    Raises:
        RankfoldError: a page of another name; the message has the nearest.
    """
    found = pages()
    wanted = name.removeprefix("docs/").removesuffix(".md")
    for known, file in found.items():
        if known == wanted or known.rpartition("/")[2] == wanted:
            return file.read_text(encoding="utf-8")
    raise RankfoldError(f"there is no page '{name}'{nearest(name, found, 'pages')}")
