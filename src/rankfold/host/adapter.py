"""One adapter on one linear layer: its parameters, what it shares, and the one question it answers.

    class Lora(Adapter):
        def __init__(self, config, site, shared=None):
            super().__init__(config, site, shared)
            self.down = nn.Parameter(torch.empty(self.r, site.in_features))
            self.up = nn.Parameter(torch.empty(site.out_features, self.r))

        def blocks(self):
            return (Factors(self.down, self.up, scale=self.scaling),)

Training, merging, the dense delta, folding and compression all read `blocks()`, so they cannot disagree.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from rankfold.errors import RankfoldError
from rankfold.host.config import LowRankConfig
from rankfold.host.watch import watch
from rankfold.kernel.factors import Factors
from rankfold.kernel.layout import Term
from rankfold.kernel.linears import low_rank_update


@dataclass(frozen=True)
class Site:
    """Where an adapter sits: the module's full name in the model, its update's shape, and its kind (kinds.py).

    Args:
        kernel: of a convolution, whose positions are part of `in_features`.
    """

    name: str
    in_features: int
    out_features: int
    kind: str = "linear"
    kernel: tuple[int, ...] = ()


@dataclass(frozen=True)
class Group:
    """The sites of one model that share state, in depth order; `key` is unique in the model."""

    key: str
    sites: tuple[Site, ...]

    def __len__(self) -> int:
        return len(self.sites)


class Adapter(nn.Module):
    """Base of every method's adapter. Trainable tensors are parameters, frozen ones buffers; both are saved.

    Args:
        config: the method's config.
        site: where it sits.
        shared: what `make_shared` returned for its group, or None.
    """

    #: Whether it adapts linear layers alone; what overrides `forward` does (`kinds.py` says which kinds those are).
    linear_only: ClassVar[bool] = False
    #: Whether two of them side by side are one of the sum of their ranks, because `down` and `up` are all there is. A subclass does
    #: not inherit it.
    stackable: ClassVar[bool] = False
    #: Buffers that training makes grow, name → the dimension that does; all of one adapter have the same size there. They load in
    #: whatever size a file has, and the config remembers it (`LowRankConfig.grown`).
    growing: ClassVar[dict[str, int]] = {}
    #: Whether the method has a schedule (its config knows), and whether a controller runs it here.
    has_schedule: bool = False
    scheduled: bool = False
    _stepped_unscheduled: bool = False
    #: Whether its controller leaves it out of the coming steps; its parameters then get no gradient, and keep `requires_grad`, so that
    #: an optimiser made in the meantime holds them too.
    resting: bool = False
    #: Whether its values come from a schedule: a controller stepped it, or they were loaded.
    has_history: bool = False
    #: Turns the update up or down while it serves (`AdaptedLayer.set_scale`). It is merged and folded, and not saved, as in PEFT.
    multiplier: float = 1.0
    #: Keys of its tensors in a state dict, as they were before any wrapper hid them; the layer sets them.
    tensor_names: tuple[str, ...] = ()

    def __init__(self, config: LowRankConfig, site: Site, shared: nn.Module | None = None) -> None:
        super().__init__()
        self.site, self.config = site, config
        self.r = config.rank_at(site.name)
        self.lora_alpha = config.alpha_at(site.name)
        # α/r of the *initial* rank: it must survive pruning, so it is never recomputed
        self.scaling = self.lora_alpha / (math.sqrt(self.r) if config.use_rslora else self.r)
        # A module, though the kernel draws the masks: TRL's trainers of preferences turn dropout off through modules
        self.drop, self.own_mask = nn.Dropout(float(config.lora_dropout)), not config.share_dropout
        # In a tuple, out of the module registry: the model owns shared state once (tuner.py), each adapter only reads it
        self._shared = (shared,)
        self.has_schedule = config.scheduled
        watch(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, or what was unpickled, has no controller: that hangs on the optimiser of the original."""
        super().__setstate__(state)
        self.scheduled = self.resting = False
        watch(self)

    @property
    def dropout(self) -> float:
        """The share of the input's elements that training drops."""
        return self.drop.p

    @property
    def fixed(self) -> bool:
        """Whether the update is a fixed matrix; the config says so. A method whose update depends on the input overrides `forward`."""
        return self.config.fixed

    @property
    def shared(self) -> Any:
        """What `make_shared` returned; a method narrows the type."""
        return self._shared[0]

    @classmethod
    def check_site(cls, config: LowRankConfig, site: Site) -> None:
        """Raises ValueError where the config does not fit a module; called before any is changed."""

    # What a method says about sharing -------------------------------------------------------------------------------

    @classmethod
    def group_key(cls, config: LowRankConfig, site: Site) -> str | None:
        """The name of the group that the site shares state with; None (the default) shares nothing."""
        return None

    @classmethod
    def check_group(cls, config: LowRankConfig, group: Group) -> None:
        """Raises ValueError where the sites of a group cannot share as the config asks; called before any is changed."""

    @classmethod
    def make_shared(cls, config: LowRankConfig, group: Group) -> nn.Module | None:
        """The state that one group shares, made once, with its first values."""
        return None

    # What a method answers ------------------------------------------------------------------------------------------

    def blocks(self) -> Sequence[Factors]:
        """The update as a sum of factors, differentiable in the parameters."""
        raise NotImplementedError(f"{type(self).__name__} must implement blocks()")

    def reset_parameters(self, init: bool | str) -> None:
        """First values. `init` is the config's `init_lora_weights`: True as the paper says, False random everywhere
        (an update that is not zero, for tests), or a scheme that the method names."""

    def check_state(self, state: dict[str, Tensor]) -> None:
        """Raises ValueError where a file's tensors, by their names here, have the right shapes and still cannot be an adapter's;
        called before any is loaded."""

    def factors(self) -> Factors:
        """The whole update as one pair; raises RankfoldError where it is not a fixed matrix."""
        if not self.fixed:
            raise RankfoldError(not_fixed(f"{type(self).__name__} at {self.site.name}", self.config))
        first, *rest = self.update()
        return first.concat(*rest)

    def update(self) -> Sequence[Factors]:
        """`blocks()`, times the multiplier; constants where the adapter rests."""
        blocks = self.blocks()
        if self.resting:
            blocks = [block.detach() for block in blocks]
        return blocks if self.multiplier == 1.0 else [block.scaled(self.multiplier) for block in blocks]

    # What the layer runs --------------------------------------------------------------------------------------------

    def alive(self) -> int:
        """The rank of the update now."""
        return sum(block.rank for block in self.blocks())

    def term(self) -> Term:
        """What it adds, for the kernel."""
        if not torch.compiler.is_compiling():
            self._heal_vectors()
        return Term(self.update(), self.dropout if self.training else 0.0, self.own_mask)

    def terms(self) -> list[Term]:
        """The same in parts, for a method of which dropout does not concern every block."""
        return [self.term()]

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """y + update(x), for layers that cannot take the fused path.

        Args:
            y: … × out, the base's output.
            x: … × in.
        """
        return low_rank_update(y, x, self.terms())

    def _heal_vectors(self) -> None:
        """Gates in float32 again where a trainer cast them by hand: `param.data = param.data.to(bfloat16)` (trl#7268)."""
        for owner in (self, self.shared):
            for p in () if owner is None else owner._parameters.values():
                if p is not None and p.ndim <= 1 and p.dtype in (torch.bfloat16, torch.float16):
                    p.data = p.data.float()
                    p.grad = None if p.grad is None else p.grad.float()

    # The trap of a schedule that nobody runs ------------------------------------------------------------------------

    def trained_unscheduled(self) -> bool:
        """Whether an optimiser stepped it with no controller attached."""
        return not self.scheduled and self._stepped_unscheduled

    # Following the model --------------------------------------------------------------------------------------------

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Own parameters and those of the group: what PEFT freezes, unfreezes and casts with this adapter."""
        yield from super().parameters(recurse)
        if self.shared is not None:
            yield from self.shared.parameters(recurse)

    def to(self, *args, **kwargs) -> Self:
        if self.shared is not None:
            self.shared.to(*args, **kwargs)
        return super().to(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(lambda t: _keep_vectors_wide(fn, t), recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, dim in self.growing.items():
            found, own = state_dict.get(prefix + name), self.get_buffer(name)
            if found is not None and found.ndim == own.ndim:
                setattr(self, name, own.new_zeros([*own.shape[:dim], found.shape[dim], *own.shape[dim + 1 :]]))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}, dropout={self.dropout:g}"


def not_fixed(what: str, config: LowRankConfig) -> str:
    """One sentence that says why an adapter that is not `fixed` does not have a delta, merge, fold or spectrum, and what comes near."""
    option = config.fold_option
    near = f", or fold what comes near it: rankfold fold ADAPTER -o OUT{option}" if option else ""
    return f"{what}: its update depends on the input, so no matrix and no LoRA equals it; serve it with PEFT, unmerged{near}"


class Shared(nn.Module):
    """State that a group shares. Owned by the model, once; see `Adapter.make_shared`."""

    #: Keys of its tensors in a state dict, as they were before any wrapper hid them; the tuner sets them.
    tensor_names: tuple[str, ...] = ()

    def attached(self, model: nn.Module) -> None:
        """Called once all adapters of its group are in the model."""

    def detached(self) -> None:
        """Called when its adapter leaves the model: what `attached` hung on the model goes."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(lambda t: _keep_vectors_wide(fn, t), recurse)


