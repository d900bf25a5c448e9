"""The walk-through of CONTRIBUTING.md and the Python of README.md run as printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def code(file: str, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / file).read_text(encoding="utf-8"), re.M | re.S)


def test_add_a_method_in_one_file(tmp_path: Path) -> None:
    script = tmp_path / "walkthrough.py"
    script.write_text("\n".join(code("CONTRIBUTING.md")), encoding="utf-8")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "folded scaled into a plain LoRA: rank 8 (4 needed)" in done.stdout
    assert (tmp_path / "scaled-folded" / "adapter_config.json").exists()


def test_the_readme_runs(tmp_path: Path) -> None:
    script = tmp_path / "readme.py"
    script.write_text("\n".join(code("README.md")), encoding="utf-8")
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "folded" / "fold_report.json").exists()


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
