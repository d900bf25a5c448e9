"""Training runs on tiny models: what they leave behind, how they resume, and how they fail."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from tiny import sentiment, write_jsonl
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BartModel,
    Trainer,
    TrainerCallback,
)

from rankfold.errors import RankfoldError
from rankfold.io.models import ModelError
from rankfold.runfile.load import parse
from rankfold.tasks import classification as classification_module
from rankfold.tasks.chats import turns, turns_by_difference
from rankfold.tasks.rows import DataError
from rankfold.train import run as run_module
from rankfold.train.checkpoints import last_whole, what_is_damaged
from rankfold.train.folder import FolderError, SaveError
from rankfold.train.metrics import read_metrics
from rankfold.train.prepare import make_plan, prepare
from rankfold.train.profiler import PARTS, Profile
from rankfold.train.run import train
from rankfold.train.trainers import CarefulTrainer, DivergedError

Values = dict[str, Any]


def change(values: Values, *overrides: str):
    return parse(values, overrides)


def silent(sentence: str) -> None:
    pass


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# --- what a run leaves behind -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("pictures")
def test_classification(classification: Values, tmp_path: Path):
    run = change(classification, "training.metric=macro_f1")
    said: list[str] = []
    result = train(run, command="rankfold train run.yaml", say=said.append)

    folder = tmp_path / "run"
    assert {p.name for p in folder.iterdir()} == {
        "adapter", "checkpoints", "run.yaml", "rows.json", "metrics.jsonl", "result.json", "metrics.png", "metrics.svg",
    }  # fmt: skip
    assert json.loads((folder / "result.json").read_text())["after"] == result.after
    assert result.measured_on == "test"
    assert result.before.keys() == result.after.keys() == {"loss", "accuracy", "macro_f1"}
    assert result.after["accuracy"] == 1.0
    assert result.after["loss"] < result.before["loss"]
    assert (result.steps, result.labels) == (8, ["neg", "pos"])

    # the budget is that of the file
    tensors = weights(folder / "adapter")
    assert result.stored == sum(t.numel() for t in tensors.values()) == result.trainable == result.adapter + result.head
    assert result.head == 2 * 16 + 2

    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 9))
    assert [row["step"] for row in rows if "eval_macro_f1" in row] == [2, 4, 6, 8]
    assert [row["step"] for row in rows if "test_loss" in row] == [0, 8]

    card = (folder / "adapter" / "README.md").read_text()
    for part in ("RaSA", "arXiv 2503.12576", f"{result.trainable:,}", "32 train, 8 validation, 8 test", "transformers 5",
                 "rankfold train run.yaml", "neg, pos", f"| accuracy | {result.before['accuracy']:.4f} | 1.0000 |"):  # fmt: skip
        assert part in card
    assert not list(folder.rglob(".*"))
    assert not (folder / "adapter" / "training_args.bin").exists()


def test_the_saved_adapter_is_what_was_measured(classification: Values, tmp_path: Path):
    run = change(classification)
    result = train(run, say=silent)
    base = AutoModelForSequenceClassification.from_pretrained(run.model.name, num_labels=2)
    model = PeftModel.from_pretrained(base, str(result.adapter_path)).eval()
    prepared = prepare(run)
    test = prepared.rows["test"]
    inputs = prepared.processor(test["text"][:], return_tensors="pt", padding=True)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(**inputs).logits, torch.tensor(test["label"][:]))
    assert loss.item() == pytest.approx(result.after["loss"], rel=1e-5)


def test_the_adapter_names_the_revision_it_was_trained_on(classification: Values):
    run = change(classification, "model.revision=v2", "training.max_steps=1", "training.epochs=null")
    adapter = train(run, say=silent).adapter_path  # a folder has no revisions, and transformers reads it all the same
    assert PeftConfig.from_pretrained(str(adapter)).revision == "v2"
    assert f"from_pretrained({run.model.name!r}, revision='v2', id2label=" in (adapter / "README.md").read_text()


def test_the_plan_is_what_happens(classification: Values, language_model: Values):
    for values in (classification, language_model):
        run = change(values, "training.gradient_accumulation=2")
        plan = make_plan(prepare(run))
        result = train(run, overwrite=True, say=silent)
        assert not Path(run.output, "plan").exists()
        b = plan.budget
        assert (b.adapter, b.head, b.base + b.trainable) == (result.adapter, result.head, result.total)
        assert plan.steps == result.steps
        if run.task == "classification":  # whole epochs, so the tokens are exact too
            assert plan.tokens == read_metrics(Path(run.output, "metrics.jsonl"))[-1]["tokens"]
        assert any(heading == "memory" and "optimiser" in text for heading, text in plan.lines())


def test_the_plan_writes_nothing(classification: Values, tmp_path: Path):
    make_plan(prepare(change(classification)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [[], ["data.loss_on=all"], ["data.packing=true"], ["training.precision=bf16"]])
def test_language_model(language_model: Values, options: list[str]):
    run = change(language_model, *options)
    result = train(run, say=silent)
    assert result.measured_on == "validation"
    assert result.after["loss"] < result.before["loss"]
    assert result.after.keys() == {"loss", "token_accuracy"}
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(run.model.name), str(result.adapter_path))
    assert isinstance(model, PeftModel)


def test_packing_leaves_the_measured_rows_apart(language_model: Values):
    counts: list[int] = []

    def look(trainer: CarefulTrainer, split: str, rows: Any) -> dict[str, float]:
        metrics = run_module.evaluate(trainer, split, rows)
        counts.append(len(trainer.row_scores["loss"].items) - len(rows))
        return metrics

    options = ["training.max_steps=1", "training.evaluate_every=1"]
    packed = train(change(language_model, *options, "data.packing=true"), measure=look, say=silent)
    apart = train(change(language_model, *options), measure=look, overwrite=True, say=silent)
    assert counts == [0, 0, 0, 0]
    assert packed.before == apart.before


def test_the_loss_is_on_the_completion_only(language_model: Values):
    """The same completions behind other prompts of the same length: the loss cannot tell unless it sees the prompt."""
    result = train(change(language_model, "training.learning_rate=1e-12"), say=silent)
    whole = train(
        change(language_model, "training.learning_rate=1e-12", "data.loss_on=all"), overwrite=True, say=silent
    )
    assert result.before["loss"] != pytest.approx(whole.before["loss"], rel=1e-3)


CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated in `SFTTrainer`")
@pytest.mark.parametrize("task", ["classification", "language_model"])
def test_the_loss_of_rows_is_not_smoothed(task: str, request: pytest.FixtureRequest):
    """The trainer makes a smoothed loss itself, of other outputs, and keeps the labels from the model."""
    values = request.getfixturevalue(task)
    plain, smooth = (
        train(change(values, "training.epochs=null", "training.max_steps=1", extra), say=silent, overwrite=True)
        for extra in ("training.extra={}", "training.extra={label_smoothing_factor: 0.2}")
    )
    assert smooth.before == plain.before


@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated in `SFTTrainer`")
def test_a_smoothed_loss_is_trained(language_model: Values):
    """Of all tokens of a step's batches, as long as they are: 1 - e of the labels' loss and e of the mean over all words."""
    options = ["training.max_steps=1", "training.gradient_accumulation=12", "training.batch_size=2"]
    run = change(language_model, *options, "training.extra={label_smoothing_factor: 0.2}")
    train(run, say=silent)
    (loss,) = [row["loss"] for row in read_metrics(Path(run.output, "metrics.jsonl")) if "loss" in row]
    rows = prepare(run).encoded["train"].rows
    assert len(rows) <= 24  # one step sees them all
    base = AutoModelForCausalLM.from_pretrained(run.model.name)
    parts = []
    for row in rows:
        labels = torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            found = base(torch.tensor([row["input_ids"]])).logits[0, :-1].double().log_softmax(-1)[labels != -100]
        own = found.gather(1, labels[labels != -100, None])[:, 0]
        parts.append(-0.8 * own - 0.2 * found.mean(1))
    assert len({len(part) for part in parts}) > 1
    assert loss == pytest.approx(float(torch.cat(parts).mean()), rel=1e-5)


def test_chat(language_model: Values, llama: Path, tmp_path: Path):
    """The assistant's turns alone are learnt, whether the template marks them (TRL) or not (ours)."""
    chats = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}] * 2 for i in range(16)]
    path = write_jsonl(tmp_path / "chats.jsonl", [{"messages": chat} for chat in chats])
    plain = tmp_path / "plain"
    shutil.copytree(llama, plain)
    (plain / "chat_template.jinja").write_text(
        CHATML.replace("m['content'] + eos_token", "m['content'] + (eos_token if m['role'] == 'assistant' else '')")
    )
    options = [f"data={path}", "data.validation=0.3", "training.max_steps=2"]
    marked = train(change(language_model, *options), say=silent)
    unmarked = train(change(language_model, *options, f"model={plain}"), overwrite=True, say=silent)
    assert unmarked.before == marked.before  # the same labels
    everything = train(change(language_model, *options, "data.loss_on=all"), overwrite=True, say=silent)
    assert everything.before["loss"] != pytest.approx(marked.before["loss"], rel=1e-4)


