"""A method is one file: outside `methods/` the source names none."""

from __future__ import annotations

import re
from pathlib import Path

from rankfold.host import registry

SRC = Path(__file__).parent.parent / "src" / "rankfold"

#: Who may name which, and why.
ALLOWED = {
    "__init__.py": {"RasaConfig"},  # the first example
    "gelora/": {"lora", "PlainLoraConfig"},  # GeLoRA is a way to choose LoRA's ranks
    "commands/gelora.py": {"lora"},  # whose ranks GeLoRA chooses
    "commands/subspace.py": {"cora_subspace"},  # CoRA's own command
    "commands/init.py": {"rasa"},  # its default, which must be known before anything heavy is imported
    "commands/plan.py": {"rasa"},  # an example in its help
    "plan/first_rate.py": {"PlainLoraConfig"},  # LoRA's own rate is the yardstick
    "moved.py": {"cora_subspace"},  # where an old import path leads
    "fold/peft_updates.py": {"adalora"},  # the function for PEFT's adapter of that name
}

NAMES = [row.name for row in registry.find() if row.name != "lora"]
CONFIGS = [row.config.__name__ for row in registry.find()]
#: Files of `methods/` that several methods have in common; their names are plain words.
COMMON = ("__init__", "lora", "gated", "chain", "knots")
MODULES = [path.stem for path in (SRC / "methods").glob("*.py") if path.stem not in COMMON]
#: Whole words, but not what is PEFT's: `peft:adalora`. Plain "lora" is also a word of file formats and of PEFT's keys, so it
#: counts only where it is given or compared as a name: `"name": "lora"`, `method == "lora"`.
WORDS = re.compile(
    rf"(?<!peft:)\b({'|'.join(sorted({*NAMES, *CONFIGS, *MODULES}))})\b|(?:name|method)[\"']?\W{{1,4}}[\"'](lora)[\"']"
)


def named(path: Path) -> set[str]:
    return {first or second for first, second in WORDS.findall(path.read_text(encoding="utf-8"))}


def test_a_method_is_named_in_its_own_file_alone() -> None:
    found = {}
    for path in SRC.rglob("*.py"):
        place = path.relative_to(SRC).as_posix()
        allowed = {name for prefix, names in ALLOWED.items() if place.startswith(prefix) for name in names}
        if not place.startswith("methods/") and (more := named(path) - allowed):
            found[place] = more
    assert not found


def test_the_exceptions_are_needed() -> None:
    for prefix, names in ALLOWED.items():
        files = [p for p in SRC.rglob("*.py") if p.relative_to(SRC).as_posix().startswith(prefix)]
        assert names <= {name for path in files for name in named(path)}, prefix
