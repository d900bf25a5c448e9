"""The rules of single engines: small functions from a case to what that engine makes of one thing in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

from rankfold.doctor.case import Case, Pair, layer_of
from rankfold.doctor.findings import Finding, Status
from rankfold.doctor.rules import STARTS, fold_command, one_scale
from rankfold.doctor.settings import scale
from rankfold.text import examples, short_repr

# --- vLLM ---------------------------------------------------------------------------------------------------------------

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")


def vllm_init(case: Case) -> Iterator[Finding]:
    init = case.file.config.get("init_lora_weights")
    if isinstance(init, str) and init not in VLLM_INITS:
        what = f"init_lora_weights={short_repr(init)} is refused, even where the weights were converted"
        fix = f"{fold_command(case)}; or write true, if the weights are against the original base"
        yield Finding(Status.REFUSED, what, case.file.where("init_lora_weights"), fix)


def vllm_saved(case: Case) -> Iterator[Finding]:
    more = [m for m in case.settings.modules_to_save if m not in ("classifier", "score")]
    if more:
        what = f"modules_to_save={short_repr(more)}: only classifier and score are taken"
        fix = "train without modules_to_save, or merge it into the base"
        yield Finding(Status.REFUSED, what, case.file.where("modules_to_save"), fix)


def vllm_embedding(case: Case) -> Iterator[Finding]:
    names = case.others.get("embedding")
    if names:
        what = "lora_embedding tensors are taken only where the model's class declares its embeddings"
        yield Finding(Status.NOT_CHECKED, what, names[0], "adapt linear modules only")


# --- SGLang -------------------------------------------------------------------------------------------------------------


def sglang_tokens(case: Case) -> Iterator[Finding]:
    """Ids below the base's vocabulary size are filtered, the others are refused."""
    path = case.file.path / "added_tokens.json"
    if not path.exists():
        return
    words = case.base.config.get("vocab_size") if case.base else None
    try:
        ids = [int(i) for i in json.loads(path.read_text(encoding="utf-8")).values()]
    except (ValueError, TypeError, AttributeError, OSError):
        ids = []
    if isinstance(words, int) and ids and max(ids) < words:
        return
    status = Status.REFUSED if isinstance(words, int) else Status.NOT_CHECKED
    what = "tokens beyond the base's vocabulary are refused" + (
        "" if status is Status.REFUSED else "; its size is not known"
    )
    yield Finding(status, what, path.name, "remove the file if no token was added in training, or give --base FOLDER")


def sglang_siblings(case: Case) -> Iterator[Finding]:
    """It stacks q, k, v and gate, up, and asks for q and v, and for gate, where any of them is there (sglang #25913)."""
    names = {p.module for p in case.whole}
    for module in sorted(names):
        block, _, kind = module.rpartition(".")
        needed = {"q_proj": ["v_proj"], "k_proj": ["q_proj", "v_proj"], "v_proj": ["q_proj"], "up_proj": ["gate_proj"]}
        lost = [n for n in needed.get(kind, []) if f"{block}.{n}" not in names]
        if lost:
            what = f"{module} is adapted without {lost[0]}, with which it is stacked (KeyError)"
            yield Finding(Status.REFUSED, what, module, f"{fold_command(case)} (it writes zeros there)")
            return


def sglang_others(case: Case) -> Iterator[Finding]:
    saved = [*case.others.get("saved", []), *case.others.get("vocabulary", [])]
    norms = [*case.others.get("norm", []), *(n for n in saved if "norm" in n)]
    if norms:
        yield Finding(Status.REFUSED, f"norms are refused: {examples(norms)}", norms[0], "train it without norms")
    if saved:
        what = f"heads in modules_to_save are dropped: {examples(saved)}"
        yield Finding(Status.IN_PART, what, saved[0], f"{fold_command(case)} --profile merged")


# --- llama.cpp and Ollama -----------------------------------------------------------------------------------------------


