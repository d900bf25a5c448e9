"""What each of PEFT's adapter types adds to a linear weight: one table, peft type → function to an `Update`.

Where the algebra has a low-rank form it is used, and is exact. Where it has none, the update is W' − W in float64, with W'
from PEFT's own merge of a copy of the layer, so that it means what PEFT means.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankfold.errors import RankfoldError
from rankfold.fold.source import Update, folding_device
from rankfold.kernel.factors import Factors

#: The base's weight, out × in in float64, from before the adapter; read only when called.
Weight = Callable[[], Tensor]


def update_of(layer: Any, name: str, config: PeftConfig, weight: Weight, expert: int | None = None) -> Update:
    """The update of one of PEFT's tuner layers by its adapter `name`, in float64 on the CPU.

    Args:
        expert: which of those in the parameter that the layer adapts; 0 of a single matrix. None for a module.

    Raises:
        ValueError: the layer's bias is changed too.
    """
    with torch.no_grad():
        if expert is None:
            found: Update = UPDATES[kind(config)](layer, name, config, weight)
        else:
            found = of_parameter(layer, name, expert)
    return found.detach().to(folding_device(found if isinstance(found, Tensor) else found.down), torch.float64)


def kind(config: PeftConfig) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def lora(layer: Any, name: str, config: Any, weight: Weight) -> Update:
    """s·BA, of a convolution's weight as a matrix; for DoRA diag(m/‖W + s·BA‖)·(W + s·BA) − W; for PiSSA and OLoRA, which start
    linear layers alone, s·BA minus what their start took out of W."""
    linear = name in layer.lora_A
    if linear:
        down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    else:
        down, up = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    trained = Factors(_f64(down).flatten(1), _f64(up).flatten(1), scale=layer.scaling[name])
    if name in layer.lora_magnitude_vector:
        return _dora(trained, _f64(layer.lora_magnitude_vector[name].weight), weight())
    start = STARTS.get(str(config.init_lora_weights).lower())
    if start is None or not linear or down.ndim > 2:
        return trained
    if start is olora_start and isinstance(layer.get_base_layer(), Conv1D):
        raise RankfoldError("init_lora_weights='olora': its start on a Conv1D cannot be folded; save it converted")
    both = trained.minus(start(weight().float(), layer.r[name], layer.scaling[name]))
    # The two nearly cancel: without this, rounding would be relative to them and not to their difference
    return both.compress(rank=both.rank)


def _dora(trained: Factors, magnitude: Tensor, before: Tensor) -> Tensor:
    """Rows of W + s·BA brought to the lengths in `magnitude`, minus W; arXiv:2402.09353, equation 5."""
    if before.is_meta:
        return before  # dense; without values there is nothing more to say
    both = before + trained.delta()
    return (magnitude.flatten() / both.norm(dim=1))[:, None] * both - before


def of_parameter(layer: Any, name: str, expert: int) -> Factors:
    """s·BA of one expert: `lora_A` has the rows of one expert after the other, `lora_B` the columns rank by rank."""
    down, up = _f64(layer.lora_A[name].weight), _f64(layer.lora_B[name].weight)
    experts = layer.num_experts
    return Factors(down.chunk(experts)[expert], up.unflatten(1, (-1, experts))[..., expert], scale=layer.scaling[name])


def pissa_start(weight: Tensor, r: int, scale: float) -> Factors:
    """The leading r terms of W's SVD, in float32 as PEFT takes it each time it loads the adapter: where two singular values
    are close, another precision would split W elsewhere."""
    u, sigma, vt = torch.linalg.svd(weight, full_matrices=False)
    return Factors(vt[:r].double(), u[:, :r].double(), sigma[:r].double())


def olora_start(weight: Tensor, r: int, scale: float) -> Factors:
    """s times the leading part of W's QR; float32 as `pissa_start`."""
    q, upper = torch.linalg.qr(weight)
    return Factors(upper[:r].double(), q[:, :r].double(), scale=scale)


