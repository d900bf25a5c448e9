"""The one place that touches what PEFT does not offer as an interface: a new member of its `PeftType` enum.

PEFT's public `register_peft_method` refuses names that the enum lacks, and there is no entry point for third parties
(shared/field.md, appendix A.1). Tested with the PEFT versions named in `TESTED`; outside that range importing rankfold
raises ImportError, because layers and checkpoints might be silently wrong there.
"""

from __future__ import annotations

from importlib.metadata import version

from packaging.version import Version
from peft.utils import PeftType

#: First version that works, first version not tried.
TESTED = (Version("0.21.0"), Version("0.22.0"))


def check_peft() -> None:
    """Raises ImportError outside the tested range of PEFT."""
    installed = Version(version("peft"))
    low, high = TESTED
    if not low <= Version(installed.base_version) < high:
        raise ImportError(
            f"rankfold needs peft >={low},<{high}, the range it is tested with; installed is {installed}. "
            f"Run: pip install 'peft>={low},<{high}'"
        )


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


# for fold: what it needs of PEFT beyond the documented interface, each a name below or a member of a class
from peft.tuners.lora import LoraLayer  # noqa: E402
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer  # noqa: E402
from peft.tuners.tuners_utils import _get_in_out_features as in_out_features  # noqa: E402
from peft.utils.other import get_pattern_key  # noqa: E402

__all__ = [
    "TESTED",
    "BaseTunerLayer",
    "LoraLayer",
    "add_peft_type",
    "check_fold_members",
    "check_peft",
    "get_pattern_key",
    "in_out_features",
    "peft_name",
]

_FOLD_MEMBERS = ((BaseTunerLayer, "_get_available_adapters"), (BaseTuner, "_remap_adapter_state_dict_for_load"))


def check_fold_members() -> None:
    """Raises ImportError, in one sentence, where PEFT lacks a member that folding PEFT's own adapters calls."""
    missing = [f"{owner.__name__}.{name}" for owner, name in _FOLD_MEMBERS if not hasattr(owner, name)]
    if missing:
        low, high = TESTED
        raise ImportError(
            f"folding needs {', '.join(missing)} of peft, which version {version('peft')} lacks; "
            f"run: pip install 'peft>={low},<{high}'"
        )
