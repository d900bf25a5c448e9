"""Controllers on an optimiser in a bare loop: when they act, what they survive, what they refuse."""

from __future__ import annotations

import io
import json
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import toy
from accelerate import Accelerator
from accelerate.state import GradientState
from peft import PeftModel, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from torch import nn
from toy import SCHEDULED, STEPS, adamw, adapted, adapters, alive, assert_same, train
from transformers import LlamaConfig, LlamaForCausalLM

import rankfold
from rankfold import AdaSvdConfig, ColaConfig, SoraConfig, attach
from rankfold.errors import RankfoldError

IDS = torch.arange(6)[None]
scheduled = pytest.mark.parametrize("method", SCHEDULED)
METHODS = [*SCHEDULED, "rasa"]


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))


def save(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> io.BytesIO:
    """What a careful loop writes, through a file's format."""
    file = io.BytesIO()
    states = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "rng": torch.get_rng_state()}
    torch.save({"adapter": toy.state(model), **states}, file)
    file.seek(0)
    return file


def linear(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (2 * STEPS))


def run(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, steps: range) -> None:
    for step in steps:
        train(model, optimizer, [step])
        scheduler.step()


# Resuming ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attach_first", [True, False], ids=["attach-load", "load-attach"])
@pytest.mark.parametrize("method", METHODS)
def test_resumed_is_uninterrupted(method: str, attach_first: bool) -> None:
    whole = adapted(method)
    optimizer = adamw(whole)
    scheduler = linear(optimizer)
    handle = attach(whole, optimizer, total_steps=STEPS)
    files = []
    for step in range(STEPS):
        files.append(save(whole, optimizer, scheduler))
        run(whole, optimizer, scheduler, range(step, step + 1))
    for step in (0, 1, 5, STEPS - 1):
        model = adapted(method, seed=99)  # its own first values must not matter
        again = adamw(model)
        rate = linear(again)
        saved = torch.load(files[step], weights_only=True)
        set_peft_model_state_dict(model, saved["adapter"])
        second = attach(model, again, total_steps=STEPS) if attach_first else None
        again.load_state_dict(saved["optimizer"])
        rate.load_state_dict(saved["scheduler"])
        second = second or attach(model, again, total_steps=STEPS)
        torch.set_rng_state(saved["rng"])
        run(model, again, rate, range(step, STEPS))
        assert_same(toy.state(model), toy.state(whole), f"from step {step}")
        assert_same(again.state_dict(), optimizer.state_dict(), f"from step {step}")
        assert second.ranks() == handle.ranks()
        assert model.peft_config["default"].schedule == whole.peft_config["default"].schedule


@scheduled
def test_saved_state_is_of_its_moment(method: str) -> None:
    """The state dict that a loop keeps in memory goes along with the optimiser's moments, and loading copies it."""
    model = adapted(method)
    optimizer = adamw(model)
    handle = attach(model, optimizer, total_steps=STEPS)
    train(model, optimizer, range(3))
    kept = torch.load(save(model, optimizer, linear(optimizer)), weights_only=True)["optimizer"]
    train(model, optimizer, range(3, 5))
    optimizer.load_state_dict(kept)
    train(model, optimizer, range(3, 4))
    assert handle.controllers["default"].step == 4
    assert kept["param_groups"][0]["rankfold"]["default"]["step"] == 3


@scheduled
def test_a_resumed_run_with_no_step_left_has_its_schedule(method: str, tmp_path: Path) -> None:
    model = adapted(method)
    optimizer = adamw(model)
    attach(model, optimizer, total_steps=STEPS)
    train(model, optimizer, range(STEPS))
    again = adapted(method)
    other = adamw(again)
    other.load_state_dict(optimizer.state_dict())
    attach(again, other, total_steps=STEPS)
    again.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())["schedule"]
    assert written == {"step": STEPS, "total_steps": STEPS, "finished": True}


def test_a_used_config_starts_anew() -> None:
    """PEFT keeps the very object that the user gave; what an earlier run wrote into it is not this run's."""
    model = adapted("sora", schedule={"step": 9, "total_steps": 9, "finished": True})
    attach(model, adamw(model), total_steps=STEPS)
    assert model.peft_config["default"].schedule is None


