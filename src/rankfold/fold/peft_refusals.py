"""What of PEFT's own adapters cannot become a plain LoRA, each with the reason and what to do instead."""

from __future__ import annotations

from peft import PeftConfig
from torch import nn

from rankfold.errors import RankfoldError
from rankfold.fold.peft_updates import REFUSED, UPDATES, kind
from rankfold.fold.sites import GROUPED, unlike_peft
from rankfold.host.kinds import kind_of

_MERGE = "merge it into the base with PEFT's merge_and_unload()"
_CONVERT = "fold what save_pretrained(path_initial_model_for_weight_conversion=…) writes, which is relative to the base"
#: Fields of any config that make it more than an update of linear weights, and what to do.
FIELDS = {
    "lora_bias": f"it trains a bias, which engines do not load; {_MERGE} or train with lora_bias=False",
    "layer_replication": f"it makes new layers, which engines do not load; {_MERGE}",
    "trainable_token_indices": f"it trains embeddings; {_MERGE} or train without",
    "alora_invocation_tokens": "activated LoRA depends on where in the text it is; serve it with an engine that has aLoRA",
    "arrow_config": "its routing depends on the input",
    "use_qalora": f"QALoRA pools its input; {_MERGE} with its quantised base",
    "use_bdlora": f"its block-diagonal layout is not read by this version; {_MERGE}",
    "kasa_config": f"KaSA changes the base's weights; {_MERGE}",
    "monteclora_config": f"its update is drawn from a distribution; {_MERGE}",
    "velora_config": f"VeLoRA is not covered by this version; {_MERGE}",
}
#: Starts that change the base in a way that the folder does not tell.
UNKNOWN_STARTS = {
    "corda": "its start depends on data",
    "lora_ga": "its start depends on gradients",
    "pissa_niter": "its randomised start differs at every load",
    "loftq": f"its base is a quantised one that only PEFT's start knows; {_MERGE}, or fold on that base",
}


def check_foldable(config: PeftConfig) -> None:
    """Raises ValueError, with the field and the fix, for what is not a fixed additive update of linear weights."""
    name = kind(config)
    if name not in UPDATES:
        reason = REFUSED.get(name, "this version has no fold for it; merge it with PEFT if it can")
        raise RankfoldError(f"peft_type={name} cannot be folded into a LoRA: {reason}")
    kept = getattr(config, "modules_to_save", None)
    if kept is not None and not (isinstance(kept, list | set) and all(isinstance(m, str) for m in kept)):
        raise RankfoldError(f"adapter_config.json: PEFT cannot use a value in it (modules_to_save={kept!r})")
    bias = getattr(config, "bias", "none")
    if isinstance(bias, str) and bias != "none":
        raise RankfoldError(
            f"bias={bias!r}: trained biases have no place in a served LoRA; {_MERGE} or train bias='none'"
        )
    for field, reason in FIELDS.items():
        value = getattr(config, field, None)
        if value:
            raise RankfoldError(f"{field}={value!r} cannot be folded into a LoRA: {reason}")
    check_start(config)


def check_kind(name: str, module: nn.Module, config: PeftConfig) -> None:
    """Raises RankfoldError for a module whose adapter of this type is not an update of its weight that a LoRA can be."""
    found, title = kind_of(module), type(module).__name__
    if title.endswith("MultiheadAttention"):
        raise RankfoldError(f"target_modules: {name} is a {title}, whose weight is three in one; {_MERGE}")
    if found is not None and not found.linear and kind(config) != "LORA":
        raise RankfoldError(
            f"target_modules: {name} is a {title}, and of {kind(config)} only adapted linear layers fold. {_MERGE}"
        )
    if unlike_peft(module):
        raise RankfoldError(f"target_modules: {name} is {GROUPED}")


def check_start(config: PeftConfig) -> None:
    """Raises RankfoldError for a start that changed the base in a way that the folder does not tell."""
    start = str(getattr(config, "init_lora_weights", ""))
    for begin, reason in UNKNOWN_STARTS.items():
        if start.startswith(begin):
            raise RankfoldError(
                f"init_lora_weights={start!r}: {reason}, so its update of the base is not known; {_CONVERT}"
            )
