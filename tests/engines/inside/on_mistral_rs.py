"""mistral.rs: all adapters lie beside the base; a request names its own. It takes text, and tells the likeliest tokens of each step."""

from __future__ import annotations

from typing import Any

from job import Job, score, serve
from mistralrs import ChatCompletionRequest, LoraAdapter, ModelDType, Runner, Which


def answer(job: Job) -> dict[str, Any]:
    adapters = [LoraAdapter(name, path) for name, path in job["adapters"].items()]
    if adapters:
        which = Which.Lora(model_id=job["base"], adapters=adapters, dtype=ModelDType.F32, max_rank=job["rank"])
    else:
        which = Which.Plain(model_id=job["base"], dtype=ModelDType.F32)
    runner = Runner(which=which, no_paged_attn=True, prefix_cache_n=0)
    for prompt in job["prompts"]:
        ids = runner.tokenize_text(prompt["text"], False, None)
        if ids != prompt["ids"]:
            raise SystemExit(f"mistral.rs reads {prompt['text']!r} as {ids}, transformers as {prompt['ids']}")

    def run(name: str | None) -> list[dict[str, Any]]:
        found = []
        for prompt in job["prompts"]:
            request = ChatCompletionRequest(
                messages=prompt["text"], model="default", max_tokens=job["steps"], temperature=0.0, logprobs=True,
                top_logprobs=job["top"], ignore_eos=True, adapter=name,
            )  # fmt: skip
            steps = runner.send_chat_completion_request(request).choices[0].logprobs.content
            tops = [{t.token: t.logprob for t in step.top_logprobs} for step in steps]
            at = len(prompt["ids"])
            # what it wrote: the likeliest may be a token that ends a text, which `ignore_eos` takes out of the choice
            tokens = [_nearest(top, step.logprob) for top, step in zip(tops, steps, strict=True)]
            found.append({"tokens": tokens, "scores": [score(at + i, top) for i, top in enumerate(tops)]})
        return found

    return {"runs": [run(name) for name in job["runs"]], "never": job["ends"]}


def _nearest(top: dict[int, float], logprob: float) -> int:
    """The token that has this log-probability."""
    return min(top, key=lambda token: abs(top[token] - logprob))


if __name__ == "__main__":
    serve("mistralrs", answer)
