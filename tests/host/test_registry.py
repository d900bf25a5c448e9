"""What one registration does to the others, what a notebook cell run twice does, and where third parties' methods come from."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import rankfold
from rankfold import PlainLoraConfig, SoraConfig
from rankfold.control.controller import Controller
from rankfold.errors import RankfoldError
from rankfold.host import plugins, registry
from rankfold.host.registry import Method, register
from rankfold.methods.gated import BudgetConfig
from rankfold.methods.lora import Lora
from rankfold.plan.candidates import Candidate
from rankfold.plan.match import solve

pytestmark = pytest.mark.usefixtures("own_registry")

CELL = '''
from dataclasses import dataclass
from typing import ClassVar
from rankfold.control.controller import Controller
from rankfold.host.config import LowRankConfig
from rankfold.host.registry import Method, register
from rankfold.methods.lora import Lora

@dataclass
class CellConfig(LowRankConfig):
    """{words}"""
    method: ClassVar[str] = "cell"

class Cell(Lora):
    words = "{words}"

register(Method("cell", "{words}", "none", "From a cell.", CellConfig, Cell, {controller}))
'''


class ChainConfig(PlainLoraConfig):
    method: ClassVar[str] = "chain"


class ChainController(Controller):
    """Like COLA's or Delta-LoRA's: a schedule over plain LoRA's adapter."""


CHAIN = Method("chain", "Chain", "none", "A schedule over LoRA.", ChainConfig, Lora, ChainController)


def run_cell(words: str, module: str = "notebook", controller: str = "None") -> dict[str, Any]:
    cell: dict[str, Any] = {"__name__": module}
    exec(compile(CELL.format(words=words, controller=controller), module, "exec", dont_inherit=True), cell)
    return cell


def adapted(config: Any) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)  # pyright: ignore[reportArgumentType]


def layer(model: PeftModel) -> Any:
    return model.base_model.model[0].lowrank_adapters["default"]  # pyright: ignore


def step(model: PeftModel) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()


# --- one registration and another's class ---------------------------------------------------------------------------------


def test_a_schedule_over_anothers_adapter_leaves_that_one_alone() -> None:
    register(CHAIN)
    lora, chain = adapted(PlainLoraConfig(target_modules=["0"])), adapted(ChainConfig(target_modules=["0"]))
    assert not layer(lora).has_schedule
    assert layer(chain).has_schedule
    step(lora)  # warnings are errors here
    assert not layer(lora).trained_unscheduled()
    with pytest.raises(RankfoldError, match="Lora at 0 is being trained without its controller"):
        step(chain)
    assert layer(chain).trained_unscheduled()
    assert (PlainLoraConfig.scheduled, ChainConfig.scheduled, SoraConfig.scheduled) == (False, True, True)


def test_an_unscheduled_method_over_a_scheduled_one_s_classes() -> None:
    class CalmConfig(SoraConfig):
        method: ClassVar[str] = "calm"

    register(Method("calm", "Calm", "none", "No schedule.", CalmConfig, registry.get("sora").adapter))
    assert not layer(adapted(CalmConfig(target_modules=["0"]))).has_schedule
    assert layer(adapted(SoraConfig(target_modules=["0"]))).has_schedule


def test_tuners_of_one_adapter_class_are_told_apart() -> None:
    register(CHAIN)
    models = [adapted(PlainLoraConfig(target_modules=["0"])), adapted(ChainConfig(target_modules=["0"]))]
    assert [type(m.base_model).__name__ for m in copy.deepcopy(models)] == ["lora_tuner", "chain_tuner"]  # pyright: ignore
    again = pickle.loads(pickle.dumps(models))
    assert [type(m.base_model) for m in again] == [type(m.base_model) for m in models]
    saved = io.BytesIO()
    torch.save(models[1], saved)
    saved.seek(0)
    assert torch.equal(torch.load(saved, weights_only=False)(torch.ones(1, 4)), models[1](torch.ones(1, 4)))


def test_a_third_party_s_model_is_unpickled_in_another_process(tmp_path: Path) -> None:
    file = tmp_path / "third_party_cell.py"
    file.write_text(CELL.format(words="a", controller="None"))
    module = plugins.load_plugin(file)
    torch.save(adapted(module.CellConfig(target_modules=["0"])), tmp_path / "model.pt")
    script = "import sys, torch, rankfold, third_party_cell; print(type(torch.load(sys.argv[1], weights_only=False).base_model).__name__)"
    found = python(script, str(tmp_path / "model.pt"), path=tmp_path)
    assert found.stdout.strip() == "cell_tuner", found.stderr


# --- a cell run twice -----------------------------------------------------------------------------------------------------


def test_a_cell_run_twice_trains_the_second_definition(tmp_path: Path) -> None:
    first = run_cell("first")
    model = adapted(first["CellConfig"](target_modules=["0"]))
    second = run_cell("second", controller="Controller")
    assert registry.get("cell").title == "second"
    new = adapted(second["CellConfig"](target_modules=["0"]))
    assert (layer(model).words, layer(new).words) == ("first", "second")
    assert (layer(model).has_schedule, layer(new).has_schedule) == (False, True)
    new.peft_config["default"].allow_unscheduled = True  # pyright: ignore
    new.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 4)), str(tmp_path))  # pyright: ignore
    assert layer(loaded).words == "second"
    assert type(loaded.peft_config["default"]) is second["CellConfig"]
    run_cell("third")
    assert not registry.get("cell").config.scheduled


