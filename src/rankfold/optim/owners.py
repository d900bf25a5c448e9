"""Asks each layer for its own factors: the module that owns a pair declares it; the order of parameters never matters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import Tensor, nn

from rankfold.host import registry
from rankfold.host.layer import AdaptedLayer


@dataclass(frozen=True, eq=False)
class Gate:
    """The trained diagonal between two factors: `length` entries of a vector, from `start` on."""

    parameter: nn.Parameter
    start: int
    length: int

    def values(self) -> Tensor:
        return self.parameter.detach()[self.start : self.start + self.length]


@dataclass(frozen=True, eq=False)
class Candidate:
    """Two factors that a layer multiplies. One of them may be frozen, a buffer, or computed from something else.

    Args:
        name: of what is adapted (a layer, or one expert's matrix), and the adapter's where it is not "default".
        down, up: as in `Factors`.
        scale: what multiplies the product.
        gate: its trained diagonal, where it has one.
        embedding: whether the layer is an embedding; the product is then the transposed update.
        method: whose adapter it is, where it is rankfold's.
        penalised: whether the method adds a loss term on the factors themselves.
    """

    name: str
    down: Tensor
    up: Tensor
    scale: float
    gate: Gate | None = None
    embedding: bool = False
    method: str = ""
    penalised: bool = False


@dataclass
class Owned:
    """The pairs that one layer declares, and why others of its parameters are not a pair's (by the parameter's id)."""

    candidates: list[Candidate] = field(default_factory=list)
    why_not: dict[int, str] = field(default_factory=dict)

    def leave(self, module: nn.Module, why: str) -> None:
        self.why_not |= {id(p): why for p in module.parameters()}


def owned(name: str, module: nn.Module) -> Owned | None:
    """What the layer `module`, called `name`, declares; None for a module that is not an adapted layer."""
    if isinstance(module, AdaptedLayer):
        return _of_ours(module)
    if isinstance(module, LoraLayer):
        return _of_peft(name, module)
    return None


def _called(name: str, adapter_name: str) -> str:
    return name if adapter_name == "default" else f"{name}[{adapter_name}]"


def _of_ours(layer: AdaptedLayer) -> Owned:
    found = Owned()
    for adapter_name, adapter in ((n, a) for n in layer.lowrank_adapters for a in layer.adapters([n])):
        if not any(True for _ in adapter.parameters()):  # tied: the embedding's
            continue
        own, pool = {id(p) for p in adapter.parameters()}, set[int]()
        row = registry.METHODS.get(adapter.config.method)
        title = row.title if row is not None else type(adapter).__name__
        penalised = row is not None and getattr(row.controller, "penalises_factors", False)
        if adapter.shared is not None:
            found.leave(adapter.shared, "shared by several layers")
            pool = {id(p) for p in adapter.shared.parameters()}
        if not adapter.fixed:
            found.leave(adapter, f"{title}'s update depends on the input")
            continue
        for block in adapter.blocks():  # its parameters, also while it rests
            if any(isinstance(t, nn.Parameter) and id(t) not in own for t in (block.down, block.up)):
                continue  # a neighbour's, which declares it
            gate = None if block.gate is None else _gate(block.gate)
            computed = block.gate is not None and gate is None  # no diagonal that could be read again at the next step
            if computed or any(t.requires_grad and not isinstance(t, nn.Parameter) for t in (block.down, block.up)):
                found.leave(adapter, f"{title} computes its factors from other parameters at each forward")
            if not computed and not pool & {id(block.down), id(block.up)}:
                name, embedding = _called(adapter.site.name, adapter_name), adapter.site.kind == "embedding"
                scale = block.scale * adapter.multiplier
                found.candidates.append(Candidate(name, block.down, block.up, scale, gate, embedding, title, penalised))
    return found


def _gate(gate: Tensor) -> Gate | None:
    """The parameter that `gate` is, or is a slice of."""
    base = gate if isinstance(gate, nn.Parameter) else gate._base
    if not isinstance(base, nn.Parameter) or base.ndim != 1 or gate.stride() != (1,):
        return None
    return Gate(base, int(gate.storage_offset()) - int(base.storage_offset()), len(gate))


def _of_peft(name: str, layer: LoraLayer) -> Owned:
    found = Owned()
    for adapter_name, scale in layer.scaling.items():
        called = _called(name, adapter_name)
        variant = layer.lora_variant.get(adapter_name)
        if adapter_name in layer.lora_embedding_A:
            down, up = layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]
            found.candidates.append(Candidate(called, down, up, scale, embedding=True))
            continue
        factors = [f[adapter_name] for f in (layer.lora_A, layer.lora_B) if adapter_name in f]
        why = ""
        if variant is not None and not layer.use_dora.get(adapter_name):
            why = f"PEFT's {type(variant).__name__} is more than a product of two factors"
        elif isinstance(layer, ParamWrapper) and layer.num_experts > 1:
            why = "the factors of several experts in one"
        elif len(factors) != 2 or not all(isinstance(f, nn.Linear) for f in factors):
            why = f"{type(layer).__name__} does not multiply two matrices"
        if why:
            for factor in factors:
                if isinstance(factor, nn.Module):
                    found.leave(factor, why)
        else:
            down, up = (f.get_parameter("weight") for f in factors)
            found.candidates.append(Candidate(called, down, up, scale))
    return found


def layers(model: nn.Module) -> Iterator[Owned]:
    """What every adapted layer of `model` declares, in the model's order. Wrappers' prefixes are left out of the names."""
    for name, module in model.named_modules():
        found = owned(plain_name(name), module)
        if found is not None:
            yield found


def plain_name(name: str) -> str:
    """The name without what DDP, torch.compile and PEFT put before it, so that a state fits the same model wrapped otherwise."""
    name = ".".join(part for part in name.split(".") if part not in ("_orig_mod", "_fsdp_wrapped_module"))
    return name.removeprefix("module.").removeprefix("base_model.model.")
