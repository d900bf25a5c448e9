"""Which versions of PEFT rankfold is tested with, checked without importing PEFT."""

from __future__ import annotations

from importlib.metadata import version

from packaging.version import Version

#: First version that works, first version not tried.
TESTED = (Version("0.21.0"), Version("0.22.0"))


def check_peft() -> None:
    """Raises ImportError outside the tested range of PEFT: layers and checkpoints might be silently wrong there."""
    installed = Version(version("peft"))
    low, high = TESTED
    if not low <= Version(installed.base_version) < high:
        raise ImportError(
            f"rankfold needs peft >={low},<{high}, the range it is tested with; installed is {installed}. "
            f"Run: pip install 'peft>={low},<{high}'"
        )
