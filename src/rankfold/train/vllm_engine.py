"""vLLM in this process as a `RolloutEngine`: each sync is a LoRA under a new name.

vLLM has no way to take an adapter from memory: it reads a folder, when a request first names it. It keys its cache of prefixes on the
adapter's name, so a policy that kept the name of the one before would continue from that one's keys and values.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from rankfold.errors import RankfoldError
from rankfold.fold.in_memory import FoldedStateDict
from rankfold.train.rollouts import Completion, Sampling


class VllmEngine:
    """Generates with a `vllm.LLM` that was made with `enable_lora=True, logprobs_mode="processed_logprobs"`.

    Args:
        llm: on the base model that is trained.
        max_rank: its `max_lora_rank`.
        folder: where the folds are written, one at a time; by default in memory (/dev/shm) where there is one.

    Raises:
        RankfoldError: the folder holds the fold of an earlier run.
    """

    def __init__(self, llm: Any, max_rank: int, folder: str | Path | None = None) -> None:
        self.llm, self.max_rank = llm, max_rank
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self._made = tempfile.TemporaryDirectory(dir=memory, prefix="rankfold-") if folder is None else None
        self.folder = Path(folder or self._made.name)  # pyright: ignore[reportOptionalMemberAccess]
        self.version = 0
        if left := sorted(path.name for path in self.folder.glob("policy-*")):
            raise RankfoldError(
                f"VllmEngine: folder='{self.folder}' holds {left[0]} of a run that was killed, and this run would end at that number; "
                "remove it, or name another folder"
            )

    def load(self, lora: FoldedStateDict) -> None:
        """Writes the fold as policy-N; vLLM reads it at the next request."""
        if foreign := [key for key in lora if not _served(key)]:
            raise RankfoldError(
                f"VllmEngine: {foreign[0]} is not a LoRA of a linear layer inside the model, and vLLM would leave it out or score "
                "with it wrongly; leave heads and embeddings out of target_modules and modules_to_save"
            )
        lora.save(self._path(self.version + 1))
        shutil.rmtree(self._path(self.version), ignore_errors=True)
        self.version += 1

    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[Completion]:
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

        wanted = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "max_tokens": sampling.max_tokens,
            "logprobs": 0,  # of the drawn token alone
            **sampling.others,
        }
        policy = LoRARequest(f"policy-{self.version}", self.version, str(self._path(self.version)))
        outputs = self.llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts],
            SamplingParams(**wanted),
            lora_request=policy,
            use_tqdm=False,
        )
        return [_completion(output.outputs[0]) for output in outputs]

    def _path(self, version: int) -> Path:
        return self.folder / f"policy-{version}"


def _served(key: str) -> bool:
    """Whether vLLM serves this tensor exactly; a LoRA of `lm_head` it leaves out of some log-probabilities."""
    return key.endswith((".lora_A.weight", ".lora_B.weight")) and "lm_head" not in key


def _completion(output: Any) -> Completion:
    drawn = [at[token].logprob for token, at in zip(output.token_ids, output.logprobs, strict=True)]
    return Completion(list(output.token_ids), drawn)
