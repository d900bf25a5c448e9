"""Which parameters of a model are the two factors of one update, and which are not.

    for pair in pairs(model):
        pair.name, pair.down, pair.up, pair.scale
    print(describe(model))                            # what a pair optimiser would train, and how

A pair is a trained `down` and a trained `up` that one layer multiplies. Whatever else is trained (heads, norms, gates, biases, DoRA's
magnitudes, a pool that layers share) is *plain*: pair optimisers give it to AdamW.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rankfold.errors import RankfoldError
from rankfold.optim.owners import Candidate, Gate, layers, plain_name


@dataclass(frozen=True, eq=False)
class Pair:
    """The two factors of one update, ΔW = scale · up · diag(gate) · down.

    Args:
        name: the layer that owns it, and the adapter where it is not "default".
        down: r × in. LoRA's A.
        up: out × r. LoRA's B.
        scale: the layer's own, α/r or α/√r.
        gate: its trained diagonal, or None. It is not part of the pair: it is trained as a plain parameter.
        embedding: whether it adapts an embedding (ΔW is then transposed: `in` is the vocabulary).
    """

    name: str
    down: nn.Parameter
    up: nn.Parameter
    scale: float = 1.0
    gate: Gate | None = None
    embedding: bool = False

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(out, in, r)."""
        return self.up.shape[0], self.down.shape[1], self.rank


@dataclass(frozen=True, eq=False)
class Plain:
    """A trained parameter that is not a pair's, and why, where there is something to say."""

    name: str
    parameter: nn.Parameter
    why: str = ""


@dataclass(frozen=True)
class Split:
    """All trained parameters of a model, each once."""

    pairs: list[Pair]
    plain: list[Plain]


def pairs(model: nn.Module, *, frozen_down: bool = False, joint: bool = True) -> list[Pair]:
    """The pairs of `model`: rankfold's adapters and PEFT's LoRA layers, in the model's order.

    Args:
        model: a model with adapted layers; adapters that are frozen as a whole are left out.
        frozen_down: also take pairs whose `down` is frozen, as LoRA-FA does.
        joint: whether a step is computed from both factors: they must then be whole, and their gradients the update's alone.
            LoRA+ needs neither.

    Raises:
        RankfoldError: no pairs; a pair with one frozen factor; factors that two pairs share; factors that are sharded.
    """
    return split(model, frozen_down=frozen_down, joint=joint).pairs


def split(model: nn.Module, *, frozen_down: bool = False, joint: bool = True) -> Split:
    """Every trained parameter of `model`, as pairs and as plain ones. Arguments and errors are those of `pairs`."""
    declared = list(layers(model))
    why_not: dict[int, str] = {}
    for layer in declared:
        why_not |= layer.why_not
    found = [_pair(c, frozen_down, joint) for layer in declared for c in layer.candidates if _trained(c)]
    if not found:
        reasons = sorted({why_not[id(p)] for p in model.parameters() if p.requires_grad and id(p) in why_not})
        raise RankfoldError(
            f"model: {type(model).__name__} has no trainable pair of LoRA factors"
            + (f" ({'; '.join(reasons)})" if reasons else "")
            + "; add an adapter with get_peft_model(model, ...) first, or take torch.optim.AdamW"
        )
    _check_untied(found)
    factors = {id(p) for pair in found for p in (pair.down, pair.up)}
    gates = {id(pair.gate.parameter) for pair in found if pair.gate is not None}
    plain = [
        Plain(plain_name(name), p, why_not.get(id(p), "gate of a pair" if id(p) in gates else ""))
        for name, p in model.named_parameters()
        if p.requires_grad and id(p) not in factors
    ]
    return Split(found, plain)


def split_pairs(owner: str, given: Sequence[Pair]) -> Split:
    """The given pairs and nothing else, for an optimiser called `owner`; raises RankfoldError where they are none."""
    found = list(given) if isinstance(given, Sequence) else []
    if not found or not all(isinstance(p, Pair) for p in found):
        text = repr(given) if len(repr(given)) <= 60 else type(given).__name__
        raise RankfoldError(
            f"{owner}: model={text} is neither a model nor a list of its pairs; give the model, or rankfold.optim.pairs(model)"
        )
    _check_untied(found)
    return Split(found, [])


