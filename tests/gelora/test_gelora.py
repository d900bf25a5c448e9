"""GeLoRA: the rule, the states it measures, the matrices it names, and the two configs it gives."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as hf
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

from rankfold.commands import gelora as command
from rankfold.gelora import GeloraPlan, assign_ranks, gelora_plan, gelora_ranks, intrinsic_dimensions, show
from rankfold.gelora.blocks import find_stacks
from rankfold.gelora.states import Chain, Dimensions, masked_mean, pooled_states
from rankfold.host.linear_layer import AdaptedLinear

VOCAB = 64
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": VOCAB}


def build(make):
    torch.manual_seed(1)
    return make()


def llama(layers: int = 3, head: bool = True) -> nn.Module:
    config = hf.LlamaConfig(**SIZES, num_hidden_layers=layers, num_key_value_heads=1, pad_token_id=0)
    return build(lambda: (hf.LlamaForCausalLM if head else hf.LlamaModel)(config))


def bert(layers: int = 3, head: bool = True) -> nn.Module:
    config = hf.BertConfig(**SIZES, num_hidden_layers=layers)
    return build(lambda: (hf.BertForSequenceClassification if head else hf.BertModel)(config))


def gpt2() -> nn.Module:
    return build(lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=3, n_head=2)))


def t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": VOCAB}
    return build(lambda: hf.T5ForConditionalGeneration(hf.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)))


def bart() -> nn.Module:
    sizes = {f"{side}_{what}": v for side in ("encoder", "decoder") for what, v in (("layers", 2), ("ffn_dim", 8), ("attention_heads", 2))}  # fmt: skip
    return build(lambda: hf.BartForSequenceClassification(hf.BartConfig(d_model=16, vocab_size=VOCAB, **sizes)))


def deberta() -> nn.Module:
    config = hf.DebertaV2Config(
        **SIZES, num_hidden_layers=2, relative_attention=True, pos_att_type="p2c|c2p", position_buckets=4, share_att_key=False
    )  # fmt: skip
    return build(lambda: hf.DebertaV2ForSequenceClassification(config))


def vit() -> nn.Module:
    sizes = {k: v for k, v in SIZES.items() if k != "vocab_size"}
    return build(
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**sizes, num_hidden_layers=2, image_size=8, patch_size=4))
    )


def neox() -> nn.Module:
    return build(lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SIZES, num_hidden_layers=2)))


def distilbert() -> nn.Module:
    return build(
        lambda: hf.DistilBertModel(hf.DistilBertConfig(dim=16, hidden_dim=24, n_layers=2, n_heads=2, vocab_size=VOCAB))
    )


QKVO = {
    "llama": (llama, ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]),
    "gpt2": (gpt2, ["attn.c_attn", "attn.c_proj"]),
    "bert": (bert, ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]),
    "deberta": (deberta, ["attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj", "attention.output.dense"]),
    "t5": (t5, [f"layer.0.SelfAttention.{m}" for m in "qkvo"] + [f"layer.1.EncDecAttention.{m}" for m in "qkvo"]),
    "bart": (bart, [f"{a}.{m}_proj" for a in ("self_attn", "encoder_attn") for m in ("k", "v", "q", "out")]),
    "vit": (vit, [f"attention.{m}_proj" for m in "qkvo"]),
    "neox": (neox, ["attention.query_key_value", "attention.dense"]),
    "distilbert": (distilbert, [f"attention.{m}_lin" for m in ("q", "k", "v", "out")]),
}  # fmt: skip


def ids(rows: int = 60, length: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def batches(rows: int = 60, **more: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": part} for part in ids(rows).split(16)]


def measured(model: nn.Module, d: list[list[float]], targets=None, **options) -> GeloraPlan:
    """The plan of made-up dimensions, one list a stack."""
    chains = tuple(
        Chain(stack.name, tuple((x - 0.1, x, x + 0.1) for x in values))
        for stack, values in zip(find_stacks(model, targets), d, strict=True)
    )
    seconds = {"states": 1.0, "dimensions": 1.0}
    return assign_ranks(model, Dimensions(chains, 60, 3, 0, "linear", 0.1, seconds), targets=targets, **options)


def tokenizer(special: bool = True) -> hf.PreTrainedTokenizerFast:
    words = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="[PAD]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"} if special else {"pad_token": "[PAD]"}
    if special:
        inner.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=32, **names)


def texts(rows: int = 80, seed: int = 0) -> list[str]:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 12, (rows,), generator=g).tolist()
    return [" ".join(f"w{i}" for i in torch.randint(3, VOCAB, (n,), generator=g).tolist()) for n in lengths]


# The rule -------------------------------------------------------------------------------------------------------------

D = [3.2, 5.9, 9.4, 9.1, 12.6, 8.0]


def test_the_rule() -> None:
    assert gelora_ranks(D) == [4, 4, 1, 5, 1]
    assert gelora_ranks(D, "ceil_diff") == [4, 5, 1, 5, 1]
    assert gelora_ranks(D, "floor_diff") == [3, 4, 1, 4, 1]
    assert gelora_ranks(D, max_rank=3) == [3, 3, 1, 3, 1]
    assert gelora_ranks([4.0] * 6) == [1] * 5
    assert gelora_ranks([2.5, 3.5]) == [2]  # half up, not to even
    assert gelora_ranks([0.0, 0.0, 7.0]) == [1, 8]  # a degenerate layer has d = 0


@pytest.mark.parametrize(
    ("options", "message"), [({"rounding": "up"}, "rounding='up'"), ({"max_rank": 0}, "max_rank=0")]
)
def test_the_rule_refuses(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gelora_ranks(D, **options)


# Which matrices -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QKVO)
def test_attention_matrices_of_every_block(name: str) -> None:
    make, expected = QKVO[name]
    model = make()
    for stack in find_stacks(model):
        for i, sites in enumerate(stack.sites):
            found = {site.name.removeprefix(f"{stack.name}.{i}.") for site in sites}
            decoder_only = ("layer.1.EncDec", "encoder_attn")
            wanted = {e for e in expected if "decoder" in stack.name or not e.startswith(decoder_only)}
            assert found == wanted
            modules = dict(model.named_modules())
            assert all(site.name in modules for site in sites)


def test_targets_choose_other_matrices() -> None:
    (stack,) = find_stacks(llama(), ["mlp.down_proj", "q_proj"])
    assert [s.name.rpartition(".")[2] for s in stack.sites[1]] == ["q_proj", "down_proj"]
    with pytest.raises(ValueError, match=r"targets=\['nope'\].*linear modules are called .*q_proj"):
        find_stacks(llama(), ["nope"])


def test_no_attention_and_adapters_are_refused() -> None:
    with pytest.raises(ValueError, match="name them with targets="):
        find_stacks(nn.Sequential(nn.Linear(3, 3)))
    adapted = get_peft_model(llama(), measured(llama(), [[1.0, 2, 3, 4]]).config())
    with pytest.raises(ValueError, match="give the base model"):
        find_stacks(adapted)


# Which states ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [llama, gpt2, bert, deberta])
def test_states_are_those_of_transformers(make) -> None:
    model = make().eval()
    mask = torch.ones(60, 7, dtype=torch.long)
    mask[::3, 4:] = 0
    batch = {"input_ids": ids(), "attention_mask": mask}
    (states,) = pooled_states(model, [batch], find_stacks(model)).values()
    with torch.no_grad():
        hidden = model(**batch, output_hidden_states=True).hidden_states
    assert len(states) == len(hidden)
    final_norm = make in (llama, gpt2)
    for ours, theirs in list(zip(states, hidden, strict=True))[: -1 if final_norm else None]:
        naive = (theirs * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        torch.testing.assert_close(ours, naive)


def test_padding_changes_nothing() -> None:
    model = bert().eval()
    short = ids(8, 5)
    padded = torch.cat([short, torch.zeros(8, 4, dtype=torch.long)], 1)
    mask = torch.cat([torch.ones(8, 5), torch.zeros(8, 4)], 1).long()
    stacks = find_stacks(model)
    (a,) = pooled_states(model, [{"input_ids": short}], stacks).values()
    (b,) = pooled_states(model, [{"input_ids": padded, "attention_mask": mask}], stacks).values()
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y)


def test_masked_mean() -> None:
    x = torch.tensor([[[1.0], [3.0], [float("nan")]]])
    assert masked_mean(x, torch.tensor([[1, 1, 0]])).item() == 2.0
    assert masked_mean(x[:, :2], None).item() == 2.0
    assert masked_mean(x[:, :2].bfloat16(), None).dtype is torch.float32
    for bad in (torch.zeros(1, 3), torch.ones(1, 2)):
        with pytest.raises(ValueError, match=r"mask|token"):
            masked_mean(x, bad)


def test_the_model_is_left_as_it_was() -> None:
    model = bert().train()
    model.bert.encoder.layer[1].eval()  # pyright: ignore[reportAttributeAccessIssue]
    before = {n: m.training for n, m in model.named_modules()}
    first = intrinsic_dimensions(model, batches())
    assert before == {n: m.training for n, m in model.named_modules()}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert intrinsic_dimensions(model, batches()).chains == first.chains  # no dropout


def test_encoder_decoder_has_two_chains() -> None:
    model = t5()
    mask = torch.ones(60, 7, dtype=torch.long)
    mask[:, 5:] = 0
    batch = {"input_ids": ids(), "attention_mask": mask, "decoder_input_ids": ids(60, 4, 1)}
    found = intrinsic_dimensions(model, [batch])
    assert [c.stack for c in found.chains] == ["encoder.block", "decoder.block"]
    plan = assign_ranks(model, found)
    assert set(plan.ranks) == {f"{side}.block.{i}" for side in ("encoder", "decoder") for i in (0, 1)}
    assert len(plan.module_ranks()) == 2 * 4 + 2 * 8


def test_vision_needs_no_mask() -> None:
    pixels = torch.randn(60, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    plan = assign_ranks(vit(), intrinsic_dimensions(vit(), [{"pixel_values": pixels}]))
    assert list(plan.ranks) == ["vit.layers.0", "vit.layers.1"]


def test_states_that_cannot_be_measured() -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan  # pyright: ignore
    with pytest.raises(ValueError, match=r"NaN or infinity in the output of model\.layers\.1"):
        intrinsic_dimensions(model, batches())
    with pytest.raises(ValueError, match="40 sequences are too few"):
        intrinsic_dimensions(llama(), batches(40))
    albert = build(lambda: hf.AlbertModel(hf.AlbertConfig(**SIZES, embedding_size=8, num_hidden_layers=3)))
    with pytest.raises(ValueError, match="share weights"):
        intrinsic_dimensions(albert, batches())


def test_identical_states_have_dimension_zero() -> None:
    """All texts end up at one point: d = 0 there, and rank 1."""
    model = bert()
    with torch.no_grad():
        for name in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
            getattr(model.bert.embeddings, name).weight.zero_()  # pyright: ignore
    found = intrinsic_dimensions(model, batches())
    assert found.chains[0].d[0] == 0.0
    assert set(assign_ranks(model, found).ranks.values()) == {1}


# Configs --------------------------------------------------------------------------------------------------------------


def ranks_in(model: nn.Module) -> dict[str, tuple[int, float]]:
    """By module of the base model: rank and scale, from the layers themselves."""
    found = {}
    for name, module in model.named_modules():
        name = name.removeprefix("base_model.model.")
        if isinstance(module, AdaptedLinear):
            (adapter,) = module.adapters(["default"])
            found[name] = (adapter.factors().rank, adapter.scaling)
        elif isinstance(module, LoraLayer):
            found[name] = (module.lora_A["default"].weight.shape[0], module.scaling["default"])
    return found


#: Twelve blocks, each with another rank than the one whose number its own begins or ends with.
TWELVE = [float(sum([1, 5, 2, 1, 3, 1, 2, 1, 1, 4, 2, 7][:i])) for i in range(13)]


@pytest.mark.parametrize("make", [llama, bert])
def test_patterns_name_one_block_exactly(make) -> None:
    """Layer 1 is not layer 11, and a plan made without a head fits the model that has one."""
    plan = measured(make(12, head=False), [TWELVE])
    assert list(plan.ranks.values()) == [2, 6, 3, 2, 4, 2, 3, 2, 2, 5, 3, 8]
    for config in (plan.config(), plan.peft_config()):
        for head in (False, True):
            found = ranks_in(get_peft_model(make(12, head=head), config))
            assert len(found) == 48
            for name, (rank, scale) in found.items():
                block = int(re.search(r"\.?layers?\.(\d+)\.", name)[1])  # pyright: ignore
                assert rank == list(plan.ranks.values())[block], name
                assert scale == 32


@pytest.mark.parametrize("name", QKVO)
def test_every_architecture_gets_just_its_attention(name: str) -> None:
    model = QKVO[name][0]()
    plan = measured(model, [[1.0 + 2.0 * i for i in range(len(s) + 1)] for s in find_stacks(model)])
    wanted = {site.name: (3, 32) for stack in find_stacks(model) for sites in stack.sites for site in sites}
    assert ranks_in(get_peft_model(QKVO[name][0](), plan.config())) == wanted
    peft_model = get_peft_model(QKVO[name][0](), plan.peft_config(fan_in_fan_out=name == "gpt2"))
    assert ranks_in(peft_model) == wanted
    trained = sum(p.numel() for n, p in peft_model.named_parameters() if "lora_" in n)
    assert plan.parameters == trained


def test_equal_dimensions_give_rank_one_everywhere() -> None:
    plan = measured(llama(), [[5.0] * 4])
    assert plan.fields()["rank_pattern"] == {}
    assert plan.config().r == 1
    assert plan.config().lora_alpha == 32
    assert set(plan.module_ranks().values()) == {1}


def test_ours_and_stock_lora_compute_the_same() -> None:
    plan = measured(llama(), [[1.0, 4.0, 3.0, 5.0]])
    ours = get_peft_model(llama(), plan.config()).eval()
    stock = get_peft_model(llama(), plan.peft_config()).eval()
    torch.manual_seed(0)
    for name, layer in ours.named_modules():
        if isinstance(layer, AdaptedLinear):
            (adapter,) = layer.adapters(["default"])
            other = stock.get_submodule(name)
            with torch.no_grad():
                adapter.up.normal_(std=0.1)
                other.lora_A["default"].weight.copy_(adapter.down)
                other.lora_B["default"].weight.copy_(adapter.up)
    batch = {"input_ids": ids(4)}
    a, b = ours(**batch).logits, stock(**batch).logits
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(a, llama().eval()(**batch).logits, atol=1e-2)


def test_no_rank_above_a_matrix_s_own() -> None:
    plan = measured(llama(), [[1.0, 40.0, 40.0, 40.0]])
    assert plan.blocks[0].rank == 40
    assert plan.module_ranks()["model.layers.0.self_attn.k_proj"] == 8  # one head of 8
    assert plan.module_ranks()["model.layers.0.self_attn.q_proj"] == 16
    assert {scale for _, scale in ranks_in(get_peft_model(llama(), plan.config())).values()} == {32}
    assert measured(llama(), [[1.0, 40.0, 40.0, 40.0]], max_rank=4).blocks[0].rank == 4


def test_fields_can_be_changed_for_training() -> None:
    plan = measured(bert(), [[1.0, 2.0, 2.0, 2.0]])
    config = plan.config(lora_dropout=0.1, task_type="SEQ_CLS")
    assert (config.lora_dropout, config.task_type, config.target_modules) == (0.1, "SEQ_CLS", set(plan.targets))
    assert plan.peft_config(use_rslora=True).use_rslora


def test_two_stacks_whose_names_end_alike_are_refused() -> None:
    """PEFT would give both the first one's rank."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = llama(2, head=False).layers
            self.vision = nn.Module()
            self.vision.layers = llama(2, head=False).layers

    assert len(measured(Two(), [[1.0, 3.0, 3.0], [1.0, 3.0, 3.0]]).module_ranks()) == 16
    with pytest.raises(ValueError, match="narrow targets"):
        measured(Two(), [[1.0, 3.0, 3.0], [1.0, 1.0, 5.0]])


