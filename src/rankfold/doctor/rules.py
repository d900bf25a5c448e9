"""The rules that several engines share: small functions from a case to what an engine makes of one thing in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from peft import PEFT_TYPE_TO_CONFIG_MAPPING

from rankfold.doctor.case import Case, Pair
from rankfold.doctor.findings import Finding, Status
from rankfold.doctor.settings import scale
from rankfold.host.config import LowRankConfig
from rankfold.text import examples, short_repr

Rule = Callable[[Case], Iterable[Finding]]
Scale = Callable[[Case, Pair], float]


def fold_command(case: Case) -> str:
    return f"rankfold fold {case.file.path} -o OUT{_fold_option(case)}"


def _fold_option(case: Case) -> str:
    """What the command must be told of an adapter of ours that has no exact fold."""
    cls = PEFT_TYPE_TO_CONFIG_MAPPING.get(case.settings.peft_type)  # pyright: ignore[reportArgumentType, reportCallIssue]
    if cls is None or not issubclass(cls, LowRankConfig) or not cls.approximations:
        return ""
    try:
        config = cls(
            **{k: v for k, v in case.file.config.items() if k in cls.__dataclass_fields__ and k != "peft_type"}
        )
    except (TypeError, ValueError):
        return ""
    return config.fold_option


# --- rules of several engines -----------------------------------------------------------------------------------------


def only_lora(status: Status, case: Case) -> Iterator[Finding]:
    """Engines know LoRA and nothing else."""
    if not case.is_lora:
        what = f"peft_type={case.settings.peft_type} is not LORA; its tensors are not read"
        yield Finding(status, what, case.file.where("peft_type"), fold_command(case))


def bare_keys(status: Status, what: str) -> Rule:
    """Factors whose keys lack PEFT's prefix."""

    def rule(case: Case) -> Iterator[Finding]:
        if case.bare:
            fix = "write base_model.model. before each key"
            yield Finding(status, f"{what}: {examples(case.bare)}", case.bare[0], fix)

    return rule


def needs(*keys: str) -> Rule:
    """Keys without which the engine's config class cannot be made."""

    def rule(case: Case) -> Iterator[Finding]:
        for key in keys:
            if key not in case.file.config or (case.file.config[key] is None and key != "target_modules"):
                yield Finding(Status.REFUSED, f"the config has no {key}", case.file.where(key), f"add {key}")

    return rule


def refuses_flag(*keys: str) -> Rule:
    """Config keys that must be false, null or empty."""

    def rule(case: Case) -> Iterator[Finding]:
        for key in keys:
            value = case.file.config.get(key)
            if value:
                fix = fold_command(case) if key == "use_dora" else f"train without {key}"
                yield Finding(Status.REFUSED, f"{key}={short_repr(value)} is refused", case.file.where(key), fix)

    return rule


def refuses_bias(case: Case) -> Iterator[Finding]:
    bias = case.file.config.get("bias", "none")
    if bias not in ("none", None):
        what = f'bias={short_repr(bias)} is refused; it must be "none"'
        yield Finding(Status.REFUSED, what, case.file.where("bias"), "train with bias='none'; a bias has no LoRA form")


def keys_end_in_factors(status: Status, why: str, *allowed: str) -> Rule:
    """Tensors that are neither lora_A.weight nor lora_B.weight; `allowed` are roles that the engine takes."""

    def rule(case: Case) -> Iterator[Finding]:
        if not case.is_lora:
            return
        for role, names in case.others.items():
            if role not in allowed:
                fix = fold_command(case) if role == "magnitude" else "train it without, or merge it into the base"
                yield Finding(status, f"{why}: {examples(names)}", names[0], fix)

    return rule