def test_a_name_belongs_to_one_module() -> None:
    run_cell("mine")
    with pytest.raises(RankfoldError, match=r"name='cell' is taken by mine \(notebook.CellConfig\)"):
        run_cell("theirs", module="elsewhere")
    assert registry.get("cell").title == "mine"


@pytest.mark.parametrize("name", ["", "x", "Big", "two words", "peft:lora", "end_", "a.b"])
def test_a_name_must_fit_into_files(name: str) -> None:
    class OddConfig(PlainLoraConfig):
        method: ClassVar[str] = name

    with pytest.raises(RankfoldError, match="Method: name="):
        register(Method(name, "Odd", "none", "", OddConfig, Lora))
    assert name not in registry.METHODS


# --- modules and files that register --------------------------------------------------------------------------------------


def test_a_file_is_imported_once_and_beside_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_plugin.py").write_text("WORDS = 'with neighbour'")
    file = tmp_path / "my_plugin.py"
    file.write_text("from neighbour_of_plugin import WORDS\n" + CELL.format(words="x", controller="None"))
    module = plugins.load_plugin(file)
    assert plugins.load_plugin(str(file)) is module is plugins.load_plugin("my_plugin")
    assert pickle.loads(pickle.dumps(module.Cell)) is module.Cell


def test_what_cannot_be_imported_is_one_sentence(tmp_path: Path) -> None:
    broken = tmp_path / "broken_plugin.py"
    broken.write_text("1 / 0")
    for name, reason in {
        str(broken): "ZeroDivisionError: division by zero",
        str(tmp_path / "gone.py"): f"there is no file {tmp_path / 'gone.py'}",
        "no_such_module_at_all": "ModuleNotFoundError: No module named 'no_such_module_at_all'",
        str(tmp_path / "json.py"): "json: another module has that name; rename the file",
    }.items():
        (tmp_path / "json.py").touch()
        with pytest.raises(RankfoldError, match=r"^imports: ") as error:
            plugins.load_plugin(name)
        assert reason in str(error.value)
    assert "broken_plugin" not in sys.modules


def python(script: str, *arguments: str, path: Path) -> subprocess.CompletedProcess[str]:
    places = os.pathsep.join([str(path), str(Path(rankfold.__file__).parents[1])])
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, "PYTHONPATH": places},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_entry_points(tmp_path: Path) -> None:
    """One names a module, one a row, one is broken; `import rankfold` is enough, and peft alone hears of none of them."""
    cell = CELL.format(words="x", controller="None").replace("register(Method(", "ROW = (Method(")
    (tmp_path / "ep_module.py").write_text(
        "from rankfold import RasaConfig\n" + CELL.format(words="m", controller="None")
    )
    (tmp_path / "ep_row.py").write_text(cell.replace('"cell"', '"row"'))
    (tmp_path / "ep_broken.py").write_text("import no_such_thing")
    about = tmp_path / "some_package-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: some-package\nVersion: 1.0\n")
    entries = ["a = ep_module", "b = ep_row:ROW", "c = ep_broken"]
    (about / "entry_points.txt").write_text("\n".join(["[rankfold.methods]", *entries]))
    script = """
import sys, warnings
import peft
assert not any(name.startswith("ep_") for name in sys.modules)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import rankfold.methods
said = [str(w.message) for w in caught if "entry point" in str(w.message)]
assert len(said) == 1, said
assert "'c = ep_broken' of some-package" in said[0] and "No module named 'no_such_thing'" in said[0], said
assert {"RANKFOLD_CELL", "RANKFOLD_ROW"} <= set(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING)
from rankfold.host import registry
print(registry.get("cell").title, [m.name for m in registry.find("ro*")], "row" in registry.METHODS)
"""
    found = python(script, path=tmp_path)
    assert found.stdout.strip() == "m ['row'] True", found.stderr


# --- what a plan must know ------------------------------------------------------------------------------------------------


class TheirBudgetConfig(BudgetConfig):
    method: ClassVar[str] = "their_budget"


def test_a_third_party_s_budgets() -> None:
    @dataclass
    class FallingConfig(PlainLoraConfig):
        method: ClassVar[str] = "falling"
        r: int = field(default=20)
        last: int = field(default=10)

        def check(self) -> None:
            super().check()
            self.require("last", self.last, self.last <= self.r, f"<= r={self.r}")

        @classmethod
        def fields_at(cls, r: int) -> dict[str, int]:
            return {"r": 2 * r, "last": r}

        def with_rank(self, n: int) -> FallingConfig:
            return self.changed(r=n, last=max(n // 2, 1))

        def ranks(self) -> dict[str, int]:
            return {"r": self.r, "last": self.last}

    register(Method("falling", "Falling", "none", "", FallingConfig, Lora))
    register(Method("their_budget", "Theirs", "none", "", TheirBudgetConfig, Lora))
    base = nn.Sequential(nn.Linear(16, 16))
    for name, at_4, solved in (
        ("falling", {"r": 8, "last": 4}, {"r": 6, "last": 3}),
        ("their_budget", {"r": 6, "target_r": 4}, {"r": 6, "target_r": 4}),
    ):
        config: Any = Candidate(name, name).with_rank(4).config(base, None, ["0"])
        assert config.ranks() == at_4
        assert config.with_rank(3).ranks()["r"] == 3
        found = solve(base, config, 6 * 32)
        assert found.config.ranks() == solved  # pyright: ignore[reportAttributeAccessIssue]
        assert found.trained == 6 * 32
    assert Candidate("x", "falling", {"last": 1}).with_rank(4).fields == {"last": 1}  # its own fields say it
