"""What a rule looks at: the adapter's file with its tensors sorted into pairs and others, its settings, its base."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property

from rankfold.doctor.adapter_file import AdapterFile
from rankfold.doctor.base_shapes import BaseShapes
from rankfold.doctor.settings import Settings
from rankfold.io.adapter_names import PREFIX, is_saved, mended, without_copies, wrapped
from rankfold.io.weights import Header

_PEFT = re.compile(r"^(?P<prefix>base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")
_LOOSE = re.compile(r"^(?P<module>.+)\.lora[_.](?P<side>[aAbB]|up|down)(\.weight)?$")
_OURS = re.compile(r"^base_model\.model\.(?P<module>.+)\.lowrank_adapters\.(?P<side>up|down)$")
#: PEFT adds both names to the modules_to_save of every classifier; a model has one of them.
CLASSIFIERS = {"classifier", "score"}
_SIDE = {"a": "a", "A": "a", "down": "a", "b": "b", "B": "b", "up": "b"}


@dataclass(frozen=True)
class Pair:
    """The two factors of one module. In mlx's format they are transposed, which `of` has undone."""

    module: str
    a: Header | None
    b: Header | None

    @property
    def rank(self) -> int:
        """Rows of A; 0 where there is no A."""
        return self.a.shape[0] if self.a and self.a.shape else 0

    @property
    def kind(self) -> str:
        """The module's type: the last part of its name."""
        return self.module.rsplit(".", 1)[-1]

    @property
    def layer(self) -> int | None:
        """The first number in its name."""
        return layer_of(self.module)


@dataclass(frozen=True)
class Case:
    """One adapter, as the rules see it.

    Args:
        pairs: of every module, complete or not.
        others: names of the tensors that are not factors, by their role: "embedding", "magnitude", "bias", "base_layer",
            "saved" (named in modules_to_save), "vocabulary" (embed_tokens or lm_head whole), "tokens", "norm", "alpha",
            "parameter" (factors of target_parameters), "foreign".
        base: what is known of the base model.
        bare: names of factors that lack the prefix base_model.model., in PEFT's format.
        wrapped: names that hold a wrapper's name or a doubled prefix.
        named: names of factors that hold the adapter's name (lora_A.default.weight).
    """

    file: AdapterFile
    settings: Settings
    pairs: list[Pair] = field(default_factory=list)
    others: dict[str, list[str]] = field(default_factory=dict)
    base: BaseShapes | None = None
    bare: list[str] = field(default_factory=list)
    wrapped: list[str] = field(default_factory=list)
    named: list[str] = field(default_factory=list)

    @property
    def ours(self) -> bool:
        return self.settings.peft_type.startswith("RANKFOLD_")

    @property
    def is_lora(self) -> bool:
        return self.settings.peft_type == "LORA"

    @cached_property
    def largest_rank(self) -> int:
        """Of the tensors, or of the config where they are not known."""
        known = [self.settings.r, *self.settings.rank_pattern.values()]
        return max((p.rank for p in self.pairs), default=max(known))

    @cached_property
    def whole(self) -> list[Pair]:
        """The pairs that have both sides and a rank."""
        return [p for p in self.pairs if p.a and p.b and p.rank]

    @cached_property
    def contradicted(self) -> list[Pair]:
        """Pairs whose rank is not the config's, so that the scale they were trained with is not known."""
        return [p for p in self.whole if self.is_lora and p.rank != self.settings.rank(p.module)]

    @cached_property
    def rank_by_kind(self) -> dict[str, int]:
        """The rank of the first module of each type."""
        return {p.kind: p.rank for p in reversed(self.whole)}

    def right_scale(self, pair: Pair) -> float:
        """The factor with which the pair was trained."""
        if pair.module not in self._scales:
            self._scales[pair.module] = self.settings.scale(pair.module)
        return self._scales[pair.module]

    @cached_property
    def _scales(self) -> dict[str, float]:
        return {}  # patterns are regular expressions, and every engine asks

    @cached_property
    def unsaved(self) -> list[str]:
        """Names in modules_to_save whose tensors are not where PEFT looks for them; PEFT names both heads of classifiers where
        there is one."""
        names, own = mended(self.file.tensors), without_copies(self.file.tensors)
        saved = [name for name in self.others.get("saved", []) if name in own and names[name] == name]
        absent = [m for m in self.settings.modules_to_save if not any(is_saved(n, [m]) for n in saved)]
        if (set(self.settings.modules_to_save) - set(absent)) & CLASSIFIERS:
            absent = [m for m in absent if m not in CLASSIFIERS]
        return absent if self.file.tensors else []

    @property
    def to_save_again(self) -> str:
        """What to do where something is `unsaved`: a tensor under another key may be it."""
        misnamed = any(is_saved(name, self.unsaved) for name in self.others.get("saved", []))
        return f"rankfold doctor {self.file.path} --fix OUT" if misnamed else "save the adapter again"

    @cached_property
    def other_names(self) -> list[str]:
        return [n for names in self.others.values() for n in names]


