"""`rankfold version`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from rankfold.commands.command import CommonOptions


@dataclass(kw_only=True)
class Options(CommonOptions):
    """print the versions of rankfold and what it stands on"""


def run(options: Options) -> int:
    print(f"python {sys.version.split()[0]}")
    for package in ("rankfold", "peft", "transformers", "trl", "torch", "accelerate", "datasets", "safetensors"):
        try:
            print(f"{package} {version(package)}")
        except PackageNotFoundError:
            print(f"{package} (not installed)")
    return 0