def scales(engine_scale: Scale, *ignored: str) -> Rule:
    """Compares the factor that the engine multiplies each update with to the one it was trained with.

    Args:
        engine_scale: the engine's formula.
        ignored: config keys that the formula does not read, the likeliest culprit first.
    """

    def rule(case: Case) -> Iterator[Finding]:
        if not case.is_lora:
            return
        wrong: list[tuple[Pair, float, float]] = []
        if case.contradicted:
            what = "config and tensors disagree on the rank, so the right scale is not known"
            yield Finding(Status.NOT_CHECKED, what, case.file.where("r"), "correct r or rank_pattern")
            return
        for pair in case.whole or _of_config(case):
            used, right = engine_scale(case, pair), case.right_scale(pair)
            if abs(used - right) > 1e-6 * abs(right):
                wrong.append((pair, used, right))
        if wrong:
            pair, used, right = max(wrong, key=lambda w: abs(w[1] - w[2]) / (abs(w[2]) or 1))
            off = ""
            if min(used, right) > 0:
                off = f", {max(used, right) / min(used, right):.4g} times too {'large' if used > right else 'small'}"
            what = f"scale {used:.4g} where {right:.4g} is right{off}, in {pair.module}"
            key = next((k for k in ignored if case.file.config.get(k)), "r")
            total = f" ({len(wrong)} of {len(case.whole)} modules)" if case.whole else ""
            yield Finding(Status.MIS_SCALED, what + total, case.file.where(key), fold_command(case))

    return rule


def _of_config(case: Case) -> list[Pair]:
    """Stand-ins for modules where the weights are a pickle: one plain, one for each pattern."""
    names = ["module", *case.settings.rank_pattern, *case.settings.alpha_pattern]
    return [Pair(name, None, None) for name in names] if case.file.pickled else []


def one_scale(case: Case, pair: Pair) -> float:
    """α/r or α/√r of the config for all."""
    s = case.settings
    return scale(s.lora_alpha, s.r, s.use_rslora)


def one_scale_no_rslora(case: Case, pair: Pair) -> float:
    return scale(case.settings.lora_alpha, case.settings.r)


def alpha_over_tensor_rank(case: Case, pair: Pair) -> float:
    """One α over each tensor's own rank; an α of 0 counts as none and leaves 1."""
    alpha = case.settings.lora_alpha
    return scale(alpha, pair.rank or case.settings.rank(pair.module)) if alpha else 1.0


def rank_flag(limit: int, flag: str, legal: tuple[int, ...], case: Case) -> Iterator[Finding]:
    """Serving flags that bound the rank."""
    rank = case.largest_rank
    if rank > limit:
        what = f"rank {rank} is above {limit}, the largest that it takes"
        fix = f"{fold_command(case)} --rank {limit}"
        yield Finding(Status.REFUSED, what, case.file.where("r"), fix)
    elif rank > 16 or not legal:
        need = next((r for r in legal if r >= rank), rank)
        yield Finding(Status.LOADS, f"serve with {flag} {need} or more", case.file.where("r"))


#: Starts that took something out of the base; PEFT repeats it at every load, others have the whole base. PEFT's conversion
#: writes init_lora_weights=true.
STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def start_from_base(case: Case) -> Iterator[Finding]:
    """Adapters that are relative to a base without their start."""
    start = case.file.config.get("init_lora_weights")
    if not case.is_lora or not isinstance(start, str) or not start.lower().startswith(STARTS):
        return
    foldable = start.lower() in ("pissa", "olora")
    convert = "save it with save_pretrained(path_initial_model_for_weight_conversion=…)"
    what = f"init_lora_weights={short_repr(start)}: it was trained on a base without its start, and this engine has the whole base"
    yield Finding(Status.WRONG, what, case.file.where("init_lora_weights"), fold_command(case) if foldable else convert)


def list_of_targets(*allowed: str) -> Rule:
    """`target_modules` as a string, but for the words that are allowed."""

    def rule(case: Case) -> Iterator[Finding]:
        targets = case.settings.target_modules
        if isinstance(targets, str) and targets not in allowed:
            what = f"target_modules={short_repr(targets)} is one string; it must be a list"
            fix = f"write the list of names, or {fold_command(case)}"
            yield Finding(Status.REFUSED, what, case.file.where("target_modules"), fix)

    return rule


def one_rank(case: Case) -> Iterator[Finding]:
    """Buffers that have the config's r."""
    odd = [p for p in case.whole if p.rank != case.settings.r]
    if case.is_lora and odd:
        what = f"{odd[0].module} has rank {odd[0].rank}, its buffers have r={case.settings.r}"
        yield Finding(Status.REFUSED, what, case.file.where("r"), fold_command(case))


