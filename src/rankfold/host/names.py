"""What a name that a model does not have is answered with: the modules that do its work here, and all that can be adapted."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from torch import nn

from rankfold.errors import nearest
from rankfold.host.checkpoint import plain_name
from rankfold.host.kinds import kind_of
from rankfold.host.peft_api import names_of_experts

#: What models call the modules that do the same work; an entry may be the end of a longer name.
QUERY = ("q_proj", "query", "q", "q_lin", "query_proj", "to_q", "wq")
KEY = ("k_proj", "key", "k", "k_lin", "key_proj", "to_k", "wk")
VALUE = ("v_proj", "value", "v", "v_lin", "value_proj", "to_v", "wv")
THREE_IN_ONE = ("c_attn", "query_key_value", "qkv_proj", "qkv", "Wqkv", "W_pack", "in_proj")
OUTPUT = (
    "o_proj",
    "out_proj",
    "attention.output.dense",
    "attn.c_proj",
    "o",
    "out_lin",
    "self_attention.dense",
    "to_out.0",
    "wo",
)
GATE = ("gate_proj", "w1", "wi_0", "gate_up_proj")
UP = ("up_proj", "w3", "wi_1", "fc1", "fc_in", "c_fc", "lin1", "intermediate.dense", "dense_h_to_4h", "wi")
DOWN = ("down_proj", "w2", "fc2", "fc_out", "mlp.c_proj", "lin2", "output.dense", "dense_4h_to_h", "wo", "Wo")
ROLES = (QUERY, KEY, VALUE, THREE_IN_ONE, OUTPUT, GATE, UP, DOWN)
#: The others that take a role's part where no module has it.
INSTEAD = {
    QUERY: (THREE_IN_ONE,), KEY: (THREE_IN_ONE,), VALUE: (THREE_IN_ONE,), THREE_IN_ONE: (QUERY, KEY, VALUE),
    GATE: (UP,),
}  # fmt: skip
#: Of UP, the names in models that have a gate beside it; the others stand for both.
GATED = ("up_proj", "w3", "wi_1")
MOST = 20


def absent_in_words(field: str, name: str, model: nn.Module) -> str:
    """A sentence about a name in a config that nothing in the model has.

    Args:
        field: of the config; "target_modules" is about modules that can be adapted, "target_parameters" about parameters, any other
            about modules.
    """
    if field == "target_parameters":
        parameters = [plain_name(n).replace(".base_layer", "") for n, p in model.named_parameters() if p.ndim in (2, 3)]
        known = list(dict.fromkeys(".".join(n.split(".")[-2:]) for n in parameters))
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ";"
        return f"no parameter of the model is called {name!r}{hint} its matrices: {_listed(known)}"
    if field != "target_modules":
        ends = {n.rpartition(".")[2] for n, _ in model.named_modules() if n}
        return f"no module of the model is called {name!r}{nearest(name, ends, 'it has')}"
    if instead := in_its_place(name, model):
        hint = f"; its place here is {' and '.join(map(repr, instead))};"
    else:
        ends = _ends([plain_name(n) for n, m in model.named_modules() if n and kind_of(m)])
        near = difflib.get_close_matches(name.rpartition(".")[2], ends, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ";"
    return f"no module of the model is called {name!r}{hint} {linear_layers_in_words(model)}"


def linear_layers_in_words(model: nn.Module) -> str:
    """The names that `target_modules` can have, experts by the names that stand for them too; those of convolutions and embeddings apart."""
    return f"linear layers: {_listed(_ends(_names(model)))}"


def in_its_place(name: str, model: nn.Module) -> list[str]:
    """What a model calls the modules that do the work of those called so in others; [] where that is not known."""
    names, last = _names(model), name.rpartition(".")[2]
    for role in ROLES:
        if not any(f".{name}".endswith(f".{one}") or last == one for one in role):
            continue
        roles = [GATE, UP] if role is UP and last not in GATED else [role]
        for some in (roles, INSTEAD.get(role, ())):
            if found := [own for one in some if (own := _there(one, names))]:
                return found
    return []


def _there(role: tuple[str, ...], names: list[str]) -> str | None:
    return next((one for one in role if any(f".{name}".endswith(f".{one}") for name in names)), None)


def _names(model: nn.Module) -> list[str]:
    """Of what can be adapted and is linear, experts by the names that stand for them too."""
    names = [plain_name(n) for n, m in model.named_modules() if n and (kind := kind_of(m)) and kind.linear]
    return [*names, *names_of_experts(model)]


def _ends(names: Iterable[str]) -> list[str]:
    """The last parts of names in the model's order; the last two where the last is a place in a list, or says nothing."""
    parts = [name.split(".") for name in names]
    return list(dict.fromkeys(".".join(p[-2:] if p[-1].isdecimal() or p[-1] == "dense" else p[-1:]) for p in parts))


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return ", ".join(names[:MOST]) + more