@pytest.mark.parametrize(
    ("method", "other", "changes"),
    [
        ("sora", "sora", {"target_modules": ["a"]}),
        ("sora", "sora", {"r": 3}),
        ("adalora", "adalora", {"r": 3}),
        ("dynamic_dora", "dynamic_dora", {"rank_pattern": {"a": 3, "b": 5}}),
        ("sora", "adalora", {}),
        ("adalora", "dynamic_dora", {}),
    ],
)
def test_the_state_of_another_model_is_refused(method: str, other: str, changes: dict[str, Any]) -> None:
    model, stranger = adapted(method), adapted(other, **changes)
    first, second = adamw(model), adamw(stranger)
    attach(model, first, total_steps=STEPS)
    train(model, first, range(2))
    saved = first.state_dict()["param_groups"][0]["rankfold"]
    second.param_groups[0]["rankfold"] = saved
    with pytest.raises(ValueError, match="resume with the config it was saved with"):
        attach(stranger, second, total_steps=STEPS)
    assert not any(a.scheduled for a in adapters(stranger))
    del second.param_groups[0]["rankfold"]
    attach(stranger, second, total_steps=STEPS)
    before = toy.state(stranger)
    second.param_groups[0]["rankfold"] = saved
    with pytest.raises(ValueError, match="resume with the config it was saved with"):
        train(stranger, second, [0])
    assert_same(toy.state(stranger), before)


@scheduled
def test_loaded_state_follows_the_model_to_its_device(method: str) -> None:
    """Trainer loads optimizer.pt onto the CPU whatever the model's device; here the device is "meta"."""
    model = adapted(method)
    controller = attach(model, adamw(model), total_steps=STEPS).controllers["default"]
    far = adapted(method).to("meta")
    moved = attach(far, adamw(far), total_steps=STEPS).controllers["default"]
    moved.load_state(controller.state)
    tensors = [t for t in torch.utils._pytree.tree_leaves(moved.state) if isinstance(t, torch.Tensor)]
    assert tensors
    assert all(t.is_meta for t in tensors)


# When a controller acts ----------------------------------------------------------------------------------------------


@scheduled
def test_only_real_steps_count(method: str) -> None:
    model = adapted(method)
    optimizer = adamw(model)
    controller = attach(model, optimizer, total_steps=STEPS).controllers["default"]
    for micro in range(6):
        toy.loss(model, micro).backward()
        if micro % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
    assert controller.step == 2


