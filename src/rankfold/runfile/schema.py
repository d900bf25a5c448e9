"""The run file: one YAML that says which model, task, data, method and training, checked before anything heavy starts.

Every field has a description; `rankfold init` writes a commented file from them. What is wrong is reported all at once,
one line per problem: file, line, path of the field, its value, what is allowed and the nearest valid name.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from rankfold.errors import short
from rankfold.runfile import methods
from rankfold.runfile.imports import DESCRIPTION as IMPORTS
from rankfold.runfile.problems import one_of
from rankfold.runfile.yaml import write
from rankfold.tasks import table
from rankfold.tasks.table import TASKS

if TYPE_CHECKING:
    from peft import PeftConfig


def _known_task(name: str) -> str:
    if name not in TASKS:
        raise ValueError(f"{short(name)} is not {one_of(name, TASKS)}")
    return name


TaskName = Annotated[str, AfterValidator(_known_task)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # numpy takes no larger one


class Section(BaseModel):
    """A part of the run file: unknown keys and values of another type are errors, and nothing changes once it is read."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Model(Section):
    name: str = Field(description="A bundled name, a local folder, a GGUF file, or a hub id.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub model.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Type of the frozen weights in memory; auto keeps the type they are stored in."
    )
    attention: str | None = Field(
        default=None,
        description="Attention implementation (sdpa, eager, flash_attention_2, ...); null lets transformers choose.",
    )
    trust_remote_code: bool = Field(default=False, description="Run Python code that comes with a hub model.")
    adapters: list[str] = Field(
        default=[],
        description="Adapter folders whose updates, and heads, are merged into the frozen weights in this order before the run's "
        "own adapter is added. It needs weights of float32.",
    )


class Columns(BaseModel):
    """What the columns of the rows are called: those of all tasks, by what we call them."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    __pydantic_extra__: dict[str, str] = Field(init=False)

    @model_validator(mode="before")
    @classmethod
    def _as_we_call_them(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return table.columns() | {role: column for role, column in given.items() if column is not None}

    @property
    def names(self) -> dict[str, str]:
        """Our name → the run file's; optional columns only where it names them."""
        return dict(self.__pydantic_extra__ or {})


class Data(Section):
    source: str | None = Field(
        default=None,
        description="A bundled name, a JSONL, CSV or Parquet file, a folder with train.jsonl (...) or with a folder of images for "
        "each class, or a datasets name.",
    )
    subset: str | None = Field(default=None, description="Configuration of a `datasets` name that has several.")
    train: str | None = Field(
        default=None, description="A file, or a split of the source. By default the split 'train'."
    )
    validation: str | float | None = Field(
        default=None,
        description="A file, a split of the source, or a share of the training rows to hold out (0.1). By default the "
        "split 'validation' if there is one. It chooses the best checkpoint.",
    )
    test: str | float | None = Field(
        default=None,
        description="As validation; by default the split 'test' if there is one. Only measured before and after.",
    )
    columns: Columns = Field(
        default=Columns(), description="What your columns are called, where they differ: {text: review}."
    )
    labels: list[str | int] | None = Field(
        default=None,
        description="The classes in order of their index. By default those of the training rows: in the order of the model's head "
        "if it knows these classes, else sorted.",
    )
    classes: list[str | int] | None = Field(
        default=None,
        min_length=1,
        description="Keep only the rows of these classes; labels still says which the head has.",
    )
    max_length: int | None = Field(
        default=None,
        gt=0,
        description="Longest text in tokens; the rest is cut off and counted. By default "
        + " or ".join(f"{task.max_length} ({task.name})" for task in TASKS.values() if task.max_length)
        + ", or what the model can take if that is less.",
    )
    max_train: int | None = Field(default=None, gt=0, description="Train on at most so many rows, drawn with the seed.")
    max_validation: int | None = Field(default=None, gt=0, description="Validate on at most so many rows.")
    max_test: int | None = Field(default=None, gt=0, description="Test on at most so many rows.")
    seed: int | None = Field(
        default=None, ge=0, description="Draws the shares and the max_... rows; by default training.seed."
    )
    loss_on: Literal["completion", "all"] = Field(
        default="completion",
        description="causal-lm: learn the completion (or the assistant's turns) only, or every token.",
    )
    packing: bool = Field(default=False, description="causal-lm: fill rows of max_length with several examples.")


class Method(BaseModel):
    """The method's name; the fields of its config beside it are checked against the config class itself."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    name: str = Field(
        description="A method of `rankfold methods`, or peft:NAME for one of PEFT's own, such as peft:lora."
    )

    @model_serializer(mode="wrap")
    def _with_nulls(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # exclude_none leaves out defaults; of a config's field, null need not be one.
        return plain(self) | {key: value for key, value in self.fields.items() if value is None}

    @property
    def fields(self) -> dict[str, Any]:
        """The config's fields that the run file sets."""
        return dict(self.__pydantic_extra__ or {})

    @cached_property
    def config(self) -> PeftConfig:
        """The PEFT config that name and fields make, built once; copy it before you change it.

        Raises:
            RankfoldError: no such method. ValueError, TypeError: a value that the config class refuses.
        """
        return methods.config_class(self.name)(**methods.preset(self.name) | self.fields)