def test_labels_of_a_chat(llama: Path):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = CHATML
    chat = [
        {"role": role, "content": text}
        for role, text in (("user", "a"), ("assistant", "bc"), ("user", "d"), ("assistant", "e"))
    ]
    ids, learnt = turns(tokenizer)(chat)  # the template has no marks
    assert (ids, learnt) == turns_by_difference(chat, tokenizer)
    assert tokenizer.decode([token for token, yes in zip(ids, learnt, strict=True) if yes]) == "bc</s>e</s>"
    assert tokenizer.decode(ids) == "<|user|>a</s><|assistant|>bc</s><|user|>d</s><|assistant|>e</s>"
    tokenizer.chat_template = "{{ messages | length }}" + CHATML
    with pytest.raises(DataError, match=r"rewrites earlier turns.*data\.loss_on: all"):
        turns(tokenizer)(chat)


def test_nothing_is_held_out(language_model: Values, tmp_path: Path):
    result = train(change(language_model, "data.validation=null", "training.max_steps=1"), say=silent)
    assert result.measured_on == ""
    assert result.before == result.after == {}
    assert "No rows were held out" in (result.adapter_path / "README.md").read_text()


def test_text(language_model: Values, tmp_path: Path):
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": f"line {i}"} for i in range(16)])
    said: list[str] = []
    train(change(language_model, f"data={path}", "data.max_length=5", "training.max_steps=1"), say=said.append)
    assert any("16 of 16 rows are longer than 5 tokens" in sentence for sentence in said)