@scheduled
def test_accelerate(method: str) -> None:
    """Attached before `prepare`, which loads the optimiser's state into itself, or after, through the wrapper."""
    GradientState._reset_state()  # a run of another test that broke off mid-epoch leaves its last batch there
    results = []
    for before in (True, False):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = adapted(method, lora_dropout=0.0)
        optimizer = adamw(model)
        handle = attach(model, optimizer, total_steps=STEPS) if before else None
        wrapped, prepared = accelerator.prepare(model, optimizer)
        handle = handle or attach(wrapped, prepared, total_steps=STEPS)
        for micro in range(2 * STEPS):
            with accelerator.accumulate(wrapped):
                accelerator.backward(toy.loss(wrapped, micro))
                prepared.step()
                prepared.zero_grad()
        assert handle.controllers["default"].step == STEPS
        results.append(toy.state(model))
    assert_same(results[0], results[1])


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@scheduled
def test_a_step_that_amp_skips_is_none(method: str, fused: bool) -> None:
    """A fused optimiser's step is called even then, with scaled gradients, and skips inside its kernel."""

    def trained(overflow: bool) -> tuple[PeftModel, Any]:
        model = adapted(method, lora_dropout=0.0)
        optimizer = adamw(model, fused=fused)
        handle = attach(model, optimizer, total_steps=STEPS)
        # only powers of two, and no growth: scaling is exact
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
        for step in range(STEPS):
            if overflow and step == 4:
                before = toy.state(model)
                scaler.scale(toy.loss(model, step) * float("inf")).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                assert_same(toy.state(model), before)
            scaler.scale(toy.loss(model, step)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return model, handle.controllers["default"]

    model, controller = trained(overflow=True)
    plain, _ = trained(overflow=False)
    assert controller.step == STEPS
    assert_same(toy.state(model), toy.state(plain))
    unscaled = adapted(method, lora_dropout=0.0)
    optimizer = adamw(unscaled, fused=fused)
    attach(unscaled, optimizer, total_steps=STEPS)
    train(unscaled, optimizer, range(STEPS))
    assert_same(toy.state(plain), toy.state(unscaled))


@scheduled
def test_only_the_trained_adapter_moves(method: str) -> None:
    """Of two adapters, although AdamW(model.parameters()) holds both."""
    model = adapted(method)
    model.add_adapter("second", toy.config(method, init_lora_weights=False))
    frozen = toy.state(model, "second")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    handle = attach(model, optimizer, total_steps=STEPS)
    assert list(handle.controllers) == ["default"]
    train(model, optimizer, range(STEPS))
    assert_same(toy.state(model, "second"), frozen)
    handle.remove()

    model.set_adapter("second")
    done = toy.state(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    assert list(attach(model, optimizer, total_steps=STEPS).controllers) == ["second"]
    train(model, optimizer, range(STEPS))
    assert_same(toy.state(model), done)
    assert not torch.equal(next(iter(toy.state(model, "second").values())), next(iter(frozen.values())))


@scheduled
def test_attached_twice_acts_once(method: str) -> None:
    once, twice = adapted(method), adapted(method)
    first, second = adamw(once), adamw(twice)
    attach(once, first, total_steps=STEPS)
    old = attach(twice, second, total_steps=STEPS)
    new = attach(twice, second, total_steps=STEPS)
    for model, optimizer in ((once, first), (twice, second)):
        torch.manual_seed(0)
        train(model, optimizer, range(STEPS))
    assert new.controllers["default"].step == STEPS
    assert_same(toy.state(once), toy.state(twice))
    old.remove()  # of no effect any more
    assert len(second._optimizer_step_pre_hooks) == 1


@scheduled
def test_removed_acts_no_more(method: str) -> None:
    model = adapted(method)
    optimizer = adamw(model)
    handle = attach(model, optimizer, total_steps=STEPS)
    train(model, optimizer, range(2))
    handle.remove()
    handle.remove()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not any(a.scheduled for a in adapters(model))


def test_a_method_without_schedule_needs_nothing() -> None:
    model = adapted("rasa")
    optimizer = adamw(model)
    assert attach(model, optimizer).controllers == {}
    assert "rankfold" not in optimizer.param_groups[0]
    assert model.peft_config["default"].schedule is None


def test_a_closure_is_refused() -> None:
    model = adapted("sora")
    optimizer = adamw(model)
    attach(model, optimizer)
    before = toy.state(model)
    with pytest.raises(TypeError, match="closure"):
        optimizer.step(lambda: 0.0)
    with pytest.raises(TypeError, match="closure"):
        optimizer.step(closure=lambda: 0.0)
    assert_same(toy.state(model), before)


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.encoder = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own
@pytest.mark.parametrize("how", ["wrapped", "injected", "compiled"])
@scheduled
def test_wherever_the_layers_are(method: str, how: str, masks_of_peft: None) -> None:
    reference = adapted(method)
    if how == "injected":
        with torch.random.fork_rng():
            torch.manual_seed(7)
            base = toy.Toy()
            torch.manual_seed(1)
            model: Any = inject_adapter_in_model(toy.config(method), base).train()
    else:
        inner = adapted(method)
        model = Wrapper(inner) if how == "wrapped" else torch.compile(inner, backend="eager")
    for m in (reference, model):
        torch.manual_seed(0)
        optimizer = adamw(m)
        assert attach(m, optimizer, total_steps=STEPS).controllers["default"].adapters == adapters(m)
        train(m, optimizer, range(STEPS))
    assert alive(model) == alive(reference)
    for mine, theirs in zip(adapters(model), adapters(reference), strict=True):
        assert_same(mine.state_dict(), theirs.state_dict())


# The schedule that nobody runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@scheduled
def test_training_without_the_controller_is_noticed(method: str, fused: bool, tmp_path: Path) -> None:
    model = adapted(method)
    optimizer = adamw(model, fused=fused)
    for _ in range(2):  # at every step, as a notebook's cell is run again
        with pytest.raises(RankfoldError, match=r"without its controller.*rankfold\.attach.*allow_unscheduled=True"):
            train(model, optimizer, range(1))
    with pytest.raises(RuntimeError, match="allow_unscheduled=True"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    model.peft_config["default"].allow_unscheduled = True
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    train(model, optimizer, range(1))  # what was said once is enough


def test_one_warning_is_enough() -> None:
    model = adapted("sora", allow_unscheduled=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, adamw(model), range(4))
    assert len([w for w in caught if "without its controller" in str(w.message)]) == 1


@scheduled
def test_no_false_alarm(method: str, tmp_path: Path) -> None:
    """Loading, evaluating, a train-mode forward or backward without a step, moving and merging are no training."""
    adapted(method).save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(toy.Toy(), str(tmp_path / "saved"))
    loaded.save_pretrained(tmp_path / "again")
    model = adapted(method)
    with torch.no_grad():
        toy.loss(model.eval(), 0)
    for step in range(2):
        toy.loss(model.train(), step).backward()
    model.to(torch.float64).to(torch.float32)
    model.merge_adapter()
    model.unmerge_adapter()
    model.zero_grad()
    toy.loss(model, 2)
    model.save_pretrained(tmp_path / "untrained")


def test_no_false_alarm_where_a_model_is_loaded_after_a_forward(tmp_path: Path) -> None:
    saved = toy.state(adapted("sora"))
    model = adapted("sora")
    toy.loss(model, 0)
    set_peft_model_state_dict(model, saved)
    toy.loss(model, 1)
    model.save_pretrained(tmp_path)


@scheduled
def test_with_the_controller_nothing_is_said(method: str, tmp_path: Path) -> None:
    model = adapted(method)
    toy.loss(model, 0)  # a forward before attaching
    optimizer = adamw(model)
    handle = attach(model, optimizer, total_steps=STEPS)
    train(model, optimizer, range(STEPS))
    handle.remove()
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())["schedule"]
    assert written == {
        "step": STEPS,
        "total_steps": STEPS if method != "sora" else written["total_steps"],
        "finished": True,
    }
    toy.loss(model.train(), 0)
    model.save_pretrained(tmp_path)


@scheduled
def test_training_on_after_the_controller_went_is_noticed(method: str) -> None:
    model = adapted(method)
    optimizer = adamw(model)
    handle = attach(model, optimizer, total_steps=STEPS)
    train(model, optimizer, range(STEPS))
    handle.remove()
    with pytest.raises(RankfoldError, match="without its controller"):
        train(model, optimizer, range(4))


# Bad days ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["adalora", "dynamic_dora"])
def test_total_steps_must_be_known(method: str) -> None:
    model = adapted(method)
    with pytest.raises(ValueError, match=r"total_step is not known.*attach\(total_steps=\.\.\.\)"):
        attach(model, adamw(model))
    assert not any(a.scheduled for a in adapters(model))
    model = adapted(method, total_step=STEPS)
    assert attach(model, adamw(model)).controllers["default"].total_steps == STEPS
    attach(adapted("sora"), adamw(adapted("sora")))  # needs none


@pytest.mark.parametrize("method", ["adalora", "dynamic_dora"])
def test_a_schedule_longer_than_training_is_said_and_recorded(method: str, tmp_path: Path) -> None:
    model = adapted(method, total_step=10 * STEPS)
    optimizer = adamw(model)
    with pytest.warns(UserWarning, match=r"total_step=120 is longer than the run of 12 steps"):
        attach(model, optimizer, total_steps=STEPS)
    train(model, optimizer, range(STEPS))
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())["schedule"]
    assert written == {"step": STEPS, "total_steps": 10 * STEPS, "finished": False}


@pytest.mark.parametrize(
    ("method", "changes"), [("adalora", {}), ("adalora", {"tfinal": 0, "deltaT": 5}), ("dynamic_dora", {})]
)
def test_training_longer_than_the_schedule_keeps_the_ranks(method: str, changes: dict[str, Any]) -> None:
    model = adapted(method, total_step=STEPS, **changes)
    optimizer = adamw(model)
    attach(model, optimizer, total_steps=3 * STEPS)
    train(model, optimizer, range(STEPS))
    final = [a.gate != 0 for a in adapters(model)]
    assert sum(alive(model)) == 4
    for step in range(STEPS):
        train(model, optimizer, [step])
        assert_same([a.gate != 0 for a in adapters(model)], final)


@pytest.mark.parametrize("method", ["adalora", "dynamic_dora"])
def test_a_run_that_goes_on_shorter_still_cuts_to_the_budget(method: str) -> None:
    """At step 8 of 40 hardly any component is out; of 12, all of them should have been."""
    model = adapted(method)
    optimizer = adamw(model)
    attach(model, optimizer, total_steps=40)
    train(model, optimizer, range(8))
    assert sum(alive(model)) > 4
    attached = attach(model, optimizer, total_steps=STEPS)
    train(model, optimizer, range(8, STEPS))
    assert attached.controllers["default"].finished()
    assert sum(alive(model)) == 4


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("adalora", {"tinit": 6, "tfinal": 6}),
        ("adalora", {"tinit": 0, "tfinal": 30}),
        ("dynamic_dora", {"start": 0.5, "end": 0.45}),
    ],
)
def test_a_run_too_short_to_cut_is_refused(method: str, changes: dict[str, Any]) -> None:
    model = adapted(method, **changes)
    with pytest.raises(ValueError, match=r"leave no step to cut ranks in a run of 12"):
        attach(model, adamw(model), total_steps=STEPS)