def forget(shared: Any, adapter_name: str) -> None:
    """Removes what one adapter's layers share."""
    for state in shared[adapter_name].values():
        state.detached()
    del shared[adapter_name]


class SharedState(nn.ModuleDict):
    """All shared state of a model: adapter name → group → `Shared`. As a module it does nothing, because an
    `nn.Sequential` that is adapted runs every child it has."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def _keep_vectors_wide(fn: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """Keeps gates, thresholds and magnitudes in float32 or wider: steps of 1e-4 vanish in half precision."""
    out = fn(t)
    if t.ndim <= 1 and t.is_floating_point() and out.is_floating_point() and out.dtype.itemsize < 4:
        return t.to(out.device, torch.float32)
    return out


_INDEX = re.compile(r"\d+")


def module_type(name: str) -> str:
    """The name with its depth taken out, so that the same projection of every layer has the same one.

    >>> module_type("model.layers.3.self_attn.q_proj")
    'model.layers.*.self_attn.q_proj'
    >>> module_type("decoder.block.0.layer.1.EncDecAttention.q"), module_type("h.0.mlp.experts.7.w1"), module_type("4")
    ('decoder.block.*.layer.*.EncDecAttention.q', 'h.*.mlp.experts.7.w1', '*')

    An expert's index is not a depth; a last index is one only where no earlier one is (`h.0.mlp.2` stays `h.*.mlp.2`).
    """
    parts = name.split(".")
    depth = [i for i, p in enumerate(parts) if _INDEX.fullmatch(p) and not (i and parts[i - 1] == "experts")]
    if len(depth) > 1 and depth[-1] == len(parts) - 1:
        depth.pop()
    return ".".join("*" if i in depth else p for i, p in enumerate(parts))


def group_by_type(config: LowRankConfig, site: Site) -> str:
    """Group key of RaSA and its like: the same projection in every layer, and the same shape. Experts share with those of their own
    layer: they read one stream and write to one, while equal indices in two layers have nothing in common."""
    if site.kind == "experts":
        container, _, parameter = site.name.rsplit(".", 2)
        return f"{container}.*.{parameter}:{site.out_features}x{site.in_features}"
    return f"{module_type(site.name)}:{site.out_features}x{site.in_features}"


def kaiming_(t: Tensor, a: float = math.sqrt(5), generator: torch.Generator | None = None) -> Tensor:
    """LoRA's first values of `down`: U(−1/√in, +1/√in) at the default a. Nothing to do on an empty factor."""
    return nn.init.kaiming_uniform_(t, a=a, generator=generator) if t.numel() else t


def first_pair_(
    down: Tensor, up: Tensor, site: Site, random: bool = False, generator: torch.Generator | None = None
) -> None:
    """LoRA's first values, an update of zero: `down` as `kaiming_`, up = 0. On an embedding, where one input of all is not zero,
    PEFT's: down = 0 and up ~ N(0, 1).

    Args:
        random: an update that is not zero, for tests.
        generator: what draws them; by default torch's own.
    """
    if site.kind == "embedding":
        nn.init.normal_(up, generator=generator)
        nn.init.normal_(down, generator=generator) if random else nn.init.zeros_(down)
    else:
        kaiming_(down, generator=generator)
        kaiming_(up, generator=generator) if random else nn.init.zeros_(up)
