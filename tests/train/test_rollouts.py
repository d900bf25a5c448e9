"""Folds handed to a rollout engine during TRL's GRPO; stock PEFT is the engine that shows what one would serve."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tiny import byte_tokenizer
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration

from rankfold import AdapterCallback, ColaConfig, PlainLoraConfig, RasaConfig, SoraConfig
from rankfold.errors import RankfoldError
from rankfold.fold import FoldedStateDict, fold_state_dict
from rankfold.train.rollouts import Completion, FoldedRollouts, Sampling
from rankfold.train.vllm_engine import VllmEngine

TINY = LlamaConfig(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    vocab_size=258, pad_token_id=0, eos_token_id=1,
)  # fmt: skip
TARGETS = ["q_proj", "v_proj", "down_proj"]
RASA = RasaConfig(r=4, shared_rank=1, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
SORA = SoraConfig(r=4, threshold=0.05, target_modules=TARGETS, task_type="CAUSAL_LM")
LEGAL = (8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's max_lora_rank


class StockPeft:
    """An engine that loads the folder of every sync as anybody would, answers greedily, and keeps what it served."""

    def __init__(self, base: LlamaForCausalLM, folder: Path, max_rank: int = 64) -> None:
        self.base, self.folder, self.max_rank = base, folder, max_rank
        self.served: list[torch.Tensor] = []
        self.sampling: Sampling | None = None

    def load(self, lora: FoldedStateDict) -> None:
        lora.save(self.folder / str(len(self.served)))
        self.model = PeftModel.from_pretrained(deepcopy(self.base), str(self.folder / str(len(self.served)))).eval()
        self.served.append(logits(self.model))

    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[Completion]:
        self.sampling = sampling
        generator = torch.Generator().manual_seed(len(self.served))
        drawn = torch.randint(2, 258, (len(prompts), sampling.max_tokens), generator=generator).tolist()
        return [Completion(tokens, [-1.0] * len(tokens)) for tokens in drawn]


def logits(model: torch.nn.Module) -> torch.Tensor:
    training = model.training
    with torch.no_grad():
        found = model.eval()(torch.arange(2, 14)[None]).logits
    model.train(training)
    return found


class Watch(AdapterCallback):
    """Keeps the policy's own logits after every step."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, model=model, **kwargs)
        self.seen.append(logits(model))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen.append(logits(model))


def varied(completions: list[Any], **_: Any) -> list[float]:
    return [float(len(set(str(text)))) for text in completions]


def trained(config: Any, engine: StockPeft, folder: Path, prompts: list[Any], **arguments: Any) -> tuple[Any, Watch]:
    watch, rollouts = Watch(), FoldedRollouts(engine)
    args = GRPOConfig(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=4, num_generations=4, learning_rate=0.05,
        max_completion_length=5, beta=0.0, report_to=[], disable_tqdm=True, use_cpu=True, bf16=False, activation_checkpointing=False,
        dataloader_pin_memory=False, save_strategy="no", top_k=7, temperature=0.9, **arguments,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=deepcopy(engine.base),
        reward_funcs=varied,
        args=args,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=byte_tokenizer(),
        peft_config=deepcopy(config),
        callbacks=[watch],
        rollout_func=rollouts,
    )
    trainer.train()
    return trainer, watch


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(TINY).eval()


@pytest.mark.parametrize("config", [RASA, SORA], ids=["rasa", "sora"])
def test_every_sync_serves_the_policy_of_that_step(base, config, tmp_path):
    engine = StockPeft(base, tmp_path / "folds")
    trainer, watch = trained(config, engine, tmp_path / "run", ["hello", "world", "four", "five"])
    assert len(engine.served) == 3
    for served, policy in zip(engine.served, watch.seen, strict=False):
        assert_close(served, policy, rtol=1e-4, atol=1e-5)
    last = FoldedRollouts(engine)
    assert last.sync(trainer.model).rank in LEGAL
    assert_close(engine.served[-1], watch.seen[-1], rtol=1e-4, atol=1e-5)
    assert (engine.served[-1] - logits(base)).abs().max() > 1e-3
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(engine.served, engine.served[1:], strict=False))
    assert engine.sampling == Sampling(5, 0.9, 1.0, 7, 0.0, 1.0, {})


def test_chats_are_rendered_as_the_trainer_would(base, tmp_path):
    engine = StockPeft(base, tmp_path / "folds")
    seen: list[list[int]] = []
    generate = engine.generate
    engine.generate = lambda prompts, sampling: (seen.extend(prompts), generate(prompts, sampling))[1]
    chat = [{"role": "user", "content": "hello"}]
    trained(RASA, engine, tmp_path / "run", [chat] * 4)
    assert byte_tokenizer().decode(seen[0]) == "<|user|>hello<|assistant|>"
    assert seen == [seen[0]] * 12


