"""What each engine reads, at which version, and how that is known: doctor's table."""

from __future__ import annotations

from generate.markdown import code, page, table
from rankfold.doctor.engines import ENGINES

KNOWN = {
    "run": "the engine was run on adapters",
    "loader run": "its own loader or converter was run",
    "source read": "its source was read; nothing was run",
}


def engines() -> str:
    rows = [(e.name, code(e.key), e.version, e.reads, KNOWN[e.known], e.date) for e in ENGINES]
    return page(
        "Engines",
        "src/rankfold/doctor/engines.py",
        "The engines whose rules `rankfold doctor` knows. `rankfold doctor ADAPTER --engine KEY` asks one; [doctor](../doctor.md) explains "
        "the verdicts, [serving](../serving.md) has the commands. A newer version of an engine may differ.",
        table(("engine", "key", "version", "it reads", "how it is known", "when"), rows),
    )