#: init_lora_weights → what it took out of the base at scale s; PEFT repeats it at every load.
STARTS: dict[str, Callable[[Tensor, int, float], Factors]] = {"pissa": pissa_start, "olora": olora_start}


def adalora(layer: Any, name: str, config: Any, weight: Weight) -> Factors:
    """B diag(E) A · s/(ranks left + 1e-5), the 1e-5 being PEFT's guard."""
    gate = _f64(layer.lora_E[name])[:, 0] / (_f64(layer.ranknum[name]) + 1e-5)
    return Factors(_f64(layer.lora_A[name]), _f64(layer.lora_B[name]), gate, layer.scaling[name])


def loha(layer: Any, name: str, config: Any, weight: Weight) -> Factors:
    """s·(B₁A₁ ⊙ B₂A₂), whose factors of rank r² are products of all pairs of components (Khatri–Rao)."""
    up_1, up_2 = _f64(layer.hada_w1_a[name]), _f64(layer.hada_w2_a[name])  # out × r
    down_1, down_2 = _f64(layer.hada_w1_b[name]), _f64(layer.hada_w2_b[name])  # r × in
    up = (up_1[:, :, None] * up_2[:, None, :]).flatten(1)
    down = (down_1[:, None, :] * down_2[None, :, :]).flatten(0, 1)
    return Factors(down, up, scale=layer.scaling[name])


def lokr(layer: Any, name: str, config: Any, weight: Weight) -> Factors:
    """s·(C ⊗ D): the Kronecker products of their factors, of rank rank(C)·rank(D)."""
    left, right = _lokr_part(layer, name, "w1"), _lokr_part(layer, name, "w2")
    down, up = torch.kron(left.down, right.down), torch.kron(left.up, right.up)
    return Factors(down, up, scale=layer.scaling[name])


def _lokr_part(layer: Any, name: str, part: str) -> Factors:
    whole = getattr(layer, f"lokr_{part}")
    if name not in whole:
        return Factors(_f64(getattr(layer, f"lokr_{part}_b")[name]), _f64(getattr(layer, f"lokr_{part}_a")[name]))
    matrix = _f64(whole[name])
    rows, columns = matrix.shape
    eye = torch.eye(min(rows, columns), dtype=torch.float64)
    return Factors(matrix, eye) if rows <= columns else Factors(eye, matrix)


def vera(layer: Any, name: str, config: Any, weight: Weight) -> Factors:
    """diag(b) B diag(d) A, with A and B the leading parts of what all layers share."""
    down = _f64(layer.vera_A[name])[:, : layer.in_features]
    up = _f64(layer.vera_B[name])[: layer.out_features]
    return Factors(down, up * _f64(layer.vera_lambda_b[name])[:, None], _f64(layer.vera_lambda_d[name]))


def composed(layer: Any, name: str, config: Any, weight: Weight) -> Factors:
    """VB-LoRA and UniLoRA: a plain B A whose matrices are composed of shared vectors, as PEFT composes them."""
    down, up = layer._get_lora_matrices(name)
    return Factors(_f64(down), _f64(up))


