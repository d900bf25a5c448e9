"""What every script in this folder does: reads a job, lets an engine answer it, writes the answer. The standard library alone.

A job is one base model with its adapters, and the order in which they are asked:

    {"base": folder or file, "adapters": {key: folder or file}, "runs": [key or null, ...], "rank": largest rank of the adapters,
     "prompts": [{"text": ..., "ids": [...]}, ...], "steps": tokens to write, "vocabulary": its size, "top": see below, "ends": tokens that end a text}

The answer is {"version": ..., "runs": [one per run]}, and a run is one entry per prompt:

    {"tokens": what it wrote, greedily, "scores": [{"at": n, "ids": [...], "logprobs": [...]}, ...]}

where a score gives log-probabilities of the token behind the first n tokens of prompt and text: of all the vocabulary behind the
prompt and of the `top` likeliest elsewhere, as far as the engine tells them. "together" holds one more run for each of `runs`, all
asked at once, if the engine can do that; "never" the tokens that it does not write, however likely they are.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

Job = dict[str, Any]
Score = dict[str, Any]


def score(at: int, logprobs: Mapping[int, float]) -> Score:
    return {"at": at, "ids": list(logprobs), "logprobs": list(logprobs.values())}


def serve(package: str, answer: Callable[[Job], dict[str, Any]]) -> None:
    """Answers the job in the first argument's file into the second's."""
    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    result = {"version": version(package), **answer(job)}
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(result, file)
