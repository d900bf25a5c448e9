"""OpenVINO GenAI: all adapters lie beside the base; a request names its own. It tells the log-probability of the tokens it wrote.

`generate` applies the request's adapter, and tells the sum of the log-probabilities alone. `add_request` tells each, and leaves the
adapter that was applied last: so it is asked behind `generate`, and the two must write the same.
"""

from __future__ import annotations

from typing import Any

import openvino as ov
from job import Job, score, serve
from openvino_genai import Adapter, AdapterConfig, ContinuousBatchingPipeline, GenerationConfig, SchedulerConfig


def answer(job: Job) -> dict[str, Any]:
    adapters = {name: Adapter(path) for name, path in job["adapters"].items()}
    properties: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    if adapters:
        properties["adapters"] = AdapterConfig(list(adapters.values()))
    scheduler = SchedulerConfig()
    scheduler.cache_size, scheduler.enable_prefix_caching = 1, False
    pipe = ContinuousBatchingPipeline(job["base"], scheduler, "CPU", properties)

    def run(name: str | None) -> list[dict[str, Any]]:
        found = []
        for prompt in job["prompts"]:
            config = GenerationConfig(max_new_tokens=job["steps"], ignore_eos=True, do_sample=False, logprobs=1)
            config.apply_chat_template = False
            if adapters:
                config.adapters = AdapterConfig(adapters[name]) if name else AdapterConfig()
            ids = ov.Tensor([prompt["ids"]])
            (whole,) = pipe.generate([ids], [config])
            handle = pipe.add_request(0, ids, config)
            while pipe.has_non_finished_requests():
                pipe.step()
            (output,) = handle.read_all()
            if whole.m_generation_ids != [list(output.generated_ids)]:
                raise SystemExit(f"{name}: generate wrote {whole.m_generation_ids}, a request {output.generated_ids}")
            at = len(prompt["ids"])
            steps = zip(output.generated_ids, output.generated_log_probs, strict=True)
            scores = [score(at + i, {token: logprob}) for i, (token, logprob) in enumerate(steps)]
            found.append({"tokens": list(output.generated_ids), "scores": scores})
        return found

    return {"runs": [run(name) for name in job["runs"]]}


if __name__ == "__main__":
    serve("openvino-genai", answer)
