"""What rankfold uses of transformers and TRL that is private or has changed before, in one place.

Each piece is looked for when this file is imported or when it is used; what is missing is one sentence with the versions that work.
pyproject.toml says which releases have all of it.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer

from rankfold.errors import RankfoldError
from rankfold.runfile.arguments import RENAMED

WORKS = {"transformers": "transformers>=5.3,<6", "trl": "trl>=1.16,<2"}


def require(package: str, owner: Any, *names: str) -> None:
    """Checks that a module, class or object of a package has what is used of it.

    Raises:
        RankfoldError: it has not; the message names the piece and the versions that work.
    """
    for name in names:
        if not hasattr(owner, name):
            where = getattr(owner, "__name__", type(owner).__name__)
            raise RankfoldError(
                f"{package} {version(package)} has no {where}.{name}, which rankfold's training needs; "
                f"install a version that has it: pip install '{WORKS[package]}'"
            )


require("transformers", Trainer, "_run_epoch", "_save_checkpoint", "_get_eval_sampler", "_get_dataloader")


class StepwiseTrainer(Trainer):
    """Trainer with two of its inner steps open, which measures every row and in its order, whatever `extra` says of training."""

    def around_checkpoint(self, folder: Path) -> AbstractContextManager[None]:
        """What a checkpoint is written in."""
        return nullcontext()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # transformers asks only after a step whether to stop; a run that resumes where it had stopped has none to make.
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        # TRL's trainer of preferences would look for texts; unlike the others it does not see that rows are tokens already.
        prepare: Any = getattr(super(), "_prepare_dataset")  # noqa: B009 - transformers' own trainer has none
        return dataset if "chosen_ids" in dataset.column_names else prepare(dataset, *args, **kwargs)

    def _get_eval_sampler(self, eval_dataset: Any) -> SequentialSampler | None:
        # train_sampling_strategy="group_by_length" would draw an order from the seed; scores are told and compared by row.
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def _get_dataloader(self, *args: Any, is_training: bool = False, **kwargs: Any) -> DataLoader:
        dropped, collator = self.args.dataloader_drop_last, self.data_collator
        self.args.dataloader_drop_last = dropped and is_training
        if not is_training and getattr(collator, "padding_free", False):  # it would make one row of a batch
            self.data_collator = dataclasses.replace(collator, padding_free=False)  # pyright: ignore[reportArgumentType]
        try:
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_drop_last, self.data_collator = dropped, collator

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self.around_checkpoint(Path(self.args.output_dir or ".", f"checkpoint-{self.state.global_step}")):
            super()._save_checkpoint(model, trial)


def make_arguments(cls: type, arguments: dict[str, Any]) -> Any:
    """An instance of TrainingArguments or of a class of it, with the names that this release of transformers wants."""
    known = {field.name for field in dataclasses.fields(cls)}
    named = {RENAMED[key] if RENAMED.get(key) in known else key: value for key, value in arguments.items()}
    if unknown := sorted(named.keys() - known):
        package = "transformers" if cls.__module__.startswith("transformers.") else "trl"
        raise RankfoldError(
            f"{package} {version(package)} has no {cls.__name__}({unknown[0]}=...), which rankfold's training needs; "
            f"install a version that has it: pip install '{WORKS[package]}'"
        )
    try:
        return cls(**named)
    except ValueError as e:  # values that contradict each other
        raise RankfoldError(f"training: {e}") from e


def check_saves(trainer: Trainer) -> None:
    """Raises RankfoldError where the trainer would save no adapter: of parts that processes keep to themselves it writes none."""
    if not trainer.is_fsdp_enabled:
        return
    plugin: Any = trainer.accelerator.state.fsdp_plugin
    kind = str(plugin.state_dict_type)
    if "FULL_STATE_DICT" not in kind:
        raise RankfoldError(
            f"accelerate: fsdp_state_dict_type={kind.removeprefix('StateDictType.')} leaves the adapter in parts, and transformers "
            "saves none of it; set fsdp_state_dict_type: FULL_STATE_DICT"
        )


def drop_reference(model: Any) -> None:
    """Deletes the copy of the adapter that TRL's trainer of preferences adds to a model as its reference: it must not be saved."""
    if "ref" in model.peft_config:
        model.delete_adapter("ref")