@pytest.mark.filterwarnings("ignore:.*LoRA tensor.* have invalid shape")  # PEFT takes AdaLoRA's rank 0 for an error
def test_peft_methods(language_model: Values, tmp_path: Path):
    assert train(change(language_model, "method={name: 'peft:lora', r: 2}"), say=silent).adapter == 2 * 2 * 2 * (
        16 + 12
    )
    adalora = "method={name: 'peft:adalora', init_r: 4, target_r: 1, tinit: 1, tfinal: 1, deltaT: 1, total_step: 4}"
    train(change(language_model, adalora), overwrite=True, say=silent)
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["rank_pattern"]  # its schedule ran, which PEFT leaves to the caller


def test_a_scheduled_method_of_ours(classification: Values, tmp_path: Path):
    from rankfold.host import registry

    scheduled = [method.name for method in registry.METHODS.values() if method.controller]
    assert scheduled
    short = {"delta_lora": ", start_step: 2", "rac_lora": ", links: 2"}  # whose defaults are meant for longer runs
    for name in scheduled:
        train(
            change(classification, f"method={{name: {name}, r: 12, target_modules: all-linear{short.get(name, '')}}}"),
            overwrite=True,
            say=silent,
        )


def test_what_a_chain_trains_at_a_time_and_what_it_keeps(language_model: Values):
    """Apart in the result, and so in a comparison: its columns "trained" and "kept"."""
    from rankfold.compare.trial_process import _ranks

    run = change(language_model, "method={name: cola, r: 2, links: 2, links_limit: 100}")
    result = train(run, say=silent)
    pair = 2 * 2 * 2 * (16 + 12)
    assert (result.adapter, result.trainable, result.stored) == (pair, pair, 2 * pair)
    assert _ranks(result.adapter_path, {})["kept"] == 2 * pair


