"""A language model's loss on a CPU: the head's products only where there are labels, and only once.

TRL's fused head scores every position where there is no Triton, and makes the logits again in its backward. Here rows without a
label never meet the head, and while a chunk's logits are at hand the gradient is made from them: two products a label, not three a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rankfold.kernel.matmul import linear, product
from rankfold.train.hf_api import Scored, score_labels_with, score_own_logits

#: Logits held at a time: 64 MB of them in float32.
CHUNK = 2**24


def score_labels_only(model: Any) -> None:
    """Has TRL's fused head of a language model computed as above where it can be: not on an accelerator, nor for a head that is
    trained, adapted, sharded or has a bias, nor for what `hf_api` leaves to TRL.

    Args:
        model: the base model, after TRL gave it the fused head.
    """
    score_labels_with(model, _plain, scored)


def score_as_the_model_does(model: Any, example: dict[str, Tensor], terms: bool = False) -> bool:
    """Has the loss made of the model's own logits where those of the fused head are others: it knows a few of the biases, caps
    and scales that models put behind their heads, and one loss of routers among the terms that models add to their loss.

    Args:
        model: the base model, after TRL gave it the fused head.
        example: rows of what it takes, where it is.
        terms: ask for terms of the loss too.

    Returns:
        Whether `aux_loss` of the fused head is now all that the model adds to the cross-entropy, weighted as it does.
    """
    if hasattr(model, "router_aux_loss_coef"):  # TRL's trainer has set the config's
        text = model.config.get_text_config()
        model.router_aux_loss_coef = getattr(text, "router_aux_loss_coef", model.router_aux_loss_coef)
    labels, trained = example["input_ids"], model.training
    others = labels.flip(1)
    model.eval()
    try:
        with torch.no_grad():
            found, other = (model(**example, labels=ids, use_cache=False) for ids in (labels, others))
            fused = model(**example, labels=labels, fused_lm_head=True)
    finally:
        model.train(trained)
    own, own_of_others = _log_probs(found, labels), _log_probs(other, others)
    kinds = [p.dtype for p in model.parameters() if p.is_floating_point()]
    if torch.is_autocast_enabled(labels.device.type):
        kinds.append(torch.get_autocast_dtype(labels.device.type))
    rounding = 1e-3 + 2 * max(torch.finfo(kind).eps for kind in kinds) * float(found.logits.abs().max())
    added, again = float(found.loss) + float(own.mean()), float(other.loss) + float(own_of_others.mean())
    alike = 1e-4 + 0.01 * abs(added)
    # A term does not depend on the labels; some decoders compare logits with labels that are not shifted
    adds = terms and abs(added - again) < alike < abs(added - float(fused.loss) - float(fused.log_probs.mean()))
    if adds or float((own - fused.log_probs.to(own.device)).abs().max()) > rounding:
        score_own_logits(model, adds)
    return adds


def _log_probs(found: Any, labels: Tensor) -> Tensor:
    logits = found.logits[:, :-1].float()
    return logits.log_softmax(-1).gather(-1, labels[:, 1:, None].to(logits.device))[..., 0]


def _plain(head: nn.Module) -> bool:
    weight = getattr(head, "weight", None)
    return (
        type(head) is nn.Linear
        and head.bias is None
        and type(weight) is nn.Parameter
        and not weight.requires_grad
        and weight.device.type == "cpu"
        and not (head._forward_hooks or head._forward_pre_hooks)
    )


def scored(hidden: Tensor, weight: Tensor, labels: Tensor) -> Scored:
    """Log-probabilities of the labels, zero where there is none, whether a label is the likeliest, and where labels are.

    Args:
        hidden: batch × length × width; weight: vocabulary × width; labels: batch × length, −100 for none.
    """
    mask = labels != -100
    picked = hidden[mask]
    if torch.is_autocast_enabled("cpu"):
        picked = picked.to(torch.get_autocast_dtype("cpu"))
    log_probs, is_top1 = _LabelScores.apply(picked, weight, labels[mask])  # pyright: ignore[reportGeneralTypeIssues]
    return (
        log_probs.new_zeros(mask.shape).masked_scatter(mask, log_probs),
        torch.zeros_like(mask).masked_scatter(mask, is_top1),
        mask,
    )


class _LabelScores(torch.autograd.Function):
    """log softmax(h Wᵀ)[label] and whether the label is the likeliest, for h n × width; W gets no gradient."""

    @staticmethod
    def forward(ctx, h, weight, labels):  # pyright: ignore[reportIncompatibleMethodOverride]
        log_probs = h.new_empty(len(h), dtype=torch.float32)
        is_top1 = torch.empty(len(h), dtype=torch.bool)
        slope = torch.empty_like(h) if ctx.needs_input_grad[0] else None  # ∂ log p / ∂ h, a row for each label
        rows = max(CHUNK // len(weight), 1)
        with torch.autocast("cpu", enabled=False):
            whole = weight.to(h.dtype)
            for i in range(0, len(h), rows):
                part = slice(i, i + rows)
                logits, own = linear(h[part], whole).float(), labels[part, None]
                total = logits.logsumexp(1, keepdim=True)
                log_probs[part] = (logits.gather(1, own) - total)[:, 0]
                is_top1[part] = logits.argmax(1) == own[:, 0]
                if slope is not None:
                    p = logits.sub_(total).exp_().neg_()
                    p = p.scatter_add_(1, own, torch.ones_like(own, dtype=p.dtype)).to(h.dtype)
                    slope[part] = product(p, whole)
        ctx.save_for_backward(slope)
        ctx.mark_non_differentiable(is_top1)
        return log_probs, is_top1

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):  # pyright: ignore[reportIncompatibleMethodOverride]
        (slope,) = ctx.saved_tensors
        return (slope * grad[:, None]).to(slope.dtype), None, None
