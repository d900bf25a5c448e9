"""What each engine does with an adapter: one row per engine, each a list of small rules.

Each row says how it is known, at which version and when; no engine is started by this module. Runs of folds are in engine_runs.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from rankfold.doctor import engine_rules, peft_rules, rules
from rankfold.doctor.case import Case
from rankfold.doctor.findings import Finding, Status
from rankfold.doctor.rules import Rule
from rankfold.io.formats.place import FORMATS


@dataclass(frozen=True)
class Engine:
    """One engine.

    Args:
        version: what was run or read.
        known: "run" (the engine), "loader run" (its own loader or converter), or "source read".
        rules: by format of the file; a format that is missing does not apply.
        reads: that format in words.
    """

    key: str
    name: str
    version: str
    known: str
    reads: str
    rules: dict[str, tuple[Rule, ...]] = field(default_factory=dict)
    date: str = "2026-11"


@dataclass(frozen=True)
class Verdict:
    """What one engine makes of the adapter: the worst of its findings."""

    engine: Engine
    findings: list[Finding]

    @property
    def status(self) -> Status:
        return max((f.status for f in self.findings), key=lambda s: s.severity, default=Status.LOADS)


def judge(engine: Engine, case: Case) -> Verdict:
    if case.file.kind not in engine.rules:
        what = f"it reads {engine.reads}; this is {FORMATS[case.file.kind]}"
        return Verdict(engine, [Finding(Status.DOES_NOT_APPLY, what)])
    if case.file.problems:
        first = case.file.problems[0]
        return Verdict(engine, [Finding(Status.REFUSED, first.what, first.where, first.fix)])
    common: tuple[Rule, ...] = (_pickled,)
    if case.file.kind == "peft":
        common += (rules.composite_names,)
        common += () if engine.key == "peft" else _NOT_PEFT
        common += () if engine.key in ("peft", "sglang") else (rules.adapter_names,)
        common += (_wrapped_gguf if engine.key in ("llama.cpp", "ollama") else _wrapped,)
    found = [f for rule in (*common, *engine.rules[case.file.kind]) for f in rule(case)]
    refused = {f.where for f in found if f.status is Status.REFUSED}
    return Verdict(engine, [f for f in found if f.status is not Status.NOT_CHECKED or f.where not in refused])


def _pickled(case: Case) -> Iterator[Finding]:
    if case.file.pickled and case.file.weights:
        what = "the weights are a pickle and were not opened; the config alone was checked"
        yield Finding(Status.NOT_CHECKED, what, case.file.weights.name, f"rankfold doctor {case.file.path} --fix OUT")


_NOT_PEFT = (
    rules.start_from_base,
    rules.more_than_lora,
    rules.served_base,
    rules.dtypes(Status.NOT_CHECKED, "F64", "F32", "F16", "BF16"),
)
_wrapped = rules.wrapper_keys(Status.IN_PART, "no module has these names, so none is applied")
_wrapped_gguf = rules.wrapper_keys(Status.REFUSED, "the converter stops at names that it does not know")

# --- the table ----------------------------------------------------------------------------------------------------------

_vllm_rank = partial(rules.rank_flag, engine_rules.VLLM_RANKS[-1], "--max-lora-rank", engine_rules.VLLM_RANKS)
_lora = partial(rules.only_lora, Status.REFUSED)
_both_gguf: tuple[Rule, ...] = (
    _lora,
    rules.needs("lora_alpha"),
    engine_rules.gguf_other_tensors,
    engine_rules.gguf_head,
    rules.scales(rules.alpha_over_tensor_rank, "use_rslora", "alpha_pattern", "rank_pattern"),
)


def _tgi(key: str, name: str, version: str, scale: rules.Scale, *more: Rule) -> Engine:
    """TGI and LoRAX, from which it came."""
    shared: tuple[Rule, ...] = (
        partial(rules.only_lora, Status.IN_PART),
        rules.keys_end_in_factors(Status.IN_PART, "only lora_A.weight and lora_B.weight are used, not"),
        rules.bare_keys(Status.NOT_CHECKED, "what becomes of keys without base_model.model. was not read"),
        engine_rules.tgi_layers,
        rules.scales(scale, "use_rslora", "alpha_pattern", "rank_pattern"),
    )
    return Engine(key, name, version, "source read", FORMATS["peft"], {"peft": (*shared, *more)})


ENGINES = (
    Engine(
        "vllm",
        "vLLM",
        "0.33.0",
        "loader run",
        FORMATS["peft"],
        {
            "peft": (
                _lora,
                rules.needs("r", "lora_alpha", "target_modules"),
                rules.refuses_flag(
                    "use_dora", "lora_bias", "layer_replication", "alora_invocation_tokens", "use_bdlora", "use_qalora"
                ),
                rules.refuses_bias,
                engine_rules.vllm_init,
                engine_rules.vllm_saved,
                engine_rules.vllm_embedding,
                rules.keys_end_in_factors(
                    Status.REFUSED,
                    "keys must end in lora_A.weight or lora_B.weight",
                    "embedding",
                    "saved",
                    "base_layer",
                    "parameter",
                ),
                rules.parameters,
                rules.scales(lambda case, pair: case.right_scale(pair)),
                _vllm_rank,
            )
        },
    ),
    Engine(
        "vllm-old",
        "older vLLM",
        "before 0.32",
        "source read",
        FORMATS["peft"],
        {
            "peft": (
                _lora,
                rules.needs("r", "lora_alpha", "target_modules"),
                rules.refuses_flag("use_dora", "modules_to_save"),
                rules.refuses_bias,
                engine_rules.vllm_embedding,
                rules.keys_end_in_factors(
                    Status.REFUSED, "keys must end in lora_A.weight or lora_B.weight", "embedding"
                ),
                rules.scales(rules.one_scale, "alpha_pattern", "rank_pattern"),
                _vllm_rank,
            )
        },
    ),
    Engine(
        "sglang",
        "SGLang",
        "0.5.23",
        "loader run",
        FORMATS["peft"],
        {
            "peft": (
                _lora,
                rules.needs("peft_type", "r", "lora_alpha", "target_modules"),
                rules.refuses_flag("use_dora"),
                rules.list_of_targets("all-linear", "all"),
                engine_rules.sglang_tokens,
                rules.one_rank,
                engine_rules.sglang_siblings,
                engine_rules.sglang_others,
                rules.keys_end_in_factors(
                    Status.NOT_CHECKED, "what becomes of other tensors was not read", "norm", "saved", "vocabulary"
                ),
                rules.bare_keys(Status.NOT_CHECKED, "what becomes of keys without base_model.model. was not read"),
                rules.scales(rules.one_scale_no_rslora, "use_rslora", "alpha_pattern", "rank_pattern"),
                partial(rules.rank_flag, 1 << 31, "--max-lora-rank", ()),
            )
        },
    ),
    Engine(
        "llama.cpp",
        "llama.cpp",
        "November 2026",
        "run",
        "a PEFT folder (through its converter) or a GGUF file",
        {"peft": (*_both_gguf, engine_rules.gguf_base), "gguf": (engine_rules.gguf_file,)},
    ),
    Engine(
        "ollama",
        "Ollama",
        "November 2026",
        "source read",
        "a PEFT folder, an mlx adapter or a GGUF file",
        {
            "peft": (
                *_both_gguf,
                engine_rules.ollama_alpha,
                engine_rules.ollama_base,
                engine_rules.ollama_rows,
                engine_rules.ollama_others,
                rules.head(Status.REFUSED, "it has no such tensor"),
            ),
            "gguf": (engine_rules.gguf_file,),
            "mlx": (engine_rules.ollama_others, engine_rules.mlx_scale_ignored),
        },
    ),
    _tgi(
        "tgi",
        "TGI",
        "2026-01-08",
        engine_rules.tgi_scale,
        rules.head(Status.IN_PART, "lm_head's LoRA is dropped with a warning"),
    ),
    _tgi("lorax", "LoRAX", "2024-06", engine_rules.lorax_scale),
    Engine("mlx", "mlx-lm", "0.32.2", "run", FORMATS["mlx"], {"mlx": (engine_rules.mlx_config,)}),
    Engine(
        "openvino",
        "OpenVINO GenAI",
        "2026.4.1",
        "run",
        FORMATS["peft"],
        {
            "peft": (
                _lora,
                rules.not_checked("target_parameters"),
                # src/cpp/src/lora/adapter.cpp groups tensors by patterns of names and passes over all others
                rules.keys_end_in_factors(
                    Status.IN_PART, "no pattern of its names takes", "saved", "vocabulary", "base_layer", "parameter"
                ),
                engine_rules.openvino_saved,
                rules.dtypes(Status.REFUSED, "F32", "F16", "BF16"),  # "Not supported safetensors dtype" in its binary
                rules.bare_keys(Status.IN_PART, "keys without base_model.model. are not applied"),
                rules.scales(rules.one, "lora_alpha", "use_rslora", "alpha_pattern", "rank_pattern"),
            )
        },
    ),
    Engine(
        "mistral.rs",
        "mistral.rs",
        "0.9.5",
        "run",
        FORMATS["peft"],
        {
            "peft": (
                _lora,
                rules.needs("r", "lora_alpha", "target_modules"),
                rules.not_checked("use_rslora", "rank_pattern", "alpha_pattern", "target_parameters"),
                # messages in the binary of 0.9.5, and `validate_dynamic` in mistralrs-quant/src/lora/mod.rs
                rules.refuses_flag(
                    "use_dora",
                    "lora_bias",
                    "modules_to_save",
                    "alora_invocation_tokens",
                    "layer_replication",
                    "use_qalora",
                    "use_bdlora",
                    "arrow_config",
                    "monteclora_config",
                    "trainable_token_indices",
                    "megatron_config",
                    "ensure_weight_tying",
                ),
                rules.refuses_bias,
                rules.keys_end_in_factors(Status.REFUSED, "no LoRA site consumes", "parameter"),
                rules.head(Status.REFUSED, "it has no LoRA of lm_head"),
                engine_rules.mistral_rs_init,
                engine_rules.mistral_rs_base,
            )
        },
    ),
    Engine(
        "lmdeploy",
        "LMDeploy",
        "0.18",
        "source read",
        FORMATS["peft"],
        {
            "peft": (
                _lora,
                rules.needs("r", "lora_alpha", "target_modules"),
                rules.not_checked("target_parameters"),
                # `add_adapters` in pytorch/models/patch.py, `load_lora_weights` in pytorch/adapter/adapter.py
                rules.list_of_targets(),
                rules.one_rank,
                rules.keys_end_in_factors(
                    Status.REFUSED, "keys must end in lora_A.weight or lora_B.weight (AssertionError)", "parameter"
                ),
                rules.bare_keys(Status.REFUSED, "as many letters as base_model.model. has are cut off"),
                rules.scales(rules.one_scale_no_rslora, "use_rslora", "alpha_pattern", "rank_pattern"),
            )
        },
    ),
    Engine(
        "diffusers",
        "diffusers",
        "2026-08-23",
        "source read",
        FORMATS["diffusers"],
        {"diffusers": (engine_rules.diffusers_kind, engine_rules.diffusers_scale)},
    ),
    Engine(
        "peft",
        "PEFT",
        "0.21.2",
        "run",
        FORMATS["peft"],
        {
            "peft": (
                rules.needs("peft_type"),
                peft_rules.known_type,
                peft_rules.values,
                peft_rules.targets,
                peft_rules.renamed,
                peft_rules.stated_ranks,
                rules.bare_keys(Status.IN_PART, "keys without base_model.model. are not applied"),
            )
        },
    ),
)
