"""The proof beside a fold: how far its factors, as read back from disk, are from the trained update."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from rankfold.factors import Factors
from rankfold.fold.compression import weighted_error
from rankfold.fold.source import Update


@dataclass(frozen=True)
class LayerProof:
    """One module. Errors are relative to ‖ΔW‖_F (`frobenius`) and to max |ΔW| (`max`), computed in float64.

    Args:
        module: its name.
        rank: components it needs.
        norm: ‖ΔW‖_F.
        algebra: of the factors before anything is cut off or rounded; 0 where the update has no factors.
        frobenius, max: of what was read back from disk, all in all.
        truncation: of what compression cut off, before rounding.
        rounding: of the rounding to the file's dtype, apart from the truncation.
        output: what compression cut off, weighed by the calibration's inputs; None without calibration.
    """

    module: str
    rank: int
    norm: float
    algebra: float
    frobenius: float
    max: float
    truncation: float = 0.0
    rounding: float = 0.0
    output: float | None = None


@dataclass
class FoldReport:
    """What was folded, how exactly, and how to serve it."""

    adapter: str
    method: str
    profile: str
    base: str | None
    rank: int
    needed_rank: int
    dtype: str
    parameters: int
    bytes: int
    layers: list[LayerProof]
    probe: dict[str, object]
    serve: dict[str, str]
    notes: list[str]
    sha256: dict[str, str]
    versions: dict[str, str] = field(default_factory=lambda: {p: version(p) for p in ("rankfold", "peft", "torch")})
    noun: str = "a plain LoRA"

    @property
    def worst(self) -> LayerProof:
        return max(self.layers, key=lambda p: p.frobenius)

    def worst_of(self, kind: str) -> float:
        """The largest of one kind of error over the modules."""
        return max(getattr(p, kind) or 0.0 for p in self.layers)

    def to_json(self) -> str:
        kinds = ("frobenius", "algebra", "truncation", "rounding")
        totals = {f"worst_{kind}": self.worst_of(kind) for kind in kinds}
        return json.dumps({**totals, **asdict(self)}, indent=2) + "\n"

    def _before_rounding(self) -> str:
        if not self.worst_of("truncation"):
            return f"{self.worst_of('algebra'):.1e} before rounding to {self.dtype}, "
        weighed = f" ({self.worst_of('output'):.1e} of the output)" if self.layers[0].output is not None else ""
        cut = f"{self.worst_of('truncation'):.1e} cut off by compression{weighed}, "
        return cut + f"{self.worst_of('rounding'):.1e} by rounding to {self.dtype}, "

    def summary(self) -> str:
        """What a person wants to know, in a few lines."""
        worst = self.worst
        lines = [
            f"folded {self.method} into {self.noun}: rank {self.rank} ({self.needed_rank} needed), "
            f"{len(self.layers)} modules, {self.parameters:,} numbers in {self.dtype}, {self.bytes / 1e6:.1f} MB",
            f"error against the trained update: {self._before_rounding()}"
            f"{worst.frobenius:.1e} on disk (relative Frobenius, worst layer {worst.module})",
        ]
        if "max_logit_error" in self.probe:
            lines.append(
                f"probe: largest logit difference {self.probe['max_logit_error']:.1e} "
                f"where logits reach {self.probe['max_logit']:.1f} ({self.probe['loaded_by']}, same base, float32)"
            )
        else:
            lines.append(f"probe: not run ({self.probe['skipped']})")
        lines += [f"serve with {engine}: {flags}" for engine, flags in self.serve.items()]
        return "\n".join([*lines, *(f"note: {n}" for n in self.notes)])


def prove(
    module: str,
    trained: Update,
    exact: Factors,
    on_disk: Update,
    *,
    cut: Factors | None = None,
    moment: Tensor | None = None,
) -> LayerProof:
    """Compares one module's folded factors, before rounding and as in the file, with the trained update (all float64).

    Args:
        exact: the factors of all of it; not looked at where `trained` is a matrix.
        cut: what compression left of it.
        moment: E[x xᵀ] of the module's inputs, to state the error of its output as well.
    """
    norm, largest = _size(trained)
    scale = norm or 1.0
    frobenius, most = _size(_difference(on_disk, trained))
    return LayerProof(
        module=module,
        rank=(exact if cut is None else cut).rank,
        norm=norm,
        algebra=0.0 if isinstance(trained, Tensor) else _norm(_difference(exact, trained)) / scale,
        frobenius=frobenius / scale,
        max=most / (largest or 1.0),
        truncation=0.0 if cut is None else _norm(_difference(cut, trained)) / scale,
        rounding=(frobenius if cut is None else _norm(_difference(on_disk, cut))) / scale,
        output=None if cut is None or moment is None else weighted_error(trained, cut, moment),
    )


def _difference(folded: Update, trained: Update) -> Update:
    if isinstance(folded, Factors) and isinstance(trained, Factors):
        return folded.minus(trained)
    return _dense(folded) - _dense(trained)


def _dense(update: Update) -> Tensor:
    return update if isinstance(update, Tensor) else update.delta()


def _size(update: Update) -> tuple[float, float]:
    """(‖ΔW‖_F, max |ΔW|)."""
    return _norm(update), float(update.abs().max()) if isinstance(update, Tensor) else _max_abs(update)


def _norm(update: Update) -> float:
    return float(update.norm())


def _max_abs(factors: Factors, rows: int = 512) -> float:
    """max |ΔW|, a few rows at a time. The r×r core is made first in float64, so that a difference of two large updates
    keeps its digits; the wide product may then run in float32."""
    f = factors.baked()
    if f.rank == 0:
        return 0.0
    q_up, r_up = torch.linalg.qr(f.up)
    q_down, r_down = torch.linalg.qr(f.down.T)
    left, right = (q_up @ (r_up @ r_down.T)).float(), q_down.T.float()
    return max(float((part @ right).abs().max()) for part in left.split(rows))


def sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def logit_error(ours: Tensor, folded: Tensor) -> dict[str, object]:
    ours, folded = ours.double(), folded.double()
    return {
        "max_logit_error": float((ours - folded).abs().max()),
        "max_logit": float(ours.abs().max()),
        "same_argmax": bool((ours.argmax(-1) == folded.argmax(-1)).all()),
    }
