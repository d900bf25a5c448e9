"""GeLoRA: the rank of every block from how much it raises the intrinsic dimension of its hidden states.

    plan = gelora_plan(model, tokenizer, texts)
    print(plan.ranks)                               # {"model.layers.0": 2, ...}
    model = get_peft_model(model, plan.config())    # or plan.peft_config(), PEFT's own LoRA

Paper: GeLoRA, Geometric Adaptive Ranks, arXiv 2412.09250 (Findings of EMNLP 2025). With d_i the intrinsic dimension of the
input of block i, and d_{i+1} of its output:

    r_i = max(d_{i+1} − d_i, 0) + 1          α_i = 32 · r_i

The same r_i for every attention matrix (K, Q, V, O) of block i; then ordinary LoRA. No official code was found, and rule,
ratio and estimator (TwoNN) are from third-party summaries of the paper.

OUR INTERPRETATION: which vectors are measured (states.py) and how many; d is rounded half up before the rule ("round"; the
difference up or down instead: "ceil_diff", "floor_diff"); no rank exceeds a matrix's own; which matrices are attention's in
other architectures (blocks.py). How far a rank depends on chance is shown: the rule applied to each subsample.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import version
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, get_args

from peft import LoraConfig
from torch import nn

from rankfold.errors import RankfoldError
from rankfold.gelora.blocks import find_stacks
from rankfold.gelora.dimension import DISCARD, Fit
from rankfold.gelora.samples import Sample, batches, draw, longest, pad_id
from rankfold.gelora.states import FEWEST, Chain, Dimensions, intrinsic_dimensions
from rankfold.methods.lora import PlainLoraConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rounding = Literal["round", "ceil_diff", "floor_diff"]

ALPHA_PER_RANK = 32
FORMAT = "rankfold-gelora-1"


def gelora_ranks(d: Sequence[float], rounding: Rounding = "round", max_rank: int | None = None) -> list[int]:
    """r_i = max(d_{i+1} − d_i, 0) + 1 for L blocks from L + 1 dimensions.

    >>> gelora_ranks([3.2, 5.9, 9.4, 9.1, 12.6, 8.0])
    [4, 4, 1, 5, 1]

    Raises:
        ValueError: an unknown rounding, or max_rank below 1.
    """
    if rounding not in get_args(Rounding):
        raise RankfoldError(f"rounding={rounding!r} must be one of {', '.join(get_args(Rounding))}")
    if max_rank is not None and max_rank < 1:
        raise RankfoldError(f"max_rank={max_rank} must be 1 or more")
    if rounding == "round":
        d = [math.floor(x + 0.5) for x in d]
    to_whole = math.floor if rounding == "floor_diff" else math.ceil
    ranks = [max(to_whole(after - before), 0) + 1 for before, after in pairwise(d)]
    return [min(rank, max_rank or rank) for rank in ranks]


@dataclass(frozen=True)
class BlockRank:
    """One block.

    Args:
        name: such as "model.layers.3".
        d_in, d_out: dimension of its input and output; `sd_in`, `sd_out` over the subsamples.
        rank: r_i.
        low, high: the least and the largest rank that the rule gives on a single subsample.
        modules: its adapted matrices, by name (out, in).
    """

    name: str
    d_in: float
    sd_in: float
    d_out: float
    sd_out: float
    rank: int
    low: int
    high: int
    modules: dict[str, tuple[int, int]]

    def ranks(self) -> dict[str, int]:
        """By module; never more than its matrix has."""
        return {name: min(self.rank, *shape) for name, shape in self.modules.items()}

    @property
    def parameters(self) -> int:
        return sum(r * sum(self.modules[name]) for name, r in self.ranks().items())


@dataclass(frozen=True)
class GeloraPlan:
    """A rank for every block, and how it was found.

    Args:
        model: its name.
        blocks: in the model's order, stack after stack.
        dimensions: what was measured.
        targets: `target_modules` that name exactly the adapted matrices.
        rounding, max_rank: of the rule.
        recipe: what was sampled and with which versions.
        notes: sentences for the reader.
    """

    model: str
    blocks: tuple[BlockRank, ...]
    dimensions: Dimensions
    targets: tuple[str, ...]
    rounding: Rounding
    max_rank: int | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    # Results ----------------------------------------------------------------------------------------------------------

    @property
    def ranks(self) -> dict[str, int]:
        """By block."""
        return {block.name: block.rank for block in self.blocks}

    def module_ranks(self) -> dict[str, int]:
        """By adapted matrix."""
        return {name: r for block in self.blocks for name, r in block.ranks().items()}

    @property
    def parameters(self) -> int:
        """Trainable parameters of the LoRA: Σ r·(in + out)."""
        return sum(block.parameters for block in self.blocks)

    def fields(self) -> dict[str, Any]:
        """r, lora_alpha, target_modules and both patterns: what a run file's `method` takes beside its name."""
        ranks = self.module_ranks()
        r = Counter(ranks.values()).most_common(1)[0][0]
        other = {name: rank for name, rank in ranks.items() if rank != r}
        return {
            "r": r,
            "lora_alpha": ALPHA_PER_RANK * r,
            "target_modules": list(self.targets),
            "rank_pattern": other,
            "alpha_pattern": {name: ALPHA_PER_RANK * rank for name, rank in other.items()},
        }

    def config(self, **changes: Any) -> PlainLoraConfig:
        """rankfold's LoRA with these ranks; `changes` are further fields, such as lora_dropout or task_type."""
        return PlainLoraConfig(**{**self.fields(), **changes})

    def peft_config(self, **changes: Any) -> LoraConfig:
        """PEFT's own LoRA with these ranks."""
        return LoraConfig(**{**self.fields(), **changes})

    # As a file --------------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """Everything, and under "method" what a run file takes."""
        method = {"name": "lora", **self.fields()}
        return json.dumps({"format": FORMAT, **asdict(self), "method": method}, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> GeloraPlan:
        """Reads `to_json` back.

        Raises:
            ValueError: not such a file, or one whose ranks do not follow from its dimensions.
        """
        try:
            raw = json.loads(text)
            if raw.get("format") != FORMAT:
                raise RankfoldError(f"format is {raw.get('format')!r}, and must be {FORMAT!r}")
            d = raw["dimensions"]
            chains = tuple(
                Chain(c["stack"], tuple(tuple(map(float, row)) for row in c["samples"])) for c in d["chains"]
            )
            blocks = tuple(
                BlockRank(**{**b, "modules": {name: (int(o), int(i)) for name, (o, i) in b["modules"].items()}})
                for b in raw["blocks"]
            )
            plan = cls(
                model=raw["model"],
                blocks=blocks,
                dimensions=Dimensions(**{**d, "chains": chains}),
                targets=tuple(raw["targets"]),
                rounding=raw["rounding"],
                max_rank=raw["max_rank"],
                recipe=raw["recipe"],
                notes=tuple(raw["notes"]),
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RankfoldError(f"not a plan that rankfold wrote: {type(error).__name__}: {error}") from None
        expected = [r for chain in plan.dimensions.chains for r in gelora_ranks(chain.d, plan.rounding, plan.max_rank)]
        if [b.rank for b in plan.blocks] != expected:
            raise RankfoldError(
                "plan: blocks[].rank do not follow from the dimensions in it; to choose other ranks, change "
                "rank_pattern of plan.config()"
            )
        return plan


def assign_ranks(
    model: nn.Module,
    dimensions: Dimensions,
    *,
    rounding: Rounding = "round",
    max_rank: int | None = None,
    targets: Sequence[str] | None = None,
    recipe: dict[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> GeloraPlan:
    """The plan that follows from `intrinsic_dimensions(model, ...)`, for inputs that are not texts, too.

    Args:
        rounding: before the rule (see the module's docstring).
        max_rank: no rank above this.
        targets: as given to `intrinsic_dimensions`.

    Raises:
        ValueError: an argument out of its range, or another model than the one measured.
    """
    stacks = {stack.name: stack for stack in find_stacks(model, targets)}
    blocks = []
    for chain in dimensions.chains:
        stack = stacks.get(chain.stack)
        if stack is None or len(stack) + 1 != len(chain.samples):
            raise RankfoldError(f"dimensions: measured on another model, this one has {', '.join(stacks)}")
        d, sd = chain.d, chain.spread
        single = [gelora_ranks(one, rounding, max_rank) for one in zip(*chain.samples, strict=True)]
        for i, rank in enumerate(gelora_ranks(d, rounding, max_rank)):
            chance = [ranks[i] for ranks in single]
            modules = {site.name: (site.out_features, site.in_features) for site in stack.sites[i]}
            blocks.append(
                BlockRank(
                    f"{stack.name}.{i}", d[i], sd[i], d[i + 1], sd[i + 1], rank, min(chance), max(chance), modules
                )
            )
    plan = GeloraPlan(
        model=str(getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__),
        blocks=tuple(blocks),
        dimensions=dimensions,
        targets=_exact_targets(model, blocks),
        rounding=rounding,
        max_rank=max_rank,
        recipe=recipe or {},
        notes=tuple(notes),
    )
    _check_patterns(plan)
    return plan


def _exact_targets(model: nn.Module, blocks: Sequence[BlockRank]) -> tuple[str, ...]:
    """Paths below a block ("self_attn.q_proj") if PEFT then adapts just these modules, else every full name."""
    wanted = {name: name.removeprefix(f"{block.name}.") for block in blocks for name in block.modules}
    short = tuple(dict.fromkeys(wanted.values()))
    if not wanted:
        raise RankfoldError("dimensions: the stacks that ran have no such matrices; check targets= and the inputs")
    matched = {n for n, _ in model.named_modules() if any(n == s or n.endswith(f".{s}") for s in short)}
    return short if matched == wanted.keys() else tuple(wanted)


def _check_patterns(plan: GeloraPlan) -> None:
    """PEFT takes a pattern's key for a regular expression of the name's end: no key may catch another module."""
    config = plan.config()
    for name, rank in plan.module_ranks().items():
        if config.rank_at(name) != rank or config.alpha_at(name) != ALPHA_PER_RANK * rank:
            raise RankfoldError(
                f"targets: {name} gets the rank of another module whose name ends the same; narrow targets"
            )


# From texts -----------------------------------------------------------------------------------------------------------


def gelora_plan(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Sample],
    *,
    points: int = 2000,
    seed: int = 0,
    subsamples: int = 5,
    rounding: Rounding = "round",
    max_rank: int | None = None,
    targets: Sequence[str] | None = None,
    max_length: int | None = None,
    batch_size: int = 32,
    fit: Fit = "linear",
    discard: float = DISCARD,
    data: str = "",
) -> GeloraPlan:
    """Measures the model on the texts and gives every block its rank.

    Args:
        model: pretrained, without adapters; best in float32.
        texts: training inputs, formatted as in training; see `Sample`. An encoder-decoder takes pairs.
        points: at most so many, drawn with the seed; texts that are the same tokens count once.
        subsamples: random halves of the points, at least 3: d is their mean, the spread their standard deviation.
        max_length: tokens; the rest is cut off. By default what the model takes, at most 1024.
        data: where the texts come from, for the record.

    Raises:
        ValueError: an argument out of its range, or too few different texts.
    """
    gelora_ranks([], rounding, max_rank)  # complains before the long part, not after
    for name, value, least in (
        ("points", points, FEWEST),
        ("batch_size", batch_size, 1),
        ("subsamples", subsamples, 3),
    ):
        if value < least:
            raise RankfoldError(f"{name}={value} must be {least} or more")
    length = max_length or longest(model, tokenizer)
    rows = draw(model, tokenizer, texts, points, seed, length)
    dimensions = intrinsic_dimensions(
        model,
        batches(rows, batch_size, pad_id(tokenizer)),
        targets=targets,
        subsamples=subsamples,
        seed=seed,
        fit=fit,
        discard=discard,
    )
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    notes = []
    if dtype != "float32":
        notes.append(f"the model computed in {dtype}; in float32 close states are told apart better")
    if len(rows) < min(points, 500):
        notes.append(f"{len(rows)} points are few: dimensions are low by chance and bias, look at their spread")
    recipe = {
        "date": date.today().isoformat(),
        "data": data,
        "texts": len(texts),
        "points": len(rows),
        "seed": seed,
        "subsamples": f"{subsamples} random halves",
        "pooling": "attention-masked mean over tokens",
        "estimator": f"TwoNN, {fit}, discard {discard:g}",
        "max_length": length,
        "batch_size": batch_size,
        "dtype": dtype,
        "versions": {package: version(package) for package in ("rankfold", "torch", "transformers")},
    }
    return assign_ranks(
        model, dimensions, rounding=rounding, max_rank=max_rank, targets=targets, recipe=recipe, notes=notes
    )