def describe(model: nn.Module, *, frozen_down: bool = False) -> str:
    """What a pair optimiser would train of `model`: its pairs by shape, and every plain parameter by name."""
    parts = split(model, frozen_down=frozen_down)
    shapes = Counter((pair.shape, str(pair.down.dtype).removeprefix("torch.")) for pair in parts.pairs)
    size = sum(p.down.numel() + p.up.numel() for p in parts.pairs)
    lines = [f"{len(parts.pairs)} pairs, {size:,} parameters"]
    for ((out, in_, rank), dtype), count in shapes.items():
        lines.append(f"  {count} × (up {out}×{rank}, down {rank}×{in_}), {dtype}")
    size = sum(p.parameter.numel() for p in parts.plain)
    lines.append(f"{len(parts.plain)} plain tensors (AdamW), {size:,} parameters")
    for p in parts.plain:
        shape = "×".join(map(str, p.parameter.shape))
        lines.append(f"  {p.name} {shape}" + (f": {p.why}" if p.why else ""))
    return "\n".join(lines)


def _trained(c: Candidate) -> bool:
    """Whether it is trained, and holds its own values: a factor that is computed from other parameters is not one to step."""
    trained = [t for t in (c.down, c.up) if t.requires_grad]
    empty = 0 in (c.down.numel(), c.up.numel())
    return bool(trained) and all(isinstance(t, nn.Parameter) for t in trained) and (not empty or _sharded(c))


def _sharded(c: Candidate) -> bool:
    """Whether each process has only a part of a factor (FSDP, ZeRO-3: a DTensor, or a flat piece of a matrix)."""
    trained = [t for t in (c.down, c.up) if t.requires_grad]
    return any(isinstance(t, DTensor) or t.ndim != 2 for t in trained)


def _pair(c: Candidate, frozen_down: bool, joint: bool) -> Pair:
    if joint and _sharded(c):
        raise RankfoldError(
            f"{c.name}: its factors are sharded over processes (FSDP or ZeRO-3), and a pair optimiser needs both whole; use DDP, "
            "or take LoraPlus or AdamW"
        )
    if joint and c.penalised:
        raise RankfoldError(
            f"{c.name}: {c.method} adds a penalty on the factors to the loss, and a pair optimiser would take its gradient "
            "for one of the update; take LoraPlus or AdamW"
        )
    frozen = [n for n, t in (("down", c.down), ("up", c.up)) if not (t.requires_grad and isinstance(t, nn.Parameter))]
    if frozen and not (frozen_down and frozen == ["down"] and isinstance(c.down, nn.Parameter)):
        fixes: list[str] = []
        by = f" in {c.method}"
        if isinstance(getattr(c, frozen[0]), nn.Parameter):  # else the method itself keeps it in a buffer
            by = ""
            fixes = [f"make {frozen[0]}.requires_grad true"]
            fixes += ["take LoraFa, which trains up alone"] if frozen == ["down"] else []
        raise RankfoldError(
            f"{c.name}: {frozen[0]} is frozen and the other factor is not{by}, so there is no pair to train; "
            + ", or ".join([*fixes, "take torch.optim.AdamW"])
        )
    assert isinstance(c.down, nn.Parameter)
    assert isinstance(c.up, nn.Parameter)
    if joint and c.up.shape[1] != c.down.shape[0]:
        raise RankfoldError(f"{c.name}: up {tuple(c.up.shape)} and down {tuple(c.down.shape)} do not multiply")
    return Pair(c.name, c.down, c.up, float(c.scale), c.gate, c.embedding)


def _storage(t: Tensor) -> tuple[object, ...]:
    """What two tensors have in common exactly if they share their values."""
    pointer = t.data_ptr() if t.device.type != "meta" else 0
    return (t.device, pointer) if pointer else (id(t),)


def _check_untied(found: list[Pair]) -> None:
    seen: dict[tuple[object, ...], str] = {}
    for pair in found:
        for factor in (pair.down, pair.up):
            if (other := seen.get(_storage(factor))) is not None:
                raise RankfoldError(
                    f"{pair.name}: its factors are tied to those of {other}, and one step cannot serve two pairs; do not tie "
                    "them (ensure_weight_tying=False, or other target_modules), or take AdamW"
                )
            seen[_storage(factor)] = pair.name