@pytest.mark.parametrize("method", ["adalora", "dynamic_dora"])
def test_a_budget_above_the_start_is_refused(method: str) -> None:
    with pytest.raises(ValueError, match=r"target_r=5 must be in 1\.\.r=4"):
        toy.config(method, target_r=5)
    with pytest.raises(ValueError, match=r"total_step=0 must be"):
        toy.config(method, total_step=0)
    model = adapted(method, target_r=3, rank_pattern={"a": 1})
    with pytest.raises(ValueError, match=r"target_r=3 asks for 6 ranks over 2 modules, which start with 5"):
        attach(model, adamw(model), total_steps=STEPS)
    model = adapted(method, target_r=4)  # nothing to cut
    optimizer = adamw(model)
    attach(model, optimizer, total_steps=STEPS)
    train(model, optimizer, range(STEPS))
    assert alive(model) == [4, 4]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@scheduled
def test_a_nan_gradient_names_its_module_and_changes_nothing(method: str, bad: float) -> None:
    model = adapted(method)
    optimizer = adamw(model)
    controller = attach(model, optimizer, total_steps=STEPS).controllers["default"]
    train(model, optimizer, range(3))
    before, state = toy.state(model), torch.load(save(model, optimizer, linear(optimizer)), weights_only=True)
    optimizer.zero_grad()
    toy.loss(model, 3).backward()
    adapters(model)[1].gate.grad[0] = bad
    with pytest.raises(FloatingPointError, match=r"at b is not finite.*learning rate"):
        optimizer.step()
    assert_same(toy.state(model), before)
    assert_same(optimizer.state_dict()["state"], state["optimizer"]["state"])
    assert controller.step == 3


