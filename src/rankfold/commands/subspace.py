"""`rankfold subspace`: CoRA's common subspace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rankfold.commands.command import CommonOptions, names, option, positional


@dataclass(kw_only=True)
class Options(CommonOptions):
    """build the common subspace that CoRA starts from"""

    models: list[str] = positional("folders of fine-tuned models of one architecture", nargs="+")
    out: str = option("the basis file to write (.safetensors)", short="-o")
    base: str | None = option("folder of their common base; needed for --source delta", default=None)
    targets: list[str] | None = option(
        "ends of module names (default: q_proj,k_proj,v_proj)", default=None, type=names, metavar="A,B"
    )
    scope: Literal["layer", "module", "global"] | None = option(
        "what shares a basis (default: layer, or module where output sizes differ)", default=None
    )
    source: Literal["weights", "delta"] = option(
        "of the models' weights, or of their deltas from the base", default="weights"
    )
    rank: int = option("columns to keep; adapters may use fewer", default=32)
    force: bool = option("replace the file if it exists", default=False)
    scale: Literal["none", "sqrt_sigma"] = option(
        "none: orthonormal columns; sqrt_sigma: times (σ/σ₁)^½", default="none"
    )


def run(options: Options) -> int:
    from rankfold.methods.cora_subspace import build_subspace

    found = build_subspace(
        options.models,
        options.out,
        base=options.base,
        scope=options.scope,
        source=options.source,
        rank=options.rank,
        scale=options.scale,
        force=options.force,
        say=print,
        **({"targets": options.targets} if options.targets else {}),
    )
    print(found.summary())
    return 0
