"""`python -m rankfold.compare.report OUT`: the report of a comparison's folder, made again."""

from __future__ import annotations

import argparse
import sys

from rankfold.compare.report import write_report


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m rankfold.compare.report", description=__doc__)
    parser.add_argument("out", help="folder of a comparison, with trials.jsonl")
    parser.add_argument(
        "--reference", metavar="NAME", help="contender the others are held against (default: plain LoRA)"
    )
    a = parser.parse_args()
    try:
        print(write_report(a.out, reference=a.reference))
    except (ValueError, OSError, ImportError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
