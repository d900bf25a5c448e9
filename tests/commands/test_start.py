"""What starting costs and brings: nothing heavy before a command needs it, and our methods in PEFT in whatever order."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import BertConfig, BertModel

import rankfold
from rankfold import cli, peft_version
from rankfold.catalogue import listed, listed_optimizers
from rankfold.host import registry
from rankfold.moved import MOVED
from rankfold.optim import registry as optimizers

HEAVY = ("torch", "peft", "transformers", "trl", "datasets", "pydantic", "numpy", "safetensors")
SRC = Path(rankfold.__file__).parent


def fresh(code: str, *arguments: str) -> str:
    """What a new interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_heavy_is_imported():
    """In one interpreter for all: what one of them imported would still be there at the end."""
    calls = ["--help", "--version", "version", "methods", "methods --json", "optimizers", "optimizers --json"]
    code = f"""
import contextlib, io, sys
from rankfold import cli
for call in sys.argv[1:]:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:
        cli.main(call.split())
    assert out.getvalue(), call
    assert not set({HEAVY}) & set(sys.modules), call
"""
    fresh(code, *calls, *(f"{command} --help" for command in cli.COMMANDS))


def test_the_catalogue_is_the_registry():
    ours = [m for m in registry.find() if m.config.__module__.startswith("rankfold.methods.")]
    assert [(r.name, r.title, r.paper, r.summary, r.foldable, r.config, r.module) for r in listed()] == [
        (m.name, m.title, m.paper, m.summary, m.foldable, m.config.__name__, m.config.__module__) for m in ours
    ]


def test_the_optimizers_of_the_catalogue_are_those_of_the_registry():
    ours = [r for r in optimizers.rows() if r.cls.__module__.startswith("rankfold.optim.")]
    assert [(r.name, r.title, r.paper, r.summary) for r in listed_optimizers()] == [
        (r.name, r.title, r.paper, r.summary) for r in ours
    ]


