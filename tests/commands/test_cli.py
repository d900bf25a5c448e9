"""The command line, in this process: what each command prints and with which status it ends."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
import types
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import SafetensorError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import rankfold
from rankfold import cli
from rankfold.errors import RankfoldError
from rankfold.fold.options import STRICT


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run file for a random BERT and eight rows."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    words = ["<pad>", "</s>", "good", "bad", "film"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="film"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="film", model_max_length=16
    ).save_pretrained(tmp_path / "bert")
    torch.manual_seed(0)
    config = BertConfig(vocab_size=5, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    BertModel(config).save_pretrained(tmp_path / "bert")
    rows = [{"text": f"{w} film", "label": w} for w in ("good", "bad")] * 4
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "model": str(tmp_path / "bert"),
        "task": "classification",
        "data": str(tmp_path / "rows.jsonl"),
        "method": {"name": "rasa", "r": 2, "shared_rank": 1, "target_modules": ["query", "value"]},
        "training": {"epochs": 1, "batch_size": 4, "log_every": 1},
        "output": str(tmp_path / "run"),
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_train_resume_and_refuse(run_file: Path, capsys: pytest.CaptureFixture[str]):
    output = run_file.with_name("run")
    assert cli.main(["train", str(run_file), "--dry-run"]) == 0
    assert "nothing was trained" in capsys.readouterr().out
    assert not output.exists()

    assert cli.main(["train", str(run_file), "training.learning_rate=1e-3"]) == 0
    captured = capsys.readouterr()
    assert "peak memory" in captured.out
    assert "step 2/2: loss" in captured.err
    assert yaml.safe_load((output / "run.yaml").read_text())["training"]["learning_rate"] == 1e-3

    assert cli.main(["train", str(run_file)]) == 1
    assert capsys.readouterr().err.startswith("error: output: the folder")
    assert cli.main(["train", str(run_file), "--resume"]) == 1  # another learning rate
    assert cli.main(["train", str(run_file), "training.learning_rate=1e-3", "--resume"]) == 0
    assert cli.main(["train", str(run_file), "--overwrite"]) == 0


def test_errors_are_one_line_and_status_1(run_file: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["validate", str(run_file)]) == 0
    assert "is valid: rasa on" in capsys.readouterr().out
    assert cli.main(["validate", str(run_file), "method.r=0"]) == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [captured.err.strip()]
    assert captured.err.startswith("error: command line: method.r: ")
    assert cli.main(["validate", str(run_file.with_name("none.yaml"))]) == 1
    assert "`rankfold init" in capsys.readouterr().err
    with pytest.raises(ValueError):
        cli.main(["validate", str(run_file), "method.r=0", "--debug"])


@pytest.mark.parametrize(
    ("file", "command", "said"),
    [
        ("benchmarks/evidence-vowels.yaml", "compare", "5 contenders on all-minilm-l6-v2"),
        ("examples/continual.yaml", "continual", "for 5 tasks of image-classification"),
    ],
)
def test_files_of_other_commands(file: str, command: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(Path(__file__).parents[2] / file)
    assert cli.main(["validate", path]) == 0
    assert said in capsys.readouterr().out
    for other in {"train", "compare", "continual"} - {command}:
        assert cli.main([other, path]) == 1
        assert f"is a file for `rankfold {command}`, and `rankfold {other}` cannot" in capsys.readouterr().err


def test_bugs_show_their_traceback(monkeypatch: pytest.MonkeyPatch, run_file: Path):
    monkeypatch.setattr("rankfold.runfile.load.load", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["validate", str(run_file)])


@pytest.mark.parametrize(
    "bug", [ValueError("ours"), TypeError("ours"), ModuleNotFoundError("no rankfold.x", name="rankfold.x")]
)
def test_a_bug_of_whatever_class_shows_its_traceback(bug: Exception, monkeypatch: pytest.MonkeyPatch, run_file: Path):
    def fail(*a):
        raise bug

    monkeypatch.setattr("rankfold.runfile.load.load", fail)
    with pytest.raises(type(bug), match=str(bug)):
        cli.main(["validate", str(run_file)])


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (RankfoldError("r=0 must be > 0"), "r=0 must be > 0"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), "CUDA out of memory"),
        (SafetensorError("invalid header"), "invalid header"),
        (
            ModuleNotFoundError("no", name="pydantic"),
            "this needs the package 'pydantic': pip install 'rankfold[train]'",
        ),
        (ModuleNotFoundError("no", name="gguf"), "this needs the package 'gguf': pip install 'rankfold[gguf]'"),
        (ImportError("this tokenizer needs sentencepiece"), "this tokenizer needs sentencepiece"),
    ],
)
def test_what_is_expected_is_one_sentence(error: Exception, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys):
    def fail(*a):
        raise error

    monkeypatch.setattr("rankfold.runfile.load.read_values", fail)
    assert cli.main(["validate", "run.yaml"]) == 1
    assert capsys.readouterr().err == f"error: {sentence}\n"


def test_every_extra_is_named_for_its_packages():
    """By the name that is imported, which differs for three of them."""
    about = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    imported = {"pyyaml": "yaml", "scikit-learn": "sklearn", "pillow": "PIL"}
    stated = {}
    for extra in ("train", "gguf", "onnx", "ray"):
        names = (re.split(r"[\[<>=]", package)[0] for package in about[extra])
        stated |= {imported.get(name, name): extra for name in names if name != "rankfold"}
    assert stated == cli.EXTRAS


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "x.yaml", "--overwrite", "training.max_steps=5", "--dry-run", "training.seed=1"],
        ["train", "--overwrite", "--dry-run", "x.yaml", "training.max_steps=5", "training.seed=1"],
        ["validate", "x.yaml", "training.max_steps=5", "--debug", "training.seed=1"],
        ["sparsify", "x.yaml", "--last", "1e-3", "training.max_steps=5", "--stages", "3", "training.seed=1"],
        ["compare", "x.yaml", "--workers", "2", "training.max_steps=5", "--dry-run", "training.seed=1"],
    ],
    ids=" ".join,
)
def test_flags_and_overrides_in_any_order(arguments: list[str], monkeypatch: pytest.MonkeyPatch):
    given = []
    monkeypatch.setattr(f"rankfold.commands.{arguments[0]}.run", lambda options: given.append(options) or 0)
    assert cli.main(arguments) == 0
    (options,) = given
    assert options.overrides == ["training.max_steps=5", "training.seed=1"]
    assert "x.yaml" in (getattr(options, "run_file", None), getattr(options, "compare_file", None))
    assert [getattr(options, f) for f in ("overwrite", "debug", "stages", "workers") if f"--{f}" in arguments] in (
        [True], [3], [2],
    )  # fmt: skip


def test_an_interrupt_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, run_file: Path, capsys):
    def interrupt(*a):
        raise KeyboardInterrupt

    monkeypatch.setattr("rankfold.runfile.load.load", interrupt)
    assert cli.main(["train", str(run_file)]) == 130
    assert "--resume" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train"], ["init", "--task", "regression"], ["fold", "a"]])
def test_wrong_usage_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 2
    assert "usage: rankfold" in capsys.readouterr().err


def test_methods(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["methods", "ras*", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["name"], row["paper"], row["foldable"], row["config"]) == ("rasa", "2503.12576", True, "RasaConfig")
    assert cli.main(["methods"]) == 0
    listed = capsys.readouterr().out
    assert "rasa" in listed
    assert "lora" in listed
    assert cli.main(["methods", "zzz*"]) == 1
    assert "no method matches 'zzz*'" in capsys.readouterr().err
    assert cli.main(["methods", "zzz*", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == []


def test_optimizers(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["optimizers"]) == 0
    listed = capsys.readouterr().out
    assert "lora_rite" in listed
    assert "2410.20625" in listed
    assert cli.main(["optimizers", "lora_pro"]) == 0
    assert "x_mode" in capsys.readouterr().out
    assert cli.main(["optimizers", "lora_plus", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert {o["name"]: o["default"] for o in row["options"]}["ratio"] == 16.0
    assert cli.main(["optimizers", "lora_por"]) == 1
    assert "no optimizer is called 'lora_por'; did you mean 'lora_pro'?" in capsys.readouterr().err


def test_init(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "new.yaml"
    assert cli.main(["init", str(path), "--task", "causal-lm", "--method", "lora"]) == 0
    assert cli.main(["validate", str(path)]) == 0
    assert "training.learning_rate is 0.002, a first rate for this method and scale" in capsys.readouterr().out
    assert "learning_rate: 0.002" in path.read_text()
    assert cli.main(["init", str(path)]) == 1
    assert "exists; give another name or --force" in capsys.readouterr().err
    assert cli.main(["init", str(path), "--force"]) == 0
    assert cli.main(["init", str(tmp_path / "x.yaml"), "--method", "raza"]) == 1
    assert "did you mean 'rasa'?" in capsys.readouterr().err
    assert not (tmp_path / "x.yaml").exists()


def test_version(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit:
        cli.main(["--version"])
    assert (exit.value.code, capsys.readouterr().out) == (0, f"rankfold {rankfold.__version__}\n")
    assert version("rankfold") == rankfold.__version__
    assert cli.main(["version"]) == 0
    assert "peft 0." in capsys.readouterr().out


def test_fold_is_called_with_its_options(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    calls = []

    def fold_adapter(adapter, out, **options):
        calls.append((adapter, out, options))
        return types.SimpleNamespace(summary=lambda: "folded")

    monkeypatch.setattr("rankfold.fold.fold_adapter", fold_adapter, raising=False)
    assert cli.main(["fold", "a", "-o", "b", "--dtype", "bfloat16", "--no-probe", "--rank", "8", "--strict"]) == 0
    [(adapter, out, options)] = calls
    assert (adapter, out) == ("a", "b")
    expected = {"base": None, "profile": "uniform", "dtype": "bfloat16", "pad": "serve", "probe": False, "force": False}
    compression = {"rank": 8, "error": None, "calibration": None, "strict": STRICT}
    assert options.items() >= {**expected, **compression, "progress": True}.items()
    assert capsys.readouterr().out == "folded\n"


def test_it_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "rankfold", "--help"], capture_output=True, text=True, check=True)
    assert "fold an adapter into a plain LoRA" in done.stdout
