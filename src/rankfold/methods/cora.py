"""CoRA: LoRA's B comes from the subspace that several fine-tuned models have in common.

Paper: Optimizing LoRA with a Common Subspace of LLMs, arXiv 2409.02119. There is no public code, and we could read the
abstract and three short summaries only. From the abstract: B is the matrix that is replaced, either frozen (approach 1,
half the trainable parameters) or as the start of a trainable B (approach 2). From the summaries: the subspace comes from
an SVD over the collected q, k and v matrices of several fine-tuned models.

OUR INTERPRETATION is everything else: left singular vectors of the matrices side by side, one basis per layer for q, k and
v (scope, source and scale are options of `build_subspace`); orthonormal columns; A = 0, so that ΔW = 0 at the start and
A has a gradient at once; the scale α/r of LoRA; the modules of the basis as default targets.

Approach 1 confines ΔW to the span of B permanently. Approach 2 pulls B towards zero, off the subspace, under weight decay:
train it with weight_decay = 0 (the run file's default) or leave B out of the decayed parameters.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from rankfold.errors import RankfoldError
from rankfold.host.adapter import Adapter, Group, Shared, Site, kaiming_
from rankfold.host.config import LowRankConfig
from rankfold.host.registry import Method, register
from rankfold.kernel.factors import Factors
from rankfold.methods.cora_subspace import Subspace, load_subspace

#: The folder of the adapter whose config is being read.
_SAVED_IN: ContextVar[Path | None] = ContextVar("_SAVED_IN", default=None)


def _hash(path: Path) -> str | None:
    try:
        return load_subspace(path).hash
    except (OSError, ValueError):
        return None  # a file of that name, but no basis


@dataclass
class CoraConfig(LowRankConfig):
    """CoRA (arXiv 2409.02119).

    Args:
        basis: the file that `rankfold subspace` or `build_subspace` wrote.
        basis_hash: its content hash; filled in from the file and saved, so that another file is refused later.
        approach: 1, B frozen, shared and not saved with the adapter; 2, B starts there, is trained, and saved.
        r: at most the rank of the basis, whose first r columns are taken.
        target_modules: by default the modules that the basis was built from.
    """

    method: ClassVar[str] = "cora"
    of_one_model: ClassVar[frozenset[str]] = LowRankConfig.of_one_model | {"basis", "basis_hash"}
    basis: str = field(
        default="",
        metadata={"help": "File of the subspace; `rankfold subspace` writes it.", "example": "bases/qkv.safetensors"},
    )
    basis_hash: str | None = field(
        default=None, metadata={"help": "Content hash of the basis, filled in from the file; another is refused."}
    )
    approach: int = field(default=1, metadata={"help": "1: B is the basis, frozen. 2: B starts as it and is trained."})

    def check(self) -> None:
        given = isinstance(self.basis, str | os.PathLike) and bool(os.fspath(self.basis))
        self.require("basis", self.basis, given, "the path of a file that `rankfold subspace` wrote")
        self.basis = str(self._place())
        super().check()
        self.require("approach", self.approach, self.approach in (1, 2), "1 (B frozen) or 2 (B trained)")
        if self.basis_hash is None and (found := self.subspace()) is not None:
            self.basis_hash = found.hash
            for r in (self.r, *self.rank_pattern.values()):
                self.require("r", r, r <= found.rank, f"<= {found.rank}, the rank of the basis")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """As PEFT's. A basis that was moved together with the adapter is found again; its hash says that it is the one."""
        saved = Path(pretrained_model_name_or_path, subfolder or "").absolute()
        token = _SAVED_IN.set(saved if saved.is_dir() else None)
        try:
            return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        finally:
            _SAVED_IN.reset(token)

    def _place(self) -> Path:
        """The absolute path of the basis; where nothing is there, the same place seen from a folder above the adapter's."""
        path = Path(self.basis).absolute()  # the adapter may be loaded from elsewhere
        if (saved := _SAVED_IN.get()) is None or self.basis_hash is None or path.exists():
            return path
        tails = [Path(*path.parts[-n:]) for n in range(1, len(path.parts))]
        for found in (above / tail for above in (saved, *saved.parents) for tail in tails):
            if found.is_file() and _hash(found) == self.basis_hash:
                return found
        return path

    def subspace(self) -> Subspace | None:
        """The basis. None where it is not needed: for a saved adapter of approach 2, which brings its own B, with the
        file gone.

        Raises:
            ValueError: no such file, a damaged one, or another than the adapter was trained with.
        """
        path = Path(self.basis)
        if self.approach == 2 and self.inference_mode and self.basis_hash and not path.exists():
            return None
        try:
            state = path.stat()
            found = _load(path, (state.st_mtime_ns, state.st_size, state.st_ino))
        except (OSError, ValueError) as error:
            why = "there is no such file" if isinstance(error, FileNotFoundError) else error
            raise RankfoldError(
                f"CoraConfig: basis={self.basis!r}: {why}; bring the file there, or change basis in the config "
                "(adapter_config.json of a saved adapter)"
            ) from None
        if self.basis_hash is not None and self.basis_hash != found.hash:
            raise RankfoldError(
                f"CoraConfig: basis={self.basis!r} is another basis than this adapter was trained with (its hash is "
                f"{found.hash[:12]}…, not basis_hash={self.basis_hash[:12]}…); restore that file, or name it in basis"
            )
        return found

    def basis_at(self, site: Site) -> Tensor | None:
        """The site's B, out × r, or None as `subspace`. Raises ValueError where the basis does not serve the site."""
        found, r = self.subspace(), self.rank_at(site.name)
        if found is None:
            return None
        self.require("r", r, r <= found.rank, f"<= {found.rank}, the rank of the basis, at {site.name}")
        return found.basis_for(site)[:, :r]

    def default_targets(self) -> set[str] | None:
        found = self.subspace()
        return None if found is None else set(found.targets)

    @classmethod
    def planned(cls, **fields: Any) -> CoraConfig:
        return cls(**fields) if fields.get("basis") else PlannedCoraConfig(**fields)


