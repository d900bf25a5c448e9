"""The one table: every method, its variants, and what its paper says must come out.

A new method adds one `Facts` with its variants to `TABLE`, and inherits every check of tests/methods/test_table*.py.
"""

from __future__ import annotations

import functools
import math
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from models import ARCHS, Arch, kinds
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankfold import attach
from rankfold.host import registry
from rankfold.host.config import LowRankConfig
from rankfold.host.linear_layer import AdaptedLinear
from rankfold.kernel.factors import Factors
from rankfold.methods.cora_subspace import content_hash, write_subspace

State = dict[str, Tensor]
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Facts:
    """What a method's paper says, in plain numbers and tensors; written without the code it judges.

    Args:
        method: name in the registry.
        count: trainable numbers of L layers of one kind: (config, r, out, in, L) → int.
        rank: rank of the folded update of one layer: (config, r, L) → int.
        delta: the update of one layer in float64: (config, r, α, own state, shared state) → out × in.
        variants: what to configure; the first is the one that runs where one a method must do.
        bad: configs that must be refused, each with what the error must name.
        starts_at_base: whether the first update is zero.
        needs: what the config needs on an architecture beside the variant's fields.
        takes_dropout: whether it allows dropout at all.
        model_wide: trainable numbers that all layers of the model share.
        multiple: of what every rank must be one.
        rank_by_place: `rank` gets a layer's place among those of its kind, in the place of L.
    """

    method: str
    count: Callable[[Any, int, int, int, int], int]
    rank: Callable[[Any, int, int], int]
    delta: Callable[[Any, int, float, State, State], Tensor]
    variants: dict[str, dict[str, Any]]
    bad: tuple[tuple[dict[str, Any], str], ...] = ()
    starts_at_base: bool = True
    needs: Callable[[Arch], dict[str, Any]] = lambda arch: {}
    takes_dropout: bool = True
    model_wide: int = 0
    multiple: int = 1
    rank_by_place: bool = False


