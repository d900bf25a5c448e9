"""vLLM: all adapters lie beside the base in one engine; a request names its own."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from job import Job, score, serve
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.lora.request import LoRARequest


def answer(job: Job) -> dict[str, Any]:
    # One slot more than there are adapters: on a CPU, a request without adapter in one batch with others gets what is in the last slot
    slots = len(job["adapters"]) + 1
    lora = {"enable_lora": True, "max_lora_rank": job["rank"], "max_loras": slots} if job["adapters"] else {}
    llm = LLM(
        job["base"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_logprobs=-1,
        max_num_seqs=32,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        **lora,
    )
    requests = {name: LoRARequest(name, i, path) for i, (name, path) in enumerate(job["adapters"].items(), 1)}
    prompts = [TokensPrompt(prompt_token_ids=p["ids"]) for p in job["prompts"]]

    def ask(names: list[str | None], tokens: int, top: int) -> list[Any]:
        params = SamplingParams(temperature=0, max_tokens=tokens, logprobs=top, ignore_eos=True, detokenize=False)
        asked = [requests.get(str(name)) for name in names for _ in prompts]
        return [r.outputs[0] for r in llm.generate(prompts * len(names), params, lora_request=asked, use_tqdm=False)]

    def texts(names: list[str | None]) -> list[list[dict[str, Any]]]:
        found = []
        for output, prompt in zip(ask(names, job["steps"], job["top"]), job["prompts"] * len(names), strict=True):
            steps = [{t: entry.logprob for t, entry in step.items()} for step in output.logprobs]
            scores = [score(len(prompt["ids"]) + i, step) for i, step in enumerate(steps)]
            found.append({"tokens": list(output.token_ids), "scores": scores})
        n = len(prompts)
        return [found[i : i + n] for i in range(0, len(found), n)]

    runs = []
    for name in job["runs"]:
        (run,) = texts([name])
        for entry, output, prompt in zip(run, ask([name], 1, job["vocabulary"]), job["prompts"], strict=True):
            whole = {t: e.logprob for t, e in output.logprobs[0].items()}
            entry["scores"].append(score(len(prompt["ids"]), whole))
        runs.append(run)
    return {"runs": runs, "together": texts(job["runs"])}


if __name__ == "__main__":
    serve("vllm-cpu", answer)
