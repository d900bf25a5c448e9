"""The blocks of a model and the matrices in them, found by structure: a list of modules that hold attention matrices.

OUR INTERPRETATION of GeLoRA's "K, Q, V, O" for any architecture: every linear module below a part of the name that says
attention (`self_attn.q_proj`, `attn.c_attn`, `attention.output.dense`, `layer.1.EncDecAttention.o`), without gates and
the projections of relative positions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from rankfold.errors import RankfoldError
from rankfold.host.adapter import Site
from rankfold.host.planning import site_of

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_NOT_QKVO = re.compile(r"^(pos|rel|gate|g_proj|norm)|position|gate$", re.IGNORECASE)


@dataclass(frozen=True)
class Stack:
    """Blocks that follow one another: the input of one is the output of the one before.

    Args:
        name: of the module list, such as "model.layers".
        blocks: its modules.
        sites: for each block, the matrices that get its rank; some block may have none.
    """

    name: str
    blocks: tuple[nn.Module, ...]
    sites: tuple[tuple[Site, ...], ...]

    def __len__(self) -> int:
        return len(self.blocks)


def find_stacks(model: nn.Module, targets: Sequence[str] | None = None) -> list[Stack]:
    """The stacks of `model`, outermost lists only.

    Args:
        targets: name suffixes of the matrices; by default all of attention.

    Raises:
        ValueError: an adapted model, or one without such matrices.
    """
    if any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        raise RankfoldError("model: it has an adapter, and GeLoRA measures the pretrained one; give the base model")
    stacks: list[Stack] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{stack.name}.") for stack in stacks)
        if isinstance(module, nn.ModuleList) and not inside:
            blocks = tuple(module)
            sites = tuple(_sites(f"{name}.{i}", block, targets) for i, block in enumerate(blocks))
            if any(sites):
                stacks.append(Stack(name, blocks, sites))
    if not stacks:
        leaves = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
        what = f"targets={list(targets)}: no block" if targets else "no block"
        raise RankfoldError(
            f"{what} of {type(model).__name__} has such matrices; name them with targets=, linear modules are "
            f"called {', '.join(leaves) or '(none)'}"
        )
    return stacks


def _sites(prefix: str, block: nn.Module, targets: Sequence[str] | None) -> tuple[Site, ...]:
    found = []
    for name, module in block.named_modules():
        full = f"{prefix}.{name}"
        if name and _wanted(name, full, targets):
            try:
                found.append(site_of(full, module))
            except TypeError:
                continue  # a norm, a dropout, a container
    return tuple(found)


def _wanted(name: str, full: str, targets: Sequence[str] | None) -> bool:
    if targets is not None:
        return any(full.endswith(f".{target}") for target in targets)
    *path, leaf = name.split(".")
    return any(_ATTENTION.search(part) for part in path) and not _NOT_QKVO.search(leaf)