def test_dimensions_of_another_model_are_refused() -> None:
    found = intrinsic_dimensions(llama(2), batches())
    with pytest.raises(ValueError, match="measured on another model"):
        assign_ranks(llama(3), found)


# From texts to a file -------------------------------------------------------------------------------------------------


def test_plan_from_texts() -> None:
    plan = gelora_plan(bert(), tokenizer(), texts(), points=70, seed=3, batch_size=16, data="made up")
    assert plan.dimensions.points == 70
    assert plan.recipe["data"] == "made up"
    assert plan.recipe["seed"] == 3
    assert set(plan.dimensions.seconds) == {"states", "dimensions"}
    for block in plan.blocks:
        assert block.low <= block.high
        assert block.rank >= 1
    again = gelora_plan(bert(), tokenizer(), texts(), points=70, seed=3, batch_size=16)
    assert again.blocks == plan.blocks
    other = gelora_plan(bert(), tokenizer(), texts(), points=70, seed=4, batch_size=16)
    assert other.dimensions.chains != plan.dimensions.chains


def test_the_same_tokens_count_once() -> None:
    twice = [t for text in texts(60) for t in (text, f"  {text}")]
    assert gelora_plan(bert(), tokenizer(), twice).dimensions.points == 60
    with pytest.raises(ValueError, match="texts: 1 different ones are too few"):
        gelora_plan(bert(), tokenizer(), ["w3 w4"] * 500)