def test_a_rank_above_the_engines_is_compressed(base, tmp_path):
    model = get_peft_model(
        deepcopy(base), RasaConfig(r=16, shared_rank=8, target_modules=TARGETS, init_lora_weights=False)
    )
    assert fold_state_dict(model).rank == 32
    engine = StockPeft(base, tmp_path / "folds", max_rank=16)
    lora = FoldedRollouts(engine).sync(model)
    assert lora.rank == 16
    assert lora.config["r"] == lora.config["lora_alpha"] == 16
    assert set(lora.compressed) <= {f"model.layers.{i}.{n}" for i in range(2) for n in _names()}
    assert lora.compressed


def _names() -> list[str]:
    return ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"]


class FakeLlm:
    """Reads the folder when a request names it, as vLLM does."""

    def __init__(self) -> None:
        self.read: list[tuple[str, int, bool]] = []

    def generate(self, prompts: list[Any], sampling: Any, *, lora_request: Any, use_tqdm: bool) -> list[Any]:
        there = (Path(lora_request.lora_path) / "adapter_model.safetensors").exists()
        self.read.append((lora_request.lora_name, lora_request.lora_int_id, there))
        at = [{5: SimpleNamespace(logprob=-0.5)}, {7: SimpleNamespace(logprob=-1.5)}]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[5, 7], logprobs=at)]) for _ in prompts]


def test_vllm_gets_every_policy_under_a_new_name(base, tmp_path, monkeypatch):
    import sys

    vllm = SimpleNamespace(SamplingParams=lambda **given: SimpleNamespace(**given))
    request = SimpleNamespace(LoRARequest=lambda n, i, p: SimpleNamespace(lora_name=n, lora_int_id=i, lora_path=p))
    for name, module in {"vllm": vllm, "vllm.lora": SimpleNamespace(), "vllm.lora.request": request}.items():
        monkeypatch.setitem(sys.modules, name, module)
    llm = FakeLlm()
    engine = VllmEngine(llm, max_rank=16, folder=tmp_path)
    rollouts = FoldedRollouts(engine)
    model = get_peft_model(deepcopy(base), deepcopy(RASA))
    for _ in range(2):
        rollouts.sync(model)
        found = engine.generate([[1, 2], [3]], Sampling(4, 1.0, 1.0, 0, 0.0, 1.0, {"seed": 3}))
    assert found == [Completion([5, 7], [-0.5, -1.5])] * 2
    assert llm.read == [("policy-1", 1, True), ("policy-2", 2, True)]
    assert [p.name for p in tmp_path.iterdir()] == ["policy-2"]
    with pytest.raises(
        RankfoldError, match=r"holds policy-2 of a run that was killed, and this run would end at that number"
    ):
        VllmEngine(llm, max_rank=16, folder=tmp_path)


def test_vllm_is_not_given_what_it_would_leave_out(base, tmp_path):
    model = get_peft_model(deepcopy(base), PlainLoraConfig(r=4, target_modules=["lm_head", "q_proj"]))
    with pytest.raises(RankfoldError, match=r"lm_head.*leave heads and embeddings out"):
        FoldedRollouts(VllmEngine(None, max_rank=16, folder=tmp_path)).sync(model)


@pytest.mark.parametrize("config", [RASA, SORA, ColaConfig(r=2, target_modules=TARGETS)], ids=["rasa", "sora", "cola"])
def test_trl_sends_vllm_the_merged_model_whole_and_gives_it_back(base, config):
    """use_vllm=True: what TRL's own sync streams is W + ΔW under the base's names, and the model is then as before."""
    model = get_peft_model(deepcopy(base), deepcopy(config))
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lowrank_" in n:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) / 10)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    policy = logits(model)
    generation = object.__new__(VLLMGeneration)
    generation.model = model
    generation._dist = SimpleNamespace(gather_params=lambda _: _nothing(), is_fsdp=False)
    sent = {name: weight.clone() for name, weight in generation._iter_named_params()}
    engine = LlamaForCausalLM(TINY).eval()
    assert not engine.load_state_dict(sent, strict=False).unexpected_keys
    assert sent.keys() == dict(engine.named_parameters()).keys()
    assert_close(logits(engine), policy, rtol=1e-4, atol=1e-5)
    assert_close(model.state_dict(), before, rtol=0, atol=0)


def _nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()
