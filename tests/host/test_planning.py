"""What is refused before a model is touched."""

from __future__ import annotations

from typing import Any

import pytest
from peft import get_peft_model
from transformers import T5Config, T5ForConditionalGeneration

from rankfold import PlainLoraConfig, RasaConfig
from rankfold.errors import RankfoldError

TINY = T5Config(vocab_size=30, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=2)
COMMON: dict[str, Any] = {"r": 2, "target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"}


@pytest.mark.parametrize("fields", [{"modules_to_save": ["shared"]}, {"trainable_token_indices": [0, 1]}], ids=str)
def test_a_module_whose_name_ends_the_shared_state_s(fields: dict[str, Any]) -> None:
    """PEFT matches the end of a name, and would have wrapped the pool: an AttributeError, or a copy of it that nothing reads."""
    model = T5ForConditionalGeneration(TINY)
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(RankfoldError, match="is about 'shared', with which 'lowrank_shared' ends"):
        get_peft_model(model, RasaConfig(shared_rank=1, **fields, **COMMON))
    assert [name for name, _ in model.named_modules()] == before
    get_peft_model(model, PlainLoraConfig(**fields, **COMMON))
