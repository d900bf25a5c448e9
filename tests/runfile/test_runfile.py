"""The run file: what is read, what is refused, and where the message points."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rankfold.compare.file import load as load_comparison
from rankfold.compare.file import parse as parse_comparison
from rankfold.continual.file import load as load_continual
from rankfold.continual.file import parse as parse_continual
from rankfold.runfile.load import load, parse
from rankfold.runfile.problems import RunFileError
from rankfold.runfile.template import template
from rankfold.runfile.yaml import YamlError, read, write

GOOD = """\
model: all-minilm-l6-v2
task: classification
data: {source: movie-reviews}
method: {name: rasa, r: 8, shared_rank: 1, lora_alpha: 16, target_modules: all-linear}
training:
  learning_rate: 1e-3
  epochs: 1
  batch_size: 16
output: runs/movie-rasa
"""


def load_text(tmp_path: Path, text: str, *overrides: str):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return load(path, overrides)


def complaints(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(RunFileError) as error:
        load_text(tmp_path, text, *overrides)
    return str(error.value).replace(str(tmp_path) + "/", "").splitlines()


def test_the_short_form_is_read(tmp_path):
    run = load_text(tmp_path, GOOD)
    assert run.model.name == "all-minilm-l6-v2"
    assert run.data.source == "movie-reviews"
    assert run.method.fields == {"r": 8, "shared_rank": 1, "lora_alpha": 16, "target_modules": "all-linear"}
    assert run.training.learning_rate == 1e-3
    assert run.metric == "accuracy"


def test_yaml_1_2_scalars():
    values, lines = read("a: 1e-3\nb: [no, yes, 010, 1:30, 2024-01-01]\nc: {d: ~, e: true}\n")
    assert values == {"a": 1e-3, "b": ["no", "yes", 10, "1:30", "2024-01-01"], "c": {"d": None, "e": True}}
    assert lines["c", "e"] == 3
    assert lines["b", 1] == 2


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\na: 2", 2),
        ("a: [1", 1),
        ("a: b: c", 1),
        ("x:\n  y: 1\n z: 2", 3),
        ("\ta: 1", 1),
        ("x: 1\na: &a\n  b: [*a]", 2),
    ],
)
def test_broken_yaml_has_a_line(text, line):
    with pytest.raises(YamlError) as error:
        read(text)
    assert error.value.line == line


def test_every_problem_at_once_with_line_path_value_and_nearest(tmp_path):
    text = GOOD.replace("learning_rate", "learning_rat").replace("batch_size: 16", "batch_size: 0")
    text = text.replace("task: classification", "task: clasification").replace("epochs: 1", "epochs: yes")
    assert complaints(tmp_path, text + "trainin: {}\n") == [
        "run.yaml:2: task: 'clasification' is not one of 'causal-lm', 'classification', 'image-classification', 'preference', "
        "'token-classification'; did you mean 'classification'?",
        "run.yaml:6: training.learning_rat: unknown key (value 0.001); did you mean 'learning_rate'?",
        "run.yaml:7: training.epochs: 'yes' is not a number or null",
        "run.yaml:8: training.batch_size: 0 is not allowed, should be greater than 0",
        "run.yaml:10: trainin: unknown key (value {}); did you mean 'training'?; "
        "known keys: data, imports, method, model, output, task, training",
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: rasa", "name: raza", "run.yaml:4: method.name: method='raza' is not known; did you mean 'rasa'?"),
        ("name: rasa", "name: peft:lor", "run.yaml:4: method.name: PEFT has no method 'lor'; did you mean 'peft:lora'?"),
        ("shared_rank: 1", "shared_rnk: 1", "did you mean 'shared_rank'?"),
        ("shared_rank: 1", "shared_rank: 9", "run.yaml:4: method.shared_rank: "),
        ("r: 8,", "r: eight,", "run.yaml:4: method.r: 'eight' is not a whole number"),
        ("r: 8,", "r: 0,", "run.yaml:4: method.r: "),
        ("r: 8,", "r: 8, task_type: CAUSAL_LM,", "method.task_type: is set by the run itself; remove it"),
        ("epochs: 1", "epochs: 1\n  max_steps: 5", "training.max_steps: 5 contradicts epochs: 1; give one of the two"),
        ("epochs: 1", "schedule: cosin", "run.yaml:7: training.schedule: unknown schedule 'cosin'; did you mean 'cosine'?"),
        (
            "epochs: 1", "schedule: cosine_with_min_lr", "training.schedule: 'cosine_with_min_lr' needs more: One of min_lr or min_lr_rate"
        ),
        ("epochs: 1", "schedule: warmup_stable_decay", "'num_decay_steps'; give it in extra: {lr_scheduler_kwargs: {...}}"),
        ("epochs: 1", "optimizer: adamw", "training.optimizer: unknown optimizer 'adamw'; did you mean 'adamw_torch'"),
        ("epochs: 1", "metric: f1", "training.metric: 'f1' is not a metric of classification; known: accuracy, loss, macro_f1"),
        ("epochs: 1", "metric: token_accuracy", "training.metric: 'token_accuracy' is not a metric of classification"),
        ("epochs: 1", "evaluate_every: often", "training.evaluate_every: 'often' is not a whole number or 'epoch'"),
        ("epochs: 1", "evaluate_every: 0", "training.evaluate_every: 0 is not allowed, should be greater than 0"),
        ("epochs: 1", "report_to: [tensorbord]", "unknown tracker 'tensorbord'; did you mean 'tensorboard'?"),
        ("epochs: 1", "report_to: clearml", "training.report_to: the tracker 'clearml' is not installed"),
        ("epochs: 1", "extra: {neftune_noise: 5}", "TrainingArguments has no argument 'neftune_noise'; did you mean"),
        ("epochs: 1", "extra: {bf16: true}", "training.extra: 'bf16' follows from the run file's own fields; use those"),
        ("batch_size: 16", "batch_size: true", "run.yaml:8: training.batch_size: True is not a whole number"),
        ("{source: movie-reviews}", "{}", "run.yaml:3: data: needs source"),
        ("movie-reviews}", "movie-reviews, validation: 1.5}", "data.validation: 1.5 is not a share of the training rows"),
        ("movie-reviews}", "movie-reviews, validation: 0.5, test: 0.5}", "together leave no row to train on"),
        ("movie-reviews}", "movie-reviews, packing: true}", "data.packing: means nothing for classification; remove it"),
        ("movie-reviews}", "movie-reviews, columns: {txt: a}}", "run.yaml:3: data.columns.txt: unknown key"),
        ("movie-reviews}", "movie-reviews, labels: [1.5]}", "run.yaml:3: data.labels"),
        ("output: runs/movie-rasa", "", "run.yaml:1: output: required but missing: Folder of this run"),
        ("model: all-minilm-l6-v2", "model: [a]", "run.yaml:1: model: ['a'] is not a mapping with the keys name"),
    ],
)  # fmt: skip
def test_one_clear_line(tmp_path, old, new, message):
    assert old in GOOD
    (line,) = complaints(tmp_path, GOOD.replace(old, new))
    assert message in line


def test_a_schedule_with_what_it_needs(tmp_path):
    schedule = "schedule: cosine_with_min_lr\n  extra: {lr_scheduler_kwargs: {min_lr: 1e-6}}"
    assert load_text(tmp_path, GOOD.replace("epochs: 1", schedule)).training.schedule == "cosine_with_min_lr"


@pytest.mark.parametrize(
    ("task", "extra", "fix"),
    [("preference", "", "use label_smoothing"), ("causal-lm", ", loss_type: dft", "remove it, or loss_type: dft")],
)
def test_smoothing_that_the_trainer_would_not_read(tmp_path, task, extra, fix):
    text = GOOD.replace("task: classification", f"task: {task}")
    (line,) = complaints(tmp_path, text.replace("epochs: 1", f"extra: {{label_smoothing_factor: 0.1{extra}}}"))
    assert line == f"run.yaml:7: training.extra: 'label_smoothing_factor' would not be read; {fix}"
    load_text(tmp_path, text.replace("epochs: 1", "extra: {label_smoothing_factor: 0.0}"))


def test_syntax_error_empty_file_and_missing_file(tmp_path):
    assert complaints(tmp_path, "model: a\ndata: [\n")[0].startswith("run.yaml:3: not valid YAML")
    assert complaints(tmp_path, "")[0].startswith("run.yaml: must be a mapping with the keys model, task")
    assert complaints(tmp_path, "- 1")[0].startswith("run.yaml:1: must be a mapping")
    with pytest.raises(FileNotFoundError, match="rankfold init"):
        load(tmp_path / "none.yaml")


def test_a_section_with_every_key_commented_out(tmp_path):
    text = GOOD.replace("  learning_rate: 1e-3\n  epochs: 1\n  batch_size: 16\n", "  #epochs: 1\n")
    assert load_text(tmp_path, text).training.batch_size == 16
    assert load_text(tmp_path, text, "training.batch_size=2").training.batch_size == 2


def test_overrides(tmp_path):
    run = load_text(
        tmp_path, GOOD, "training.learning_rate=5e-4", "method.r=4", "data.columns.text=review", "model.dtype=bfloat16"
    )
    assert run.training.learning_rate == 5e-4
    assert run.method.fields["r"] == 4
    assert run.data.columns.text == "review"
    assert (run.model.name, run.model.dtype) == ("all-minilm-l6-v2", "bfloat16")
    assert load_text(tmp_path, GOOD, "method=lora").method.fields == {}  # a section is replaced whole
    assert load_text(tmp_path, GOOD, "method.shared_rank=null").method.fields["shared_rank"] is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.seed=x", "command line: training.seed: 'x' is not a whole number"),
        (
            "training.seed=4294967296",
            "command line: training.seed: 4294967296 is not allowed, should be less than 4294967296",
        ),
        ("training.lr=1", "command line: training.lr: unknown key (value 1)"),
        ("seed", "command line: override 'seed' must look like training.seed=1"),
        ("output.name=x", "command line: output.name: 'output' holds 'runs/movie-rasa', not a section"),
        ("training.seed=[", "command line: training.seed: not valid YAML"),
    ],
)
def test_bad_overrides(tmp_path, override, message):
    (line,) = complaints(tmp_path, GOOD, override)
    assert line.startswith(message)


def test_peft_methods_and_their_patterns(tmp_path):
    text = GOOD.replace("name: rasa", "name: peft:lora").replace("shared_rank: 1", "init_lora_weights: pissa_niter_4")
    assert load_text(tmp_path, text).method.fields["init_lora_weights"] == "pissa_niter_4"
    assert "'peft:lora' has no such field" in complaints(tmp_path, text.replace("init_lora_weights", "init_weights"))[0]


def test_the_copy_of_a_run_means_the_same(tmp_path):
    run = load_text(tmp_path, GOOD, "training.early_stopping=2", "training.extra={adam_beta2: 0.99}")
    assert load_text(tmp_path, run.to_yaml()).model_dump() == run.model_dump() | {
        "training": run.training.model_dump() | {"epochs": 1.0}
    }


LOOKS_LIKE = [
    "08",
    "1e3",
    "+5",
    "1.",
    ".5",
    "5e-1",
    "-.inf",
    "~",
    "null",
    "True",
    "",
    "no",
    "1:30",
    "2024-01-01",
    "0x1f",
    "a: b",
]


def test_text_that_looks_like_something_else_reads_back_as_text():
    values = {"words": LOOKS_LIKE, "keys": {word: word for word in LOOKS_LIKE}, "rest": [8, 1000.0, 1e-5, True, None]}
    text = write(values, "rankfold train 'run.yaml'\n'training.seed=1'")
    assert read(text)[0] == yaml.safe_load(text) == values  # for readers of YAML 1.1 too


@pytest.mark.parametrize("labels", [["08", "09"], ["1e3", "2e3"]])
def test_every_copy_has_the_labels_and_the_nulls_that_were_given(tmp_path, labels):
    method = {"name": "peft:fourierft", "random_loc_seed": None}  # 777 by default
    shared = {"model": "m", "task": "classification", "data": {"source": "d", "labels": labels}, "output": "o"}
    run = parse({**shared, "method": method})
    tasks = parse_continual({**shared, "method": method, "split": {"parts": 2}})
    comparison = parse_comparison({**shared, "methods": [method], "seeds": [0]})
    assert run.method.fields == {"random_loc_seed": None}
    for file, loaded in ((run, load), (tasks, load_continual), (comparison, load_comparison)):
        path = tmp_path / "copy.yaml"
        path.write_text(file.to_yaml())
        assert loaded(path).model_dump() == file.model_dump()
    assert tasks.run_file(1, tasks.data).method.fields == {"random_loc_seed": None}


def test_parse_leaves_the_callers_values_alone():
    values = {"model": "m", "task": "causal-lm", "data": "d", "method": "lora", "output": "o"}
    before = dict(values)
    assert parse(values, ["training.seed=3", "data.packing=true"]).training.seed == 3
    assert values == before


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
@pytest.mark.parametrize("method", ["rasa", "lora", "peft:lora", "peft:adalora"])
def test_the_written_run_file_is_valid(tmp_path, task, method):
    overrides = ["method.total_step=100"] if method == "peft:adalora" else []
    run = load_text(tmp_path, template(task, method), *overrides)
    assert (run.task, run.method.name) == (task, method)


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_every_default_in_the_written_file_is_valid(tmp_path, task):
    text = template(task, "rasa").replace("  #", "  ")
    lines = [line for line in text.splitlines() if not line.startswith("   ") and not line.lstrip().startswith("# ")]
    kept = "\n".join(line for line in lines if ":" in line and not line.rstrip().endswith(": null"))
    # max_steps and epochs exclude each other, and loss_on and packing are for one task only: their defaults are harmless.
    assert load_text(tmp_path, kept).task == task


@pytest.mark.parametrize(
    "example", sorted(Path(__file__).parents[2].glob("examples/*.yaml")), ids=lambda path: path.name
)
def test_examples_are_valid(example):
    text = example.read_text()
    (load_comparison if "methods:" in text else load_continual if "split:" in text else load)(example)


@pytest.mark.parametrize("name", ["adalora", "dynamic_dora"])
def test_a_starter_file_of_a_budget_method_prunes(tmp_path, name):
    method = load_text(tmp_path, template("causal-lm", name)).method
    assert method.config.r == 12  # pyright: ignore[reportAttributeAccessIssue]
    assert method.config.target_r == 8  # pyright: ignore[reportAttributeAccessIssue]


def test_a_folder_in_place_of_a_run_file(tmp_path):
    with pytest.raises(RunFileError, match="is a folder; name a file"):
        load(tmp_path)
    (tmp_path / "run.yaml").write_text(GOOD)
    with pytest.raises(RunFileError, match=rf"is a folder; name the file in it: {tmp_path}/run\.yaml"):
        load(tmp_path)