def test_nan_weights_are_refused() -> None:
    model = adapted("dynamic_dora")
    optimizer = adamw(model)
    attach(model, optimizer, total_steps=STEPS)
    toy.loss(model, 0).backward()
    with torch.no_grad():
        adapters(model)[0].up[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="at a is not finite"):
        optimizer.step()


def test_methods_of_one_model_are_separate() -> None:
    """PEFT refuses two methods in one PeftModel; two adapters of one method train at once when both are active."""
    model = adapted("sora")
    model.add_adapter("second", toy.config("sora", threshold=0.0))
    model.base_model.set_adapter(["default", "second"])
    optimizer = adamw(model)
    handle = attach(model, optimizer)
    train(model, optimizer, range(30))
    assert handle.controllers.keys() == {"default", "second"}
    assert alive(model) != [4, 4]
    assert [a.alive() for a in adapters(model, "second")] == [4, 4]
    assert {name: list(ranks) for name, ranks in handle.ranks().items()} == {
        "default": ["a", "b"],
        "second": ["a", "b"],
    }


# Two processes -------------------------------------------------------------------------------------------------------


def _ddp_child(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", f"file://{store}", timedelta(seconds=60), world_size=2, rank=rank)
        result = {}
        for method in SCHEDULED:
            model = adapted(method, seed=rank)  # DDP sends rank 0's first values
            ddp = nn.parallel.DistributedDataParallel(model)
            optimizer = adamw(model)
            handle = attach(ddp, optimizer, total_steps=STEPS)
            torch.manual_seed(rank)  # another dropout
            masks = []
            for step in range(STEPS):
                optimizer.zero_grad()
                toy.loss(ddp, 2 * step + rank).backward()  # other data
                optimizer.step()
                masks.append([a.gate.detach().clone() for a in adapters(model)])
            result[method] = {"gates": masks, "state": toy.state(model), "optimizer": optimizer.state_dict()}
            result[method]["ranks"] = handle.ranks()
        dist.barrier()
        dist.destroy_process_group()
        torch.save(result, f"{out}/{rank}.pt")
    except BaseException:
        Path(out, f"{rank}.error").write_text(traceback.format_exc())
        raise


def test_two_processes_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    context = toy.processes()
    children = [
        context.Process(target=_ddp_child, args=(rank, str(tmp_path / "store"), str(tmp_path)), daemon=True)
        for rank in range(2)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        if child.is_alive():
            child.kill()
    errors = "\n".join(p.read_text() for p in tmp_path.glob("*.error"))
    assert [c.exitcode for c in children] == [0, 0], errors
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert_same(first, second)
    assert sum(first["adalora"]["ranks"]["default"].values()) == 4
    assert sum(first["dynamic_dora"]["ranks"]["default"].values()) == 4
    assert sum(first["sora"]["ranks"]["default"].values()) < 8


def test_the_public_names() -> None:
    assert rankfold.attach is attach


# What lacks something ---------------------------------------------------------------------------------------------------


@scheduled
def test_a_schedule_that_ran_does_not_start_again_without_its_state(method: str, tmp_path: Path) -> None:
    """A loop that loads only the adapter: living ranks went up again, and nobody was told."""
    model = adapted(method)
    optimizer = adamw(model)
    attach(model, optimizer, total_steps=STEPS)
    train(model, optimizer, range(6))
    model.save_pretrained(tmp_path)
    resumed = PeftModel.from_pretrained(toy.Toy(), tmp_path, is_trainable=True).train()
    optimizer = adamw(resumed)
    attach(resumed, optimizer, total_steps=STEPS)
    before = {n: p.detach().clone() for n, p in resumed.named_parameters()}
    with pytest.raises(ValueError, match="has run 6 steps, but this optimiser has no state of it"):
        train(resumed, optimizer, [6])
    assert all(torch.equal(p, before[n]) for n, p in resumed.named_parameters())
    resumed.peft_config["default"].schedule = None  # on purpose
    train(resumed, optimizer, [6])


@scheduled
def test_an_optimiser_that_holds_part_of_an_adapter_is_refused(method: str) -> None:
    """Matrices in one optimiser, gates in another: two controllers for one adapter, and ranks that never fall."""
    model = adapted(method)
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim == 2]
    with pytest.raises(ValueError, match=r"holds down, up but not gate"):
        attach(model, torch.optim.SGD(matrices, lr=0.1), total_steps=STEPS)


@pytest.mark.parametrize(("tinit", "total"), [(11, 12), (0, 1)])
def test_a_schedule_that_could_never_cut_is_refused(tinit: int, total: int) -> None:
    model = adapted("adalora", tinit=tinit, tfinal=0)
    with pytest.raises(ValueError, match=r"leave no step to cut ranks"):
        attach(model, adamw(model), total_steps=total)


def test_one_output_has_no_variance_and_no_nan() -> None:
    base = nn.Sequential(nn.Linear(6, 1), nn.Linear(1, 3))
    model = get_peft_model(base, toy.config("dynamic_dora", target_modules=["0", "1"], r=2, target_r=1))
    optimizer = adamw(model)
    attach(model, optimizer, total_steps=STEPS)
    for _ in range(3):
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize(
    ("method", "frozen", "changes"),
    [
        ("sora", ["gate"], {"preset": "reference"}),
        ("adalora", ["down", "up"], {}),
        ("dynamic_dora", ["down", "up"], {}),
    ],
)
def test_what_is_frozen_has_no_penalty(method: str, frozen: list[str], changes: dict[str, Any]) -> None:
    model = adapted(method, **changes)
    kept = [getattr(a, name).requires_grad_(False) for a in adapters(model) for name in frozen]
    optimizer, before = adamw(model), [p.clone() for p in kept]
    attach(model, optimizer, total_steps=STEPS)
    train(model, optimizer, range(2))
    assert_same(kept, before)


def test_an_optimiser_without_a_rate_is_refused_before_anything_moves() -> None:
    model = adapted("sora")
    optimizer = adamw(model)
    attach(model, optimizer, total_steps=STEPS)
    for group in optimizer.param_groups:
        group["lr"] = None  # as transformers' Adafactor keeps it
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"lr is None; set gate_lr"):
        train(model, optimizer, [0])
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# Several adapters ----------------------------------------------------------------------------------------------------


