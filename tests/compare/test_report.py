"""The report: whole, self-contained, readable on a phone and a laptop, light and dark, in a real browser."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from browser import Browser, find
from synthetic import METHODS, Method, as_loss, fail, halving, lines

from rankfold.commands.compare import print_report
from rankfold.compare.report import write_report
from rankfold.compare.report.__main__ import main
from rankfold.compare.report.charts import _apart, _limits
from rankfold.compare.report.svg import SERIES
from rankfold.compare.trial_file import TrialLine, append

HOSTILE = r'$\w$ <script>alert("x")</script> & "Ω" '
LONG = "a contender whose name is far longer than a phone is wide · and its place"


def _partly_failed() -> list[TrialLine]:
    found = lines(METHODS[:3], rates=(1e-3, 2e-3), seeds=(0, 1))
    return [fail(t, "failed", HOSTILE + "x" * 300) if t.label == METHODS[1].label and t.seed == 1 else t for t in found]


CASES: dict[str, list[TrialLine]] = {
    "full": lines(seed_spread=0.02),
    "loss": as_loss(lines(seeds=(0, 1))),
    "one seed": lines(METHODS[:3], seeds=(0,)),
    "one method": lines(METHODS[2:3]),
    "one trial": lines(METHODS[:1], rates=(1e-3,), seeds=(0,)),
    "halving": halving(lines()),
    "where": lines(METHODS[:4], rates=(1e-3, 2e-3), wheres=("attention only", "mlp only", "first third")),
    "partly failed": _partly_failed(),
    "nothing finished": [fail(t, "failed", "no module is called q_proj") for t in lines(METHODS[:2], rates=(1e-3,))],
    "hostile": lines((Method(HOSTILE, "rasa"), Method(LONG, "sora", chooses=True)), rates=(1e-3, 2e-3), layers=30),
    "bare": [
        replace(t, curve={}, kept=None, ranks={}, items=None, seconds=None, peak_bytes=None, tokens_per_second=None, versions={})
        for t in lines(METHODS[:2], rates=(1e-3, 2e-3))
    ],
}  # fmt: skip


def write(folder: Path, found: Sequence[TrialLine]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for line in found:
        append(folder / "trials.jsonl", line)
    (folder / "compare.yaml").write_text("model: all-minilm-l6-v2 # <b>&\nrates: [1.0e-3, 2.0e-3]\n", encoding="utf-8")
    return write_report(folder)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    return {case: write(folder / case.replace(" ", "-"), found) for case, found in CASES.items()}


def test_ranks_that_differ_by_seed_are_rounded(tmp_path: Path) -> None:
    found = [replace(t, parameters=t.parameters | {"folded_rank": 8 - (t.seed == 0)}) for t in lines(METHODS[:1])]
    page = write(tmp_path / "ranks", found).read_text(encoding="utf-8")
    assert "<small>rank 7.7</small>" in page


@pytest.mark.parametrize("case", CASES)
def test_self_contained_with_pictures_of_their_own(case: str, reports: dict[str, Path]) -> None:
    page = reports[case].read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*"|@import|url\((?!#)|<script', page)
    svgs = re.findall(r'<svg class="figure".*?</svg>', page, flags=re.DOTALL)
    assert bool(svgs) == (case != "nothing finished")
    for svg in svgs:
        root = ElementTree.fromstring(svg)
        here = {e.get("id") for e in root.iter()}
        named = set(root.get("aria-labelledby", "").split())
        referred = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', svg))
        assert {a or b for a, b in referred} | named <= here
        assert all(e.text and e.text.strip() for e in root if e.tag.endswith(("title", "desc")))
        assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) > 1
        assert not [c for c in SERIES if c in svg]
        assert not re.findall(r"(?:fill|stroke): #(?!ffffff)", svg), "a colour that does not follow the scheme"
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    sizes = {float(size) for size in re.findall(r"font: (\d+(?:\.\d+)?)px", page)}
    assert min(sizes) >= 14


def test_what_is_said(reports: dict[str, Path]) -> None:
    page = reports["full"].read_text(encoding="utf-8")
    for heading in (
        "Results",
        "Every pair",
        "Learning curves",
        "Time and memory",
        "Ranks by layer",
        "Failures",
        "Make it again",
    ):
        assert f">{heading}</h2>" in page
    for text in (
        "no difference shown",
        "Pareto front",
        "rankfold compare compare.yaml",
        "2.13.0+cpu",
        "diverged",
        "grid may be",
    ):
        assert text in page
    assert "# &lt;b&gt;&amp;" in page
    assert 'id="ranks-2-title"' in page
    assert 'id="ranks-3-title"' in page
    assert 'id="ranks-0-title"' not in page, "LoRA does not choose its ranks"
    hostile = reports["hostile"].read_text(encoding="utf-8")
    assert "&lt;script&gt;alert" in hostile
    partly = reports["partly failed"].read_text(encoding="utf-8")
    assert "1 did not finish" in partly
    assert "There are no pictures" not in partly
    assert "None of the 6 trials finished" in reports["nothing finished"].read_text(encoding="utf-8")


def test_the_same_lines_make_the_same_page(tmp_path: Path) -> None:
    found = CASES["one method"]
    assert write(tmp_path / "a", found).read_bytes() == write(tmp_path / "b", found).read_bytes()
    analysis = json.loads((tmp_path / "a" / "analysis.json").read_text())
    assert analysis["contenders"][0]["label"] == METHODS[2].label
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "analysis.json",
        "compare.yaml",
        "report.html",
        "trials.jsonl",
    ]


def test_bad_input_is_one_line_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        write_report(tmp_path / "none")
    with pytest.raises(ValueError, match="there are no trials yet; run"):
        write_report(tmp_path)
    (tmp_path / "trials.jsonl").write_text('{"id": 1}\n\n{}\n')
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path)])
    assert main() == 1
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith("error: ")
    assert [p.name for p in tmp_path.iterdir()] == ["trials.jsonl"]


def test_drawing_apart() -> None:
    assert _apart([1.0, 5.0], 1.0) == [1.0, 5.0]
    moved = _apart([1.0, 1.0, 1.5, 9.0, 2.2], 1.0)
    order = sorted(moved)
    assert all(b - a >= 1 - 1e-9 for a, b in pairwise(order))
    assert moved[3] == 9.0
    assert sum(moved) == pytest.approx(14.7)


def test_one_endless_interval_does_not_flatten_the_others() -> None:
    low, high = _limits([0.80, 0.82, 0.81], [(0.79, 0.81), (0.81, 0.83), (-3.0, 4.0)])
    assert high - low < 0.2


# --- in a browser -------------------------------------------------------------------------------------------------------

LOOK = """(() => {
  const visible = e => { const b = e.getBoundingClientRect(); return b.width > 40 && b.height > 40; };
  const figures = [...document.querySelectorAll("svg.figure")];
  const scrolls = e => { for (; e; e = e.parentElement) if (e.matches(".scroll, pre")) return true; return false; };
  const outside = [...document.querySelectorAll("main *")].filter(e =>
    !scrolls(e) && !e.closest("svg") && e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 80));
  const cut = figures.flatMap(f => { const box = f.getBoundingClientRect();
    return [...f.querySelectorAll("text")].filter(t => { const b = t.getBoundingClientRect();
      return b.left < box.left - 1 || b.right > box.right + 1 || b.top < box.top - 1 || b.bottom > box.bottom + 1; })
      .map(t => f.getAttribute("aria-labelledby").split(" ")[0] + ": " + t.textContent); });
  const crossing = figures.flatMap(f => { const all = [...f.querySelectorAll("text")].map(t => [t.textContent, t.getBoundingClientRect()]);
    return all.flatMap(([a, x], i) => all.slice(i + 1).filter(([b, y]) =>
      Math.min(x.right, y.right) - Math.max(x.left, y.left) > 1 && Math.min(x.bottom, y.bottom) - Math.max(x.top, y.top) > 3)
      .map(([b]) => a + " / " + b)); });
  const small = [...document.querySelectorAll("main *")].filter(e => [...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim()))
    .map(e => { const s = parseFloat(getComputedStyle(e).fontSize), f = e.closest("svg.figure");
      return s * (f ? f.getBoundingClientRect().width / f.viewBox.baseVal.width : 1); });
  return {wide: document.documentElement.scrollWidth, window: innerWidth, figures: figures.length, shown: figures.filter(visible).length,
    outside, cut, crossing, smallest: Math.min(...small),
    paper: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color};
})()"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = find()
    if program is None:
        pytest.skip("no Chromium here: install one or name it in RANKFOLD_CHROMIUM")
    with Browser(program) as opened:
        yield opened


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("case", CASES)
def test_in_chromium(case: str, width: int, scheme: str, reports: dict[str, Path], browser: Browser) -> None:
    browser.open(reports[case], width, scheme=scheme)
    found = browser.run(LOOK)
    assert browser.complaints == []
    assert len(browser.asked) == 1, "nothing but the file itself is loaded"
    assert found["window"] == width
    assert found["wide"] <= width
    assert found["outside"] == []
    assert found["figures"] == found["shown"]
    assert found["cut"] == [], "a label is cut off"
    assert found["crossing"] == [], "labels overlap"
    assert found["smallest"] >= 14
    light = sum(int(x) for x in re.findall(r"\d+", found["paper"])[:3]) / 3
    assert (light > 200) == (scheme == "light")


def test_it_prints_light_whatever_the_screen(reports: dict[str, Path], browser: Browser) -> None:
    browser.open(reports["full"], 794, scheme="dark", media="print")
    found = browser.run(LOOK)
    assert found["paper"] == "rgb(255, 255, 255)"
    assert found["ink"] == "rgb(0, 0, 0)"
    assert found["wide"] <= 794
    assert browser.run("[...document.querySelectorAll('.scroll')].every(e => e.scrollWidth <= e.clientWidth + 1)")
    assert browser.pdf().startswith(b"%PDF")


def test_the_command_says_in_the_terminal_what_the_page_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_report(write(tmp_path, lines()).parent)
    said = capsys.readouterr().out
    assert said.startswith("LoRA r=8 (PEFT) has the highest test accuracy")
    assert "against LoRA r=8 (PEFT)" in said
    assert said.rstrip().endswith("report.html")