def loss_is_of_its_batch(trainer: Trainer) -> None:
    """Tells Trainer, which looks at the model's signature alone, that the loss is not divided by the rows of all batches:
    else it would multiply it by the accumulated batches or the processes."""
    require("transformers", trainer, "model_accepts_loss_kwargs")
    trainer.model_accepts_loss_kwargs = False


def log_means(trainer: Trainer, metrics: dict[str, float], prefix: str, means: dict[str, float]) -> None:
    """Puts means over rows or tokens where an evaluation has means over batches: Trainer's loss, and what TRL's trainers add when
    they log. What `compute_metrics` made is of all rows already.

    Args:
        metrics: of the evaluation, before it is logged.
        means: by their names without prefix.
    """
    added: dict[str, list[float]] = getattr(trainer, "_metrics", {}).get("eval", {})
    for name, mean in means.items():
        if name in added:
            added[name] = [mean]
        elif name == "loss" or f"{prefix}_{name}" not in metrics:
            metrics[f"{prefix}_{name}"] = mean


def make_optimizer_by(trainer: Trainer, factory: Any, keywords: dict[str, Any]) -> None:
    """Has the trainer make its optimiser as `factory()(model, **keywords)`. Not by its argument, which TRL's DPOTrainer lacks."""
    require("transformers", trainer, "optimizer_cls_and_kwargs")
    trainer.optimizer_cls_and_kwargs = (factory, keywords)


#: What some models do to their logits besides the head's product; TRL's head knows how, ours does not.
SCALED = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")

Scored = tuple[Tensor, Tensor, Tensor]
"""Log-probabilities of the labels, whether a label is the likeliest, and where there are labels: batch × length each."""


def score_labels_with(
    model: Any, usable: Callable[[Any], bool], scored: Callable[[Tensor, Tensor, Tensor], Scored]
) -> None:
    """Has TRL's `model(..., fused_lm_head=True)` of a language model computed by `scored`, where it can be.

    It cannot, and TRL's own is called: for a head that is not `usable`, for logits that are scaled, for routers' losses, and for
    labels that are shifted already.

    Args:
        model: the base model, after TRL gave it the fused head.
        usable: says so of the output embeddings.
        scored: hidden states, the head's weight and labels in.
    """
    import trl.trainer.utils as theirs

    require("trl", theirs, "add_fused_lm_head", "FusedCausalLMOutput")
    require("trl", theirs.FusedCausalLMOutput, *_FUSED)
    config = model.config.get_text_config()
    if any(getattr(config, name, None) is not None for name in SCALED):
        return
    forward_of_trl = model.forward

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        labels, head = kwargs.get("labels"), self.get_output_embeddings()
        others = {k: v for k, v in kwargs.items() if k not in ("labels", "fused_lm_head", "use_cache")}
        if (
            not kwargs.get("fused_lm_head")
            or labels is None
            or "shift_labels" in others
            or "num_items_in_batch" in others
            or others.get("output_router_logits", getattr(config, "output_router_logits", False))
            or not usable(head)
        ):
            return forward_of_trl(*args, **kwargs)
        hidden = getattr(self, self.base_model_prefix)(*args, use_cache=False, **others).last_hidden_state[:, :-1]
        log_probs, is_top1, mask = scored(hidden, head.weight, labels[:, 1:])
        return theirs.FusedCausalLMOutput(
            loss=-log_probs.sum() / mask.sum().clamp(min=1),
            log_probs=log_probs,
            entropy=log_probs.new_zeros(mask.shape),  # TRL logs it, rankfold does not
            is_top1=is_top1,
            label_mask=mask,
        )

    model.forward = types.MethodType(forward, model)


