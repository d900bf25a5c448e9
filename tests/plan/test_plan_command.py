"""`rankfold plan` without GeLoRA: table, JSON, run file sections, and wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from shapes import LLAMA_8B, folder

from rankfold import cli
from rankfold.runfile.load import parse


@pytest.fixture
def llama(tmp_path: Path) -> str:
    return str(folder(tmp_path / "llama", "llama"))


def run(*arguments: str) -> int:
    return cli.main(["plan", *arguments])


def test_the_table_fits(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--model", llama, "--budget-of", "lora:r=8") == 0
    out = capsys.readouterr().out
    assert all(len(line) <= 100 for line in out.splitlines()[2:])
    assert "…" not in out
    rows = {line[:14].strip(): line for line in out.splitlines()}
    assert rows["lora"].endswith("100.0%")
    assert "r 7, k 1" in rows["rasa"]
    assert "Conv1D" not in out
    assert "# lora" not in out  # run file sections are for methods that were named


def test_json_and_run_file(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["rasa", "peft:dora:r=4", "peft:adalora", "cora:approach=2"]
    assert run("--model", llama, "--task", "causal-lm", "--json", "--budget", "10k", "--method", *names) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["budget"] == 10_000
    assert [m["label"] for m in plan["methods"]] == ["rasa", "peft:dora", "peft:adalora", "cora"]
    for found in plan["methods"]:
        assert found["share"] == found["trained"] / 10_000
        section = yaml.safe_load(found["run_file"])["method"]
        assert section["name"] in ("rasa", "peft:lora", "peft:adalora", "cora")
        if section["name"] != "cora":  # whose basis is not there
            parse({"model": llama, "task": "causal-lm", "data": "x", "output": "y", "method": section})
    rasa, dora, *_ = plan["methods"]
    assert rasa["serve"]["vllm"] == f"--max-lora-rank {rasa['serve']['rank']}"
    assert "dense" in dora["no_fold"]


def test_named_methods_come_with_their_section(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--model", llama, "--method", "rasa:shared_rank=2", "--targets", "q_proj,v_proj", "--r", "4") == 0
    out = capsys.readouterr().out
    section = yaml.safe_load(out[out.index("\nmethod:") :])["method"]
    assert section == {"name": "rasa", "target_modules": ["q_proj", "v_proj"], "shared_rank": 2, "r": 4}


def test_a_method_that_cannot_run_is_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--model", str(folder(tmp_path, "gpt2")), "--method", "lora", "peft:loha") == 0
    assert "peft:loha: LoHaConfig: Target module of type" in " ".join(capsys.readouterr().out.split())


def test_heads_of_a_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = str(folder(tmp_path, "bert"))
    assert run("--model", where, "--task", "classification", "--labels", "5", "--method", "lora", "--json") == 0
    assert json.loads(capsys.readouterr().out)["methods"][0]["head"] == 5 * 32 + 5


def test_a_model_of_eight_billion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    assert run("--model", str(tmp_path), "--json", "--method", "lora", "rasa", "--budget-of", "peft:lora:r=8") == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["base"]["parameters"], plan["base"]["bytes"]) == (8_030_261_248, 16_060_522_496)
    assert plan["budget"] == plan["methods"][0]["trained"] == 20_971_520
    # 32 layers: seven of eight ranks private or pooled, and gates of 6 + 32 · 1 in each of 224 matrices
    assert plan["methods"][1]["trained"] == 20_971_520 * 7 // 8 + 224 * 38


BAD = {
    "no method can meet the budget of 3 parameters": ["--budget", "3"],
    "--budget 'much' is not a number": ["--budget", "much"],
    "method='rassa' is not known; did you mean 'rasa'?": ["--method", "rassa"],
    "has no field 'rank'": ["--method", "lora:rank=3"],
    "must look like field=value": ["--budget-of", "lora:8"],
    "r=0": ["--budget-of", "lora:r=0"],
    "contradict": ["--budget", "1M", "--r", "4"],
    "--r 0": ["--r", "0"],
    "--labels 0 must be an integer > 0": ["--labels", "0"],
    "--targets names no module": ["--targets", ","],
    "target_modules=[1 is not valid YAML: expected": ["--method", "lora:target_modules=[1"],
    "target_modules='(' is not a valid regular expression": ["--method", "lora:target_modules=("],
    "method='' is not known": ["--budget-of", ""],
    "--budget '' is not a number": ["--budget", ""],
    "no method can run on this model": ["--targets", "nowhere"],
    "--data is of --method gelora": ["--data", "x"],
    "give --data": ["--method", "gelora"],
    "--r is not of --method gelora": ["--method", "gelora", "--data", "x", "--r", "4"],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_line(message: str, llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--model", llama, *BAD[message]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--model", str(tmp_path)) == 1
    assert "has no config.json" in capsys.readouterr().err