class _AnyBasis(Subspace):
    """A basis for every module, of any rank: random, or without values on the meta device."""

    def key_for(self, site: Site) -> str:
        return site.name

    def basis_for(self, site: Site) -> Tensor:
        return torch.nn.init.orthogonal_(torch.empty(site.out_features, self.rank))


@dataclass
class PlannedCoraConfig(CoraConfig):
    """A CoRA whose basis does not exist yet. Its counts follow from the shapes, so any basis of them will do."""

    note: ClassVar[str] = "counted without a basis: `rankfold subspace` builds it, and its file goes with the adapter"
    basis: str = field(default="not built yet")

    def subspace(self) -> Subspace:
        rank = max(self.r, *self.rank_pattern.values(), 1)
        return _AnyBasis(
            bases={}, sigmas={}, scope="module", source="weights", scale="none", rank=rank, targets=(), base=None, models=(),
            hash="",
        )  # fmt: skip


@lru_cache(maxsize=1)  # every site of a model asks; `state` tells a file that was replaced
def _load(path: Path, state: tuple[int, ...]) -> Subspace:
    return load_subspace(path)


class Basis(Shared):
    """B of one key: frozen, in one storage, and saved nowhere but in the basis file, which `read` reads."""

    up: Tensor

    def __init__(self, read: Callable[[], Tensor]) -> None:
        super().__init__()
        self._read = read
        self.register_buffer("up", read().clone(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Never below float32: PEFT takes adapters to the base's half precision and back, and B would not be the file's
        def wide(t: Tensor) -> Tensor:
            out = fn(t)
            return out if out.dtype.itemsize >= 4 else t.to(out.device)

        had_values = not self.up.is_meta
        super()._apply(wide, recurse)
        if not had_values and not self.up.is_meta:  # `to_empty`, and no checkpoint will fill it
            self.up.copy_(self._read())
        return self


class Cora(Adapter):
    linear_only = True  # a basis is of linear layers

    def __init__(self, config: CoraConfig, site: Site, shared: Basis | None = None) -> None:
        super().__init__(config, site, shared)
        self.down = nn.Parameter(torch.empty(self.r, site.in_features))  # A
        if shared is None:  # approach 2
            start = config.basis_at(site)
            self.up = nn.Parameter(torch.zeros(site.out_features, self.r) if start is None else start.clone())  # B

    @classmethod
    def group_key(cls, config: CoraConfig, site: Site) -> str | None:
        subspace = config.subspace()
        config.basis_at(site)  # for its errors, while nothing has been changed
        return None if subspace is None or config.approach == 2 else f"basis:{subspace.key_for(site)}"

    @classmethod
    def check_group(cls, config: CoraConfig, group: Group) -> None:
        subspace = config.subspace()
        places = sorted({subspace.place_of(site) for site in group.sites}) if subspace else []
        if len(places) > 1:
            raise RankfoldError(
                f"CoraConfig: basis={config.basis!r} fits {places[0]} and {places[1]} alike, and is of one of them; name the modules "
                "of one in target_modules or exclude_modules, by a pattern"
            )

    @classmethod
    def make_shared(cls, config: CoraConfig, group: Group) -> Basis:
        widest = max(group.sites, key=lambda site: config.rank_at(site.name))
        return Basis(partial(config.basis_at, widest))  # pyright: ignore[reportArgumentType]  (never None in approach 1)

    def reset_parameters(self, init: bool | str) -> None:
        if init:
            nn.init.zeros_(self.down)
        else:
            kaiming_(self.down)

    def blocks(self) -> Sequence[Factors]:
        up = self.up if self.shared is None else self.shared.up[:, : self.r].to(self.down.dtype)
        return (Factors(self.down, up, scale=self.scaling),)


CORA = register(
    Method(
        name="cora",
        title="CoRA",
        paper="2409.02119",
        summary="B is a common subspace of several models: frozen (half the parameters), or a start.",
        config=CoraConfig,
        adapter=Cora,
        example={"target_modules": None},  # the basis names them
        variants={"cora 1": {"approach": 1}, "cora 2": {"approach": 2}},
    )
)
