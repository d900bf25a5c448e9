"""Promises 6 and 7 for every method: what training moves, precision, checkpointing, accumulation, Trainer, TRL, compile."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from models import ARCHS, BERT, GPT2, LLAMA, T5, VIT, VOCAB, Arch
from peft import PeftModel, prepare_model_for_kbit_training
from safetensors.torch import load_file
from table import (
    FIRST,
    LIVE,
    ROWS,
    Row,
    adapt,
    adapter_buffers,
    adapter_parameters,
    all_everywhere,
    all_rows,
    assert_same,
    everywhere,
    first_rows,
    fit,
    layers,
    on,
    rows,
    second,
    snapshot,
    spread,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from rankfold import AdapterCallback
from rankfold.kernel.linears import separate_order


def gradients(arch: Arch, model: nn.Module, batches: list[dict[str, Tensor]] | None = None) -> dict[str, Tensor]:
    """Of the mean loss over the batches, for all that is trainable."""
    model.zero_grad()
    batches = batches or [arch.inputs(next(model.parameters()).device)]
    for batch in batches:
        (arch.loss(model, batch) / len(batches)).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}  # pyright: ignore[reportOptionalMemberAccess]


# What moves ---------------------------------------------------------------------------------------------------------


@all_everywhere
def test_training_moves_the_adapter_and_nothing_else(arch: Arch, row: Row, device: torch.device) -> None:
    model = adapt(arch, row, device, live=False)
    before, first = snapshot(model), arch.loss(model).item()
    fit(arch, model.train(), steps=6, lr=0.05)
    ours = {n for n, _ in adapter_parameters(model)}
    head = {n for n in before if "modules_to_save" in n}
    for name, tensor in snapshot(model).items():
        if tensor.numel() and name in ours | head:
            assert not torch.equal(tensor, before[name]), f"{name} has not moved"
        elif name not in adapter_buffers(model):
            assert torch.equal(tensor, before[name]), f"{name} has moved"
    assert arch.loss(model.eval()).item() < first


@rows
def test_gradients_are_those_of_the_plain_formula(row: Row, device: torch.device) -> None:
    if device.type == "mps":
        pytest.skip("no float64 on mps")
    model = adapt(LLAMA, row, device, dtype=torch.float64).double()
    fused = gradients(LLAMA, model)
    with separate_order():
        plain = gradients(LLAMA, model)
    for name in plain:
        torch.testing.assert_close(fused[name], plain[name], rtol=1e-10, atol=1e-12)


@all_rows
def test_only_the_active_adapters_learn(row: Row, device: torch.device) -> None:
    model = adapt(LLAMA, row, device)
    second(model, LLAMA, row)
    for active in (["default"], ["other"], ["default", "other"]):
        model.base_model.set_adapter(active)
        for config in model.peft_config.values():
            config.schedule = None  # every round is a run of its own
        before = snapshot(model)
        fit(LLAMA, model.train(), steps=2)
        changed = {n for n, t in snapshot(model).items() if not torch.equal(t, before[n])}
        wanted = {n for name in active for n, p in adapter_parameters(model, name) if p.numel()}
        assert changed - {n for name in active for n in adapter_buffers(model, name)} == wanted


@all_rows
def test_training_can_go_on_from_a_file(row: Row, device: torch.device, tmp_path) -> None:
    model = adapt(LLAMA, row, device)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(LLAMA.build(device), tmp_path, is_trainable=True)
    for m in (model, again):
        torch.manual_seed(0)
        fit(LLAMA, m.train(), steps=3)
    assert_same(snapshot(again), snapshot(model))


DROPOUT = [row for row in ROWS if row.variant == "dropout"]


@on(*ARCHS.values(), some_rows=DROPOUT)
def test_dropout(arch: Arch, row: Row, device: torch.device) -> None:
    def run() -> Tensor:
        torch.manual_seed(3)
        return arch.out(model)

    model = adapt(arch, row, device)
    still = arch.out(model)
    assert torch.equal(arch.out(model), still)
    model.train()
    wild = arch.out(model)
    assert not torch.equal(wild, still)
    assert not torch.equal(arch.out(model), wild)
    assert torch.equal(run(), run())
    with model.disable_adapter():
        assert torch.equal(arch.out(model), arch.out(arch.build(device)))
    model.merge_adapter()
    assert torch.equal(arch.out(model), arch.out(model))


@pytest.mark.parametrize("row", DROPOUT, ids=str)
def test_dropout_is_unbiased(row: Row, device: torch.device) -> None:
    layer = next(iter(layers(adapt(LLAMA, row, device)).values())).train()
    x = torch.randn(1, 16, device=device)
    mean = layer(x.expand(100_000, 16)).mean(0)
    torch.testing.assert_close(mean, layer.eval()(x)[0], rtol=0.02, atol=0.02)


# Precision ----------------------------------------------------------------------------------------------------------


@everywhere
def test_autocast(arch: Arch, row: Row, device: torch.device) -> None:
    model = adapt(arch, row, device).train()
    torch.manual_seed(0)
    wanted = arch.loss(model)
    torch.manual_seed(0)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = arch.loss(model)
        for layer in layers(model).values():
            x = torch.randn(2, layer.lowrank_adapters["default"].site.in_features, device=device)
            assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(loss.float(), wanted, rtol=0.1, atol=0.1)
    loss.backward()
    for name, p in adapter_parameters(model):
        assert p.grad is not None, name
        assert p.grad.dtype == p.dtype == torch.float32
        assert torch.isfinite(p.grad).all()


@all_everywhere
def test_half_precision_base_trains(arch: Arch, row: Row, device: torch.device) -> None:
    """Adapter in float32 on a bfloat16 base without autocast, as PEFT sets it up: small steps are not lost."""
    model = adapt(arch, row, device, dtype=torch.bfloat16).train()
    before = snapshot(model)
    fit(arch, model, steps=2, lr=1e-6)
    for name, p in adapter_parameters(model):
        assert p.dtype == torch.float32
        assert torch.isfinite(p).all()
        if p.numel():
            assert not torch.equal(p, before[name]), name


@rows
def test_gates_learn_in_a_pure_bfloat16_model(row: Row, device: torch.device) -> None:
    model = adapt(LLAMA, row, device, dtype=torch.bfloat16, options={"autocast_adapter_dtype": False}).train()
    before = snapshot(model)
    fit(LLAMA, model, steps=2, lr=1e-6)
    for name, p in adapter_parameters(model):
        assert p.dtype == (torch.bfloat16 if p.ndim > 1 else torch.float32)
        if p.ndim == 1:
            assert not torch.equal(p, before[name])


# Memory savers ------------------------------------------------------------------------------------------------------


@spread(arch=[LLAMA, GPT2, BERT, T5, VIT], reentrant=[True, False])
def test_gradient_checkpointing(arch: Arch, row: Row, reentrant: bool, device: torch.device) -> None:
    """The same gradients, dropout included."""
    plain = adapt(arch, row, device).train()
    plain.enable_input_require_grads()  # it makes attention take another kernel
    torch.manual_seed(0)
    wanted = gradients(arch, plain)
    model = adapt(arch, row, device).train()
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert model.get_base_model().is_activation_checkpointing
    torch.manual_seed(0)
    found = gradients(arch, model)
    if arch is not T5:
        # what all layers share: a re-entrant backward sums the gradients of a block first, and then those of the blocks
        summed = {n for n in wanted if reentrant and row.facts.model_wide and "lowrank_shared" in n}
        assert_same(*({n: g for n, g in grads.items() if n not in summed} for grads in (found, wanted)))
    for name in wanted:  # T5 caches keys unless it checkpoints, and then rounds otherwise
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-3, atol=1e-6)


@rows
def test_gradient_checkpointing_switched_on_before(row: Row, device: torch.device) -> None:
    from peft import get_peft_model

    wanted = gradients(LLAMA, adapt(LLAMA, row, device).eval())
    base = LLAMA.build(device)
    base.activation_checkpointing_enable({"use_reentrant": True})
    model = get_peft_model(base, row.config(LLAMA))
    model.load_state_dict(adapt(LLAMA, row, device).state_dict())
    model.train()
    for layer in layers(model).values():
        layer.eval()  # no dropout
    assert_same(gradients(LLAMA, model), wanted)


@rows
def test_prepared_for_kbit_training(row: Row, device: torch.device) -> None:
    from peft import get_peft_model

    base = prepare_model_for_kbit_training(LLAMA.build(device, torch.bfloat16))
    model = get_peft_model(base, row.config(LLAMA)).train()
    before = snapshot(model)
    fit(LLAMA, model, steps=2)
    changed = {n for n, t in snapshot(model).items() if not torch.equal(t, before[n])}
    assert changed - adapter_buffers(model).keys() == {n for n, p in adapter_parameters(model) if p.numel()}


@all_everywhere
def test_accumulated_gradients_equal_those_of_the_whole_batch(arch: Arch, row: Row, device: torch.device) -> None:
    model = adapt(arch, row, device)
    batch = arch.inputs(device, rows=4)
    parts = [{k: v[i : i + 2] for k, v in batch.items()} for i in (0, 2)]
    whole, summed = gradients(arch, model, [batch]), gradients(arch, model, parts)
    for name in whole:
        torch.testing.assert_close(summed[name], whole[name], rtol=1e-4, atol=1e-6)


# Trainer and TRL ----------------------------------------------------------------------------------------------------

TEXT = [f"w{i % 7} w{i % 5} w{(3 * i) % 11} w{i % 3} w{(i * i) % 13}" for i in range(24)]


def tokenizer() -> PreTrainedTokenizerFast:
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{i}": 4 + i for i in range(VOCAB - 4)}}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


class Stop(TrainerCallback):
    """A kill at a step: the process is gone, what is on disk is what there is."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def trainer(row: Row, folder: Path, device: torch.device, *callbacks: TrainerCallback, **changes) -> Trainer:
    """`changes` of TrainingArguments, but for `start`, the seed of the adapter's first values."""
    model = adapt(LLAMA, row, device, live=False, seed=changes.pop("start", 2))
    ids = LLAMA.inputs(rows=12)["input_ids"].tolist()
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "save_steps": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1,
        "use_cpu": device.type == "cpu",
        **changes,
    }
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    callbacks = (AdapterCallback(), *callbacks)
    return Trainer(model, TrainingArguments(**settings), train_dataset=data, eval_dataset=data, callbacks=[*callbacks])


