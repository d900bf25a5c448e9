"""The proof beside a fold: how far its factors, as read back from disk, are from the trained update."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version

import torch
from torch import Tensor

from rankfold.fold.approximate import Approximation
from rankfold.fold.compression import weighted_error
from rankfold.fold.source import Update
from rankfold.io.files import to_json
from rankfold.kernel.factors import Factors
from rankfold.text import size

#: From this share of the whole update (‖·‖_F) on, the summary says in words what compression cut off.
SEEN = 0.05
#: Up to which share of the largest logit a probe's difference is explained: by arithmetic in float32, and per unit of the worst
#: layer's error on disk.
FLOOR, AMPLIFIED = 0.01, 30.0


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
    left_out: dict[str, float] = field(default_factory=dict)
    approximation: Approximation | None = None

    @property
    def worst(self) -> LayerProof:
        return max(self.layers, key=lambda p: p.frobenius)

    def worst_of(self, kind: str) -> float:
        """The largest of one kind of error over the modules."""
        return max(getattr(p, kind) or 0.0 for p in self.layers)

    def to_json(self) -> str:
        kinds = ("frobenius", "algebra", "truncation", "rounding")
        totals = {f"worst_{kind}": self.worst_of(kind) for kind in kinds}
        return to_json({**totals, **asdict(self)})

    def _before_rounding(self) -> str:
        if not self.worst_of("truncation"):
            return f"{self.worst_of('algebra'):.1e} before rounding to {self.dtype}, "
        weighed = f" ({self.worst_of('output'):.1e} of the output)" if self.layers[0].output is not None else ""
        cut = f"{self.worst_of('truncation'):.1e} cut off by compression{weighed}, "
        return cut + f"{self.worst_of('rounding'):.1e} by rounding to {self.dtype}, "

    def _cut(self) -> list[str]:
        """In words, where compression cut off what may be seen in the outputs."""
        whole = math.hypot(*(p.norm for p in self.layers)) or 1.0
        share = math.hypot(*(p.truncation * p.norm for p in self.layers)) / whole
        if share < SEEN:
            return []
        worst = max(self.layers, key=lambda p: p.truncation)
        return [
            f"compression cut off {share:.0%} of the update ({worst.truncation:.0%} of {worst.module}): what is served is that far "
            "from what was trained; a larger --rank or a smaller --error cuts off less"
        ]

    def _unexplained(self) -> list[str]:
        """In words, where the probe's difference is far above what the error on disk makes of logits."""
        found, reach = self.probe["max_logit_error"], self.probe["max_logit"]
        assert isinstance(found, float)
        assert isinstance(reach, float)
        if self.approximation or found <= (FLOOR + AMPLIFIED * self.worst.frobenius) * reach:
            return []
        return [
            "the error on disk does not explain that difference: PEFT may apply only a part of the adapter itself, or the base "
            "may amplify rounding, as routers do; see what `rankfold doctor` says of the adapter"
        ]

    def summary(self) -> str:
        """What a person wants to know, in a few lines."""
        worst = self.worst
        lines = [
            f"folded {self.method} into {self.noun}: rank {self.rank} ({self.needed_rank} needed), "
            f"{len(self.layers)} modules, {self.parameters:,} parameters in {self.dtype}, {size(self.bytes)}",
            *([self.approximation.in_words()] if self.approximation else []),
            f"error against {'that approximation' if self.approximation else 'the trained update'}: {self._before_rounding()}"
            f"{worst.frobenius:.1e} on disk (relative Frobenius, worst layer {worst.module})",
            *self._cut(),
        ]
        if "max_logit_error" in self.probe:
            lines.append(
                f"probe: largest logit difference {self.probe['max_logit_error']:.1e} "
                f"where logits reach {self.probe['max_logit']:.3g} ({self.probe['loaded_by']}, same base, float32)"
            )
            lines += self._unexplained()
        else:
            lines.append(f"probe: not run ({self.probe['skipped']})")
        lines += [f"serve with {engine}: {flags}" for engine, flags in self.serve.items()]
        return "\n".join([*lines, *(f"note: {n}" for n in self.notes)])