def test_seeds(classification: Values, tmp_path: Path):
    runs = [train(change(classification, f"training.seed={seed}", f"output={tmp_path / name}"), say=silent)
            for seed, name in ((0, "a"), (0, "b"), (1, "c"))]  # fmt: skip
    a, b, c = (weights(run.adapter_path) for run in runs)
    assert same(a, b)
    assert not same(a, c)


def test_early_stopping_and_the_best_checkpoint(classification: Values):
    options = [
        "training.epochs=10",
        "training.early_stopping=2",
        "training.evaluate_every=1",
        "training.learning_rate=0.03",
    ]
    result = train(change(classification, *options), say=silent)
    assert result.steps < 40
    assert result.best_step is not None
    assert result.best_step <= result.steps - 2
    rows = read_metrics(Path(result.output, "metrics.jsonl"))
    scores = {row["step"]: row["eval_accuracy"] for row in rows if "eval_accuracy" in row}
    assert scores[result.best_step] == max(scores.values())
    with pytest.raises(DataError, match="early_stopping needs validation rows"):
        train(
            change(classification, *options, f"data={Path(classification['data']['source'], 'train.jsonl')}"),
            overwrite=True,
        )


def test_an_evaluation_keeps_no_hidden_states(classification: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An encoder and decoder give them with their classes: a gigabyte for two thousand rows of 128 tokens and width 1,024."""
    tokenizer = AutoTokenizer.from_pretrained(classification["model"])
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {end[0]}", special_tokens=[end])
    tokenizer.save_pretrained(tmp_path / "bart")
    sizes: dict[str, Any] = {
        f"{part}_{of}": 2 for part in ("encoder", "decoder") for of in ("layers", "attention_heads", "ffn_dim")
    }
    marks: dict[str, Any] = {f"{which}_token_id": 1 for which in ("bos", "eos", "decoder_start", "forced_eos")} | {
        "pad_token_id": 0
    }
    BartModel(BartConfig(vocab_size=len(tokenizer), d_model=16, **sizes, **marks)).save_pretrained(tmp_path / "bart")
    kept: list[tuple[int, ...]] = []

    def metrics(prediction: Any) -> dict[str, float]:
        kept.append(prediction.predictions.shape)
        return made(prediction)

    made = classification_module._metrics
    monkeypatch.setattr(classification_module, "_metrics", metrics)
    run = change(classification, f"model={tmp_path / 'bart'}", "training.max_steps=1", "training.epochs=null")
    assert train(run, say=silent).after.keys() == {"loss", "accuracy", "macro_f1"}
    assert set(kept) == {(8,)}


def test_a_language_model_classifies(classification: Values, llama: Path):
    result = train(change(classification, f"model={llama}"), say=silent)
    assert result.head == 2 * 16
    with pytest.raises(ModelError, match="lacks weights of a language model"):
        train(change(classification, "task=causal-lm", "training.epochs=1"), overwrite=True, say=silent)


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_what_a_model_was_for_before_does_not_matter(classification: Values, tmp_path: Path, problem: str):
    folder = tmp_path / "before"
    shutil.copytree(classification["model"], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"problem_type": problem}))
    options = ["training.epochs=null", "training.max_steps=2"]
    result = train(change(classification, f"model={folder}", *options), say=silent)
    assert result.after == train(change(classification, *options, f"output={tmp_path / 'plain'}"), say=silent).after


def test_a_head_with_another_name_is_trained(classification: Values, tmp_path: Path):
    """PEFT knows `classifier` and `score`; DistilBERT's pre_classifier would stay random for ever."""
    from transformers import DistilBertConfig, DistilBertModel

    folder = tmp_path / "distilbert"
    shutil.copytree(classification["model"], folder)
    (folder / "model.safetensors").unlink()
    config = DistilBertConfig(vocab_size=300, dim=16, hidden_dim=32, n_layers=1, n_heads=2, max_position_embeddings=64)
    DistilBertModel(config).save_pretrained(folder)
    run = change(classification, f"model={folder}")
    plan, result = make_plan(prepare(run)), train(run, say=silent)
    assert result.head == plan.budget.head == (16 * 16 + 16) + (2 * 16 + 2)
    assert any("pre_classifier" in key for key in weights(result.adapter_path))


# --- killed and resumed -------------------------------------------------------------------------------------------------


class Kill(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def killed(run: Any, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(*args: Any, **kwargs: Any) -> CarefulTrainer:
        trainer = original(*args, **kwargs)
        trainer.add_callback(Kill(step))
        return trainer

    original = run_module.make_trainer
    monkeypatch.setattr(run_module, "make_trainer", make)
    with pytest.raises(KeyboardInterrupt):
        train(run, say=silent)
    monkeypatch.setattr(run_module, "make_trainer", original)


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("classification", {}),
        ("classification", {"early_stopping": 2, "evaluate_every": 1, "metric": "loss", "learning_rate": 0.5}),
        ("language_model", {"gradient_accumulation": 2}),
    ],
)
def test_killed_and_resumed_is_bit_identical(
    task: str, options: Values, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    values = request.getfixturevalue(task)
    values["training"].update(options)
    whole = train(change(values, f"output={tmp_path / 'whole'}"), say=silent)
    run = change(values)
    killed(run, 3, monkeypatch)
    said: list[str] = []
    result = train(run, resume=True, say=said.append)
    assert any("resuming from" in s and "checkpoint-2" in s for s in said)
    assert result.steps == whole.steps
    assert same(weights(result.adapter_path), weights(whole.adapter_path))
    assert (result.before, result.after) == (whole.before, whole.after)
    drop = ("grad_norm", "tokens")  # of the log alone
    logs = [
        [{k: v for k, v in row.items() if k not in drop} for row in read_metrics(Path(r.output, "metrics.jsonl"))]
        for r in (result, whole)
    ]
    assert logs[0] == logs[1]


def test_resume_skips_what_is_half_written(classification: Values, tmp_path: Path, monkeypatch):
    run = change(classification, "training.keep_checkpoints=5")
    killed(run, 7, monkeypatch)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert last_whole(checkpoints) == (checkpoints / "checkpoint-6", [])
    (checkpoints / "checkpoint-6" / "trainer_state.json").unlink()
    (checkpoints / "checkpoint-4" / "optimizer.pt").write_bytes(
        (checkpoints / "checkpoint-4" / "optimizer.pt").read_bytes()[:-100]
    )
    said: list[str] = []
    train(run, resume=True, say=said.append)
    assert "checkpoint-6 is incomplete: trainer_state.json is missing" in said
    assert "checkpoint-4 is incomplete: optimizer.pt is cut off" in said
    assert any("checkpoint-2" in s and "resuming" in s for s in said)


def test_damaged_checkpoints(classification: Values, tmp_path: Path):
    train(change(classification), say=silent)
    whole = tmp_path / "run" / "checkpoints" / "checkpoint-8"
    assert what_is_damaged(whole) is None

    def damaged(change: Any) -> str:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy)
        change(copy)
        return what_is_damaged(copy) or ""

    file = "adapter_model.safetensors"
    assert "is cut off or foreign" in damaged(lambda c: (c / file).write_bytes((c / file).read_bytes()[:-10]))
    assert "is cut off or foreign" in damaged(lambda c: (c / file).write_bytes(b"GIF89a of another program"))
    nan = {key: t * math.nan for key, t in weights(whole).items()}
    assert "holds NaN" in damaged(lambda c: save_file(nan, c / file))
    assert "trainer_state.json is cut off" in damaged(lambda c: (c / "trainer_state.json").write_text('{"epoch": 1.'))
    assert "rng_state.pth is missing" in damaged(lambda c: (c / "rng_state.pth").unlink())
    assert "optimizer.pt is missing" in damaged(lambda c: (c / "optimizer.pt").unlink())
    assert not damaged(lambda c: (c / "optimizer.pt").rename(c / "optimizer.bin"))  # as FSDP writes it


def test_resume_without_a_checkpoint_starts(classification: Values):
    said: list[str] = []
    assert train(change(classification), resume=True, say=said.append).steps == 8
    assert any("starting at step 0" in s for s in said)


def test_a_finished_run_resumes_to_the_same(classification: Values):
    first = train(change(classification), say=silent)
    again = train(change(classification), resume=True, say=silent)
    assert (again.steps, again.after, again.before) == (first.steps, first.after, first.before)
    assert train(change(classification, "training.epochs=3"), resume=True, say=silent).steps == 12


def test_another_run_is_not_resumed(classification: Values, tmp_path: Path):
    train(change(classification, "training.max_steps=1", "training.epochs=null"), say=silent)
    with pytest.raises(FolderError, match=r"is another one: method\.r was 2, is 3\. Undo the change"):
        train(change(classification, "method.r=3"), resume=True, say=silent)
    (tmp_path / "run" / "run.yaml").write_text("model: [")
    with pytest.raises(FolderError, match="is damaged"):
        train(change(classification), resume=True, say=silent)


# --- refused, with nothing written --------------------------------------------------------------------------------------


def test_output_folders(classification: Values, tmp_path: Path):
    folder = tmp_path / "run"
    folder.mkdir()
    run = change(classification, "training.max_steps=1", "training.epochs=null")
    train(run, say=silent)  # an empty folder is fine
    with pytest.raises(FolderError, match=r"exists and is not empty .* --resume, replace with --overwrite"):
        train(run, say=silent)
    with pytest.raises(FolderError, match="use one of the two"):
        train(run, resume=True, overwrite=True, say=silent)
    (folder / "notes.txt").write_text("mine")
    train(run, overwrite=True, say=silent)
    assert (folder / "notes.txt").read_text() == "mine"
    other = tmp_path / "home"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    with pytest.raises(FolderError, match="does not look like the folder of a run"):
        train(change(classification, f"output={other}"), overwrite=True, say=silent)
    with pytest.raises(FolderError, match=r"has no run\.yaml, so there is no run in it to resume"):
        train(change(classification, f"output={other}"), resume=True, say=silent)
    with pytest.raises(FolderError, match="is a file"):
        train(change(classification, f"output={other / 'thesis.tex'}"), say=silent)


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        (
            "model=/no/such/folder",
            ModelError,
            "'/no/such/folder' is neither a folder with a saved model nor a GGUF file",
        ),
        ("model=all-minilm-l6", ModelError, "did you mean 'all-minilm-l6-v2'?"),
        (
            "method={name: rasa, target_modules: [qurey]}",
            ModelError,
            "no module of the model is called 'qurey'; did you mean 'query'",
        ),
        ("data.columns.label=stars", DataError, "train has no column 'stars' for the label"),
        ("data.max_length=100", DataError, "data.max_length: 100 tokens do not fit the model, which takes 64"),
        (
            "training.extra={dataloader_prefetch_factor: 2}",
            RankfoldError,
            "training: --dataloader_prefetch_factor can only be set",
        ),
    ],
)
def test_bad_input(classification: Values, tmp_path: Path, override: str, error: type, message: str):
    with pytest.raises(error, match=message):
        train(change(classification, override), say=silent)
    assert not (tmp_path / "run").exists()