@dataclass(frozen=True, eq=False)
class Row:
    facts: Facts
    variant: str
    kwargs: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.facts.method}-{self.variant}"

    def rank(self, r: int) -> int:
        """The nearest rank from r on that the method can have."""
        return -(-r // self.facts.multiple) * self.facts.multiple

    def config(self, arch: Arch, **changes: Any) -> LowRankConfig:
        """The row's config for an architecture; in patterns 0 and 1 stand for its two kinds of layer, a rank that is given as a
        change is `rank(r)`."""
        if type(r := changes.get("r")) is int and r > 0:
            changes["r"] = self.rank(r)
        kwargs = {
            "target_modules": list(arch.targets),
            "task_type": arch.task,
            **self.facts.needs(arch),
            **self.kwargs,
            **changes,
        }
        for name in ("rank_pattern", "alpha_pattern"):
            if kwargs.get(name):
                kwargs[name] = {arch.targets[k] if isinstance(k, int) else k: v for k, v in kwargs[name].items()}
        return registry.get(self.facts.method).config(**kwargs)


def scale(config: LowRankConfig, r: int, alpha: float) -> float:
    return alpha / (math.sqrt(r) if config.use_rslora else r)


def _lora_delta(config: Any, r: int, alpha: float, own: State, _: State) -> Tensor:
    return scale(config, r, alpha) * own["up"] @ own["down"]


def _rasa_k(config: Any, r: int) -> int:
    return max(r // 8, 1) if config.shared_rank is None else config.shared_rank


def _rasa_delta(config: Any, r: int, alpha: float, own: State, pool: State) -> Tensor:
    parts = [part for part in (own, pool) if "up" in part]  # k = r has no private ranks, k = 0 no pool
    up, down = torch.cat([p["up"] for p in parts], 1), torch.cat([p["down"] for p in parts])
    return up @ torch.diag(own["gate"]) @ down


def _rasa_count(config: Any, r: int, out: int, inn: int, layers: int) -> int:
    k = _rasa_k(config, r)
    return layers * r * (inn + out) + layers * (r - k + layers * k)


LORA = Facts(
    method="lora",
    count=lambda config, r, out, inn, layers: layers * r * (inn + out),
    rank=lambda config, r, layers: r,
    delta=_lora_delta,
    variants={
        "default": {},
        "rslora": {"r": 4, "use_rslora": True},
        "dropout": {"r": 4, "lora_alpha": 12, "lora_dropout": 0.3},
        "patterns": {"r": 4, "rank_pattern": {0: 2}, "alpha_pattern": {1: 5}},
        "gaussian": {"r": 3, "init_lora_weights": "gaussian"},
    },
    bad=(({"init_lora_weights": "pissa"}, "init_lora_weights"), ({"init_lora_weights": 3}, "init_lora_weights")),
)
RASA = Facts(
    method="rasa",
    count=_rasa_count,
    rank=lambda config, r, layers: r - _rasa_k(config, r) + layers * _rasa_k(config, r),
    delta=_rasa_delta,
    variants={
        "default": {},
        "k0": {"r": 4, "shared_rank": 0},
        "k1": {"r": 4, "lora_alpha": 6, "shared_rank": 1},
        "kr": {"r": 3, "shared_rank": 3},
        "rslora": {"r": 4, "shared_rank": 2, "use_rslora": True},
        "dropout": {"r": 4, "shared_rank": 2, "lora_dropout": 0.3},
        "patterns": {"r": 4, "rank_pattern": {0: 2}, "alpha_pattern": {1: 5}},
    },
    bad=(
        ({"r": 4, "shared_rank": 5}, "shared_rank"),
        ({"shared_rank": -1}, "shared_rank"),
        ({"shared_rank": 1.0}, "shared_rank"),
        ({"shared_rank": "1"}, "shared_rank"),
        ({"r": 8, "shared_rank": 4, "rank_pattern": {0: 2}}, "shared_rank"),
        ({"init_lora_weights": "gaussian"}, "init_lora_weights"),
    ),
)


def _gated_count(config: Any, r: int, out: int, inn: int, layers: int) -> int:
    return layers * (r * (inn + out) + r)


def _gated_delta(config: Any, r: int, alpha: float, own: State, _: State) -> Tensor:
    return scale(config, r, alpha) * own["up"] @ torch.diag(own["gate"]) @ own["down"]


def _adalora_delta(config: Any, r: int, alpha: float, own: State, _: State) -> Tensor:
    return alpha / (r + 1e-5) * own["up"] @ torch.diag(own["gate"]) @ own["down"]


# The scheduled methods (SoRA, AdaLoRA, dynamic DoRA) keep all their ranks here, so that every tensor moves; their
# schedules are in their own files. `allow_unscheduled`, because the table trains by hand and saves at any time.
SORA = Facts(
    method="sora",
    count=_gated_count,
    rank=lambda config, r, layers: r,
    delta=_gated_delta,
    variants={
        "default": {"allow_unscheduled": True},
        "dropout": {"r": 4, "lora_dropout": 0.3, "allow_unscheduled": True},
    },
    bad=(({"threshold": -1}, "threshold=-1"), ({"prox": "hard"}, "prox='hard'"), ({"preset": "x"}, "preset='x'")),
)
ADALORA = Facts(
    method="adalora",
    count=_gated_count,
    rank=lambda config, r, layers: r,
    delta=_adalora_delta,
    variants={"default": {"r": 4, "target_r": 4, "allow_unscheduled": True}},
    bad=(
        ({"r": 4, "target_r": 5}, "target_r=5"),
        ({"deltaT": 0}, "deltaT=0"),
        ({"use_rslora": True}, "use_rslora=True"),
    ),
)
DYNAMIC_DORA = Facts(
    method="dynamic_dora",
    count=_gated_count,
    rank=lambda config, r, layers: r,
    delta=_gated_delta,
    variants={
        "default": {"r": 4, "target_r": 4, "lora_dropout": 0.0, "interval": 1, "start": 0, "end": 0}
        | {"allow_unscheduled": True}
    },
    bad=(({"r": 4, "target_r": 0}, "target_r=0"), ({"start": 0.6, "end": 0.5}, "start=0.6")),
)


@functools.cache
def _basis(arch: Arch) -> dict[str, Any]:
    """A basis file for every linear layer of an architecture: the left singular vectors of its own weights."""
    tensors = {}
    for name, module in arch.build().named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            weight = module.weight.detach().double()
            u, sigma, _ = torch.linalg.svd(weight.T if isinstance(module, Conv1D) else weight)
            u = nn.functional.pad(u[:, :12], (0, max(12 - u.shape[0], 0)))
            tensors |= {f"{name}.basis": u.float().contiguous(), f"{name}.sigma": sigma}
    path = Path(tempfile.mkdtemp()) / "basis.safetensors"
    about = {"version": 1, "scope": "module", "source": "weights", "scale": "none", "rank": 12, "base": None}
    ends = sorted({n.rpartition(".")[0].rpartition(".")[2] for n in tensors})
    write_subspace(path, tensors, about | {"targets": ends, "models": [], "gaps": {}, "hash": content_hash(tensors)})
    return {"basis": str(path)}


def _cora_delta(config: Any, r: int, alpha: float, own: State, shared: State) -> Tensor:
    up = own["up"] if config.approach == 2 else shared["up"][:, :r]
    return scale(config, r, alpha) * up @ own["down"]


CORA = Facts(
    method="cora",
    count=lambda config, r, out, inn, layers: layers * r * (inn + (out if config.approach == 2 else 0)),
    rank=lambda config, r, layers: r,
    delta=_cora_delta,
    variants={
        "frozen": {"r": 4},
        "trained": {"r": 4, "approach": 2},
        "dropout": {"r": 4, "lora_alpha": 12, "lora_dropout": 0.3},
        "patterns": {"r": 4, "rank_pattern": {0: 2}, "alpha_pattern": {1: 5}},
    },
    bad=(({"approach": 0}, "approach"), ({"basis": ""}, "basis"), ({"r": 13}, "r=13")),
    needs=_basis,
)

#: Components of the finished link that `stir` gives every chain.
LINK = 2


def _chain_delta(config: Any, r: int, alpha: float, own: State, _: State) -> Tensor:
    return scale(config, r, alpha) * (own["up"] @ own["down"] + own["links_up"] @ own["links_down"])


# Chains are tested with a finished link, and tie one more knot in every run of 2 steps or more. Their own tests are in test_chains.py.
COLA = Facts(
    method="cola",
    count=lambda config, r, out, inn, layers: layers * r * (inn + out),
    rank=lambda config, r, layers: r + LINK,
    delta=_chain_delta,
    variants={
        "default": {"r": 4, "links": 2, "allow_unscheduled": True},
        "dropout": {"r": 4, "links": 2, "lora_alpha": 12, "lora_dropout": 0.3, "allow_unscheduled": True},
    },
    bad=(
        ({"links": 0}, "links=0"),
        ({"links": 2, "link_steps": 5}, "link_steps=5"),
        ({"link_shares": [0.5, 0.6]}, "link_shares=[0.5, 0.6]"),
        ({"links": 2, "link_ranks": [8, 4, 2]}, "link_ranks=[8, 4, 2]"),
        ({"r": 4, "links": 2, "link_ranks": [8, 4]}, "link_ranks=[8, 4]"),
        ({"rewarm_steps": -1}, "rewarm_steps=-1"),
        ({"restart_schedule": "step"}, "restart_schedule='step'"),
        ({"links_error": 1.0}, "links_error=1.0"),
        ({"links_limit": 0}, "links_limit=0"),
        ({"preset": "x"}, "preset='x'"),
    ),
)
RAC_LORA = Facts(
    method="rac_lora",
    count=lambda config, r, out, inn, layers: layers * r * (out if config.side == "right" else inn),
    rank=lambda config, r, layers: r + LINK,
    delta=_chain_delta,
    variants={
        "default": {"r": 4, "links": 2, "allow_unscheduled": True},
        "left": {"r": 4, "links": 2, "side": "left", "sketch": "orthonormal", "allow_unscheduled": True},
    },
    bad=(
        ({"side": "top"}, "side='top'"),
        ({"sketch": "uniform"}, "sketch='uniform'"),
        ({"sketch_std": 0.0}, "sketch_std=0.0"),
        ({"solver": "newton"}, "solver='newton'"),
        ({"solver": "exact_gd", "link_steps": 2}, "link_steps=2"),
        ({"solver": "exact_gd", "lora_dropout": 0.1}, "lora_dropout=0.1"),
    ),
)
XGBLORA = Facts(
    method="xgblora",
    count=lambda config, r, out, inn, layers: layers * r * (inn + out),
    rank=lambda config, r, layers: r + LINK,
    delta=_chain_delta,
    # Every layer is drawn, so that every tensor moves; the draws are in test_xgblora.py
    variants={"default": {"link_steps": 2, "allow_unscheduled": True}},
    bad=(({"layers_drawn": 0}, "layers_drawn=0"), ({"link_steps": 0}, "link_steps=0")),
    needs=lambda arch: {"layers_drawn": {"t5": 4, "mlp": 3}.get(arch.name, 3)},
)


def _delta_lora_delta(config: Any, r: int, alpha: float, own: State, _: State) -> Tensor:
    now, then = own["up"] @ own["down"], own["links_up"] @ own["links_down"]
    return scale(config, r, alpha) * ((1 + config.delta_weight) * now - config.delta_weight * then)


DELTA_LORA = Facts(
    method="delta_lora",
    count=lambda config, r, out, inn, layers: layers * r * (inn + out),
    rank=lambda config, r, layers: r + LINK,
    delta=_delta_lora_delta,
    variants={"default": {"r": 4, "start_step": 0, "allow_unscheduled": True}},
    takes_dropout=False,
    bad=(
        ({"lora_dropout": 0.1}, "lora_dropout=0.1"),
        ({"delta_weight": -1.0}, "delta_weight=-1.0"),
        ({"start_step": -1}, "start_step=-1"),
    ),
)


def _sbora_delta(config: Any, r: int, alpha: float, own: State, _: State) -> Tensor:
    out, inn = own["shape"].int().tolist()
    delta, index = torch.zeros(out, inn, dtype=torch.float64), own["index"].long()
    if config.variant == "fa":
        delta[:, index] = scale(config, r, alpha) * own["up"]
    else:
        delta[index] = scale(config, r, alpha) * own["down"]
    return delta


SBORA = Facts(
    method="sbora",
    count=lambda config, r, out, inn, layers: layers * r * (out if config.variant == "fa" else inn),
    rank=lambda config, r, layers: r,
    delta=_sbora_delta,
    variants={
        "fa": {"r": 3},
        "fb": {"r": 3, "lora_alpha": 12, "lora_dropout": 0.3, "variant": "fb", "seed": 7},
    },
    bad=(
        ({"variant": "fc"}, "variant='fc'"),
        ({"seed": "x"}, "seed='x'"),
        ({"region": -1}, "region=-1"),
        ({"draw": "last"}, "draw='last'"),
    ),
)


def _block_delta(config: Any, r: int, alpha: float, own: State, _: State) -> Tensor:
    n, down, up = config.blocks, own["down"], own["up"]
    if config.block_axis == "rank":
        delta = sum(up[:, i * (r // n) : (i + 1) * (r // n)] @ down for i in range(n))
    else:
        delta = up @ torch.cat([down] * n, 1)
    return scale(config, r, alpha) * delta


BLOCK_LORA = Facts(
    method="block_lora",
    count=lambda config, r, out, inn, layers: layers * (r * inn // config.blocks + r * out),
    rank=lambda config, r, layers: r // config.blocks if config.block_axis == "rank" else r,
    delta=_block_delta,
    multiple=2,
    variants={
        "default": {"r": 4},
        "input": {"r": 3, "lora_alpha": 12, "lora_dropout": 0.3, "block_axis": "input", "use_rslora": False},
    },
    bad=(
        ({"blocks": 0}, "blocks=0"),
        ({"blocks": 3}, "blocks=3"),
        ({"rank_pattern": {0: 3}}, "rank_pattern['q_proj']=3"),
        ({"block_axis": "output"}, "block_axis='output'"),
    ),
)


def _sd_delta(config: Any, r: int, alpha: float, own: State, shared: State) -> Tensor:
    return shared["alpha"][0] * own["up"] @ own["down"]


# In its first task; those with earlier directions are in test_sd_lora.py.
SD_LORA = Facts(
    method="sd_lora",
    count=lambda config, r, out, inn, layers: layers * r * (inn + out),
    rank=lambda config, r, layers: r,
    delta=_sd_delta,
    variants={"default": {"r": 4}},
    bad=(
        ({"norm": "l1"}, "norm='l1'"),
        ({"use_rslora": True}, "use_rslora=True"),
        ({"alpha_pattern": {0: 4.0}}, "alpha_pattern={'q_proj': 4.0}"),
        ({"rank_schedule": {4: 6, 8: 8}}, "rank_schedule={4: 6, 8: 8}"),
        ({"rank_schedule": {0: 6}}, "rank_schedule={0: 6}"),
        ({"rank_schedule": [8, 6]}, "rank_schedule=[8, 6]"),
        ({"magnitude": float("nan")}, "magnitude=nan"),
        ({"kd_residual": "max"}, "kd_residual='max'"),
        ({"kd_update": "no"}, "kd_update='no'"),
        ({"kd_threshold": -1.0}, "kd_threshold=-1.0"),
        ({"task": -1}, "task=-1"),
    ),
    model_wide=1,
)


def _previous(config: Any, own: State) -> list[State]:
    """What `state_at` read off the modules that a module is linked to, itself first."""
    links = len(own) if config.previous < 0 else config.previous
    found = [{k: own[f"{before}{k}"] for k in ("pair.up", "pair.down")} for before in _befores(own)]
    return found[: links + 1]


def _befores(own: State) -> list[str]:
    return ["", *(f"before.{i}." for i in range(1, len(own)) if f"before.{i}.pair.up" in own)]


def _bs_delta(config: Any, r: int, alpha: float, own: State, _: State) -> Tensor:
    pairs = [p["pair.up"] @ p["pair.down"] for p in _previous(config, own)]
    return scale(config, r, alpha) * sum(pairs[1:], pairs[0])


RES_LORA = Facts(
    method="res_lora",
    count=lambda config, r, out, inn, layers: layers * r * (inn + out),
    rank=lambda config, r, place: r * (1 + min(place, config.previous) if config.previous >= 0 else place + 1),
    rank_by_place=True,
    delta=_bs_delta,
    variants={
        "bs": {"r": 3},
        "all": {"r": 2, "lora_alpha": 2, "previous": -1, "use_rslora": True},
        "dropout": {"r": 2, "lora_alpha": 3, "lora_dropout": 0.3, "previous": 2},
    },
    bad=(
        ({"shortcut": "as"}, "shortcut='as'"),
        ({"previous": -2}, "previous=-2"),
        ({"previous": 1.0}, "previous=1.0"),
        ({"shortcut": "is", "previous": 2}, "previous=2"),
    ),
)

TABLE = [
    LORA, RASA, SORA, ADALORA, DYNAMIC_DORA, CORA, COLA, RAC_LORA, XGBLORA, DELTA_LORA, SBORA, BLOCK_LORA, SD_LORA, RES_LORA,
]  # fmt: skip
#: ResLoRA's other shortcuts, whose update is not a matrix: they run in the tests that do not ask for one.
LIVE = [
    Row(RES_LORA, "is", {"r": 3, "shortcut": "is", "lora_alpha": 2}),
    Row(RES_LORA, "ms", {"r": 3, "shortcut": "ms", "previous": 2, "lora_alpha": 2}),
]
ROWS = [Row(facts, variant, kwargs) for facts in TABLE for variant, kwargs in facts.variants.items()]
FIRST = [next(row for row in ROWS if row.facts is facts) for facts in TABLE]
DROPPING = [row for row in FIRST if row.facts.takes_dropout]

rows = pytest.mark.parametrize("row", ROWS, ids=str)
all_rows = pytest.mark.parametrize("row", [*ROWS, *LIVE], ids=str)
first_rows = pytest.mark.parametrize("row", FIRST, ids=str)


#: Every row on every architecture: `make test-grid`.
WHOLE_GRID = os.environ.get("RANKFOLD_WHOLE_GRID") == "1"


def in_turn(check: str, values: Sequence[T], some_rows: Sequence[Row] = ROWS) -> list[tuple[T, Row]]:
    """The architectures (or dtypes, or other values) that a check runs a row on: one, in turn, and two for a method's first row.

    A fault lies where two things meet: a check and a method, a check and an architecture, a method and an architecture. It hardly ever
    takes all three. So every two meet, and few threes do. Where a check begins comes from its name, so that methods meet other
    architectures in other checks.
    """
    if WHOLE_GRID:
        return [(value, row) for row in some_rows for value in values]
    start = zlib.crc32(check.encode())
    further = len(values) // 2 | 1  # odd: where the last of several parameters has two values, a first row meets both
    places = [(start + i + k, row) for i, row in enumerate(some_rows) for k in (0, further)[: 1 + (row in FIRST)]]
    return [(values[place % len(values)], row) for place, row in places]


def spread(some_rows: Sequence[Row] = ROWS, **parameters: Iterable[Any]) -> Callable[[Callable[..., None]], Any]:
    """Gives a check its `row` and these parameters, whose combinations are taken in turn."""

    def parametrized(check: Callable[..., None]) -> Any:
        cases = [
            (*values, row) for values, row in in_turn(check.__name__, list(product(*parameters.values())), some_rows)
        ]
        ids = ["-".join(getattr(each, "name", str(each)) for each in case) for case in cases]
        return pytest.mark.parametrize((*parameters, "row"), cases, ids=ids)(check)

    return parametrized


def on(*archs: Arch, some_rows: Sequence[Row] = ROWS) -> Callable[[Callable[..., None]], Any]:
    return spread(some_rows, arch=archs)


everywhere = on(*ARCHS.values())
all_everywhere = on(*ARCHS.values(), some_rows=[*ROWS, *LIVE])


def adapt(
    arch: Arch,
    row: Row,
    device: torch.device | str = "cpu",
    *,
    dtype: torch.dtype = torch.float32,
    live: bool = True,
    seed: int = 2,
    name: str = "default",
    options: dict[str, Any] | None = None,
    **changes: Any,
) -> PeftModel:
    """The architecture with the row's adapter on it, in eval mode.

    Args:
        live: move every adapter tensor off its first value, as if trained.
        options: for `get_peft_model`.
        changes: of the config.
    """
    config = row.config(arch, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(arch.build(device, dtype), config, adapter_name=name, **(options or {}))  # pyright: ignore[reportArgumentType]
    if live:
        stir(model, name, seed)
    return model.eval()  # pyright: ignore[reportReturnType]


def second(model: PeftModel, arch: Arch, row: Row, name: str = "other", **changes: Any) -> None:
    """Adds one more adapter, of a rank of its own, so that it shows if the two are mixed up, and as if trained."""
    model.add_adapter(name, row.config(arch, **{"r": 5, "rank_pattern": {}, **changes}))
    stir(model, name, seed=5)


def stir(model: nn.Module, name: str = "default", seed: int = 2) -> None:
    """Adds noise to every parameter of one adapter, and a finished link where it has such."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in adapter_parameters(model, name):
            p += (0.2 * torch.randn(p.shape, generator=g)).to(p)
        for adapter in (a for layer in layers(model).values() for a in layer.adapters([name]) if a.growing):
            shapes = (LINK, adapter.site.in_features), (adapter.site.out_features, LINK)
            down, up = ((0.2 * torch.randn(shape, generator=g)).to(adapter.up) for shape in shapes)  # pyright: ignore[reportArgumentType]
            adapter.add_link(Factors(down, up))  # pyright: ignore[reportCallIssue]


def fit(arch: Arch, model: nn.Module, steps: int, lr: float = 0.01) -> None:
    """Trains by hand, with the method's controller where it has one."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    attached = attach(model, optimizer, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        arch.loss(model).backward()
        optimizer.step()
    attached.remove()


def adapter_parameters(model: nn.Module, name: str = "default") -> list[tuple[str, nn.Parameter]]:
    """An adapter's parameters, shared ones once."""
    marks = (f"lowrank_adapters.{name}.", f"lowrank_shared.{name}.")
    return [(n, p) for n, p in model.named_parameters() if any(mark in n for mark in marks)]


def adapter_buffers(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """An adapter's own frozen tensors; training may change them where it goes from one link to the next."""
    return {n: b for n, b in model.named_buffers() if f"lowrank_adapters.{name}." in n}


def layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The adapted layers by their name in the base model."""
    return {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, AdaptedLinear)}


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the base weights under the adapters."""
    return {name: layer.get_base_weight().clone() for name, layer in layers(model).items()}


def snapshot(model: nn.Module) -> State:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def assert_same(a: State, b: State) -> None:
    """The same keys, and bit for bit the same tensors."""
    assert a.keys() == b.keys()
    different = [k for k in a if a[k].dtype != b[k].dtype or not torch.equal(a[k], b[k])]
    assert not different, f"{len(different)} of {len(a)} tensors differ, such as {different[:3]}"


def stock_lora(model: PeftModel, arch: Arch, name: str = "default", dtype: torch.dtype = torch.float32) -> PeftModel:
    """What `factors()` says, as PEFT's own LoRA with alpha = rank on a fresh base."""
    found = {n: a.lowrank_adapters[name].factors().baked().detach() for n, a in layers(model).items()}
    ranks = {n.replace(".", r"\."): f.rank for n, f in found.items()}
    widest = max(ranks.values())
    config = LoraConfig(
        r=widest,
        lora_alpha=widest,
        rank_pattern=ranks,
        alpha_pattern=ranks,
        target_modules=list(found),
        task_type=arch.task,
        fan_in_fan_out=arch.name == "gpt2",
    )
    device = next(model.parameters()).device
    lora = get_peft_model(arch.build(device, dtype), config, autocast_adapter_dtype=False)  # pyright: ignore[reportArgumentType]
    for n, f in found.items():
        layer = lora.get_submodule(f"base_model.model.{n}")
        layer.lora_A["default"].weight.data = f.down.to(dtype)  # pyright: ignore[reportIndexIssue]
        layer.lora_B["default"].weight.data = f.up.to(dtype)  # pyright: ignore[reportIndexIssue]
    return lora.eval()  # pyright: ignore[reportReturnType]


def state_at(model: nn.Module, name: str, adapter: str = "default") -> tuple[State, State]:
    """Own and shared tensors of the adapter on one layer, in float64, read off the modules by name alone; and (out, in). Those of
    the layers of its kind before it follow, as "before.1." and so on, the nearest first."""
    found = layers(model)
    layer = found[name]
    module = layer.lowrank_adapters[adapter]
    own = {k: v.detach().double() for k, v in module.state_dict().items()}
    kind = next(names for names in kinds(list(found)).values() if name in names)
    for i, before in enumerate(reversed(kind[: kind.index(name)]), 1):
        state = found[before].lowrank_adapters[adapter].state_dict()
        own |= {f"before.{i}.{k}": v.detach().double() for k, v in state.items()}
    own["shape"] = torch.tensor([layer.out_features, layer.in_features])
    shared = {} if module.shared is None else module.shared.state_dict() | dict(module.shared.named_buffers())  # pyright: ignore[reportCallIssue]
    return own, {k: v.detach().double() for k, v in shared.items()}


def assert_distinct(tensors: list[Tensor]) -> None:
    """No tensor twice, and no memory in two."""
    assert len({id(t) for t in tensors}) == len(tensors)
    memory = [t.data_ptr() for t in tensors if t.numel()]
    assert len(set(memory)) == len(memory)
