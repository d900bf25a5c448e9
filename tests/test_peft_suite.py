"""How tests/peft_suite judges: every outcome that its list does not say, and every line that says too much, is a sentence."""

from __future__ import annotations

import importlib.util
from pathlib import Path

FILE = Path(__file__).parent / "peft_suite" / "expected.py"
spec = importlib.util.spec_from_file_location("peft_suite_expected", FILE)
assert spec is not None
assert spec.loader is not None
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)

LINES = """# No convolutions.
all row Conv?d *
# Gates.
rasa,sora t.py::test_dtype[*-half]
"""
AS_IT_SHOULD_BE = {
    "row Conv1d LoRA": ("refused", "TypeError: no"),
    "t.py::test_dtype[a-half]": ("failed", "AssertionError"),
    "t.py::test_dtype[a-float]": ("passed", ""),
    "t.py::test_dtype[b-half]": ("skipped", ""),
}


def test_what_is_expected_is_silent() -> None:
    assert module.Expected(LINES).judge("rasa", AS_IT_SHOULD_BE) == []


def test_what_is_not_is_said() -> None:
    came = AS_IT_SHOULD_BE | {"row Conv1d LoRA": ("passed", ""), "t.py::test_new": ("failed", "KeyError: 'x'")}
    said = module.Expected(LINES).judge("rasa", came)
    assert len(said) == 3
    assert any("passes, in spite of 'all row Conv?d *': row Conv1d LoRA" in s for s in said)
    assert any("no test that fails matches 'all row Conv?d *'" in s for s in said)
    assert any("without a reason: t.py::test_new: KeyError: 'x'" in s for s in said)
    (other,) = module.Expected(LINES).judge("lora", AS_IT_SHOULD_BE)  # the line on gates is not for it
    assert "failed, without a reason: t.py::test_dtype[a-half]" in other


def test_the_committed_list_has_reasons() -> None:
    assert not module.Expected(module.EXPECTED.read_text()).unexplained
