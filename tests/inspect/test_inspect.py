"""What `rankfold inspect` says is what a dense matrix says; and it draws, reads and refuses what it should."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import torch
import transformers as hf
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from torch import nn

from rankfold import PlainLoraConfig, RasaConfig, SoraConfig
from rankfold.commands import inspect as command
from rankfold.host import registry
from rankfold.host.linear_layer import AdaptedLinear
from rankfold.inspect import inspect_adapter, inspect_run
from rankfold.inspect.grid import grid, place
from rankfold.inspect.inspection import ModuleUpdate
from rankfold.inspect.pictures import draw_adapter, draw_history
from rankfold.inspect.terminal import bars, show_adapter, show_history

TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    config = hf.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, vocab_size=48
    )  # fmt: skip
    hf.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapted(base: Path, config) -> PeftModel:
    torch.manual_seed(2)
    model = get_peft_model(hf.LlamaForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or "lowrank_" in name:
                p.add_(0.2 * torch.randn_like(p))
    return model.eval()  # pyright: ignore[reportReturnType]


def deltas(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().double()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


# Numbers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(registry.METHODS))
def test_numbers_are_those_of_the_dense_update(base: Path, method: str) -> None:
    row = registry.get(method)
    config = _config(row, base)
    model = adapted(base, config)
    found = inspect_adapter(model)
    assert found.method == row.title
    dense = deltas(model)
    assert [u.module for u in found.updates] == list(dense)
    for u in found.updates:
        sigma = torch.linalg.svdvals(dense[u.module])
        assert u.norm == pytest.approx(float(dense[u.module].norm()), rel=1e-4)
        assert u.sigma == pytest.approx(sigma[: len(u.sigma)].tolist(), rel=1e-3, abs=1e-5)
        assert u.stable_rank == pytest.approx(float(sigma.square().sum() / sigma[0] ** 2), rel=1e-3)
        shares = (sigma / sigma.sum()).clamp_min(1e-30)
        assert u.effective_rank == pytest.approx(float((-(shares * shares.log()).sum()).exp()), rel=1e-2)
        energy = sigma.square().cumsum(0) / sigma.square().sum()
        assert u.energy_rank == int((energy < 0.99).sum()) + 1
        assert (u.out, u.into) == tuple(dense[u.module].shape)
        assert u.rank <= u.start


def _config(row, base: Path):
    """A config of any method; one that needs more than r says so by raising, and is left to its own tests."""
    try:
        more = {"target_r": 2} if hasattr(row.config, "target_r") else {}
        return row.config(r=4, target_modules=TARGETS, **more)
    except ValueError as needs:
        pytest.skip(f"needs more than a rank: {needs}")


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 20}}]
)
def test_peft_s_lora_live_and_saved(base: Path, tmp_path: Path, options) -> None:
    model = adapted(base, LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, **options))
    found = inspect_adapter(model)
    for u in found.updates:
        assert u.norm == pytest.approx(float(deltas(model)[u.module].norm()), rel=1e-4)
        assert u.rank == u.start == (2 if "q_proj" in u.module and "rank_pattern" in options else 4)
    model.save_pretrained(tmp_path / "saved")
    saved = inspect_adapter(tmp_path / "saved")
    assert {u.module: u.rank for u in saved.updates} == {u.module: u.rank for u in found.updates}
    sigma = {u.module: u.sigma for u in found.updates}
    for u in saved.updates:
        assert u.sigma == pytest.approx(sigma[u.module], rel=1e-6)


@pytest.mark.parametrize("config", [PlainLoraConfig, RasaConfig])
def test_a_folder_says_what_the_model_said(base: Path, tmp_path: Path, config) -> None:
    model = adapted(base, config(r=4, target_modules=TARGETS))
    model.save_pretrained(tmp_path / "run" / "adapter")
    live, saved = inspect_adapter(model), inspect_adapter(tmp_path / "run" / "adapter")
    assert saved.updates == live.updates
    assert saved.name == "run/adapter"


def test_dead_components_are_not_kept(base: Path) -> None:
    model = adapted(base, SoraConfig(r=4, target_modules=TARGETS))
    layers = [m for m in model.modules() if isinstance(m, AdaptedLinear)]
    with torch.no_grad():
        layers[0].adapters(["default"])[0].gate.zero_()  # pyright: ignore
        layers[1].adapters(["default"])[0].gate[1:] = 0  # pyright: ignore
    first, second, third, *_ = inspect_adapter(model).updates
    assert (first.rank, first.start, first.norm, first.sigma) == (0, 4, 0.0, ())
    assert (first.effective_rank, first.stable_rank, first.energy_rank) == (0.0, 0.0, 0)
    assert (second.rank, second.energy_rank) == (1, 1)
    assert second.effective_rank == pytest.approx(1)
    assert third.rank == 4


def test_formulas() -> None:
    u = ModuleUpdate("m", 5, 6, 4, 4, (2.0, 2.0, 2.0, 2.0))
    assert u.norm == 4
    assert u.effective_rank == pytest.approx(4)
    assert u.stable_rank == pytest.approx(4)
    assert u.energy_rank == 4
    steep = ModuleUpdate("m", 5, 6, 2, 2, (10.0, 0.1))
    assert steep.energy_rank == 1
    assert steep.stable_rank == pytest.approx(1.0001)
    p = (10 / 10.1, 0.1 / 10.1)
    assert steep.effective_rank == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)))


# Layout ---------------------------------------------------------------------------------------------------------------


def test_grid() -> None:
    names = ["h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_proj", "h.1.attn.c_attn", "pooler.dense"]
    found = grid(names)
    assert found.rows == ("0", "1", "–")
    assert found.columns == ("c_attn", "attn.c_proj", "mlp.c_proj", "dense")
    assert found.table({"h.1.attn.c_attn": 3.0}, missing=-1.0)[1] == [3.0, -1.0, -1.0, -1.0]

    t5 = grid([f"{side}.block.{i}.layer.{k}.{m}" for side, k in (("encoder", 1), ("decoder", 2)) for i in (0, 1) for m in ("wi", "wo")])  # fmt: skip
    assert t5.rows == ("encoder 0", "encoder 1", "decoder 0", "decoder 1")
    assert t5.columns == ("wi", "wo")

    assert place("model.layers.3.mlp.experts.7.w1")[2] == "mlp.experts.7.w1"
    assert place("lm_head") == ("", None, "lm_head")
    nested = grid(["stages.0.blocks.0.q", "stages.0.blocks.1.q"])
    assert len(set(nested.cells.values())) == 2


def test_bars() -> None:
    assert bars([4.0, 2.0, 0.0, 0.1], 8) == "█▅ ▁"
    assert bars(range(1000), 10)[-1] == "█"
    assert len(bars(range(1000), 10)) == 10
    assert bars([0, 0], 8) == "  "
    assert bars([], 8) == ""
    assert bars([1, 2, 3], 0) == bars([1, 2, 3], -20) == "█"  # in a terminal of 40 columns or fewer


def printed(table) -> str:
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(table)
    return console.export_text()


def test_terminal_fits_80_columns(base: Path) -> None:
    model = adapted(base, SoraConfig(r=16, target_modules="all-linear"))
    text = printed(show_adapter(inspect_adapter(model)))
    assert max(map(len, text.splitlines())) <= 80
    assert "336 of 336 ranks kept in 21 matrices" in text
    for name in ("q_proj", "down_proj"):
        assert name in text
    assert "…" not in text


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_pictures(base: Path, tmp_path: Path, ending: str) -> None:
    found = inspect_adapter(adapted(base, SoraConfig(r=4, target_modules=TARGETS)))
    draw_adapter(found, tmp_path / f"a.{ending}")
    draw_history(history(tmp_path), tmp_path / f"b.{ending}")
    for name in "ab":
        assert (tmp_path / f"{name}.{ending}").read_bytes()[:5] in (b"<?xml", b"\x89PNG\r")
    with pytest.raises(ValueError, match="must end in"):
        draw_adapter(found, tmp_path / "a.gif")


def test_an_untrained_adapter_is_shown(base: Path, tmp_path: Path) -> None:
    model = get_peft_model(hf.LlamaForCausalLM.from_pretrained(base), PlainLoraConfig(r=4, target_modules=TARGETS))
    found = inspect_adapter(model)
    assert (found.rank, found.start, found.norm) == (0, 36, 0.0)
    assert "9 without any" in " ".join(printed(show_adapter(found)).split())
    draw_adapter(found, tmp_path / "zero.png")


# Runs -----------------------------------------------------------------------------------------------------------------


def write_ranks(path: Path, steps: int = 5, **more) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "step": 10 * s,
            "ranks": {"default": {f"layers.{i}.{m}": 8 - s * (i + 1) // 3 for i in (0, 1) for m in "qv"}, **more},
        }
        for s in range(1, steps + 1)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def history(folder: Path):
    write_ranks(folder / "run" / "checkpoints" / "ranks.jsonl")
    return inspect_run(folder / "run")


def test_a_run_s_ranks(tmp_path: Path) -> None:
    found = history(tmp_path)
    assert found.name == "run"
    assert found.steps == (10, 20, 30, 40, 50)
    assert found.ranks["layers.1.q"] == (8, 7, 6, 6, 5)
    assert found.total[0] == 32
    assert found.by_kind()["q"] == tuple(a + b for a, b in zip(found.ranks["layers.0.q"], found.ranks["layers.1.q"], strict=True))  # fmt: skip
    assert "rank at step 50" in printed(show_history(found))
    assert inspect_run(tmp_path / "run" / "checkpoints").steps == found.steps


def test_lines_of_a_resumed_and_a_running_run(tmp_path: Path) -> None:
    path = tmp_path / "ranks.jsonl"
    write_ranks(path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[2], lines[4][:20]]))  # a step twice, and half a line
    assert inspect_run(tmp_path).steps == (10, 20, 30, 40, 50)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["x", '{"step": 1, "ranks": {"default": {"m": 1}}}'], "ranks.jsonl:1"),
        ([], "no whole line"),
        (['{"step": 1, "ranks": {"other": {"m": 1}}}'], "adapter_name='default'.*other"),
        (
            ['{"step": 1, "ranks": {"default": {"m": 1}}}', '{"step": 2, "ranks": {"default": {"n": 1}}}'],
            "other modules",
        ),
    ],
)
def test_spoilt_ranks_are_refused(tmp_path: Path, lines: list[str], message: str) -> None:
    (tmp_path / "ranks.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        inspect_run(tmp_path)


# Refusals and the command ---------------------------------------------------------------------------------------------


def test_what_cannot_be_looked_at(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="DoRA"):
        inspect_adapter(adapted(base, LoraConfig(r=2, target_modules=TARGETS, use_dora=True)))
    with pytest.raises(ValueError, match="adapter_name='x': the model has default"):
        inspect_adapter(adapted(base, LoraConfig(r=2, target_modules=TARGETS)), adapter_name="x")
    with pytest.raises(ValueError, match="no adapter"):
        inspect_adapter(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"no adapter_config\.json"):
        inspect_adapter(tmp_path)
    adapted(base, IA3Config(target_modules=["v_proj"], feedforward_modules=[])).save_pretrained(tmp_path / "ia3")
    with pytest.raises(ValueError, match="IA3"):
        inspect_adapter(tmp_path / "ia3")
    nan = adapted(base, PlainLoraConfig(r=2, target_modules=TARGETS))
    with torch.no_grad():
        next(p for n, p in nan.named_parameters() if n.endswith(".up"))[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"NaN or infinity"):
        inspect_adapter(nan)


def test_the_command(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    adapted(base, PlainLoraConfig(r=4, target_modules=TARGETS)).save_pretrained(run / "adapter")
    command.run(command.Options(path=str(run), picture=str(tmp_path / "p.svg")))  # a run whose ranks do not change
    assert "rank kept" in capsys.readouterr().out
    assert not (tmp_path / "p-ranks.svg").exists()

    write_ranks(run / "checkpoints" / "ranks.jsonl")
    with pytest.raises(FileExistsError, match="--force"):
        command.run(command.Options(path=str(run), picture=str(tmp_path / "p.svg")))
    assert not (tmp_path / "p-ranks.svg").exists()
    command.run(command.Options(path=str(run), picture=str(tmp_path / "p.svg"), force=True))
    shown = capsys.readouterr().out
    assert "rank at step 50" in shown
    assert "p-ranks.svg" in shown
    assert (tmp_path / "p-ranks.svg").exists()

    command.run(command.Options(path=str(run), json=True))
    found = json.loads(capsys.readouterr().out)
    assert len(found["adapter"]["updates"]) == 9
    assert found["run"]["steps"] == [10, 20, 30, 40, 50]
    command.run(command.Options(path=str(run / "adapter"), json=True))
    assert set(json.loads(capsys.readouterr().out)) == {"adapter"}

    for name in ("adapter_config.json", "adapter_model.safetensors"):
        command.run(command.Options(path=str(run / "adapter" / name), json=True))
        assert set(json.loads(capsys.readouterr().out)) == {"adapter"}
    command.run(command.Options(path=str(run / "checkpoints" / "ranks.jsonl"), json=True))
    assert set(json.loads(capsys.readouterr().out)) == {"run"}
    for path in (base, base / "model.safetensors", base / "config.json"):
        with pytest.raises(ValueError, match="neither an adapter"):
            command.run(command.Options(path=str(path)))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        command.run(command.Options(path=str(tmp_path / "nothing")))
    with pytest.raises(ValueError, match="must end in"):
        command.run(command.Options(path=str(run), picture="x.bmp"))
