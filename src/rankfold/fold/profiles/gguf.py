"""Profile `gguf`: one GGUF file that llama.cpp takes with --lora.

llama.cpp multiplies a module's update by adapter.lora.alpha / (its rank): every module has one rank here, and alpha is it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from shlex import quote

import torch
from torch import Tensor
from transformers import PretrainedConfig

from rankfold.errors import RankfoldError
from rankfold.fold.profiles.profile import Folded, Profile, Written
from rankfold.fold.source import base_config
from rankfold.io.gguf_names import ARCHITECTURES, need_gguf, row_order, stored_names
from rankfold.kernel.factors import Factors

FILE = "adapter.gguf"


def write(folded: Folded, folder: Path) -> Written:
    """adapter.gguf. Modules without an update are left out: llama.cpp takes any subset."""
    gguf = need_gguf("profile gguf")
    base, rank = base_config(folded.base, folded.source.config.revision), max(folded.rank, 1)
    _check(base)
    if folded.source.heads:
        raise RankfoldError("profile gguf: a GGUF LoRA has no place for the trained head in modules_to_save")
    kind = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[folded.dtype]
    quantisation = gguf.GGMLQuantizationType[kind]
    names = tensor_names([n for n, f in folded.factors.items() if f.rank], base)
    path = folder / FILE
    architecture = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[ARCHITECTURES[base.model_type].name]]
    parameters = 0
    with closing(gguf.GGUFWriter(path, architecture)) as writer:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
        for name, stored in names.items():
            padded = folded.factors[name].pad(rank)
            order = row_order(name, padded.up.shape[0], base)
            up = padded.up if order is None else padded.up[order]
            for suffix, tensor in (("lora_a", padded.down), ("lora_b", up)):  # rank × in, out × rank
                data = gguf.quantize(tensor.float().numpy(), quantisation)
                writer.add_tensor(f"{stored}.{suffix}", data, raw_dtype=quantisation)
                parameters += tensor.numel()
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return Written(
        rank=rank,
        parameters=parameters,
        read=reader(path, names, base, folded),
        serve={
            "llama.cpp": f"llama-cli -m BASE.gguf --lora {quote(str(folded.out / FILE))}",
            "llama.cpp server": f"llama-server -m BASE.gguf --lora {quote(str(folded.out / FILE))}",
            "llama-cpp-python": f"Llama('BASE.gguf', lora_path={str(folded.out / FILE)!r})",
        },
    )


def _check(base: PretrainedConfig) -> None:
    if base.model_type not in ARCHITECTURES:
        raise RankfoldError(
            f"profile gguf: model_type={base.model_type!r} is not among those that were compared with llama.cpp "
            f"({', '.join(ARCHITECTURES)}); fold with --profile uniform and run llama.cpp's convert_lora_to_gguf.py on it"
        )


def tensor_names(modules: list[str], base: PretrainedConfig) -> dict[str, str]:
    """The name of each module's weight in the base's GGUF file; raises RankfoldError for one that takes no LoRA there."""
    _check(base)
    names = stored_names(modules, base)
    for module in modules:
        if module not in names:
            raise RankfoldError(
                f"profile gguf: {module} is not a layer of the blocks; llama.cpp ties or ignores it. Train without it, "
                "or fold with --profile merged"
            )
    return names


def reader(path: Path, names: dict[str, str], base: PretrainedConfig, folded: Folded) -> Callable[[str], Factors]:
    """Reads a module's factors back from the file, rows in transformers' order; those left out come back with rank 0."""
    import gguf

    stored = gguf.GGUFReader(path)
    tensors = {t.name: t for t in stored.tensors}
    alpha = float(stored.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())

    def load(name: str) -> Tensor:
        return torch.tensor(gguf.dequantize(tensors[name].data, tensors[name].tensor_type)).to(folded.dtype)

    def read(module: str) -> Factors:
        if module not in names:
            return folded.factors[module]
        down, up = load(f"{names[module]}.lora_a"), load(f"{names[module]}.lora_b")
        found = Factors(down, up, scale=alpha / down.shape[0])
        order = row_order(module, up.shape[0], base)
        return found if order is None else replace(found, up=up[order.argsort()])

    return read


PROFILE = Profile(write, noun="a GGUF LoRA", library="gguf")
