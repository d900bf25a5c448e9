"""A config.json with the keys of transformers 4 beside those of transformers 5.

`save_pretrained` of transformers 5 renames keys of the config, and engines that read the old ones fall back to defaults without
a word: mlx-lm took theta 10000 for 100000, mistral.rs asks for `rope_theta`. So what rankfold writes has both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankfold.io.files import to_json

#: Keys that transformers 4 wrote, by those of `rope_parameters`; of single families where they have names of their own.
ROPE = {"rope_theta": "rope_theta", "partial_rotary_factor": "partial_rotary_factor"}
ROPE_OF = {
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "gpt_neox_japanese": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
}
#: The same for parameters by type of layer: the key of theta.
THETAS = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}
THETAS_OF = {
    "modernbert": {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"},
    "modernbert-decoder": {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"},
}


def add_old_keys(folder: Path) -> None:
    """Adds them to the config.json that transformers wrote into a folder."""
    path = folder / "config.json"
    path.write_text(to_json(with_old_keys(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")


def with_old_keys(config: Mapping[str, Any], scaling: bool = True) -> dict[str, Any]:
    """A config with the keys of transformers 4 beside those of transformers 5, in its parts as well; what is there stays.

    Args:
        scaling: write `rope_scaling` too, which some configs would read in place of `rope_parameters`.
    """
    found = {
        k: with_old_keys(v, scaling) if isinstance(v, dict) and k.endswith("_config") else v for k, v in config.items()
    }
    if isinstance(found.get("dtype"), str):
        found.setdefault("torch_dtype", found["dtype"])
    if pattern := _period(found.get("layer_types")):
        found.setdefault("sliding_window_pattern", pattern)
    rope, kind = found.get("rope_parameters"), found.get("model_type")
    if not isinstance(rope, dict) or not rope:
        return found
    nested = {layers: part for layers, part in rope.items() if isinstance(part, dict)}
    for layers, part in nested.items():
        if "rope_theta" in part and (name := THETAS_OF.get(str(kind), THETAS).get(layers)):
            found.setdefault(name, part["rope_theta"])
    flat = nested.get("full_attention", {}) if nested else rope
    for new, old in ROPE_OF.get(str(kind), ROPE).items():
        if new in flat and not (nested and new == "rope_theta"):
            found.setdefault(old, flat[new])
    rest = {key: value for key, value in flat.items() if key not in ROPE}
    if scaling and rest.get("rope_type", "default") != "default":
        found.setdefault("rope_scaling", rest)
    return found


def _period(layers: Any) -> int:
    """One layer in this many has full attention, as older configs count; 0 without such a period."""
    if not isinstance(layers, list) or set(layers) != {"full_attention", "sliding_attention"}:
        return 0
    period = layers.index("full_attention") + 1
    same = [
        ("full_attention" if (i + 1) % period == 0 else "sliding_attention") == kind for i, kind in enumerate(layers)
    ]
    return period if period > 1 and all(same) else 0
