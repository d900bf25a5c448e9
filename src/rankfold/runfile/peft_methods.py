"""What a run file must know of PEFT's own methods, whose configs cannot be asked."""

from __future__ import annotations

from typing import Any

#: Names that PEFT's users know, for a field of its LoRA.
ALIASES: dict[str, tuple[str, dict[str, Any]]] = {
    "peft:rslora": ("peft:lora", {"use_rslora": True}),
    "peft:dora": ("peft:lora", {"use_dora": True}),
}
#: Fields of a starter file that have no default, or one that does not fit the bundled models; None takes away one of LoRA's.
EXAMPLES: dict[str, dict[str, Any]] = {
    "peft:adalora": {
        "init_r": 12, "target_r": 8, "tinit": 20, "tfinal": 50, "deltaT": 5, "total_step": 100, "r": None,
    },
    "peft:c3a": {"block_size": 32},
    "peft:cartridge": {"num_virtual_tokens": 16},
    "peft:oft": {"oft_block_size": 32, "r": None},
    "peft:p_tuning": {"num_virtual_tokens": 16, "encoder_hidden_size": 128},
    "peft:prefix_tuning": {"num_virtual_tokens": 16},
    "peft:prompt_tuning": {"num_virtual_tokens": 16},
    "peft:road": {"group_size": 32},
    "peft:shadow": {"target_modules": r".*\.layers?\.\d+$"},
    "peft:trainable_tokens": {"token_indices": [0, 1, 2]},
    "peft:vblora": {"vector_length": 64},
}  # fmt: skip
#: Methods that choose their ranks on a schedule, of which PEFT keeps nothing in a checkpoint; and the field that turns it on, if one does.
SCHEDULED: dict[str, str | None] = {"peft:adalora": None, "peft:adamss": "use_asa"}
#: Methods that a run file cannot train, and why.
REFUSED = {
    "peft:adaption_prompt": "it replaces the forwards of whole models, as the trainer does; use PEFT in Python",
    "peft:cpt": "it needs the tokens of its prompt and their mask, which only Python code can make; use PEFT",
    "peft:multitask_prompt_tuning": "it needs the number of a task with every row; use PEFT in Python",
    "peft:poly": "it needs the number of a task with every row; use PEFT in Python",
    "peft:xlora": "it mixes adapters that are trained already; use PEFT in Python",
}