def miss(layer: Any, name: str, config: Any, weight: Weight) -> Update:
    """Mᵀ [I I I …]: the input is summed over blocks of length r. Its form "bat" multiplies W and has no low rank."""
    if layer.miss_fn == "bat":
        return merged(layer, name, config, weight)
    block = _f64(layer.miss_block[name])  # r × out, or r × mini_r, repeated
    if layer.miss_fn == "mini":
        block = block.repeat(1, layer.out_features // layer.miss_mini_r[name])
    r = block.shape[0]
    eyes = torch.eye(r, dtype=torch.float64).repeat(1, -(-layer.in_features // r))[:, : layer.in_features]
    return Factors(eyes, block.T)


def hra(layer: Any, name: str, config: Any, weight: Weight) -> Factors:
    """W (Π(I − 2uᵢuᵢᵀ) − I) = −W U T Uᵀ, with T⁻¹ = ½I + the part of UᵀU above the diagonal; of rank ≤ r."""
    u = _f64(layer.hra_u[name])  # in × r
    u = torch.linalg.qr(u).Q if layer.hra_apply_GS[name] else u / u.norm(dim=0)
    inverse = torch.triu(u.T @ u, 1) + 0.5 * torch.eye(u.shape[1], dtype=torch.float64)
    up = torch.linalg.solve_triangular(inverse, weight() @ u, upper=True, left=False)
    return Factors(u.T, up, scale=-1.0)


def delora(layer: Any, name: str, config: Any, weight: Weight) -> Factors:
    """B diag(λ/(r‖aᵢ‖‖bᵢ‖)) A diag(w), with w the norms of W's columns, which the adapter keeps."""
    down, up = _f64(layer.delora_A[name]), _f64(layer.delora_B[name])
    norms = down.norm(dim=1).clamp(min=1e-4) * up.norm(dim=0).clamp(min=1e-4)
    gate = _f64(layer.delora_lambda[name]) / layer.r[name] / norms
    return Factors(down * _f64(layer.delora_w_norm[name]), up, gate)


def merged(layer: Any, name: str, config: Any, weight: Weight) -> Tensor:
    """W' − W, out × in, by PEFT's merge in float64 of a copy of the layer."""
    before = weight()
    if before.is_meta:
        return before  # dense; without values there is nothing more to say
    alone = copy.deepcopy(layer)
    base = alone.get_base_layer()
    # A copy even of a view that is contiguous already: some of PEFT's layers merge in place
    stored = (before.T if isinstance(base, Conv1D) else before).clone(memory_format=torch.contiguous_format)
    base.weight = nn.Parameter(stored, requires_grad=False)
    alone.double().eval()
    bias = None if base.bias is None else base.bias.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about sparse tensors
        alone.merge(safe_merge=True, adapter_names=[name])
    base = alone.get_base_layer()
    if bias is not None and not torch.equal(base.bias, bias):
        raise RankfoldError(f"peft_type={kind(config)}: it changes the layer's bias too, which no LoRA can hold")
    return (base.weight.T if isinstance(base, Conv1D) else base.weight) - before


def _f64(tensor: Tensor) -> Tensor:
    return tensor.detach().to(folding_device(tensor), torch.float64)


Function = Callable[[Any, str, Any, Weight], Update]
UPDATES: dict[str, Function] = {
    "LORA": lora,
    "ADALORA": adalora,
    "LOHA": loha,
    "LOKR": lokr,
    "VERA": vera,
    "VBLORA": composed,
    "UNILORA": composed,
    "MISS": miss,
    "HRA": hra,
    "DELORA": delora,
    "RANDLORA": merged,
    "FOURIERFT": merged,
    "WAVEFT": merged,
    "OFT": merged,
    "BOFT": merged,
    "C3A": merged,
    "SHIRA": merged,
    "HIRA": merged,
    "GRALORA": merged,
    "ROAD": merged,
}

_TOKENS = "it adds virtual tokens or activations, not an update of a weight"
_BIAS = "it rescales activations and biases"
#: What is not an additive update of linear weights, and why.
REFUSED: dict[str, str] = {
    "PROMPT_TUNING": _TOKENS,
    "MULTITASK_PROMPT_TUNING": _TOKENS,
    "P_TUNING": _TOKENS,
    "PREFIX_TUNING": _TOKENS,
    "CPT": _TOKENS,
    "CARTRIDGE": _TOKENS,
    "ADAPTION_PROMPT": _TOKENS,
    "IA3": _BIAS,
    "BEFT": "it trains biases",
    "LN_TUNING": "it trains layer norms, not linear layers",
    "TRAINABLE_TOKENS": "it trains embeddings, not linear layers",
    "XLORA": "its mixture of adapters depends on the input",
    "POLY": "its mixture of adapters depends on the task of each input",
    "PVERA": "its update is drawn from a distribution",
    "PEANUT": "its update is not linear in the input",
}
