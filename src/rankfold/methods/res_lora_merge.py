"""What comes near ResLoRA's input and middle shortcuts without them: one pair per module, by the paper's two rules.

x_{n−1} is taken for α*·x_n, so that "is" becomes ΔW_n = (1 + α*)·s·B_nA_n. Of n's run of equal shapes, in depth order:

    "bi", from inputs    is: α* = f_{n−1}/f_n, f the mean ‖x‖_F of the last 100 training forwards
                         ms: α* = Σ_{k=1…m} f_{n−k}/f_n, f the mean ‖A x‖_F, and ΔW_n = (1 + α*)·s·B_nA_n
    "bw", from weights   is: α* = f*_{n−2}/f*_{n−1}, f* = ‖W + (1 + α*)·s·BA‖_F, and 1 for the first two modules
                         ms: ΔW_n = s·B_n·(A_n + Σ_{k=1…m} f_{n−k}/f_n·A_{n−k}), f the mean ‖x‖_F: this one reads A, not W

The first module's input is doubled, so its α* is 1 in both rules of "is", and exact. The authors' code adds into the frozen W to find
f*, transposes the update and drops s and 1 + α*; here the formulas are computed on a copy. OUR INTERPRETATION: α* = 1 for the
second module by "bw".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.errors import RankfoldError
from rankfold.host.layer import AdaptedLayer
from rankfold.kernel.factors import Factors
from rankfold.methods.res_lora_adapter import ResLora


@torch.no_grad()
def approximate(model: nn.Module, rule: str, adapter_name: str = "default") -> Callable[[], None]:
    """Makes an adapter with "is" or "ms" a plain one in place: its config is `shortcut="bs", previous=0` from then on, so it merges,
    folds and saves as a LoRA. It is not the same function: measure what it costs (`rankfold fold --approximate`).

    Args:
        model: a PeftModel, or one into which the adapter was injected; unmerged. The base's weights are read and not written.
        rule: "bi" or "bw".

    Returns:
        A function that takes it back when called, and makes it again when called again.

    Raises:
        RankfoldError: another adapter or rule, or "bi" without recorded norms. Nothing is changed then.
    """
    configs: Any = getattr(model, "peft_config", {})
    config = configs.get(adapter_name)
    if getattr(config, "method", None) != "res_lora" or config.fixed:
        raise RankfoldError(
            f'adapter_name={adapter_name!r} must be a ResLoRA with shortcut="is" or "ms"; others need no approximation'
        )
    if rule not in config.approximations:
        raise RankfoldError(f'rule={rule!r} must be "bi", from the norms of inputs, or "bw", from weights')
    layers = {
        a.site.name: layer
        for layer in model.modules()
        if isinstance(layer, AdaptedLayer)
        for a in layer.adapters([adapter_name])
    }
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise RankfoldError(f"adapter_name={adapter_name!r} is merged; call unmerge_adapter() first")
    rules = Rules({name: (layer, layer.adapters([adapter_name])[0]) for name, layer in layers.items()}, rule)
    found = {name: rules.near(name) for name in layers}
    plain = config.changed(shortcut="bs", previous=0)
    swaps = [_swapping(layers[name].adapters([adapter_name])[0], factors, plain) for name, factors in found.items()]
    others = [plain]

    def swap() -> None:
        others.append(configs[adapter_name])
        configs[adapter_name] = others.pop(0)
        for one in swaps:
            one()

    swap()
    return swap


class Rules:
    """The rules on one adapter.

    Args:
        placed: the layer and the adapter at each module.
    """

    def __init__(self, placed: dict[str, tuple[AdaptedLayer, Any]], rule: str) -> None:
        self.placed, self.rule = placed, rule
        self._norms: dict[str, float] = {}  # f*, each from those before it

    def near(self, name: str) -> Factors:
        """The pair that takes the module's place, at its own scale."""
        _, adapter = self.placed[name]
        down, up = adapter.pair()
        if adapter.config.shortcut == "is" or self.rule == "bi":
            return Factors(down, up * (1 + self.alpha(name)))
        own, down = _mean(adapter, "input_norms"), down.clone()
        for other in adapter.shared.before(name, adapter.config.links):
            down += _mean(other, "input_norms") / own * other.pair()[0].to(down.device)
        return Factors(down, up)

    def alpha(self, name: str) -> float:
        """α* of a module."""
        _, adapter = self.placed[name]
        chain = adapter.shared
        if adapter.config.shortcut == "ms":
            own = _mean(adapter, "middle_norms")
            return sum(_mean(a, "middle_norms") / own for a in chain.before(name, adapter.config.links))
        before = [a.site.name for a in chain.before(name, 2)]
        if self.rule == "bi":
            return _mean(self.placed[before[0]][1], "input_norms") / _mean(adapter, "input_norms") if before else 1.0
        return self._norm(before[1]) / self._norm(before[0]) if len(before) == 2 else 1.0

    def _norm(self, name: str) -> float:
        if name not in self._norms:
            self._norms[name] = norm_of_merged(*self.placed[name], self.alpha(name))
        return self._norms[name]


@torch.no_grad()
def norm_of_merged(layer: AdaptedLayer, adapter: Any, alpha: float) -> float:
    """f* = ‖W + (1 + α*)·s·BA‖_F, on a copy."""
    weight = layer.get_base_weight()
    wide = torch.promote_types(weight.dtype, torch.float32)
    down, up = (t.to(wide) for t in adapter.pair())
    delta = (1 + alpha) * adapter.scaling * up @ down
    return float((weight.to(wide) + layer.kind.in_weight_layout(delta, weight)).norm())


def _mean(adapter: ResLora, name: str) -> float:
    """The mean of what was recorded."""
    window: Tensor = adapter.get_buffer(name)
    seen = window[window != 0]
    if not len(seen):
        raise RankfoldError(
            f"ResLoRA: no norms were recorded at {adapter.site.name}, because it saw no training forward; train it, or take the rule "
            '"bw" of shortcut="is", which needs none'
        )
    return float(seen.mean())


def _swapping(adapter: Any, factors: Factors, config: Any) -> Callable[[], None]:
    """A function that gives an adapter another pair and config, and what it had at the next call."""
    other = [(factors.down.clone(), factors.up.clone(), config, (None,), {})]

    @torch.no_grad()
    def swap() -> None:
        down, up = (t.clone() for t in adapter.pair())
        other.append((down, up, adapter.config, adapter._shared, dict(adapter._buffers)))
        new_down, new_up, adapter.config, adapter._shared, buffers = other.pop(0)
        adapter.pair.down.copy_(new_down)
        adapter.pair.up.copy_(new_up)
        adapter._buffers.clear()
        adapter._buffers.update(buffers)
        adapter.tensor_names = tuple(adapter.state_dict())

    return swap