def test_damaged_models(classification: Values, tmp_path: Path):
    model = tmp_path / "model"

    def attempt() -> str:
        with pytest.raises(ModelError) as error:
            train(change(classification, f"model={model}"), say=silent)
        assert not (tmp_path / "run").exists()
        return str(error.value)

    model.mkdir()
    assert "has no config.json" in attempt()
    shutil.copytree(classification["model"], model, dirs_exist_ok=True)
    good = load_file(model / "model.safetensors")
    save_file({**good, "encoder.layer.0.attention.self.query.weight": torch.full((16, 16), math.nan)},
              model / "model.safetensors", {"format": "pt"})  # fmt: skip
    assert "holds NaN or infinite numbers in bert.encoder.layer.0.attention.self.query.weight" in attempt()
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-100])
    assert "cannot be read" in attempt()
    (tmp_path / "no.gguf").write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match="is not a GGUF file"):
        train(change(classification, f"model={tmp_path / 'no.gguf'}"), say=silent)


# --- failing half-way ---------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_the_run(classification: Values, tmp_path: Path):
    with pytest.raises(
        DivergedError, match=r"the loss is (nan|inf) at step \d+; lower training.learning_rate \(now 1e\+30\)"
    ):
        train(change(classification, "training.learning_rate=1e30", "training.max_grad_norm=0"), say=silent)
    assert not (tmp_path / "run" / "adapter").exists()