@all_rows
def test_trainer_resumes_bit_for_bit(row: Row, device: torch.device, tmp_path) -> None:
    """Killed in the middle of an interval, resumed from the checkpoint before it, by a new model and a new Trainer."""
    if device.type != "cpu":
        pytest.skip("bit-identity is promised on a CPU")
    straight = trainer(row, tmp_path / "straight", device)
    straight.train()
    killed = trainer(row, tmp_path / "killed", device, Stop(5))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = trainer(row, tmp_path / "killed", device, start=99)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert_same(snapshot(resumed.model), snapshot(straight.model))
    files = [load_file(tmp_path / run / "checkpoint-6" / "adapter_model.safetensors") for run in ("straight", "killed")]
    assert_same(*files)
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (straight, resumed)]
    assert losses[0] == losses[1]


@first_rows
def test_trainer_keeps_the_best_adapter(row: Row, device: torch.device, tmp_path) -> None:
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss"}
    run = trainer(row, tmp_path, device, **best, per_device_eval_batch_size=4)
    run.train()
    again = PeftModel.from_pretrained(LLAMA.build(device), run.state.best_model_checkpoint)
    assert torch.equal(LLAMA.out(run.model.eval()), LLAMA.out(again))


@all_rows
def test_sft_trainer_takes_the_config(row: Row, device: torch.device, tmp_path) -> None:
    base = LLAMA.build(device)
    args = SFTConfig(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
        dataset_num_proc=None,
        max_length=16,
        bf16=False,
        activation_checkpointing=row in FIRST,
    )
    run = SFTTrainer(
        base,
        args,
        train_dataset=Dataset.from_dict({"text": TEXT}),
        processing_class=tokenizer(),
        peft_config=row.config(LLAMA),
        callbacks=[AdapterCallback()],
    )
    before = snapshot(run.model)
    run.train()
    after = snapshot(run.model)
    changed = {n for n in after if not torch.equal(after[n], before[n])} - adapter_buffers(run.model).keys()
    assert changed == {n for n, p in adapter_parameters(run.model) if p.numel()}
    run.save_model(str(tmp_path / "saved"))
    again = PeftModel.from_pretrained(LLAMA.build(device), tmp_path / "saved")
    assert torch.equal(LLAMA.out(again), LLAMA.out(run.model.eval()))