def gguf_other_tensors(case: Case) -> Iterator[Finding]:
    """The converter stops at any tensor that is neither a factor, nor a norm (which the loader then skips)."""
    if not case.is_lora:
        return
    names = [n for n in case.other_names if "lora_embedding_" not in n and ".base_layer.weight" not in n]
    norms = [n for n in names if "_layernorm" in n or ".norm" in n]
    stops = [n for n in names if n not in norms]
    if stops:
        fix = fold_command(case) if case.others.get("magnitude") else "train it without, or merge it into the base"
        yield Finding(Status.REFUSED, f"the converter stops at {stops[0]}", stops[0], fix)
    elif norms:
        what = f"converted and then not applied: {examples(norms)}"
        yield Finding(Status.IN_PART, what, norms[0], "merge it into the base")


def gguf_head(case: Case) -> Iterator[Finding]:
    if any(p.module == "lm_head" for p in case.pairs):
        tied = case.base and case.base.config.get("tie_word_embeddings")
        if case.base is None or tied:
            status = Status.REFUSED if tied else Status.NOT_CHECKED
            what = "lm_head is adapted, which fails where the base ties it to its embeddings"
            yield Finding(status, what, "lm_head", "train without lm_head" if tied else "give --base FOLDER")


def gguf_base(case: Case) -> Iterator[Finding]:
    if not case.file.config.get("base_model_name_or_path"):
        what = "the config names no base: the converter needs --base or --base-model-id"
        yield Finding(Status.LOADS, what, case.file.where("base_model_name_or_path"))


def gguf_file(case: Case) -> Iterator[Finding]:
    """A GGUF's own metadata and names."""
    for key, wanted in (("general.type", "adapter"), ("adapter.type", "lora")):
        value = case.file.config.get(key)
        if value != wanted:
            what = f"{key}={short_repr(value)} must be {wanted!r}; this is not a LoRA"
            yield Finding(Status.REFUSED, what, key, "convert the adapter with convert_lora_to_gguf.py")
    bad = [n for n in case.other_names if not n.endswith("_norm.weight")]
    if bad:
        what = f"tensors that end in neither .lora_a nor .lora_b: {examples(bad)}"
        yield Finding(Status.REFUSED, what, bad[0], "convert the adapter again")
    lone = [p.module for p in case.pairs if not (p.a and p.b)]
    if lone:
        yield Finding(Status.REFUSED, f"pairs that miss a side: {examples(lone)}", lone[0], "convert it again")
    if not case.file.config.get("adapter.lora.alpha"):
        what = "there is no alpha, so every scale is 1"
        yield Finding(Status.LOADS, what, "adapter.lora.alpha")


def ollama_alpha(case: Case) -> Iterator[Finding]:
    alpha = case.file.config.get("lora_alpha")
    if isinstance(alpha, float):
        what = f"lora_alpha={alpha} is a float where an unsigned integer is parsed"
        yield Finding(Status.REFUSED, what, case.file.where("lora_alpha"), f"write an integer, or {fold_command(case)}")


def ollama_base(case: Case) -> Iterator[Finding]:
    """safetensors adapters are converted for two architectures; Mistral's is llama's in GGUF."""
    if case.base is None:
        what = "whether the base is a llama or gemma2, for which alone safetensors adapters are converted"
        yield Finding(Status.NOT_CHECKED, what, case.file.where("base_model_name_or_path"), "give --base FOLDER")
    elif case.base.config.get("model_type") not in ("llama", "mistral", "gemma2"):
        what = f"the base is a {short_repr(case.base.config.get('model_type'))}; safetensors adapters need a llama or gemma2"
        yield Finding(Status.REFUSED, what, "config.json (model_type)", "convert it to GGUF with llama.cpp first")


def ollama_rows(case: Case) -> Iterator[Finding]:
    """Of a llama's q and k its conversion reorders the rows of A where those of B are meant."""
    kinds = [p.module for p in case.whole if p.kind in ("q_proj", "k_proj")]
    if kinds and case.base and case.base.config.get("model_type") in ("llama", "mistral"):
        what = "its conversion of a llama reorders the rows of lora_a in q_proj and k_proj, where those of lora_b are meant"
        yield Finding(Status.WRONG, what, kinds[0], f"{fold_command(case)} --profile gguf")


def ollama_others(case: Case) -> Iterator[Finding]:
    """Its conversion renames lora_A.weight and lora_B.weight, and its loader stops at what ends otherwise."""
    names = [n for role in ("norm", "embedding", "base_layer", "foreign") for n in case.others.get(role, [])]
    if names:
        yield Finding(Status.REFUSED, f"unexpected suffix: {examples(names)}", names[0], "adapt linear modules only")