def full_disk(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_disk_full_at_a_checkpoint(classification: Values, tmp_path: Path, monkeypatch):
    original = Trainer._save_rng_state
    monkeypatch.setattr(Trainer, "_save_rng_state", full_disk)
    with pytest.raises(
        SaveError, match=r"cannot save .*checkpoint-2: .*No space left on device; make room and continue with"
    ):
        train(change(classification), say=silent)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    monkeypatch.setattr(Trainer, "_save_rng_state", original)
    assert train(change(classification), resume=True, say=silent).steps == 8


def test_disk_full_at_the_end(classification: Values, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(run_module, "model_card", full_disk)
    with pytest.raises(SaveError, match=r"cannot save .*adapter: .*No space left"):
        train(change(classification), say=silent)
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"checkpoints", "run.yaml", "rows.json", "metrics.jsonl"}
    monkeypatch.undo()
    assert train(change(classification), resume=True, say=silent).after["accuracy"] == 1.0


# --- several processes --------------------------------------------------------------------------------------------------


# Adam divides rounding by rounding where a gradient is nearly 0; plain descent shows a wrong scale at once.
SGD = ["training.optimizer=sgd", "training.learning_rate=0.3", "training.max_grad_norm=0"]


@pytest.mark.slow
def test_two_processes_train_as_one(classification: Values, language_model: Values, tmp_path: Path):
    """One launch for both tasks, since to start it takes longer than they do."""
    options = ["method.lora_dropout=0.0", *SGD]
    options += ["data.max_train=12", "training.epochs=null", "training.max_steps=3"]  # 12: every batch is full
    tasks = {"classification": classification, "language_model": language_model}
    for task, values in tasks.items():
        two = change(values, *options, f"output={tmp_path / task}", "training.batch_size=2")
        (tmp_path / f"{task}.yaml").write_text(two.to_yaml())
    (tmp_path / "both.py").write_text(
        "import sys\nfrom rankfold.cli import main\nsys.exit(any([main(['train', file]) for file in sys.argv[1:]]))\n"
    )
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", str(tmp_path / "both.py"), *(str(tmp_path / f"{task}.yaml") for task in tasks),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rows before training") == len(tasks)  # one process speaks
    for task, values in tasks.items():
        result = json.loads((tmp_path / task / "result.json").read_text())
        alone = train(
            change(values, *options, f"output={tmp_path / 'one' / task}", "training.batch_size=4"), say=silent
        )
        assert result["steps"] == alone.steps
        if task == "classification":  # TRL takes the mean over batches, which are of another size here
            assert result["after"] == pytest.approx(alone.after, rel=1e-4)
        a, b = weights(alone.adapter_path), weights(tmp_path / task / "adapter")
        assert all(torch.allclose(a[key], b[key], atol=1e-5) for key in a)


