"""Prints the lowest versions that pyproject.toml allows, as pip's requirements: `make test-lowest` tests with them.

A bound ">=5.3" becomes "==5.3": that very release. What these bring along, such as NumPy, is the newest that they admit. The extras in EXTRAS are tested, and what runs tests comes along.
Arguments are packages to take from constraints.txt instead: `python tests/lowest.py torch` where only one build of torch can be had.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXTRAS = ("train",)
BESIDE = ["pytest>=8"]


def lowest(requirement: str) -> str:
    """The requirement at its lower bound.

    >>> lowest("transformers>=5.3,<6")
    'transformers==5.3'
    """
    name, bound = re.fullmatch(r"([\w.-]+)\s*>=\s*([\d.]+).*", requirement.strip()).groups()  # pyright: ignore[reportOptionalMemberAccess]
    return f"{name}=={bound}"


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(r for extra in EXTRAS for r in project["optional-dependencies"][extra])]
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    for requirement in map(lowest, wanted):
        name = requirement.partition("==")[0]
        print(f"{name}=={pins[name]}" if name in sys.argv[1:] else requirement)
    print(*BESIDE, sep="\n")


if __name__ == "__main__":
    main()
