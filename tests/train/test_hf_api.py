"""Private names of transformers and TRL stand in one file, and what is missing there is one sentence."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.fsdp import StateDictType
from transformers import TrainingArguments

from rankfold.errors import RankfoldError
from rankfold.train import hf_api

SRC = Path(hf_api.__file__).parents[1]
LIBRARIES = ("transformers", "trl")
#: Methods of their trainers that are not for others.
STEPS = {"_run_epoch", "_save_checkpoint", "_inner_training_loop", "_prepare_dataset", "_maybe_log_save_evaluate"}


def private_names(path: Path) -> set[str]:
    """Names with a leading underscore that a file takes from transformers or TRL, and pieces that changed between releases."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    theirs: set[str] = set()  # what the file imported from them
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LIBRARIES:
            theirs |= {alias.asname or alias.name for alias in node.names}
            found |= {
                name for name in [*(node.module or "").split("."), *(a.name for a in node.names)] if name[0] == "_"
            }
        elif isinstance(node, ast.Import):
            theirs |= {a.asname or a.name for a in node.names if a.name.split(".")[0] in LIBRARIES}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            if (isinstance(root, ast.Name) and root.id in theirs) or node.attr in STEPS:
                found.add(node.attr)
        elif isinstance(node, ast.FunctionDef) and node.name in STEPS:
            found.add(node.name)
        elif isinstance(node, ast.Constant | ast.Name) and "FusedCausalLMOutput" in str(getattr(node, "id", "")):
            found.add("FusedCausalLMOutput")
    return found


def test_private_names_stand_in_one_file():
    found = {str(path.relative_to(SRC)): names for path in SRC.rglob("*.py") if (names := private_names(path))}
    assert found.pop("train/hf_api.py") >= {"_run_epoch", "_save_checkpoint"}
    assert not found


def test_what_is_missing_is_one_sentence():
    class Trainer: ...

    with pytest.raises(
        RankfoldError, match=r"^transformers 5\.\S+ has no Trainer\._run_epoch, .*'transformers>=5\.3,<6'$"
    ):
        hf_api.require("transformers", Trainer, "_run_epoch")
    with pytest.raises(RankfoldError, match=r"^trl 1\.\S+ has no SimpleNamespace\.gone, "):
        hf_api.require("trl", SimpleNamespace(), "gone")


def test_an_argument_that_is_gone_is_one_sentence(tmp_path: Path):
    with pytest.raises(RankfoldError, match=r"has no TrainingArguments\(warmup_stops=\.\.\.\), .*pip install"):
        hf_api.make_arguments(TrainingArguments, {"output_dir": str(tmp_path), "warmup_stops": 1})


def test_a_trainer_that_saves_parts_is_refused():
    def trainer(kind: str) -> Any:
        plugin = SimpleNamespace(state_dict_type=StateDictType[kind])
        return SimpleNamespace(
            is_fsdp_enabled=True, accelerator=SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
        )

    hf_api.check_saves(trainer("FULL_STATE_DICT"))
    with pytest.raises(
        RankfoldError, match=r"fsdp_state_dict_type=SHARDED_STATE_DICT .* set fsdp_state_dict_type: FULL_STATE_DICT"
    ):
        hf_api.check_saves(trainer("SHARDED_STATE_DICT"))


def test_arguments_have_the_name_that_this_release_wants(tmp_path: Path):
    made = hf_api.make_arguments(TrainingArguments, {"output_dir": str(tmp_path), "gradient_checkpointing": True})
    assert made.activation_checkpointing  # and no FutureWarning, which would be an error here


def test_the_bounds_are_those_of_the_package():
    pyproject = (SRC.parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    for package, works in hf_api.WORKS.items():
        assert f'"{works}"' in pyproject, package
