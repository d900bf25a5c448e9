"""What the doctor finds: one sentence, where it is, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """What a finding means. The first two are about the file itself, the others about one engine, worst last."""

    NOTE = "note"
    PROBLEM = "problem"

    DOES_NOT_APPLY = "does not apply"
    LOADS = "loads"
    NOT_CHECKED = "not checked"
    IN_PART = "loads in part"
    MIS_SCALED = "loads but mis-scaled"
    WRONG = "loads but wrong"
    REFUSED = "refused"

    @property
    def severity(self) -> int:
        return list(Status).index(self)


@dataclass(frozen=True)
class Finding:
    """One thing to know.

    Args:
        what: one sentence with the field or tensor and its value.
        where: "adapter_config.json:7 (use_rslora)", or the name of a tensor or file.
        fix: what to do; empty where nothing need be done.
    """

    status: Status
    what: str
    where: str = ""
    fix: str = ""
