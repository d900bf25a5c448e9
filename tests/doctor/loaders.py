"""Engines' own loaders of adapters, without the rest of the engine: python loaders.py ENGINE BASE FOLDER… prints JSON, what
each folder was refused with or null.

What the loader's modules import of their engine is a stub unless it is listed as real: kernels, servers and models are not
needed to read an adapter. `test_loaders.py` runs this where the engine's package can be found.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from safetensors.torch import load_file

Load = Callable[[Path], object]


class Stub(ModuleType):
    """A module of an engine that has whatever is asked of it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=f"{self.__name__}.{name}")


class Stubs(MetaPathFinder, Loader):
    """Imports stubs for a package found in `root`, but for the modules that are real."""

    def __init__(self, package: str, root: Path, real: set[str]):
        self.package, self.root, self.real = package, root, real

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if fullname.split(".")[0] != self.package or fullname in self.real:
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__path__ = [str(self.root / module.__name__.replace(".", "/"))]


def package_root(package: str) -> Path:
    return next(Path(place) for place in sys.path if (Path(place) / package).is_dir())


def with_stubs(package: str, *real: str) -> None:
    sys.meta_path.insert(0, Stubs(package, package_root(package), {f"{package}.{name}" for name in real}))


def vllm(base: Path) -> Load:
    """`PEFTHelper` and `LoRAModel.from_local_checkpoint`, as the worker calls them for a llama."""
    try:
        import regex  # noqa: F401
    except ImportError:
        import re

        sys.modules["regex"] = re
    with_stubs("vllm", "lora.peft_helper", "lora.lora_model", "lora.lora_weights", "lora.utils")
    helpers, models, weights = (import_module(f"vllm.lora.{n}") for n in ("peft_helper", "lora_model", "lora_weights"))
    models.PIN_MEMORY = weights.PIN_MEMORY = False
    modules = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head", "embed_tokens"}

    def load(folder: Path) -> object:
        helper = helpers.PEFTHelper.from_local_dir(str(folder), max_position_embeddings=2048)
        helper.validate_legal(SimpleNamespace(max_lora_rank=512))
        return models.LoRAModel.from_local_checkpoint(
            str(folder), modules, helper, lora_model_id=1, device="cpu", dtype=torch.float32
        )

    return load


def sglang(base: Path) -> Load:
    """`LoRAConfig`, `LoRAAdapter.initialize_weights` and the pool's names of modules; its manager's three checks and the shapes of
    the pool's buffers stand here once more."""
    with_stubs("sglang", "srt.lora.lora", "srt.lora.lora_config", "srt.lora.utils")
    lora, configs, utils = (import_module(f"sglang.srt.lora.{name}") for name in ("lora", "lora_config", "utils"))

    class FileLoader:
        """The model loader's way of reading files."""

        Source = staticmethod(lambda path, **others: path)

        def __init__(self, options: object):
            pass

        def _get_weights_iterator(self, path: str) -> Iterator[tuple[str, torch.Tensor]]:
            yield from load_file(Path(path) / "adapter_model.safetensors").items()

    lora.DefaultModelLoader = FileLoader
    lora.get_layer_id = lambda name: int(name.split("layers.")[1].split(".")[0]) if "layers." in name else None
    known = json.loads((base / "config.json").read_text())

    def load(folder: Path) -> object:
        config = configs.LoRAConfig(str(folder), base_vocab_size=known["vocab_size"])
        if config.lora_added_tokens_size > 0 or config.use_dora:
            raise ValueError("LoRAManager.validate_new_adapter: added tokens or DoRA")
        if not isinstance(config.target_modules, list):
            raise ValueError("LoRAManager.init_lora_shapes: target_modules must be a list")
        adapter = lora.LoRAAdapter("a", config, SimpleNamespace(**known), None, MagicMock())
        adapter.initialize_weights()
        targets = utils.get_normalized_target_modules(config.target_modules)
        for layer in adapter.layers:
            for name, weight in layer.weights.items():
                utils.get_target_module_name(name, targets)
                if "lora_A" in name and weight.shape[-2] % config.r:
                    raise ValueError(f"LoRAMemoryPool: {name} does not fit buffers of rank {config.r}")
        return adapter

    return load


def mlx_lm(base: Path) -> Load:
    """`load_adapters` on the base, all of it real."""
    from mlx_lm.tuner.utils import load_adapters  # pyright: ignore[reportMissingImports]
    from mlx_lm.utils import load_model  # pyright: ignore[reportMissingImports]

    return lambda folder: load_adapters(load_model(base)[0], str(folder))


def peft(base: Path) -> Load:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return lambda folder: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder))


LOADERS = {"vllm": vllm, "sglang": sglang, "mlx": mlx_lm, "peft": peft}


def outcome(load: Load, folder: Path) -> str | None:
    try:
        load(folder)
    except Exception as error:  # whatever it says, it refuses
        return f"{type(error).__name__}: {error}"
    return None


if __name__ == "__main__":
    engine, base, *folders = sys.argv[1:]
    load = LOADERS[engine](Path(base))
    print("\n" + json.dumps({folder: outcome(load, Path(folder)) for folder in folders}))