def score_own_logits(model: Any, terms: bool = False) -> None:
    """Has TRL's `model(..., fused_lm_head=True)` of a language model computed from the logits of the model's own forward.

    Args:
        model: the base model, after TRL gave it the fused head.
        terms: `aux_loss` is all that the model's loss has beside the cross-entropy.
    """
    import trl.trainer.utils as theirs

    require("trl", theirs, "FusedCausalLMOutput")
    require("trl", theirs.FusedCausalLMOutput, *_FUSED, "mean_logits", "log_sum_sq_probs", "aux_loss")
    forward_of_model = model.forward

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self.config.get_text_config(), "output_router_logits"):
            kwargs.pop("output_router_logits", None)  # TRL asks for it wherever there is an auxiliary loss
        if not kwargs.pop("fused_lm_head", False):
            return forward_of_model(*args, **kwargs)
        labels, shifted, items = (kwargs.pop(key, None) for key in ("labels", "shift_labels", "num_items_in_batch"))
        found = forward_of_model(*args, **kwargs | ({"labels": labels} if terms else {}) | {"use_cache": False})
        logits, targets = (found.logits[:, :-1], labels[:, 1:]) if shifted is None else (found.logits, shifted)
        targets = targets.to(logits.device)
        mask = targets != -100
        picked, own = logits[mask].float(), targets[mask]
        log_p = picked.log_softmax(-1)

        def placed(values: Tensor) -> Tensor:
            return values.new_zeros(mask.shape).masked_scatter(mask, values)

        log_probs = placed(log_p.gather(-1, own[:, None])[:, 0])
        with torch.no_grad():
            others = {
                "entropy": placed(-(log_p.exp() * log_p).sum(-1)),
                "log_sum_sq_probs": placed((2 * log_p).logsumexp(-1)),
                "mean_logits": placed(picked.mean(-1)),
                "is_top1": placed(picked.argmax(-1) == own),
            }
        mean = -log_probs.sum() / mask.sum().clamp(min=1)
        return theirs.FusedCausalLMOutput(
            loss=mean if items is None else -log_probs.sum() / items,
            log_probs=log_probs,
            label_mask=mask,
            aux_loss=found.loss - mean if terms else getattr(found, "aux_loss", None),
            **others,
        )

    model.forward = types.MethodType(forward, model)


def mend_loss_of_routers(trainer: Any, model: Any, example: dict[str, Tensor]) -> None:
    """TRL asks for the loss of the routers wherever a config has its coefficient, and takes `num_experts` from it. Dense models of a
    family of mixtures have no router (Granite 4), others do not return what it says (Llama 4), and some configs call the experts
    otherwise (GraniteMoE, PhiMoE; trl#7248).

    Args:
        model: the base model.
        example: rows of what it takes, where it is.
    """
    require("trl", trainer, "aux_loss_enabled")
    text: Any = model.config.get_text_config()
    if not (trainer.aux_loss_enabled or getattr(text, "output_router_logits", False)):
        return
    trunk = getattr(model, model.base_model_prefix)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        routers = getattr(trunk(**example, use_cache=False, output_router_logits=True), "router_logits", None)
    if not routers:
        trainer.aux_loss_enabled = text.output_router_logits = False
    elif not hasattr(text, "num_experts"):
        text.num_experts = routers[0].shape[-1]


def add_terms_of_the_model(trainer: Any) -> None:
    """Has TRL's trainer of language models add the fused head's `aux_loss` to its loss as it is."""
    require("trl", trainer, "aux_loss_enabled", "router_aux_loss_coef")
    trainer.aux_loss_enabled, trainer.router_aux_loss_coef = True, 1.0


_FUSED = ("loss", "log_probs", "entropy", "is_top1", "label_mask")
