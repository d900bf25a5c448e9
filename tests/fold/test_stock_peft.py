"""Folds in an environment that has PEFT and transformers but no rankfold: not imported, not importable, not installed."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rankfold import SoraConfig
from rankfold.fold import fold_adapter
from rankfold.io.cache import cache_root

TOKENS = torch.arange(5, 21)[None]

SCRIPT = """
import importlib.metadata, importlib.util, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

assert importlib.util.find_spec("rankfold") is None, "rankfold can be imported"
assert "rankfold" not in {d.name for d in importlib.metadata.distributions()}, "rankfold is installed"
base, tokens, expected, *folds = sys.argv[1:]
expected, tokens = torch.load(expected), torch.load(tokens)
for fold in folds:
    if fold.endswith("merged"):
        model = AutoModelForCausalLM.from_pretrained(fold)
    else:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), fold)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(tokens).logits, expected, rtol=1e-5, atol=1e-5)
assert not any(name.split(".")[0] == "rankfold" for name in sys.modules)
print(len(folds), "folds agree")
"""


@pytest.fixture(scope="module")
def stock_python() -> Path:
    """The interpreter of a virtual environment with this one's packages, rankfold excepted; made once and kept.

    The packages are links to those installed here: the versions are those under test and nothing is downloaded. A path
    file would not do, for rankfold's metadata lie in the same folder.
    """
    here = Path(sysconfig.get_path("purelib"))
    packages = sorted(p for p in here.iterdir() if "rankfold" not in p.name.lower() and p.suffix != ".pth")
    key = hashlib.sha256("\n".join([sys.executable, *map(str, packages)]).encode()).hexdigest()[:16]
    target = cache_root() / "environments" / f"stock-peft-{key}"
    python = target / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if python.exists():
        return python
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=target.parent))
        venv.EnvBuilder(with_pip=False, symlinks=os.name != "nt").create(work)
        site = work / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
        for package in packages:
            (site / package.name).symlink_to(package)
        try:
            work.rename(target)
        except OSError:  # another process was faster
            shutil.rmtree(work)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        pytest.skip(f"a virtual environment of links cannot be made here: {error}")
    return python


@pytest.mark.slow
def test_every_fold_that_peft_reads_loads_where_rankfold_is_not(stock_python: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(base)
    sora = SoraConfig(
        target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False, allow_unscheduled=True
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), sora).eval()
    with torch.no_grad():
        for i, gate in enumerate(p for n, p in model.named_parameters() if n.endswith("gate")):
            gate[: i % 9] = 0
        torch.save(model(TOKENS).logits, tmp_path / "logits.pt")
    torch.save(TOKENS, tmp_path / "tokens.pt")
    model.save_pretrained(tmp_path / "adapter")
    folds = ("uniform", "compact", "merged")
    for profile in folds:
        fold_adapter(tmp_path / "adapter", tmp_path / profile, profile=profile, probe=False)
    command = [
        str(stock_python),
        "-I",
        "-c",
        SCRIPT,
        str(base),
        str(tmp_path / "tokens.pt"),
        str(tmp_path / "logits.pt"),
    ]
    done = subprocess.run(
        [*command, *(str(tmp_path / p) for p in folds)], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "3 folds agree"