def prove(
    module: str,
    trained: Update,
    exact: Factors,
    on_disk: Factors,
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
    algebra = 0.0 if isinstance(trained, Tensor) else _sketched(exact, trained) / scale
    # Where nothing was cut, what is on the disk differs from `exact` by rounding alone, and from `trained` by that and `algebra`
    frobenius, most = _size(_difference(on_disk, exact if cut is None else trained))
    return LayerProof(
        module=module,
        rank=on_disk.rank,
        norm=norm,
        algebra=algebra,
        frobenius=frobenius / scale + (algebra if cut is None else 0.0),
        max=most / (largest or 1.0),
        truncation=0.0 if cut is None else _norm(_difference(cut, trained)) / scale,
        rounding=(frobenius if cut is None else _norm(_difference(on_disk, cut))) / scale,
        output=None if cut is None or moment is None else weighted_error(trained, cut, moment),
    )


def prove_sum(proof: LayerProof, trained: Update, folded: Factors, added: Tensor) -> LayerProof:
    """The proof of a module whose update was added to its weight, where the rounding is that of the sum.

    Args:
        proof: of its factors.
        trained, folded: its update and what was added, in float64.
        added: the saved weight minus the base's, out × in in float64.
    """
    norm, largest = proof.norm or 1.0, _size(trained)[1] or 1.0
    frobenius, most = _size(_difference(added, trained))
    rounding = _norm(_difference(added, folded))
    return replace(proof, frobenius=frobenius / norm, max=most / largest, rounding=rounding / norm)


def _difference(folded: Update, other: Update) -> Update:
    if isinstance(folded, Tensor) or isinstance(other, Tensor):
        return _dense(folded) - _dense(other)
    if folded.rank != other.rank:
        return folded.minus(other)
    # B'A' − BA = (B' − B) A' + B (A' − A): of factors that are close, nothing large is subtracted
    new, old = folded.baked(), other.baked()
    return Factors(torch.cat([new.down, new.down - old.down]), torch.cat([new.up - old.up, old.up], 1))


def _sketched(folded: Factors, trained: Factors, vectors: int = 8) -> float:
    """‖ΔW' − ΔW‖_F, estimated by what both do to a few random inputs (fixed seed): any error shows, at no cost."""
    new, old = folded.baked(), trained.baked()
    x = torch.randn(new.shape[1], vectors, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return float((new.up @ (new.down @ x) - old.up @ (old.down @ x)).norm()) / vectors**0.5


def _dense(update: Update) -> Tensor:
    return update if isinstance(update, Tensor) else update.delta()


def _size(update: Update) -> tuple[float, float]:
    """(‖ΔW‖_F, max |ΔW|)."""
    if isinstance(update, Tensor):
        return float(update.norm()), float(update.abs().max())
    steady, norm = _steady(update)
    return norm, _max_abs(steady)


def _norm(update: Update) -> float:
    return float(update.norm()) if isinstance(update, Tensor) else _steady(update)[1]


def _steady(f: Factors) -> tuple[Factors, float]:
    """The same update in a form whose products keep their digits, and ‖ΔW‖_F: a difference of two large updates has its
    core made first, by QR in float64; what does not cancel needs none, and its norm is a sum of r × r products."""
    f = f.baked()
    square = float(((f.up.T @ f.up) * (f.down @ f.down.T)).sum())
    apart = float((f.up.square().sum(0) * f.down.square().sum(1)).sum())
    if square > 1e-6 * apart or apart == 0:
        return f, max(square, 0.0) ** 0.5
    q_up, r_up = torch.linalg.qr(f.up)
    q_down, r_down = torch.linalg.qr(f.down.T)
    core = r_up @ r_down.T
    return Factors(q_down.T, q_up @ core), float(core.norm())


def _max_abs(f: Factors, rows: int = 512) -> float:
    """max |ΔW|, a few rows at a time; the wide product may run in float32."""
    if f.rank == 0:
        return 0.0
    right = f.down.float()
    largest = 0.0
    for part in f.up.float().split(rows):
        low, high = torch.aminmax(part @ right)
        largest = max(largest, -float(low), float(high))
    return largest


def logit_error(ours: Tensor, folded: Tensor) -> dict[str, object]:
    ours, folded = ours.double(), folded.double()
    return {
        "max_logit_error": float((ours - folded).abs().max()),
        "max_logit": float(ours.abs().max()),
        "same_argmax": bool((ours.argmax(-1) == folded.argmax(-1)).all()),
    }