def test_one_config_for_two_adapters_keeps_two_schedules() -> None:
    config = SoraConfig(r=4, target_modules=["q_proj"], threshold=0.0)
    model = get_peft_model(llama(), config, adapter_name="one")
    model.add_adapter("two", config)
    records = []
    for name in ("one", "two"):
        model.set_adapter(name)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        handle = attach(model, optimizer, total_steps=3)
        for _ in range(1 if name == "one" else 3):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        handle.remove()
        records.append(model.peft_config["one"].schedule)
    assert records[0] is not None
    assert records[1] == records[0] != model.peft_config["two"].schedule
    assert config.schedule is None


class Towers(nn.Module):
    def __init__(self, names: tuple[str, str]) -> None:
        super().__init__()
        configs = (
            SoraConfig(r=4, target_modules=["q_proj"], threshold=0.0),
            AdaSvdConfig(r=4, target_r=1, target_modules=["q_proj"]),
        )
        self.a, self.b = (get_peft_model(llama(), c, adapter_name=n) for c, n in zip(configs, names, strict=True))


def test_each_of_two_models_has_the_controller_of_its_own_config() -> None:
    towers = Towers(("one", "two"))
    handle = attach(towers, torch.optim.AdamW([p for p in towers.parameters() if p.requires_grad]), total_steps=6)
    assert {name: type(c).__name__ for name, c in handle.controllers.items()} == {
        "one": "SoraController",
        "two": "AdaSvdController",
    }
    towers = Towers(("default", "default"))
    with pytest.raises(RankfoldError, match="two adapted models in one module call their adapter 'default'"):
        attach(towers, torch.optim.AdamW([p for p in towers.parameters() if p.requires_grad]), total_steps=6)


def test_two_chains_give_the_learning_rate_back() -> None:
    fields: dict[str, Any] = {"r": 2, "links": 2, "restart_schedule": "linear"}
    model = get_peft_model(llama(), ColaConfig(target_modules=["q_proj"], **fields), adapter_name="one")
    model.add_adapter("two", ColaConfig(target_modules=["v_proj"], **fields))
    model.base_model.set_adapter(["one", "two"])  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    attach(model, optimizer, total_steps=8)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.param_groups[0]["lr"] == 0.5
