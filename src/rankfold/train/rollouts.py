"""Rollouts of TRL's GRPO from an engine that holds the policy's fold.

from rankfold.train import FoldedRollouts, VllmEngine
GRPOTrainer(..., callbacks=[AdapterCallback()], rollout_func=FoldedRollouts(VllmEngine(llm)))

Nothing of TRL or of an engine is imported here: TRL calls a `rollout_func` with prompts and its trainer (its GRPOTrainer alone has one).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from rankfold.errors import RankfoldError
from rankfold.fold.in_memory import FoldedStateDict, fold_state_dict


@dataclass(frozen=True)
class Sampling:
    """How the trainer wants its completions sampled.

    Args:
        max_tokens: of one completion.
        others: further arguments of the engine, GRPOConfig's `generation_kwargs`.
    """

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    others: dict[str, Any]


@dataclass(frozen=True)
class Completion:
    """One completion: its tokens, and the log-probability with which each was drawn."""

    tokens: list[int]
    logprobs: list[float]


class RolloutEngine(Protocol):
    """What generates; `VllmEngine` is one."""

    max_rank: int
    """The largest rank it was started for; folds of a higher one are compressed to it."""

    def load(self, lora: FoldedStateDict) -> None:
        """Takes the policy in place of the one before. The tensors are overwritten at the next sync."""
        ...

    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[Completion]:
        """One completion for each prompt (token ids), in their order."""
        ...


class FoldedRollouts:
    """A `rollout_func` of GRPOTrainer: folds the policy in memory, hands it to the engine, and generates there.

    The engine gets a plain LoRA, whatever the method, and the model is neither merged nor changed. It syncs whenever TRL asks
    for completions, so no completion comes from an older policy.

    Args:
        engine: generates.
        adapter_name: of the policy.

    `lora` is the fold of the last sync, `syncs` counts them.
    """

    def __init__(self, engine: RolloutEngine, adapter_name: str = "default") -> None:
        self.engine, self.adapter_name = engine, adapter_name
        self.lora: FoldedStateDict | None = None
        self.syncs = 0

    def sync(self, model: Any) -> FoldedStateDict:
        """Folds the model's adapter into the memory of the sync before, and hands it to the engine.

        Raises:
            RankfoldError: as `fold_state_dict`; the engine cannot take the fold.
        """
        self.lora = fold_state_dict(model, adapter_name=self.adapter_name, max_rank=self.engine.max_rank, out=self.lora)
        self.engine.load(self.lora)
        self.syncs += 1
        return self.lora

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """TRL's `rollout_func`: one completion for each prompt; TRL has repeated them `num_generations` times."""
        if trainer.accelerator.distributed_type.value in ("FSDP", "DEEPSPEED"):
            raise RankfoldError(
                f"FoldedRollouts: {trainer.accelerator.distributed_type.value} keeps each process a part of the adapter, and a fold "
                "needs all of it; train with DDP, or leave rollout_func out and use TRL's use_vllm=True"
            )
        self.sync(trainer.accelerator.unwrap_model(trainer.model))
        ids = _tokens(prompts, trainer)
        found = self.engine.generate(ids, _sampling(trainer))
        return {
            "prompt_ids": ids,
            "completion_ids": [completion.tokens for completion in found],
            "logprobs": [completion.logprobs for completion in found],
        }


def _tokens(prompts: list[Any], trainer: Any) -> list[list[int]]:
    """The prompts as TRL's trainer would tokenise them."""
    if isinstance(prompts[0], str):
        return trainer.processing_class(text=prompts)["input_ids"]
    if any(isinstance(message["content"], list) for prompt in prompts for message in prompt):
        raise RankfoldError("FoldedRollouts: prompts with images are not supported; leave rollout_func out")
    return trainer.processing_class.apply_chat_template(
        conversation=prompts,
        tools=trainer.tools or None,
        chat_template=trainer.chat_template,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        **trainer.chat_template_kwargs,
    )["input_ids"]


def _sampling(trainer: Any) -> Sampling:
    return Sampling(
        max_tokens=trainer.max_completion_length,
        temperature=trainer.temperature,
        top_p=trainer.top_p,
        top_k=trainer.top_k,
        min_p=trainer.min_p or 0.0,
        repetition_penalty=trainer.repetition_penalty,
        others=dict(trainer.args.generation_kwargs or {}),
    )
