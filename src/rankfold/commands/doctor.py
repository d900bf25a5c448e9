"""`rankfold doctor`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from rankfold.commands.command import CommonOptions, names, option, positional


def _engines(text: str) -> list[str]:
    """Engines from "vllm,sglang"; a wrong one is wrong usage."""
    from rankfold.doctor.engines import ENGINES

    keys = [e.key for e in ENGINES]
    found = [n.lower() for n in names(text)]
    wrong = [n for n in found if n not in keys]
    if wrong or not found:
        raise argparse.ArgumentTypeError(f"{', '.join(wrong) or 'nothing'}: must be of {', '.join(keys)}")
    return found


@dataclass(kw_only=True)
class Options(CommonOptions):
    """say which engine loads an adapter, which refuses or mis-scales it, and why"""

    path: str = positional("any adapter: a folder, or a .safetensors or .gguf file")
    base: str | None = option("folder of the base model, if not the one that the adapter names", default=None)
    engines: list[list[str]] = option(
        "check only these engines; exit 1 unless all of them load it: vllm,sglang,llama.cpp,... (repeatable)",
        default=[],
        flag="engine",
        action="append",
        type=_engines,
        metavar="NAMES",
    )
    fix: str | None = option("write a copy with what can be mended, and examine that", default=None, metavar="OUT")
    json: bool = option("print JSON instead of the table", default=False)


def run(options: Options) -> int:
    """Prints a diagnosis. Returns 0 if the file is sound and every engine that is asked loads it right, else 1."""
    from rankfold.doctor.diagnosis import diagnose
    from rankfold.doctor.fix import fix

    mended = fix(options.path, options.fix) if options.fix else []
    found = diagnose(options.fix or options.path, options.base, [name for part in options.engines for name in part])
    if options.json:
        print(found.to_json(), end="")
    else:
        from rankfold.doctor.show import show
        from rankfold.text import terminal

        for sentence in mended:
            print(f"mended: {sentence}")
        terminal().print(show(found))
    return 0 if found.healthy else 1
