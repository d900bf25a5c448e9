"""Every name that `init --method peft:...` takes makes a file that validates; the others are refused by name."""

from __future__ import annotations

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from rankfold.errors import RankfoldError
from rankfold.runfile.load import parse
from rankfold.runfile.peft_methods import ALIASES, EXAMPLES, REFUSED
from rankfold.runfile.problems import RunFileError
from rankfold.runfile.template import template
from rankfold.runfile.yaml import read
from rankfold.tasks.table import TASKS

OWN = {f"peft:{kind.value.lower()}" for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
NAMES = sorted({name for name in OWN if not name.startswith("peft:rankfold_")} | set(ALIASES))


@pytest.mark.parametrize("name", NAMES)
def test_a_starter_file_validates_or_is_refused_by_name(name: str):
    for task in TASKS:
        if name in REFUSED:
            with pytest.raises(RankfoldError, match=f"'{name}' cannot be trained by a run file: it "):
                template(task, name)
        else:
            run = parse(read(template(task, name))[0])
            assert run.method.name == name


def test_the_tables_name_what_peft_has():
    assert {*EXAMPLES, *REFUSED} <= OWN


def test_a_name_for_a_field_of_lora():
    run = {"model": "m", "task": "causal-lm", "data": "phonemes", "output": "o"}
    assert parse(run | {"method": "peft:dora"}).method.config.use_dora  # pyright: ignore[reportAttributeAccessIssue]
    assert parse(run | {"method": "peft:rslora"}).method.config.use_rslora  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(RunFileError, match=r"method\.name: 'peft:xlora' cannot be trained"):
        parse(run | {"method": "peft:xlora"})
    with pytest.raises(RunFileError, match=r"method\.name: PEFT has no method 'rankfold_rasa'"):
        parse(run | {"method": "peft:rankfold_rasa"})
