"""llama.cpp through its library's server: all adapters are loaded, and each request gives every one a scale."""

from __future__ import annotations

from typing import Any

import xllamacpp
from job import Job, score, serve


def answer(job: Job) -> dict[str, Any]:
    server, names = _server(job), list(job["adapters"])

    def complete(ids: list[int], name: str | None, tokens: int, top: int) -> list[dict[str, Any]]:
        request = {
            "prompt": ids, "n_predict": tokens, "n_probs": top, "temperature": 0, "ignore_eos": True,
            "cache_prompt": False, "stream": False, "lora": [{"id": i, "scale": float(n == name)} for i, n in enumerate(names)],
        }  # fmt: skip
        return server.handle_completions(request)["choices"][0]["logprobs"]["content"]

    def run(name: str | None) -> list[dict[str, Any]]:
        found = []
        for prompt in job["prompts"]:
            text = complete(prompt["ids"], name, job["steps"], job["top"])
            (first,) = complete(prompt["ids"], name, 1, job["vocabulary"])
            at = len(prompt["ids"])
            steps = [(at + i, entry) for i, entry in enumerate(text)]
            scores = [
                score(n, {t["id"]: t["logprob"] for t in entry["top_logprobs"]}) for n, entry in [*steps, (at, first)]
            ]
            found.append({"tokens": [entry["id"] for entry in text], "scores": scores})
        return found

    # `ignore_eos` takes every token that ends a text out of the choice
    return {"runs": [run(name) for name in job["runs"]], "never": job["ends"]}


def _server(job: Job) -> xllamacpp.Server:
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = job["base"], 256, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.verbosity, params.warmup = -1, False
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 0.0) for path in job["adapters"].values()]
    # The cache of keys and values is float16 by default, worth 1e-2; flash attention would round as well
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)


if __name__ == "__main__":
    serve("xllamacpp", answer)
