"""benchmarks/evidence.py --page: what it writes on the evidence page and on the pages of methods and optimisers, from fabricated lines."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from synthetic import Method, fail, lines

from rankfold.compare.statistics import analyse
from rankfold.compare.trial_file import TrialLine, append

ROOT = Path(__file__).parents[2]
RATES = (1e-3, 2e-3, 5e-3)


def script(name: str = "evidence") -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


OPTIMISERS = (
    Method("AdamW", "lora", 1.0), Method("LoRA-RITE", "lora", 1.6, best=1e-3), Method("LoRA-Pro full", "lora", 0.4, wild=3e-3),
    Method("LoRA-Pro efficient", "lora"), Method("AdamW on RaSA", "rasa"),
)  # fmt: skip
OPTIMIZER = {"LoRA-RITE": "lora_rite", "LoRA-Pro full": "lora_pro", "LoRA-Pro efficient": "lora_pro"}
CHAINS = (Method("LoRA", "lora"), Method("LoRA, 3 x scale", "lora"), Method("COLA, 3 links", "cola"), Method("Delta-LoRA", "delta_lora", 0.7))  # fmt: skip


def optimisers() -> list[TrialLine]:
    found = lines(OPTIMISERS, rates=RATES)
    return [replace(t, training={"optimizer": OPTIMIZER[t.label]} if t.label in OPTIMIZER else {}) for t in found]


def write(path: Path, found: list[TrialLine]) -> None:
    for line in found:
        append(path, line)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("evidence")
    for name in ("methods", "optimisers"):
        shutil.copytree(ROOT / "docs" / name, folder / "docs" / name)
    (folder / "results").mkdir()
    write(folder / "results" / "evidence-optimisers.jsonl", optimisers())
    write(folder / "results" / "evidence-chains.jsonl", lines(CHAINS, rates=RATES))
    found = script().write(folder / "results", folder / "docs")
    return folder / "docs", [p.relative_to(folder / "docs").as_posix() for p in found]


def measured(page: Path) -> str:
    """What stands under "Measured", and nothing else."""
    return page.read_text(encoding="utf-8").partition("## Measured\n")[2]


def test_pages_of_those_that_took_part(written: tuple[Path, list[str]]) -> None:
    docs, found = written
    assert set(found) == {
        "evidence.md",
        "methods/cola.md",
        "methods/delta_lora.md",
        "methods/rasa.md",
        "optimisers/lora_rite.md",
        "optimisers/lora_pro.md",
    }
    for page in docs.glob("*/*.md"):
        name = page.relative_to(docs)
        before, after = (ROOT / "docs" / name).read_text(encoding="utf-8"), page.read_text(encoding="utf-8")
        if name.as_posix() not in found:
            assert before == after
        else:  # outside of the markers nothing has changed
            assert "Not yet" not in measured(page)
            assert after.partition("<!-- measured")[0] == before.partition("<!-- measured")[0]
            assert after.partition("<!-- end of measured -->")[2] == before.partition("<!-- end of measured -->")[2]


def test_values_are_those_of_the_analysis(written: tuple[Path, list[str]]) -> None:
    docs, _ = written
    analysis = analyse(optimisers())
    rite = next(c for c in analysis.contenders if c.name == "LoRA-RITE")
    difference = analysis.difference("LoRA-RITE", "AdamW")
    assert difference is not None
    assert difference.interval is not None
    assert rite.deviation is not None
    low, high = (f"{x:+.4f}".replace("-", "−") for x in difference.interval)
    plain = next(c for c in analysis.contenders if c.name == "AdamW")
    row = (
        f"accuracy, 60 steps | LoRA-RITE | 338,000 | 221,184 | 0.001 (lowest tried) | {rite.test:.4f} ± {rite.deviation:.4f} | "
        f"AdamW | {plain.test:.4f} ± {plain.deviation:.4f} | {difference.value:+.4f} ({low} to {high}), {difference.verdict} |"
    )
    text = measured(docs / "optimisers" / "lora_rite.md")
    assert any(line.endswith(row) for line in text.splitlines())
    assert "LoRA-Pro" not in text
    evidence = (docs / "evidence.md").read_text(encoding="utf-8")
    for heading in ("## Optimisers for pairs of factors", "## Chains beside LoRA", "## An earlier run"):
        assert heading in evidence
    assert f"({low} to {high}), {difference.verdict} |" in evidence
    assert "each contender at the rank that it is given" in evidence  # the chains have no budget


def test_the_page_begins_with_what_was_shown(written: tuple[Path, list[str]]) -> None:
    found = (analyse(optimisers()), analyse(lines(CHAINS, rates=RATES)))
    verdicts = [d.verdict for a in found for c in a.ranked if (d := a.difference(c.name, a.reference or ""))]
    better, worse, open_ = (verdicts.count(v) for v in ("better", "worse", "no difference shown"))
    assert min(better, worse) > 0  # the fabricated scores lie far apart
    short = (written[0] / "evidence.md").read_text(encoding="utf-8").partition("## In short\n")[2].partition("\n## ")[0]
    assert f"{len(verdicts)} contenders" in short
    assert f"{better} are shown to be better, {worse} worse. For {open_} no" in " ".join(short.split())
    assert "| AdamW | 3 | 4 | LoRA-RITE | " in short


def test_every_mode(written: tuple[Path, list[str]]) -> None:
    text = measured(written[0] / "optimisers" / "lora_pro.md")
    assert "| LoRA-Pro full | " in text
    assert "| LoRA-Pro efficient | " in text


def test_every_plain_lora_is_a_control(written: tuple[Path, list[str]]) -> None:
    """Delta-LoRA's fair one has three times the scale."""
    text = measured(written[0] / "methods" / "delta_lora.md")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [(row[1], row[6]) for row in rows[1:]] == [("Delta-LoRA", "LoRA"), ("Delta-LoRA", "LoRA, 3 x scale")]
    assert {len(row) for row in rows} == {9}


def test_seeds_that_failed_are_said(tmp_path: Path) -> None:
    evidence = script()
    found = [
        fail(t, "failed", "x") if (t.label, t.seed) == ("COLA, 3 links", 2) else t for t in lines(CHAINS, rates=RATES)
    ]
    path = ROOT / "docs" / "methods" / "cola.md"
    analyses = {"chains": analyse(found)}
    text = evidence.measured(analyses, path)
    assert ", 1 of the seeds failed |" in text
    assert "not tested |" in text  # two seeds in common are too few
    assert evidence.measured(analyses, path.with_name("rasa.md")) == ""
    assert evidence.measured(analyses, path.with_name("lora.md")) == ""


@pytest.mark.parametrize("results", ["evidence-*.jsonl", "evidence-continual.json"])
def test_committed_pages_are_up_to_date(results: str, tmp_path: Path) -> None:
    """Whoever commits results writes the pages too."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    if results.endswith(".jsonl"):
        pages = script().write(ROOT / "benchmarks" / "results", tmp_path / "docs")
    else:
        continual, pages = script("continual"), [tmp_path / "docs" / "methods" / "sd_lora.md"]
        continual.write_page(json.loads(continual.RESULT.read_text(encoding="utf-8")), pages[0])
    for path in pages:
        name = path.relative_to(tmp_path / "docs")
        assert path.read_text(encoding="utf-8") == (ROOT / "docs" / name).read_text(encoding="utf-8"), name