def wrapper_keys(status: Status, what: str) -> Rule:
    """Keys that wrappers of training left."""

    def rule(case: Case) -> Iterator[Finding]:
        if case.wrapped:
            fix = f"rankfold doctor {case.file.path} --fix OUT"
            yield Finding(status, f"{what}: {examples(case.wrapped)}", case.wrapped[0], fix)

    return rule


def adapter_names(case: Case) -> Iterator[Finding]:
    """`lora_A.default.weight`, which PEFT and SGLang read."""
    if case.named:
        what = f"keys must end in lora_A.weight or lora_B.weight: {examples(case.named)}"
        yield Finding(Status.REFUSED, what, case.named[0], f"rankfold doctor {case.file.path} --fix OUT")


def composite_names(case: Case) -> Iterator[Finding]:
    """Names of a multimodal model where the base is not known: on a text model nothing would match."""
    parts = [p.module for p in case.pairs if "language_model" in p.module.split(".")]
    if parts and case.base is None and case.settings.peft_type == "LORA":
        what = f"{parts[0]} is a module of a multimodal model; a text model has none of that name"
        yield Finding(Status.NOT_CHECKED, what, parts[0], "give --base FOLDER")


def head(status: Status, what: str) -> Rule:
    """A LoRA of lm_head."""

    def rule(case: Case) -> Iterator[Finding]:
        heads = [p.module for p in case.pairs if p.kind == "lm_head"]
        if heads:
            yield Finding(status, what, heads[0], f"{fold_command(case)} --profile merged")

    return rule


def parameters(case: Case) -> Iterator[Finding]:
    """Factors of target_parameters, such as fused experts."""
    if names := case.others.get("parameter"):
        what = f"target_parameters are taken for its classes of fused experts only: {examples(names)}"
        yield Finding(Status.NOT_CHECKED, what, names[0])


def not_checked(*keys: str) -> Rule:
    """Config keys whose reading was not tried."""

    def rule(case: Case) -> Iterator[Finding]:
        for key in keys:
            if case.file.config.get(key):
                what = f"whether {key} is read was not tried"
                yield Finding(Status.NOT_CHECKED, what, case.file.where(key), fold_command(case))

    return rule


#: Keys that make an adapter more than B·A beside linear layers. Loaders that do not know them take the rest for a LoRA.
MORE_THAN_LORA = (
    "alora_invocation_tokens",
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)


def more_than_lora(case: Case) -> Iterator[Finding]:
    """Keys and factors of which a loader may make something else than PEFT does."""
    if not case.is_lora:
        return
    for key in MORE_THAN_LORA:
        if value := case.file.config.get(key):
            what = f"what becomes of {key}={short_repr(value)} was not checked"
            yield Finding(Status.NOT_CHECKED, what, case.file.where(key), f"train without {key}")
    flat = [p.module for p in case.whole if any(h and len(h.shape) != 2 for h in (p.a, p.b))]
    if flat:
        what = f"what becomes of factors that are not matrices, as of convolutions, was not checked: {examples(flat)}"
        yield Finding(Status.NOT_CHECKED, what, flat[0])


def dtypes(status: Status, *taken: str) -> Rule:
    """Tensors of other dtypes than these."""

    def rule(case: Case) -> Iterator[Finding]:
        others = {name: header.dtype for name, header in case.file.tensors.items() if header.dtype not in taken}
        if others:
            name, dtype = next(iter(others.items()))
            what = f"dtype {dtype} of {name}: " + ("refused" if status is Status.REFUSED else "not checked")
            yield Finding(status, what, name, f"rankfold doctor {case.file.path} --fix OUT")

    return rule


#: How the names of transformers' classes end that engines serve.
SERVED = ("ForCausalLM", "ForConditionalGeneration", "ForSequenceClassification", "LMHeadModel")


def served_base(case: Case) -> Iterator[Finding]:
    """Bases that are not language models. Which language models an engine has is not known either."""
    names = case.base.config.get("architectures") if case.base else None
    if case.base and isinstance(names, list) and names and not any(str(name).endswith(SERVED) for name in names):
        what = f"whether it serves a {short_repr(names[0])} was not checked"
        yield Finding(Status.NOT_CHECKED, what, str(case.base.folder / "config.json"))


def one(case: Case, pair: Pair) -> float:
    """No scale is read."""
    return 1.0