class Training(Section):
    epochs: float | None = Field(
        default=None, gt=0, description="Passes over the training rows; 3 unless max_steps is given."
    )
    max_steps: int | None = Field(default=None, gt=0, description="Optimiser steps, instead of epochs.")
    batch_size: int = Field(default=16, gt=0, description="Rows per step and device.")
    gradient_accumulation: int = Field(default=1, gt=0, description="Batches gathered before each optimiser step.")
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations: less memory, about a third slower."
    )
    learning_rate: float = Field(default=2e-4, gt=0, description="Peak learning rate.")
    schedule: str = Field(
        default="linear", description="Learning-rate schedule: linear, cosine, constant, ... (transformers' names)."
    )
    warmup: float = Field(
        default=0.0, ge=0, description="Warm-up: below 1 a share of all steps, from 1 on a number of steps."
    )
    optimizer: str = Field(
        default="adamw_torch",
        description="Optimiser, by its name in transformers or `rankfold optimizers` (lora_plus, lora_rite, ...).",
    )
    optimizer_options: dict[str, Any] = Field(
        default={},
        description="Options of an optimiser of `rankfold optimizers`, as in {ratio: 16}; `rankfold optimizers NAME` lists them.",
    )
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled weight decay.")
    max_grad_norm: float | None = Field(
        default=None,
        ge=0,
        description="Gradients are clipped to this norm; 0 turns clipping off. By default 1, and 0 for lora_rite and lora_pro (mode sgd "
        "excepted), whose steps it would distort.",
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="Type of the computation: fp32, or autocast to bf16 or fp16."
    )
    start_from: str | None = Field(
        default=None, description="An adapter folder of the same method and shapes whose weights the run starts from."
    )
    seed: Seed = Field(default=0, description="Seed of the new weights, the order of the rows and dropout.")
    deterministic: bool = Field(
        default=False, description="Only deterministic kernels: repeatable to the bit, slower on a GPU."
    )
    evaluate_every: int | Literal["epoch"] = Field(
        default="epoch", description="Validate and save a checkpoint every so many steps, or after every epoch."
    )
    eval_batch_size: int | None = Field(
        default=None, gt=0, description="Rows per batch in evaluation; by default batch_size."
    )
    metric: str | None = Field(
        default=None,
        description="Chooses the best checkpoint. "
        + "; ".join(f"{task.name}: {', '.join(task.metrics)}" for task in TASKS.values())
        + ".",
    )
    keep_best: bool | None = Field(
        default=None,
        description="End with the best checkpoint on validation instead of the last one. By default yes, but no for a "
        "method that chooses its ranks on a schedule: the best may be from before they were chosen.",
    )
    early_stopping: int | None = Field(
        default=None, gt=0, description="Stop after so many evaluations in a row without a better metric."
    )
    keep_checkpoints: int = Field(default=2, gt=0, description="Checkpoints kept on disk (the best one always is).")
    log_every: int = Field(default=10, gt=0, description="Steps between two lines of metrics.jsonl.")
    report_to: str | list[str] = Field(
        default="none", description="Also report to tensorboard, wandb, trackio, mlflow, ... (what transformers knows)."
    )
    extra: dict[str, Any] = Field(
        default={},
        description="Any further argument of transformers' TrainingArguments (causal-lm: TRL's SFTConfig; preference: its DPOConfig).",
    )


class RunFile(Section):
    """One training run. Build it with `load` (from a file) or `parse` (from a dictionary) of load.py."""

    model: Model = Field(description="The pretrained model; its name alone is enough.")
    task: TaskName = Field(description=" or ".join(f"{task.name} ({task.summary})" for task in TASKS.values()) + ".")
    data: Data = Field(description="The rows; the source's name alone is enough.")
    method: Method = Field(description="The adapter; its name alone is enough.")
    training: Training = Field(default=Training(), description="How to train.")
    imports: list[str] = Field(default=[], description=IMPORTS)
    output: str = Field(
        description="Folder of this run: adapter, checkpoints, metrics, model card. Must not exist yet."
    )

    @property
    def metric(self) -> str:
        """The metric that chooses the best checkpoint."""
        return self.training.metric or next(iter(table.get(self.task).metrics))

    @property
    def greater_is_better(self) -> bool:
        return table.get(self.task).metrics[self.metric].greater_is_better

    @property
    def rows_seed(self) -> int:
        """What draws the held-out shares and the `max_` rows."""
        return self.training.seed if self.data.seed is None else self.data.seed

    @property
    def keeps_best(self) -> bool:
        """Whether the run ends with the best checkpoint on validation."""
        if self.training.keep_best is None:
            return not methods.scheduled(self.method.name, self.method.fields)
        return self.training.keep_best

    def to_yaml(self, comment: str = "") -> str:
        """Every value of the run, defaults included, so that the file means the same in a later version; below a comment."""
        values = self.model_dump(exclude_none=True)
        return write(values, comment)
