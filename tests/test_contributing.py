"""The walk-through of CONTRIBUTING.md runs as printed, and README.md says what is so."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("own_registry")
def test_add_a_method_in_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """The file alone: test_third_party.py takes it through every command, in a process of its own."""
    script = tmp_path / "walkthrough.py"
    script.write_text("\n".join(re.findall(r"^```python\n(.*?)^```", CONTRIBUTING, re.M | re.S)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script))
    assert "folded scaled into a plain LoRA: rank 8 (4 needed)" in capsys.readouterr().out
    assert (tmp_path / "scaled-folded" / "adapter_config.json").exists()


def test_the_readme_is_short_and_its_numbers_are_measured() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 150
    measured = {page: (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8") for page in ("evidence", "peft")}
    for accuracy in re.findall(r"(?<!\d)0\.\d{4}(?!\d)", readme):
        assert accuracy in measured["evidence"], accuracy
    for count in re.findall(r"([\d,]+) pass; (\d+) do not", readme)[0]:
        assert count in measured["peft"], count


def test_the_readme_lists_every_method_and_each_has_a_page() -> None:
    from rankfold.host import registry

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for method in registry.find():
        assert f"| `{method.name}` | `{method.config.__name__}` | [{method.paper}]" in readme
        assert (ROOT / "docs" / "methods" / f"{method.name}.md").exists()