def make_case(file: AdapterFile, settings: Settings, base: BaseShapes | None) -> Case:
    sides: dict[str, dict[str, Header]] = defaultdict(dict)
    others: dict[str, list[str]] = defaultdict(list)
    ours = settings.peft_type.startswith("RANKFOLD_")
    bare: list[str] = []
    peft = file.kind == "peft" and not ours
    mends = mended(file.tensors) if peft else {}
    odd = wrapped(file.tensors) if peft else []
    pattern = _LOOSE if file.kind != "peft" else _OURS if ours else _PEFT
    named: list[str] = []
    for name, header in file.tensors.items():
        plain = mends.get(name, name)
        match = None if _of_parameter(plain, settings) else pattern.match(plain)
        if match:
            if pattern is _PEFT and not name.startswith("base_model.") and name not in odd:
                bare.append(name)
            if pattern is _PEFT and not name.endswith((".lora_A.weight", ".lora_B.weight")):
                named.append(name)
            shape = header.shape[::-1] if file.kind == "mlx" else header.shape
            sides[match["module"]][_SIDE[match["side"]]] = Header(shape, header.dtype)
        else:
            others[_role(plain, settings)].append(name)
    pairs = [Pair(module, s.get("a"), s.get("b")) for module, s in sides.items()]
    return Case(file, settings, pairs, dict(others), base, bare, odd, named)


def layer_of(module: str) -> int | None:
    return next((int(part) for part in module.split(".") if part.isdecimal()), None)


def _of_parameter(name: str, settings: Settings) -> bool:
    """Whether a factor is of a parameter that `target_parameters` names, as fused experts are: it is not the weight of a module."""
    module = name.removeprefix(PREFIX).rpartition(".lora_")[0]
    while module.endswith(".base_layer"):
        module = module.removesuffix(".base_layer")
    owners = [target.rpartition(".")[0] for target in settings.target_parameters]
    if "" in owners and not settings.targets(module):  # a parameter's bare name, of whatever module has it
        return True
    return bool(module) and any(owner and (module == owner or module.endswith(f".{owner}")) for owner in owners)


def _role(name: str, settings: Settings) -> str:
    parts = name.split(".")
    if _of_parameter(name, settings):
        return "parameter"
    if "lora_embedding_" in name:
        return "embedding"
    if "magnitude" in name or name.endswith(".dora_scale"):
        return "magnitude"
    if is_saved(name, settings.modules_to_save):
        return "saved"
    if name.endswith(".bias"):
        return "bias"
    if "base_layer" in parts:
        return "base_layer"
    if any("trainable_tokens" in part for part in parts):
        return "tokens"
    if parts[-2:] in (["embed_tokens", "weight"], ["lm_head", "weight"]):
        return "vocabulary"
    if "_layernorm" in name or ".norm" in name or "_norm" in name:
        return "norm"
    return "alpha" if parts[-1] == "alpha" else "foreign"