# Compiling ----------------------------------------------------------------------------------------------------------


def check_compiled(arch: Arch, row: Row, device: torch.device, **how) -> None:
    torch.compiler.reset()
    model = adapt(arch, row, device, lora_dropout=0.0)
    wanted, grads = arch.out(model), gradients(arch, model)
    compiled = torch.compile(model, **how)
    torch.testing.assert_close(arch.out(compiled), wanted, rtol=1e-4, atol=1e-5)
    found = gradients(arch, compiled)
    for name, grad in grads.items():
        torch.testing.assert_close(found["_orig_mod." + name], grad, rtol=1e-3, atol=1e-5)


# What the kernel is given: one pair, a pool with a gate, an index. Inductor takes most of a minute for each.
KINDS_OF_BLOCKS = [row for row in FIRST if row.facts.method in ("lora", "rasa", "sbora")]


@pytest.mark.slow
@pytest.mark.parametrize("row", KINDS_OF_BLOCKS, ids=str)
def test_compiled_model_equals_eager(row: Row, device: torch.device) -> None:
    check_compiled(LLAMA, row, device)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "row"),
    [*((LLAMA, row) for row in [*FIRST, *LIVE] if row not in KINDS_OF_BLOCKS), (BERT, FIRST[1])],
    ids=lambda a: getattr(a, "name", str(a)),
)
def test_traced_model_equals_eager(arch: Arch, row: Row, device: torch.device) -> None:
    check_compiled(arch, row, device, backend="aot_eager")


@on(LLAMA, GPT2)
def test_compiled_layer_has_one_graph(arch: Arch, row: Row, device: torch.device, masks_of_peft: None) -> None:
    """Forward and backward of an adapted layer without a graph break, dropout included; eager inside (fast to test)."""
    torch.compiler.reset()
    layer = next(iter(layers(adapt(arch, row, device)).values())).train()
    x = torch.randn(4, 16, device=device, requires_grad=True)
    torch.manual_seed(0)
    layer(x).square().sum().backward()
    wanted = {n: p.grad for n, p in [*layer.named_parameters(), ("x", x)] if p.grad is not None}
    for p in [*layer.lowrank_adapters["default"].parameters(), x]:
        p.grad = None
    torch.manual_seed(0)
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    for name, p in [*layer.named_parameters(), ("x", x)]:
        if name in wanted:
            torch.testing.assert_close(p.grad, wanted[name], rtol=1e-4, atol=1e-5)
