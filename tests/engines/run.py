"""Folds in the engines that serve them, run: `make test-engines`, `make test-engine ENGINE=vllm`.

    python tests/engines/run.py                 # every engine
    python tests/engines/run.py vllm mlx-lm     # some
    python tests/engines/run.py --model random  # on one model

Each engine lives in an environment of its own in rankfold's cache (environments.py), made once from its file in requirements/. Where
that cannot be had, the engine is skipped and its reason is printed. What was measured is kept in the package, for `rankfold doctor`, and
written into docs/serving.md. Fails unless every engine that could be run passes.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "fold")]

from artefacts import MODELS, Shelf  # noqa: E402
from bench import Bench, Row  # noqa: E402
from environments import Unavailable  # noqa: E402
from record import keep, write_table  # noqa: E402
from transformers.utils.logging import disable_progress_bar, set_verbosity_error  # noqa: E402

from engines import ENGINES, EngineFailed  # noqa: E402
from rankfold.io.cache import MissingAssetError  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", nargs="*", metavar="ENGINE", help=", ".join(ENGINES))
    parser.add_argument("--model", choices=MODELS, help="one model alone; nothing is kept or written then")
    options = parser.parse_args()
    if unknown := sorted(set(options.engines) - ENGINES.keys()):
        parser.error(f"ENGINE={unknown[0]} must be one of {', '.join(ENGINES)}")
    asked = [ENGINES[key] for key in options.engines or ENGINES]
    warnings.simplefilter("ignore")
    disable_progress_bar()
    set_verbosity_error()
    failed, skipped = [], []
    with tempfile.TemporaryDirectory(prefix="rankfold-engines-") as work:
        benches = []
        for key in [options.model] if options.model else MODELS:
            try:
                benches.append(Bench(Shelf(MODELS[key](Path(work)), Path(work))))
            except MissingAssetError as missing:
                skipped.append(str(missing))
        for engine in asked:
            rows: list[Row] = []
            try:
                for bench in benches:
                    version, found = bench.run(engine)
                    rows += found
                    show(engine.name, version, found)
            except Unavailable as reason:
                skipped.append(f"{engine.name}: {reason}")
                continue
            except EngineFailed as stopped:
                failed.append(f"{engine.name} stopped:\n{stopped}")
                continue
            failed += [f"{engine.name}, {r.model}, {r.profile} {r.artefact}: {f}" for r in rows for f in r.failures]
            if len(benches) == len(MODELS) and not any(row.failures for row in rows):
                keep(engine, version, rows)
    if not options.model:
        write_table()
    for reason in skipped:
        print(f"skipped: {reason}")
    for failure in failed:
        print(f"FAILED: {failure}")
    return bool(failed)


def show(name: str, version: str, rows: list[Row]) -> None:
    for row in rows:
        m = row.measured
        text = f"{m.same}/{m.written} tokens" + (f", {m.margin:.1e} behind" if m.same < m.written else "")
        verdict = "FAILED" if row.failures else "ok"
        print(
            f"{name} {version}, {row.model}, {row.profile or '-'}, {row.artefact}: error {m.error:.1e} of {m.scored}, "
            f"moved {m.moved:.2g}, {text}: {verdict}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