def mlx_scale_ignored(case: Case) -> Iterator[Finding]:
    numbers = case.file.config.get("lora_parameters")
    used = numbers.get("scale") if isinstance(numbers, dict) else None
    if used not in (None, 1, 1.0):
        what = f"scale {used} of lora_parameters is not read"
        yield Finding(
            Status.MIS_SCALED, what, case.file.where("lora_parameters"), "multiply lora_b by it and write 1.0"
        )


# --- TGI and LoRAX ------------------------------------------------------------------------------------------------------

#: In which order the module types of a llama are loaded.
TGI_ORDER = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "c_proj", "gate_proj", "up_proj", "down_proj", "c_fc")


def tgi_padded(rank: int) -> int:
    """The kernel's rank on one GPU: 8 at least, else a multiple of 16."""
    return 8 if rank <= 8 else -(-rank // 16) * 16


def tgi_scale(case: Case, pair: Pair) -> float:
    """The config's α/r for the first type of module; the padding of each type then overwrites r for the next."""
    s = case.settings
    if pair.kind not in TGI_ORDER:
        return one_scale(case, pair)
    ranks = case.rank_by_kind
    before = [ranks[kind] for kind in TGI_ORDER[: TGI_ORDER.index(pair.kind)] if kind in ranks]
    return scale(s.lora_alpha, tgi_padded(before[-1]) if before else s.r, s.use_rslora)


def lorax_scale(case: Case, pair: Pair) -> float:
    """As TGI, with a peft 0.4.0 that has no use_rslora."""
    plain = replace(case, settings=replace(case.settings, use_rslora=False))
    return tgi_scale(plain, pair)


def tgi_layers(case: Case) -> Iterator[Finding]:
    """One absent layer drops its whole type; ranks within a type are stacked."""
    if not case.is_lora:
        return
    for kind in sorted({p.kind for p in case.whole if p.layer is not None}):
        members = [p for p in case.whole if p.kind == kind]
        have = {p.layer for p in members}
        every = _layers_of_base(case, kind) or set(range(1 + max(p.layer or 0 for p in case.whole)))
        absent = sorted(every - have)
        if absent:
            what = f"{kind} has no tensors in layer {absent[0]} ({len(absent)} of {len(every)} absent), so all {kind} are dropped"
            yield Finding(Status.IN_PART, what, members[0].module, f"{fold_command(case)} (it writes zeros there)")
        ranks = sorted({p.rank for p in members})
        if len(ranks) > 1:
            odd = next(p for p in members if p.rank != members[0].rank)
            what = f"ranks of {kind} differ ({ranks[0]} to {ranks[-1]}), and they are stacked"
            yield Finding(Status.REFUSED, what, odd.module, fold_command(case))


def _layers_of_base(case: Case, kind: str) -> set[int]:
    shapes = case.base.shapes if case.base else {}
    return {i for name in shapes if name.rsplit(".", 1)[-1] == kind and (i := layer_of(name)) is not None}


# --- mlx-lm and diffusers -----------------------------------------------------------------------------------------------


def mlx_config(case: Case) -> Iterator[Finding]:
    config, fix = case.file.config, "restore what mlx_lm.lora wrote"
    if config.get("fine_tune_type") == "full":
        if case.pairs:
            what = f"fine_tune_type='full' is of whole weights, and these are factors: {examples([p.module for p in case.pairs])}"
            yield Finding(Status.REFUSED, what, case.file.where("fine_tune_type"), fix)
        return
    dora = config.get("fine_tune_type") == "dora"
    unknown = [name for name in case.other_names if not (dora and name.endswith(".m"))]
    if unknown:
        yield Finding(Status.REFUSED, f"tensors that it does not know: {examples(unknown)}", unknown[0], fix)
    if not isinstance(config.get("num_layers"), int):
        yield Finding(Status.REFUSED, "the config needs num_layers", case.file.where("num_layers"), fix)
    numbers = config.get("lora_parameters")
    where = case.file.where("lora_parameters")
    if not isinstance(numbers, dict) or not {"rank", "scale", "dropout"} <= set(numbers):
        yield Finding(Status.REFUSED, "the config needs lora_parameters{rank, scale, dropout}", where, fix)
        return
    idle = [p.module for p in case.pairs if not _mlx_adapts(case, p, numbers.get("keys"))]
    if idle:
        what = f"tensors of layers that num_layers and keys do not name: {examples(idle)}"
        yield Finding(Status.REFUSED, what, idle[0], fix)
    wrong = [p for p in case.whole if p.rank != numbers["rank"]]
    if wrong:
        what = f"lora_parameters.rank={short_repr(numbers['rank'])}, but {wrong[0].module} has rank {wrong[0].rank}"
        yield Finding(Status.REFUSED, what, where, "mlx has one rank for all")


def _mlx_adapts(case: Case, pair: Pair, keys: object) -> bool:
    """Of the last num_layers layers, or of all if it is not positive, what keys name within a layer; of the model what they name in full."""
    layers = case.base.config.get("num_hidden_layers") if case.base else None
    last = case.file.config.get("num_layers")
    first = layers - last if isinstance(layers, int) and isinstance(last, int) and last > 0 else 0
    names = keys if isinstance(keys, list) else None
    if names and pair.module in names:
        return True
    if pair.layer is None or pair.layer < first:
        return False
    return names is None or pair.module.partition(f".{pair.layer}.")[2] in names


def diffusers_kind(case: Case) -> Iterator[Finding]:
    """It has no code for LoHa and LoKr; what it converts from other tools' names was not checked."""
    names = list(case.file.tensors)
    foreign = [n for n in names if "hada_" in n or "lokr_" in n]
    other = [n for n in names if n.startswith(("lora_unet_", "lora_te", "diffusion_model.")) or ".processor." in n]
    if foreign:
        yield Finding(
            Status.REFUSED, f"it has no LoHa or LoKr: {examples(foreign)}", foreign[0], "merge it where it was made"
        )
    dora = [n for n in names if n.endswith(".dora_scale") and n not in other]
    if dora:
        what = f"filtered out with a warning (lora_state_dict in loaders/lora_pipeline.py): {examples(dora)}"
        yield Finding(Status.IN_PART, what, dora[0], "train without DoRA, or merge it where it was made")
    if other and not foreign:
        what = f"names of kohya, ComfyUI or old processors, whose conversion was not checked: {examples(other)}"
        yield Finding(Status.NOT_CHECKED, what, other[0])


def diffusers_scale(case: Case) -> Iterator[Finding]:
    ranks = {p.rank for p in case.whole}
    if len(ranks) > 1 and not case.others.get("alpha") and not case.file.config.get("lora_adapter_metadata"):
        what = (
            f"ranks from {min(ranks)} to {max(ranks)} without alphas: versions before pull request 14409 take one "
            "module's rank as the α of all"
        )
        yield Finding(Status.NOT_CHECKED, what, case.whole[0].module, "add alpha keys or metadata")


# --- OpenVINO GenAI, mistral.rs and LMDeploy ----------------------------------------------------------------------------


def openvino_saved(case: Case) -> Iterator[Finding]:
    """Of whole modules its patterns name lm_head.weight and embed_tokens.weight, which take the place of the base's."""
    if not case.is_lora:
        return
    names = [*case.others.get("saved", []), *case.others.get("vocabulary", [])]
    whole = [n for n in names if n.endswith((".lm_head.weight", ".embed_tokens.weight"))]
    dropped = [n for n in names if n not in whole]
    fix = "train without modules_to_save, or merge it into the base"
    if dropped:
        yield Finding(Status.IN_PART, f"no pattern of its names takes {examples(dropped)}", dropped[0], fix)
    if whole:
        what = f"taken in the place of the base's constants, which was not run: {examples(whole)}"
        yield Finding(Status.NOT_CHECKED, what, whole[0], fix)


def mistral_rs_init(case: Case) -> Iterator[Finding]:
    init = case.file.config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(STARTS):
        what = f"init_lora_weights={short_repr(init)} is refused, as it requires transformed base weights"
        yield Finding(Status.REFUSED, what, case.file.where("init_lora_weights"), fold_command(case))


def mistral_rs_base(case: Case) -> Iterator[Finding]:
    config = case.base.config if case.base else {}
    if "rope_parameters" in config and "rope_theta" not in config:
        what = "it refuses this base until its config.json has rope_theta at the top level (missing field rope_theta)"
        yield Finding(Status.LOADS, what, "config.json (rope_parameters)")