def test_pairs_chats_and_encoder_decoders() -> None:
    pairs = list(zip(texts(60), texts(60, seed=1), strict=True))
    assert gelora_plan(bert(), tokenizer(), pairs).dimensions.points == 60
    assert gelora_plan(llama(), tokenizer(special=False), pairs).dimensions.points == 60
    plan = gelora_plan(t5(), tokenizer(), pairs)
    assert len(plan.dimensions.chains) == 2
    with pytest.raises(ValueError, match="needs a pair"):
        gelora_plan(t5(), tokenizer(), texts())
    chatty = tokenizer(special=False)
    chatty.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    chats = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in pairs]
    assert gelora_plan(llama(), chatty, chats).dimensions.points == 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": 10}, "points=10 must be 50 or more"),
        ({"subsamples": 2}, "subsamples=2 must be 3"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"rounding": "x"}, "rounding='x'"),
    ],
)
def test_wrong_arguments(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gelora_plan(bert(), tokenizer(), texts(), **options)


def test_half_precision_is_noted() -> None:
    plan = gelora_plan(bert().bfloat16(), tokenizer(), texts())
    assert any("bfloat16" in note for note in plan.notes)


def test_json_round_trip() -> None:
    plan = gelora_plan(bert(), tokenizer(), texts(), points=60)
    text = plan.to_json()
    assert GeloraPlan.from_json(text) == plan
    method = json.loads(text)["method"]
    assert method["name"] == "lora"
    assert method["lora_alpha"] == 32 * method["r"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda raw: "[]",
        lambda raw: "{",
        lambda raw: json.dumps({**raw, "format": "x"}),
        lambda raw: json.dumps({k: v for k, v in raw.items() if k != "blocks"}),
        lambda raw: json.dumps({**raw, "blocks": [{**b, "rank": b["rank"] + 1} for b in raw["blocks"]]}),
        lambda raw: json.dumps({**raw, "dimensions": {**raw["dimensions"], "chains": [{"stack": 1}]}}),
    ],
)
def test_a_spoilt_file_is_refused(spoil) -> None:
    raw = json.loads(measured(bert(), [[1.0, 2.0, 2.0, 2.0]]).to_json())
    with pytest.raises(ValueError, match="plan"):
        GeloraPlan.from_json(spoil(raw))


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_table_and_picture(tmp_path: Path, ending: str) -> None:
    from rich.console import Console

    plan = replace(measured(t5(), [[1.0, 12.0, 3.0], [2.0, 2.0, 3.0]]), notes=("a note",))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(show.table(plan))
    shown = console.export_text()
    assert "encoder.block.0" in shown
    assert "a note" in shown
    assert f"{plan.parameters:,} parameters" in shown
    assert max(map(len, shown.splitlines())) <= 80
    show.picture(plan, tmp_path / f"plan.{ending}")
    start = (tmp_path / f"plan.{ending}").read_bytes()[:5]
    assert start in (b"<?xml", b"\x89PNG\r")
    with pytest.raises(ValueError, match="must end in"):
        show.picture(plan, tmp_path / "plan.txt")


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    bert().save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    rows = [{"text": text, "label": i % 2, "other": text[::-1]} for i, text in enumerate(texts())]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_the_command(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"out": str(place / "new" / "plan.json"), "picture": str(place / "plan.svg")}
    options = command.Options(model=str(place / "bert"), data=str(place / "rows.jsonl"), points=60, **files)
    assert command.run(options) == 0
    plan = GeloraPlan.from_json(Path(files["out"]).read_text())
    shown = capsys.readouterr().out
    assert f"{plan.parameters:,} parameters" in shown
    assert "plan.svg" in shown
    assert list(plan.ranks) == ["encoder.layer.0", "encoder.layer.1", "encoder.layer.2"]
    assert len(ranks_in(get_peft_model(bert(), plan.config()))) == 12  # fits with a head, too
    with pytest.raises(FileExistsError, match="--force"):
        command.run(replace(options, data="unread"))

    command.run(replace(options, json=True, max_rank=1, out=None, picture=None))
    assert {block["rank"] for block in json.loads(capsys.readouterr().out)["blocks"]} == {1}


def test_the_command_takes_pairs(place: Path) -> None:
    where = {"model": str(place / "bert"), "data": str(place / "rows.jsonl")}
    plan = command.measured(command.Options(**where, text="other", pair="text", targets=["query"]))
    assert plan.targets == ("attention.self.query",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": "txet"}, "text"),
        ({"picture": "plan.gif"}, "must end in"),
        ({"model": "./nothing"}, "nothing"),
        ({"max_length": 0}, "data.max_length: 0 is not allowed, should be greater than 0"),
        ({"max_length": 33}, "data.max_length: 33 tokens do not fit the model, which takes 32"),
    ],
)
def test_the_command_refuses_before_it_measures(place: Path, options, message: str) -> None:
    arguments = {"model": str(place / "bert"), "data": str(place / "rows.jsonl"), **options}
    with pytest.raises(ValueError, match=message):
        command.run(command.Options(**arguments))
