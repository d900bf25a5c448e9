"""mlx-lm on Linux: a model holds one adapter, so that switching is loading; models with other adapters lie beside it in the process."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from job import Job, score, serve
from mlx_lm import load
from mlx_lm.generate import generate_step


def answer(job: Job) -> dict[str, Any]:
    models = {name: load(job["base"], adapter_path=job["adapters"].get(name))[0] for name in set(job["runs"])}

    def run(name: str | None) -> list[dict[str, Any]]:
        found = []
        for prompt in job["prompts"]:
            tokens, scores, at = [], [], len(prompt["ids"])
            for i, (token, row) in enumerate(
                generate_step(mx.array(prompt["ids"]), models[name], max_tokens=job["steps"])
            ):
                values = np.array(row.astype(mx.float32)).reshape(-1)
                ids = range(len(values)) if i == 0 else np.argpartition(values, -job["top"])[-job["top"] :].tolist()
                tokens.append(int(token))
                scores.append(score(at + i, {int(t): float(values[t]) for t in ids}))
            found.append({"tokens": tokens, "scores": scores})
        return found

    return {"runs": [run(name) for name in job["runs"]]}


if __name__ == "__main__":
    serve("mlx-lm", answer)
