"""What it costs until `rankfold` says its first word: CPU time of the commands that need no model, beside a bare interpreter.

    python benchmarks/start.py --rounds 10 --out benchmarks/results/start.json

Each round runs every command once, so that what else the machine does meets all of them. CPU time is user + system of the process and its
children, the median over the rounds; the first round, which compiles bytecode and fills the disk cache, is left out.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

BARE = ["-c", "pass"]
COMMANDS = {
    "python -c pass": BARE,
    "python -c 'import rankfold'": ["-c", "import rankfold"],
    **{
        f"rankfold {command}": ["-m", "rankfold", *command.split()]
        for command in ("--help", "--version", "version", "methods", "methods --json", "train --help", "plan --help")
    },
    "python -c 'import torch'": ["-c", "import torch"],
    "python -c 'import peft'": ["-c", "import peft"],
}


def cpu_seconds(arguments: list[str]) -> float:
    """User and system time of one run."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, help="write the figures here (JSON)")
    options = parser.parse_args()

    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for at in range(options.rounds + 1):
        for name, arguments in COMMANDS.items():
            took = cpu_seconds(arguments)
            if at:
                seconds[name].append(took)
    bare = median(seconds["python -c pass"])
    rows = [
        {"command": n, "cpu_s": median(s), "least_s": min(s), "most_s": max(s), "ratio_to_bare": median(s) / bare}
        for n, s in seconds.items()
    ]
    table = Table("command", "CPU s", "least", "most", "× bare", box=None, pad_edge=False, header_style="bold")
    for row in rows:
        figures = (f"{row[key]:.3f}" for key in ("cpu_s", "least_s", "most_s"))
        table.add_row(row["command"], *figures, f"{row['ratio_to_bare']:.1f}")
    Console().print(table)
    if options.out:
        about = {"python": platform.python_version(), "machine": platform.processor() or platform.machine()}
        options.out.write_text(json.dumps({**about, "rounds": options.rounds, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
