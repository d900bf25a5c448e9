"""A look at the numbers themselves, one tensor in memory at a time."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch

from rankfold.doctor.adapter_file import AdapterFile
from rankfold.doctor.findings import Finding, Status
from rankfold.text import examples

#: Either side of a factor pair, in each format.
_UP = re.compile(r"(\.lora_[bB](\.weight)?|\.up|\.lora[_.]up\.weight)$")
_DOWN = re.compile(r"(\.lora_[aA](\.weight)?|\.down|\.lora[_.]down\.weight)$")


@dataclass
class _Seen:
    broken: list[str] = field(default_factory=list)
    zero: set[str] = field(default_factory=set)


def check_numbers(file: AdapterFile) -> list[Finding]:
    """NaN and infinity, and adapters that change nothing."""
    seen = _Seen()
    try:
        for name, tensor in file.read_tensors():
            if not tensor.is_floating_point():
                continue
            if tensor.itemsize < 2:  # float8 has no arithmetic
                tensor = tensor.float()
            if not torch.isfinite(tensor).all():
                seen.broken.append(name)
            if not torch.count_nonzero(tensor):
                seen.zero.add(name)
    except (ValueError, OSError) as error:
        return [Finding(Status.PROBLEM, str(error), fix="copy or download the file again")]
    found = []
    if seen.broken:
        what = f"NaN or infinity in {len(seen.broken)} of {len(file.tensors)} tensors: {examples(seen.broken)}"
        fix = "the training diverged; take an earlier checkpoint"
        found.append(Finding(Status.PROBLEM, what, seen.broken[0], fix))
    for side, pattern in (("B (up)", _UP), ("A (down)", _DOWN)):
        names = [n for n in file.tensors if pattern.search(n)]
        if names and seen.zero.issuperset(names):
            what = f"every {side} is zero, so the adapter changes nothing: it was saved before it was trained"
            found.append(Finding(Status.PROBLEM, what, names[0], "save after training"))
    return found
