"""PEFT's own tests as a judge of our methods: runs those that use LoraConfig with a config of ours in its place.

    make test-peft                                      # every method of METHODS
    python tests/peft_suite/run.py lora rasa            # some
    python tests/peft_suite/run.py --write              # afterwards: adds what is new to expected.txt, for you to explain

PEFT's source archive comes from the package index, once, with its hash (sdist.txt). The models of the hub are small ones made from
their configs (hub.py). Only tests of one process on a CPU are run. Every outcome is held against expected.txt, which gives a reason
for each test that does not pass; a test that fails without a line there fails the run, and so does one that passes in spite of a line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from expected import EXPECTED, Expected, Outcomes  # noqa: E402

#: Those that need no file of their own: CoRA's basis belongs to one model, and these tests have dozens.
METHODS = ("lora", "rasa", "sora", "adalora", "dynamic_dora")
FILES = (
    "test_custom_models.py",
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_seq_classifier.py",
    "test_token_classification_qa.py",
)


def suite(cache: Path) -> Path:
    """The unpacked tests of the installed PEFT, with the models they ask for beside them."""
    name = f"peft-{version('peft')}"
    archive, folder = cache / "downloads" / f"{name}.tar.gz", cache / "peft-suite" / name
    pinned = HERE / "sdist.txt"
    if f"peft=={version('peft')} " not in pinned.read_text():
        sys.exit(
            f"PEFT {version('peft')} is installed, and {pinned} pins another: put its hash there, and run with --write"
        )
    if not archive.exists():
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "--require-hashes"]
        subprocess.run([*pip, "-r", str(pinned), "-d", str(archive.parent)], check=True)
    if not (folder / "tests/__init__.py").exists():
        with tarfile.open(archive) as tar:
            tar.extractall(folder.parent, filter="data")
        (folder / "tests/__init__.py").touch()  # the archive leaves it out, and the tests import each other
    models = [sys.executable, str(HERE / "hub.py"), str(folder.parent / "hub")]
    subprocess.run(models, check=True, stderr=subprocess.DEVNULL)  # only progress bars
    return folder


def outcomes(method: str, folder: Path) -> Outcomes:
    """What came of each test and each row of a table."""
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        paths = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = {"PEFT_SUITE_METHOD": method, "PEFT_SUITE_OUT": out.name, "HF_HUB_CACHE": str(folder.parent / "hub")}
        env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": paths}
        pytest = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "plugin",
            "-o",
            "addopts=",
            "-p",
            "no:cacheprovider",
            "-W",
            "ignore",
        ]
        shown = subprocess.run(
            [*pytest, "-q", "--tb=no", *(f"tests/{file}" for file in FILES)],
            cwd=folder,
            env={**os.environ, **env},
            capture_output=True,
            text=True,
        )
        if not (text := Path(out.name).read_text()) or shown.returncode > 1:
            sys.exit(f"{method}: pytest ended with {shown.returncode}\n{shown.stdout[-3000:]}\n{shown.stderr[-3000:]}")
        return {name: (how, error) for name, (how, error) in json.loads(text).items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=METHODS, metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--write", action="store_true", help="add what failed without a reason to expected.txt")
    options = parser.parse_args()
    folder = suite(Path(os.environ.get("RANKFOLD_CACHE", Path.home() / ".cache/rankfold")))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(options.methods, pool.map(lambda m: outcomes(m, folder), options.methods), strict=True))
    expected = Expected(EXPECTED.read_text())
    problems = []
    for method, came in found.items():
        wrong = expected.judge(method, came)
        counts = {how: sum(h == how for h, _ in came.values()) for how in ("passed", "failed", "refused", "skipped")}
        print(f"{method}: " + ", ".join(f"{n} {how}" for how, n in counts.items()) + f"; {len(wrong)} not as expected")
        problems += wrong
    if options.write:
        expected.add(found)
    print("\n".join(problems))
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
