"""Which of PEFT's tests do not pass with our methods, and why: reads expected.txt and judges outcomes by it.

The file is a list of reasons, each a line that starts with "# ", and below it one pattern per line, after the methods it holds for
("all", or names joined by commas). In a pattern `*` stands for anything and `?` for one character. All tests of these methods that match must not pass.
"""

from __future__ import annotations

import re
from pathlib import Path

EXPECTED = Path(__file__).parent / "expected.txt"
UNEXPLAINED = "# UNEXPLAINED"
#: Test or row to its outcome and the first line of its error.
Outcomes = dict[str, tuple[str, str]]


class Expected:
    """The lines of expected.txt."""

    def __init__(self, text: str) -> None:
        self.lines: list[tuple[str, re.Pattern[str], str]] = []
        self.unexplained = UNEXPLAINED in text
        for line in text.splitlines():
            if line and not line.startswith("#"):
                methods, pattern = line.split(" ", 1)
                self.lines.append(
                    (methods, re.compile(re.escape(pattern).replace(r"\*", ".*").replace(r"\?", ".")), line)
                )

    def judge(self, method: str, came: Outcomes) -> list[str]:
        """Sentences about what is not as the file says: unexpected failures and passes, and lines that match nothing."""
        lines = [
            (pattern, line) for methods, pattern, line in self.lines if methods == "all" or method in methods.split(",")
        ]
        bad = {name for name, (how, _) in came.items() if how in ("failed", "refused", "error")}
        good = {name for name, (how, _) in came.items() if how == "passed"}
        said = ["expected.txt has lines without a reason"] if self.unexplained else []
        for pattern, line in lines:
            matched = {name for name in bad if pattern.fullmatch(name)}
            said += [
                f"{method}: passes, in spite of {line!r}: {name}" for name in sorted(good) if pattern.fullmatch(name)
            ]
            said += [] if matched else [f"{method}: no test that fails matches {line!r}"]
        explained = {name for name in bad if any(pattern.fullmatch(name) for pattern, _ in lines)}
        return said + [
            f"{method}: {came[name][0]}, without a reason: {name}: {came[name][1]}" for name in sorted(bad - explained)
        ]

    def add(self, found: dict[str, Outcomes]) -> None:
        """Appends what has no reason yet, for a person to move below one."""
        new: dict[str, list[str]] = {}
        for method, came in found.items():
            patterns = [
                pattern for methods, pattern, _ in self.lines if methods == "all" or method in methods.split(",")
            ]
            for name, (how, _) in came.items():
                if how in ("failed", "refused", "error") and not any(p.fullmatch(name) for p in patterns):
                    new.setdefault(name, []).append(method)
        lines = [
            f"{'all' if len(methods) == len(found) else ','.join(methods)} {name}" for name, methods in new.items()
        ]
        if lines:
            with EXPECTED.open("a") as file:
                file.write("\n".join(["", UNEXPLAINED, *lines, ""]))
