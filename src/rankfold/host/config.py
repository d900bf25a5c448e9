"""The fields every method has, named as PEFT's LoraConfig names them: changing the class name changes the method."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from peft import PeftConfig
from peft.utils import PeftType

from rankfold.errors import RankfoldError
from rankfold.host.card import say_what_loads_it
from rankfold.host.field_types import bad_pattern, field_types, fits, in_words
from rankfold.host.lora_fields import LoraFields, without_lora_fields
from rankfold.host.peft_api import get_pattern_key, peft_name


@dataclass
class LowRankConfig(PeftConfig, metaclass=LoraFields):
    """Base of every method's config.

    Args:
        r: rank, > 0.
        lora_alpha: numerator of the scale α/r (α/√r with `use_rslora`).
        lora_dropout: dropout on the adapter's input, 0 ≤ p < 1.
        target_modules: names (suffixes), a regex, or "all-linear"; by default those PEFT adapts with LoRA. Names that experts had as
            modules (gate_proj, w1, …) mean the fused ones, as in PEFT.
        target_parameters: names (suffixes) of parameters, such as fused experts.
        rank_pattern, alpha_pattern: per-module exceptions, as in LoraConfig.

    Raises:
        ValueError: a field out of its range; the message names field, value and range.
    """

    r: int = field(default=8, metadata={"help": "Rank of the update."})
    lora_alpha: float = field(default=8, metadata={"help": "Numerator of the scale alpha/r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input while training."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": 'Module name suffixes, a regular expression, or "all-linear".'}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names or a regular expression of modules to leave alone."}
    )
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Ends of names of parameters, such as fused experts: experts.gate_up_proj."}
    )
    trainable_token_indices: list[int] | dict | None = field(
        default=None,
        metadata={"help": "Rows of the embedding trained in full by PEFT's own mechanism, such as new tokens."},
    )
    ensure_weight_tying: bool = field(
        default=False, metadata={"help": "An output head that shares the embedding's weight shares its adapter too."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained in full and saved beside the adapter, such as a new head."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Only these layer indices; needs a list in target_modules."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the layer list that layers_to_transform counts, if not the usual."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha/sqrt(r) (rsLoRA, arXiv 2312.03732)."})
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Module name (suffix or regex) to rank, where it differs from r."}
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Module name (suffix or regex) to lora_alpha, where it differs."}
    )
    init_lora_weights: bool | str = field(
        default=True, metadata={"help": "true: as the paper says (the update starts at 0); false: random, for tests."}
    )
    fan_in_fan_out: bool = field(
        default=False, metadata={"help": "Taken for LoraConfig's sake; the weight's layout is seen from the module."}
    )
    bias: str = field(default="none", metadata={"help": 'Only "none": a trained bias cannot be folded into a LoRA.'})

    share_dropout: bool = field(
        default=True, metadata={"help": "Layers that read one input (q, k, v; gate, up) drop the same elements of it."}
    )
    fuse_mlp: bool = field(
        default=True,
        metadata={"help": "Compute a gated MLP (SwiGLU, GeGLU) as one, which keeps less for the backward."},
    )
    allow_unscheduled: bool = field(
        default=False, metadata={"help": "Train, save or fold a scheduled method although its schedule does not run."}
    )
    schedule: dict | None = field(
        default=None, metadata={"help": "Written by the controller: how far the schedule has run. Not for you to set."}
    )

    grown: dict[str, int] | None = field(
        default=None, metadata={"help": "Written on saving: the frozen rank of each module. Not for you to set."}
    )

    #: Schemes of `init_lora_weights` beside true and false.
    inits: ClassVar[tuple[str, ...]] = ()
    #: The method's name in the registry; its PEFT type is this in upper case behind "RANKFOLD_".
    method: ClassVar[str]
    #: Whether a controller belongs to it; its registration sets this.
    scheduled: ClassVar[bool] = False
    #: The field that decides how large the method is; `with_rank` sets it.
    grows_with: ClassVar[str] = "r"
    #: The field whose growing value makes the update sparser, where there is one: `rankfold sparsify` raises it.
    sparser_with: ClassVar[str | None] = None
    #: A note on the counts, shown below a plan.
    note: ClassVar[str | None] = None
    #: Fields that belong to one model: where the adapter goes there, and what came from it.
    of_one_model: ClassVar[frozenset[str]] = frozenset({
        "target_modules", "exclude_modules", "target_parameters", "modules_to_save", "trainable_token_indices", "ensure_weight_tying",
        "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "grown", "schedule", "inference_mode", "task_type",
        "peft_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_version",
    })  # fmt: skip
    #: Of a method whose update may depend on the input, the rules by which a plain LoRA comes near it (`Method.approximate`).
    approximations: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.peft_kind()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))
        self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}
        self.check()

    def check(self) -> None:
        """Raises ValueError for a field of another type or out of its range. Methods extend it."""
        without_lora_fields(type(self), vars(self))  # one may have been assigned
        for name, hint in field_types(type(self)).items():
            self.require(name, getattr(self, name), fits(getattr(self, name), hint), in_words(hint))
            if said := bad_pattern(name, getattr(self, name)):
                raise RankfoldError(
                    f"{type(self).__name__}: {name}: {said}; for any start of a name write .* and not *"
                )
        init = self.init_lora_weights
        names = ["true", "false", *(f'"{name}"' for name in self.inits)]
        self.require("init_lora_weights", init, isinstance(init, bool) or init in self.inits, " or ".join(names))
        self.require("r", self.r, is_whole(self.r) and self.r > 0, "an integer > 0")
        self.require("lora_alpha", self.lora_alpha, is_number(self.lora_alpha) and self.lora_alpha > 0, "a number > 0")
        p = self.lora_dropout
        self.require("lora_dropout", p, is_number(p) and 0.0 <= p < 1.0, "a number in [0, 1)")
        self.require("bias", self.bias, self.bias == "none", '"none": a trained bias cannot be folded into a LoRA')
        for name, rank in self.rank_pattern.items():
            self.require(f"rank_pattern[{name!r}]", rank, is_whole(rank) and rank > 0, "an integer > 0")
        for name, alpha in self.alpha_pattern.items():
            self.require(f"alpha_pattern[{name!r}]", alpha, is_number(alpha) and alpha > 0, "a number > 0")
        if isinstance(
            self.target_modules, str
        ):  # as LoraConfig: all-linear becomes whole names, which no layer leaves out
            for name in ("layers_to_transform", "layers_pattern"):
                needed = "None when target_modules is a string; list the modules to choose layers"
                self.require(name, getattr(self, name), getattr(self, name) is None, needed)
        self.require(
            "layers_pattern",
            self.layers_pattern,
            not self.layers_pattern or self.layers_to_transform is not None,
            "None unless layers_to_transform is given",
        )

    def default_targets(self) -> set[str] | None:
        """What to adapt where `target_modules` is None; None leaves it to PEFT's table of architectures."""
        return None

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)
        say_what_loads_it(Path(save_directory), self.method, type(self).__module__, self.fold_option)

    @property
    def fixed(self) -> bool:
        """Whether the update is a fixed matrix, whatever the input: only then is there a delta to merge, fold and inspect."""
        return True

    @property
    def fold_option(self) -> str:
        """What `rankfold fold` must be told to come near an update that is not fixed; empty where it needs nothing, or nothing helps."""
        return f" --approximate {'|'.join(self.approximations)}" if self.approximations and not self.fixed else ""

    # What a plan and a comparison ask --------------------------------------------------------------------------------

    @classmethod
    def peft_kind(cls) -> PeftType:
        return PeftType[peft_name(cls.method).upper()]

    @classmethod
    def planned(cls, **fields: Any) -> LowRankConfig:
        """A config with these fields that serves only for counting: what else it needs may not exist yet.

        Raises:
            RankfoldError: as the constructor.
        """
        return cls(**fields)

    def for_another_model(self, **fields: Any) -> LowRankConfig:
        """The same method on another model, with these fields; it serves for measuring, as `planned` does for counting."""
        kept = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.init and f.name not in self.of_one_model
        }
        return self.planned(**{**kept, **fields})

    @classmethod
    def fields_at(cls, r: int) -> dict[str, int]:
        """The fields that mean "rank r" when methods are compared; falling ranks end at r."""
        return {"r": r}

    def changed(self, **fields: Any) -> Self:
        """A copy with other fields; raises RankfoldError where they are out of range."""
        other = copy.deepcopy(self)
        for name, value in fields.items():
            setattr(other, name, value)
        other.check()
        return other

    def with_rank(self, n: int) -> Self:
        """A copy with n for the field `grows_with`, and with all that follows from it. Parameters never fall as n rises.

        Raises:
            RankfoldError: n is out of range.
        """
        return self.changed(**{self.grows_with: n})

    def at_the_end(self) -> Self | None:
        """For a method whose ranks fall, a copy with the ranks of the end, spread evenly; else None."""
        return None

    def live(self, sizes: Mapping[str, int]) -> int | None:
        """The most parameters that are trained at a time, for a method that trains one part after another; else None.

        Args:
            sizes: trained parameters of each adapter, by module.
        """
        return None

    def parts(self) -> int | None:
        """How many such parts add up in the end; 1 for most methods, None where the length of the run decides."""
        return 1

    def ranks(self) -> dict[str, int]:
        """The rank settings, defaults resolved, as a run file writes them."""
        return {self.grows_with: getattr(self, self.grows_with)}

    def ranks_in_words(self) -> str:
        """The rank settings in a few letters, for a narrow column: "r 8"."""
        return ", ".join(f"{name} {value}" for name, value in self.ranks().items())

    # Checking ---------------------------------------------------------------------------------------------------------

    def require(self, name: str, value: object, ok: bool, allowed: str) -> None:
        """Raises ValueError, naming field, value and what is allowed, unless `ok`."""
        if not ok:
            raise RankfoldError(f"{type(self).__name__}: {name}={value!r} must be {allowed}")

    def rank_at(self, module: str) -> int:
        """The rank at a module, `rank_pattern` respected (PEFT's matching)."""
        return _at(self.rank_pattern, module, self.r)

    def alpha_at(self, module: str) -> float:
        return _at(self.alpha_pattern, module, self.lora_alpha)


def _at(patterns: dict[str, Any], module: str, default: Any) -> Any:
    """The value for a module. A pattern of a fused parameter, which lacks the expert's index, covers each of its experts."""
    for name in (module, re.sub(r"(\bexperts)\.\d+\.", r"\1.", module)):
        if (key := get_pattern_key(list(patterns), name)) in patterns:
            return patterns[key]
    return default


def is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it is a finite number; true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
