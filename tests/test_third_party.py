"""The method of CONTRIBUTING.md in a file of a user's own, through every command, with no edit in the package.

One process runs it all: it imports the libraries once and forks for each command, so that none knows what another imported.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

import rankfold

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(Path(__file__).parent / "train"))
from tiny import byte_tokenizer, write_jsonl  # noqa: E402

COMMANDS = """
import json, os, sys
import datasets, trl, rankfold.train.run, rankfold.commands.compare, rankfold.fold, rankfold.inspect, rankfold.plan.costs
from rankfold.cli import main

for command in json.load(open("commands.json")):
    print("$", *command, flush=True)
    child = os.fork()
    if child == 0:
        code = main(command)
        sys.stdout.flush()
        os._exit(code)
    print("=", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def user_s_file(folder: Path) -> None:
    """my_method.py: the first block of CONTRIBUTING.md, and a method with a budget over the whole model."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (scaled, *_) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    budget = """
from rankfold.methods.gated import BudgetConfig


@dataclass
class ShrinkingConfig(BudgetConfig):
    method: ClassVar[str] = "shrinking"


class Shrinking(Scaled):
    pass


register(Method("shrinking", "Shrinking LoRA", "none", "Ranks that should fall.", ShrinkingConfig, Shrinking))
"""
    (folder / "my_method.py").write_text(scaled + budget)


def model_and_rows(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, **tokens, max_position_embeddings=64)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": f"{i} plus {i} is", "completion": f" {2 * i}"} for i in range(30)]
    write_jsonl(folder / "sums.jsonl", rows)


def run_commands(folder: Path, commands: list[list[str]]) -> tuple[str, list[int]]:
    (folder / "elsewhere/commands.json").write_text(json.dumps(commands))
    source = str(Path(rankfold.__file__).parents[1])
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache"), "PYTHONPATH": source}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMMANDS],
        cwd=folder / "elsewhere",
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    return done.stdout, [int(code) for code in re.findall(r"^= (-?\d+)$", done.stdout, re.M)]


def test_a_user_s_method_goes_through_every_command(tmp_path: Path) -> None:
    user_s_file(tmp_path)
    model_and_rows(tmp_path)
    run = {
        "model": "../model",
        "task": "causal-lm",
        "imports": ["my_method.py"],  # beside the run file
        "data": {"train": "../sums.jsonl", "validation": 0.2, "test": 0.2},
        "method": {"name": "scaled", "r": 2, "target_modules": ["q_proj", "v_proj"]},
        "training": {"max_steps": 2, "batch_size": 4, "evaluate_every": 1},
        "output": "run",
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    keys = ("model", "task", "data", "imports")
    both = {"methods": ["scaled", "shrinking"], "budget": 1200, "rates": [1e-3], "seeds": [0], "output": "compared"}
    training = {"training": {"max_steps": 1, "batch_size": 4}}
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump({key: run[key] for key in keys} | both | training))
    (tmp_path / "elsewhere" / "written").mkdir(parents=True)
    of_mine = ["--import", "../my_method.py"]
    commands = {
        "validate": ["validate", "../run.yaml"],
        "init": ["init", "written/run.yaml", "--method", "scaled", "--task", "causal-lm", *of_mine],
        "validate what init wrote": ["validate", "written/run.yaml"],
        "plan": ["plan", "--model", "../model", "--method", "scaled", "shrinking", "--r", "4", *of_mine],
        "plan, budget": [
            "plan",
            "--model",
            "../model",
            "--budget",
            "2000",
            "--json",
            "--method",
            "scaled",
            "shrinking",
            *of_mine,
        ],
        "train": ["train", "../run.yaml"],
        "train, again": ["train", "../run.yaml", "--resume"],
        "compare, dry": ["compare", "../compare.yaml", "--dry-run"],
        "compare": ["compare", "../compare.yaml", "methods=[shrinking]"],
        "fold": ["fold", "run/adapter", "-o", "folded", *of_mine],
        "inspect": ["inspect", "run/adapter", *of_mine],
        "doctor": ["doctor", "folded", "--engine", "vllm,peft", *of_mine],
        "methods": ["methods", "s[ch]*", *of_mine],
        "fold, nothing imported": ["fold", "run/adapter", "-o", "refused"],
        "inspect, nothing imported": ["inspect", "run/adapter"],
        "train, nothing imported": ["train", "../run.yaml", "imports=[]"],
        "train, no such file": ["train", "../run.yaml", "imports=[gone.py]"],
    }
    out, codes = run_commands(tmp_path, list(commands.values()))
    assert len(codes) == len(commands), out
    assert dict(zip(commands, codes, strict=True)) == {name: int(i > 12) for i, name in enumerate(commands)}, out

    said = dict(zip(commands, re.split(r"^\$ .*$", out, flags=re.M)[1:], strict=True))
    assert re.search(r"shrinking +r 6 to 4", said["plan"])
    assert re.search(r"^scaled .*\n(.*\n)*shrinking ", said["methods"], re.M)
    plan = json.loads(said["plan, budget"].split("\n= ")[0])
    assert [row["label"] for row in plan["methods"]] == ["scaled", "shrinking"]
    assert all(1400 < row["trained"] <= 2000 for row in plan["methods"])
    written = yaml.safe_load((tmp_path / "elsewhere" / "run" / "run.yaml").read_text())
    assert written["imports"] == [str(tmp_path / "my_method.py")]
    assert "import my_method  # makes Scaled LoRA known" in (tmp_path / "elsewhere/run/adapter/README.md").read_text()
    trials = [json.loads(line) for line in (tmp_path / "elsewhere/compared/trials.jsonl").read_text().splitlines()]
    assert [(t["method"], t["status"]) for t in trials] == [("shrinking", "done")], out
    assert 700 < trials[0]["parameters"]["trained"] <= 1200
    assert "2 trials of at most 1 steps" in said["compare, dry"]
    assert (tmp_path / "elsewhere/folded/fold_report.json").is_file()
    for command in ("fold", "inspect"):
        assert (
            "peft_type='RANKFOLD_SCALED' is of the method 'scaled', which is not registered here"
            in (said[f"{command}, nothing imported"])
        )
    assert "method.name: method='scaled' is not known" in said["train, nothing imported"]
    assert f"imports.0: '{tmp_path}/gone.py' cannot be imported (there is no file" in said["train, no such file"]
    assert out.count("Traceback") == 0