def test_methods_of_third_parties_are_listed_from_the_registry(monkeypatch: pytest.MonkeyPatch, capsys):
    entry = EntryPoint("theirs", "theirs:METHOD", "rankfold.methods")
    monkeypatch.setattr("rankfold.commands.methods.entry_points", lambda group: [entry])
    theirs = registry.Method("theirs", "Theirs", "0000.00000", "A method.", rankfold.RasaConfig, registry.Adapter)
    monkeypatch.setattr(registry, "find", lambda pattern="*": [theirs])
    assert cli.main(["methods", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == ["theirs"]


def test_the_public_names():
    assert {m.config.__name__ for m in registry.find()} | {"AdapterCallback", "Factors", "attach"} == set(
        rankfold.__all__
    )
    assert set(rankfold.__all__) <= set(dir(rankfold))
    namespace: dict[str, object] = {}
    exec("from rankfold import *\nfrom rankfold.methods import RasaConfig as same", namespace)
    assert namespace["RasaConfig"] is namespace["same"] is registry.get("rasa").config
    with pytest.raises(AttributeError, match="no attribute 'RassaConfig'"):
        rankfold.RassaConfig  # noqa: B018
    stated = (SRC / "methods" / "__init__.py").read_text()
    for m in registry.find():
        assert f"import {m.config.__name__} as {m.config.__name__}\n" in stated  # what type checkers read


def forked(codes: dict[str, str]) -> dict[str, str]:
    """What each piece of code prints, in a process that has imported torch and transformers but neither PEFT nor rankfold."""
    program = """
import contextlib, io, json, os, sys, traceback, transformers.modeling_utils, transformers.models.auto
assert not {"peft", "rankfold"} & set(sys.modules)
for name, code in json.loads(sys.argv[1]).items():
    if not (child := os.fork()):
        try:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(code, {})
            said = out.getvalue().strip()
        except BaseException:
            said = traceback.format_exc()
        print(json.dumps({name: said}), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""
    found: dict[str, str] = {}
    for line in fresh(program, json.dumps(codes)).splitlines():
        found |= json.loads(line)
    return found


KNOWN = (
    "import peft; print(sorted(t.value for t in peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING if t.startswith('RANKFOLD_')))"
)

ORDERS = {
    "peft first": "import peft, rankfold",
    "rankfold first": "import rankfold, peft",
    "a config of the host": "from rankfold.host.config import LowRankConfig",
    "a config of ours": "from rankfold import RasaConfig",
    "the trainer, which imports peft half way": "import rankfold; from transformers import TrainerCallback, Trainer, set_seed",
    "trl": "import rankfold; from trl.trainer.sft_trainer import SFTTrainer",
    "the callback": "from rankfold import AdapterCallback",
    "a controller": "from rankfold.control.controller import Controller",
    "the specification": "import rankfold, importlib.util as u; s = u.find_spec('peft'); assert s.origin.endswith('.py'), s",
    "part of peft": "import rankfold; from peft.tuners.lora import LoraLayer",
    "a reload": "import rankfold, peft, importlib; importlib.reload(peft)",
    "an import that failed": "import sys, rankfold; sys.modules['peft.auto'] = None\ntry: import peft\n"
    "except ImportError: del sys.modules['peft.auto']\nelse: assert False\n",
}


def test_methods_are_known_to_peft_whatever_is_imported_first():
    packages = {".".join(("rankfold", *p.relative_to(SRC).parts[:-1])) for p in SRC.rglob("*.py")}
    codes = {**ORDERS, **{package: f"import {package}" for package in packages}}
    known = str(sorted(f"RANKFOLD_{m.name.upper()}" for m in registry.find()))
    assert forked({name: f"{code}\n{KNOWN}" for name, code in codes.items()}) == dict.fromkeys(codes, known)


def test_an_adapter_loads_where_only_rankfold_is_imported(tmp_path: Path):
    config = BertConfig(vocab_size=5, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    BertModel(config).save_pretrained(tmp_path / "base")
    base = BertModel.from_pretrained(tmp_path / "base").eval()
    model = get_peft_model(
        base, rankfold.RasaConfig(r=2, shared_rank=1, target_modules=["query"], init_lora_weights=False)
    )
    model.eval().save_pretrained(str(tmp_path / "adapter"))
    torch.save(model, tmp_path / "whole.pt")
    show = "print(model.eval()(torch.tensor([[1, 2]])).last_hidden_state.sum().item())"
    loads = f"""
import rankfold, torch
from peft import PeftModel
from transformers import BertModel
model = PeftModel.from_pretrained(BertModel.from_pretrained({str(tmp_path / "base")!r}), {str(tmp_path / "adapter")!r})
{show}
"""
    unpickles = f"import torch; model = torch.load({str(tmp_path / 'whole.pt')!r}, weights_only=False); {show}"
    expected = str(model(torch.tensor([[1, 2]])).last_hidden_state.sum().item())
    assert forked({"loads": loads, "unpickles": unpickles}) == {"loads": expected, "unpickles": expected}


@pytest.mark.parametrize("installed", ["0.20.9", "0.22.0", "1.0"])
def test_another_peft_is_refused(installed: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peft_version, "version", lambda name: installed)
    with pytest.raises(
        ImportError, match=rf"is tested with; installed is {installed}\. Run: pip install 'peft>=0.21.0"
    ):
        peft_version.check_peft()


def test_old_names_are_the_same_modules():
    code = f"""
import importlib
for old, new in {MOVED}.items():
    module = importlib.import_module("rankfold." + old)
    assert module is importlib.import_module("rankfold." + new), old
    assert module.__name__ == module.__spec__.name == "rankfold." + new, old
from rankfold.layer import AdaptedLinear
import pickle, rankfold.host.linear_layer, rankfold.train.cache as cache
assert AdaptedLinear is rankfold.host.linear_layer.AdaptedLinear and rankfold.train.cache is cache
"""
    pickled = "import pickle; print(pickle.loads(b'crankfold.factors\\nFactors\\n.').__module__)"
    expected = {"modules": "", "pickled": "rankfold.kernel.factors"}
    assert forked({"modules": code, "pickled": pickled}) == expected
    with pytest.raises(ModuleNotFoundError, match=r"rankfold\.nothing"):
        __import__("rankfold.nothing")


def test_no_old_name_hides_a_module():
    there = {".".join(p.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__") for p in SRC.rglob("*.py")}
    assert not there & set(MOVED)
    assert set(MOVED.values()) <= there


def test_libraries_are_quiet_at_the_start_unless_debugging(tmp_path: Path):
    """What torchao, torch and transformers say while they are imported, said here by stand-ins in every machine's place."""
    (tmp_path / "torchao.py").write_text("import logging; logging.getLogger('torchao').warning('Failed to load x.so')")
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("import warnings; warnings.warn('renamed', FutureWarning)")
    (tmp_path / "transformers" / "utils.py").write_text(
        "class logging:\n  disable_progress_bar = lambda: print('no bars')\n  set_verbosity_error = lambda: print('errors')\n"
    )
    code = """
import sys, types
sys.path.insert(0, sys.argv[1])
from rankfold import cli
from rankfold.commands import validate
def run(options):
    import logging, torchao, transformers
    logging.getLogger("torch.utils._pytree").warning("deprecated")
validate.run = run
cli.main(["validate", "x.yaml", *sys.argv[2:]])
"""
    for arguments, out, err in (
        ([], "no bars\nerrors\n", []),
        (["--debug"], "", ["Failed to load", "renamed", "deprecated"]),
    ):
        command = [sys.executable, "-c", code, str(tmp_path), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout == out
        assert all(line in done.stderr for line in err)
        assert err or not done.stderr
