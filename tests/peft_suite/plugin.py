"""The pytest plugin that puts one method's config in place of LoraConfig in PEFT's own tests, and writes down what came of each.

Its environment: PEFT_SUITE_METHOD names the method, PEFT_SUITE_OUT the file of outcomes. See run.py.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

#: Name of a test, or of a row of PEFT's tables, to its outcome and the first line of its error.
_OUTCOMES: dict[str, tuple[str, str]] = {}


def pytest_configure(config: pytest.Config) -> None:
    """Before any of PEFT's test modules is imported, because they take LoraConfig from `peft` by name."""
    import peft

    sys.modules["diffusers"] = diffusers = ModuleType("diffusers")  # they only ask whether a model is of this class
    diffusers.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # pyright: ignore
    peft.LoraConfig = _stand_in(os.environ["PEFT_SUITE_METHOD"])  # pyright: ignore
    sys.path.insert(0, os.getcwd())
    importlib.import_module("tests.testing_utils").hub_online_once = _offline


def _stand_in(method: str) -> type:
    """The method's config; where it has a schedule, with all ranks kept and nobody to run it, as PEFT's loops have none."""
    from rankfold.host import registry

    config = registry.get(method).config
    if not config.scheduled:
        return config

    @dataclass
    class Unscheduled(config):
        allow_unscheduled: bool = True

        def __post_init__(self) -> None:
            if hasattr(self, "target_r"):
                self.target_r = self.r
            super().__post_init__()

    Unscheduled.__name__ = Unscheduled.__qualname__ = config.__name__
    return Unscheduled


@contextlib.contextmanager
def _offline(model_id: str) -> Iterator[None]:
    """In place of what goes to the hub for the first use of a model."""
    yield


# Choosing ---------------------------------------------------------------------------------------------------------------


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps the tests that use LoraConfig, without the rows of PEFT's tables that our config refuses."""
    kept = [item for item in items if isinstance(item, pytest.Function) and _is_ours(item) and not _is_refused(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


def _is_ours(item: pytest.Function) -> bool:
    """Whether a test uses LoraConfig: its table says which config, or its source does."""
    import peft

    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    classes = [v for v in values if isinstance(v, type) and issubclass(v, peft.PeftConfig)]
    if classes:
        return peft.LoraConfig in classes
    return "LoraConfig" in re.findall(r"\w+", inspect.getsource(item.function)) or any(
        isinstance(v, peft.LoraConfig) for v in values
    )


def _is_refused(item: pytest.Function) -> bool:
    """Whether the row of a table cannot even be injected; tried once per row, and an outcome like a test's."""
    import peft

    params: dict[str, Any] = item.callspec.params if hasattr(item, "callspec") else {}
    fields = params.get("config_kwargs")
    if not isinstance(fields, dict):
        return False
    row = f"row {params['test_name']}" if "test_name" in params else f"row {item.path.name} {fields}"
    if row not in _OUTCOMES:
        _OUTCOMES[row] = "passed", ""
        try:
            config = peft.LoraConfig(**fields)
            if "test_name" in params:
                peft.get_peft_model(item.cls.transformers_class.from_pretrained(params["model_id"]), config)
        except Exception as error:
            _OUTCOMES[row] = "refused", _first_line(error)
    return _OUTCOMES[row][0] == "refused"


# Writing down -----------------------------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if report.failed and call.excinfo is not None:
        report.user_properties.append(("error", _first_line(call.excinfo.value)))
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        _OUTCOMES[report.nodeid] = report.outcome, str(dict(report.user_properties).get("error", ""))


def pytest_sessionfinish(session: pytest.Session) -> None:
    import peft

    ours = peft.LoraConfig.__name__
    outcomes = {name.removeprefix("tests/").replace(ours, "LoraConfig"): how for name, how in _OUTCOMES.items()}
    Path(os.environ["PEFT_SUITE_OUT"]).write_text(json.dumps(outcomes))


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:200]
