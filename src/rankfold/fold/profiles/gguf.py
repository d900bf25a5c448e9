"""Profile `gguf`: one GGUF file that llama.cpp takes with --lora.

llama.cpp multiplies a module's update by adapter.lora.alpha / (its rank): every module has one rank here, and alpha is it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote

import torch
from torch import Tensor
from transformers import PretrainedConfig

from rankfold.errors import RankfoldError
from rankfold.fold.profiles.profile import Folded, Profile, Written
from rankfold.fold.source import base_config
from rankfold.kernel.factors import Factors

FILE = "adapter.gguf"


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp's converter lays out the linear layers of a family.

    Args:
        name: gguf's MODEL_ARCH.
        interleaved: the rows of q and k are reordered so that the halves which the rotary embedding pairs alternate.
    """

    name: str
    interleaved: bool = False


#: By the model_type of the base. Closed: every family here is compared with transformers by running llama.cpp
#: (tests/fold/test_llama_cpp.py). Others may split, fuse or reorder weights.
ARCHITECTURES = {
    "llama": Architecture("LLAMA", interleaved=True),
    "mistral": Architecture("LLAMA", interleaved=True),
    "qwen2": Architecture("QWEN2"),
    "qwen3": Architecture("QWEN3"),
    "gemma2": Architecture("GEMMA2"),
    "gemma3_text": Architecture("GEMMA3"),
}


def write(folded: Folded, folder: Path) -> Written:
    """adapter.gguf. Modules without an update are left out: llama.cpp takes any subset."""
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("profile gguf needs the package gguf: pip install 'rankfold[gguf]'")
    import gguf

    base, rank = base_config(folded.base), max(folded.rank, 1)
    family = _architecture(base)
    if folded.source.heads:
        raise RankfoldError("profile gguf: a GGUF LoRA has no place for the trained head in modules_to_save")
    kind = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[folded.dtype]
    quantisation = gguf.GGMLQuantizationType[kind]
    names = tensor_names([n for n, f in folded.factors.items() if f.rank], base)
    path = folder / FILE
    architecture = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[family.name]]
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


def _architecture(base: PretrainedConfig) -> Architecture:
    if base.model_type not in ARCHITECTURES:
        raise RankfoldError(
            f"profile gguf: model_type={base.model_type!r} is not among those that were compared with llama.cpp "
            f"({', '.join(ARCHITECTURES)}); fold with --profile uniform and run llama.cpp's convert_lora_to_gguf.py on it"
        )
    return ARCHITECTURES[base.model_type]


def tensor_names(modules: list[str], base: PretrainedConfig) -> dict[str, str]:
    """The name of each module's weight in the base's GGUF file; raises ValueError for one that takes no LoRA there."""
    import gguf

    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[_architecture(base).name], base.num_hidden_layers)
    names = {}
    for module in modules:
        stored = table.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if stored is None or not stored.startswith("blk."):
            raise RankfoldError(
                f"profile gguf: {module} is not a layer of the blocks; llama.cpp ties or ignores it. Train without it, "
                "or fold with --profile merged"
            )
        names[module] = stored
    return names


def row_order(module: str, rows: int, base: PretrainedConfig) -> Tensor | None:
    """The rows of a module's weight in the order of the GGUF file, or None where that is the same."""
    heads = {"q_proj": base.num_attention_heads, "k_proj": base.num_key_value_heads}.get(module.rsplit(".", 1)[-1])
    if heads is None or not _architecture(base).interleaved:
        return None
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)


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
