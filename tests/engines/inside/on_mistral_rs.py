"""mistral.rs: all adapters lie beside the base; a request names its own. It takes text, and tells the likeliest tokens of each step.

Only requests to chat tell log-probabilities, and a prompt that is one string gets the model's chat template too: so the template here
is none.
"""

from __future__ import annotations

import tempfile
from typing import Any

from job import Job, score, serve
from mistralrs import ChatCompletionRequest, LoraAdapter, ModelDType, Runner, Which


def answer(job: Job) -> dict[str, Any]:
    adapters = [LoraAdapter(name, path) for name, path in job["adapters"].items()]
    if adapters:
        which = Which.Lora(model_id=job["base"], adapters=adapters, dtype=ModelDType.F32, max_rank=job["rank"])
    else:
        which = Which.Plain(model_id=job["base"], dtype=ModelDType.F32)
    with tempfile.NamedTemporaryFile("w", suffix=".jinja") as template:
        template.write("{% for message in messages %}{{ message['content'] }}{% endfor %}")
        template.flush()
        runner = Runner(which=which, no_paged_attn=True, prefix_cache_n=0, jinja_explicit=template.name)
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
            response = runner.send_chat_completion_request(request)
            if response.usage.prompt_tokens != len(prompt["ids"]):
                raise SystemExit(f"mistral.rs put {response.usage.prompt_tokens} tokens before its answer to {prompt}")
            steps = response.choices[0].logprobs.content
            tops = [{t.token: t.logprob for t in step.top_logprobs} for step in steps]
            at = len(prompt["ids"])
            tokens = [max(top, key=lambda token, top=top: top[token]) for top in tops]
            found.append({"tokens": tokens, "scores": [score(at + i, top) for i, top in enumerate(tops)]})
        return found

    return {"runs": [run(name) for name in job["runs"]]}


if __name__ == "__main__":
    serve("mistralrs", answer)
