"""Old module names. Each is the same module object as the new one, so that old user code and pickles still load."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

#: Old name to new name, below `rankfold`.
MOVED = {
    "factors": "kernel.factors",
    "contraction": "kernel.linears",
    "gated_mlp": "kernel.gated_mlp",
    "dropout": "kernel.dropout",
    "products": "kernel.matmul",
    "scratch": "kernel.scratch",
    "peft_types": "host.peft_api",
    "config": "host.config",
    "adapter": "host.adapter",
    "layer": "host.linear_layer",
    "siblings": "host.siblings",
    "fused_mlp": "host.fused_mlp",
    "tuner": "host.tuner",
    "registry": "host.registry",
    "folders": "io.files",
    "model_folder": "io.model_folder",
    "train.cache": "io.cache",
    "train.bundled": "io.assets",
    "train.gguf_folder": "io.gguf_models",
    "subspace": "methods.cora_subspace",
    "plan.gelora": "gelora.ranks",
    "plan.dimension": "gelora.dimension",
    "plan.states": "gelora.states",
    "plan.samples": "gelora.samples",
    "plan.blocks": "gelora.blocks",
    "plan.budgets": "plan.costs",
    "plan.base": "plan.base_facts",
    "plan.show_costs": "plan.show",
    "train.runfile": "runfile.load",
    "train.checks": "runfile.checks",
    "train.problems": "runfile.problems",
    "train.yamlfile": "runfile.yaml",
    "train.init": "runfile.template",
    "train.plan": "train.prepare",
    "train.arguments": "runfile.arguments",
    "train.chats": "tasks.chats",
    "plan.contenders": "plan.candidates",
    "train.profile": "train.profiler",
    "fold.ours": "fold.native",
    "fold.base": "io.models",
    "fold.profile": "fold.profiles.profile",
    "fold.uniform": "fold.profiles.uniform",
    "fold.compact": "fold.profiles.compact",
    "fold.gguf": "fold.profiles.gguf",
    "fold.mlx": "fold.profiles.mlx",
    "fold.merged": "fold.profiles.merged",
    "fold.weights": "io.weights",
    "compare.lines": "compare.trial_file",
    "compare.estimate": "compare.time_left",
    "compare.trial": "compare.trial_process",
    "compare.trials": "compare.trial_list",
    "compare.run": "compare.experiment",
    "compare.scores": "train.scores",
    "inspect.run": "inspect.history",
    "doctor.weights": "doctor.tensor_values",
    "doctor.base": "doctor.base_shapes",
}


def keep_old_names() -> None:
    """Makes the old names importable; asked last, so that a module that is there is found first."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


class _Finder(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == "rankfold" and name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        sys.modules[old] = import_module("rankfold." + MOVED[old.removeprefix("rankfold.")])