def test_rows_that_are_too_few(classification: Values, tmp_path: Path):
    path = write_jsonl(tmp_path / "two.jsonl", sentiment(2))
    assert train(change(classification, f"data={path}"), say=silent).steps == 2


def test_accumulated_and_checkpointed_gradients_are_the_same(classification: Values, tmp_path: Path):
    options = ["method.lora_dropout=0.0", *SGD]
    variants = {
        "a": [],
        "b": ["training.batch_size=4", "training.gradient_accumulation=2"],
        "c": ["training.gradient_checkpointing=true"],
    }
    a, b, c = (
        weights(train(change(classification, *options, *more, f"output={tmp_path / name}"), say=silent).adapter_path)
        for name, more in variants.items()
    )
    assert all(torch.allclose(a[key], b[key], atol=1e-4) for key in a)
    assert all(torch.allclose(a[key], c[key], atol=1e-6) for key in a)


def test_a_profile_says_where_the_time_went(language_model: Values):
    run = change(language_model, "training.max_steps=7")
    train(run, callbacks=[Profile(Path(run.output))], say=silent)
    page = Path(run.output, "profile.txt").read_text()
    assert "where the time of 3 steps went" in page
    found = json.loads(Path(run.output, "profile.json").read_text())
    assert found["shares"].keys() == {*PARTS, "all else"}
    assert all(0 < share < 1 for share in found["shares"].values())
    assert abs(sum(found["shares"].values()) - 1) < 1e-6
    assert json.loads(Path(run.output, "profile-trace.json").read_text())["traceEvents"]
