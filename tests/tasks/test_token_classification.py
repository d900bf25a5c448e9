"""Words and tags: which token has a word's tag, how tags become indices, and rows that are refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from tiny import byte_tokenizer, write_jsonl
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rankfold.runfile.load import parse
from rankfold.tasks import rows as tasks_rows
from rankfold.tasks import table, token_classification
from rankfold.tasks.rows import DataError, Rows
from rankfold.train.data import load_rows
from rankfold.train.prepare import prepare

TASK = table.get("token-classification")


def run_of(rows: list[dict[str, Any]] | Path, folder: Path, **data: Any) -> Any:
    source = rows if isinstance(rows, Path) else write_jsonl(folder / "rows.jsonl", rows)
    values = {"task": TASK.name, "model": "-", "method": "lora", "output": "-", "data": {"source": str(source), **data}}
    return parse(values)


def load(rows: list[dict[str, Any]] | Path, folder: Path, **data: Any) -> Rows:
    return load_rows(run_of(rows, folder, **data))


def word_pieces() -> PreTrainedTokenizerFast:
    """BERT's kind: lower case, [CLS] ... [SEP], words in pieces."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "met", "love", "##lace", "##s", "ada", ",", "new", "york"]
    tokenizer = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()  # pyright: ignore
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64
    )


def encoded(rows: Rows, tokenizer: Any, max_length: int | None = None) -> list[dict[str, Any]]:
    made = TASK.encode(rows, "train", tokenizer, max_length, None)
    return [dict(row) for row in made.rows]


ROWS = [
    {"words": ["Met", "Ada", "Lovelaces", ","], "tags": ["O", "B-PER", "I-PER", "O"]},
    {"words": ["New York", "met"], "tags": ["B-LOC", "O"]},
]


def test_the_first_piece_has_the_tag(tmp_path: Path):
    rows = load(ROWS, tmp_path)
    assert rows.labels == ["B-LOC", "B-PER", "I-PER", "O"]
    assert rows.class_counts == {"B-LOC": 1, "B-PER": 1, "I-PER": 1, "O": 3}
    first, second = encoded(rows, word_pieces())
    assert first["input_ids"] == [2, 4, 8, 5, 6, 7, 9, 3]  # [CLS] met ada love ##lace ##s , [SEP]
    assert first["labels"] == [-100, 3, 1, 2, -100, -100, 3, -100]
    assert second["input_ids"] == [2, 10, 11, 4, 3]
    assert second["labels"] == [-100, 0, -100, 3, -100]


def test_tokens_are_those_of_words_given_apart(tmp_path: Path):
    """As transformers' examples do it, with is_split_into_words and word_ids."""
    tokenizer, rows = word_pieces(), load(ROWS, tmp_path)
    for words, tags, row in zip(
        rows.splits["train"]["words"], rows.splits["train"]["tags"], encoded(rows, tokenizer), strict=True
    ):
        found = tokenizer(words, is_split_into_words=True)
        ids = found.word_ids()
        labels = [-100 if w is None or w in ids[:i] else tags[w] for i, w in enumerate(ids)]
        assert (row["input_ids"], row["labels"]) == (found["input_ids"], labels)


def test_a_tokenizer_that_keeps_spaces(tmp_path: Path):
    """Bytes, where a space is a token of the word behind it: the text is read as a text, and every word has one tag."""
    (row,) = encoded(load([{"words": ["a", "été", "c"], "tags": ["X", "Y", "X"]}], tmp_path), byte_tokenizer())
    assert len(row["input_ids"]) == len("a été c".encode())
    assert row["labels"] == [0, -100, 1, -100, -100, -100, -100, -100, 0]


def test_rows_are_cut_off_and_words_without_a_token_are_counted(tmp_path: Path):
    rows = load([*ROWS, {"words": ["met", "\u200b", "ada"], "tags": ["O", "O", "B-PER"]}], tmp_path)
    found = TASK.encode(rows, "train", word_pieces(), 6, None)
    assert found.lengths == [8, 5, 4]
    assert [len(ids) for ids in found.rows["input_ids"]] == [6, 5, 4]
    assert found.rows[0]["labels"] == [-100, 3, 1, 2, -100, -100]
    assert rows.notes == ["train: words that are not learnt, because the tokenizer makes no token of them: 1"]
    assert list(TASK.learnable(found.rows, slice(None))) == [0, 1, 2]


def test_columns_of_the_hub(tmp_path: Path):
    names = ClassLabel(names=["O", "B-PER"])
    features = Features({"id": Value("string"), "tokens": List(Value("string")), "ner_tags": List(names)})
    split = Dataset.from_dict({"id": ["1"], "tokens": [["a", "b"]], "ner_tags": [[0, 1]]}, features=features)
    split.to_parquet(tmp_path / "rows.parquet")
    rows = load(tmp_path / "rows.parquet", tmp_path)
    assert rows.labels == ["B-PER", "O"]
    assert rows.splits["train"]["tags"][:] == [[1, 0]]
    assert rows.notes == ["train: not used: the column id"]
    two = [{"tokens": ["a"], "ner_tags": ["O"], "pos_tags": ["X"]}]
    with pytest.raises(DataError, match=r"data\.columns: \{words: tokens, tags: ner_tags\}"):
        load(two, tmp_path)
    assert load([*two, {**two[0], "pos_tags": ["Y"]}], tmp_path, columns={"tags": "pos_tags"}).labels == ["X", "Y"]


def test_numbers_are_named_by_data_labels(tmp_path: Path):
    rows = [{"words": ["a", "b"], "tags": [0, 2]}, {"words": ["c"], "tags": [1]}]
    named = load(rows, tmp_path, labels=["O", "B-X", "I-X"])
    assert named.labels == ["O", "B-X", "I-X"]
    assert named.splits["train"]["tags"][:] == [[0, 2], [1]]
    assert load(rows, tmp_path).labels == ["0", "1", "2"]
    assert load(rows, tmp_path).notes[0].startswith("train: the tags are numbers; name them in data.labels")
    assert load(rows, tmp_path, labels=[2, 1, 0]).splits["train"]["tags"][:] == [[2, 0], [1]]
    with pytest.raises(DataError, match=r"train: the tag 2 is not the index of one of the 2 names in data\.labels"):
        load(rows, tmp_path, labels=["O", "B-X"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"words": ["a", "b"], "tags": ["O"]}, "train, row 2: 2 words but 1 tags; give every word a tag"),
        ({"words": ["a"], "tags": [None]}, "train, row 2: the word 'a' has the tag None"),
        ({"words": ["a"], "tags": [""]}, "train, row 2: the word 'a' has the tag ''"),
        ({"words": ["a"], "tags": None}, "train, row 2: column 'tags' must be a list with a tag for each word, got None"),
        ({"words": None, "tags": ["O"]}, "train, row 2: column 'words' must be a list of words, got None"),
        ({"words": [None], "tags": ["O"]}, "train, row 2: column 'words' must be a list of words"),
        ({"words": [], "tags": []}, "train, row 2: column 'words' has no word; remove the row"),
    ],
)  # fmt: skip
def test_bad_rows(row: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(DataError, match=message):
        load([{"words": ["x"], "tags": ["B-X"]}, row], tmp_path)


def test_texts_are_not_words(tmp_path: Path):
    with pytest.raises(DataError, match="train, row 1: column 'words' must be a list of words, got 'a b'"):
        load([{"words": "a b", "tags": ["O", "O"]}], tmp_path)


def test_a_tag_that_training_never_sees(tmp_path: Path):
    files = {"train": str(write_jsonl(tmp_path / "t.jsonl", ROWS))}
    files["validation"] = str(write_jsonl(tmp_path / "v.jsonl", [{"words": ["x", "y"], "tags": ["B-ORG", "B-ORG"]}]))
    values = {"task": TASK.name, "model": "-", "method": "lora", "output": "-", "data": files}
    with pytest.raises(
        DataError, match=r"validation: the tag 'B-ORG' \(2 words\) is never seen in train; known tags: B-LOC"
    ):
        load_rows(parse(values))


def test_metrics_and_row_scores():
    """Two rows by hand: of three entities two are found, four of five words are right."""
    labels = ["O", "B-A", "I-A"]
    true = np.array([[-100, 1, -100, 2, 0], [1, 1, -100, -100, -100]])
    said = np.array([[0, 1, 0, 2, 0], [1, 0, 0, -100, -100]])
    metrics = TASK.options(None, labels)["compute_metrics"](SimpleNamespace(label_ids=true, predictions=said))
    assert metrics == {"precision": 1.0, "recall": 2 / 3, "f1": 0.8, "f1_A": 0.8, "accuracy": 4 / 5}
    logits = torch.nn.functional.one_hot(torch.tensor(said).clamp(min=0), 3).double() * 9
    trainer: Any = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(id2label=dict(enumerate(labels)))))
    inputs = {"labels": torch.tensor(true)}
    for name, rows, weights in (
        ("recall", [1, 0.5], [1, 2]),
        ("precision", [1, 1], [1, 1]),
        ("f1", [1, 2 / 3], [2, 3]),
        ("accuracy", [1, 0.5], [3, 2]),
    ):
        found, counted = TASK.scores([SimpleNamespace(logits=logits)], inputs, name, trainer)
        assert found.tolist() == rows
        assert counted.tolist() == weights
    loss, counted = TASK.scores([SimpleNamespace(logits=logits)], inputs, "loss", trainer)
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten())
    assert (loss * counted).sum() / counted.sum() == pytest.approx(float(wanted))


def test_tags_without_marks_are_scored_word_by_word():
    found = SimpleNamespace(label_ids=np.array([[0, 1, 1, -100]]), predictions=np.array([[0, 1, 0, 0]]))
    metrics = TASK.options(None, ["NOUN", "VERB"])["compute_metrics"](found)
    assert metrics["precision"] == metrics["recall"] == metrics["f1"] == metrics["accuracy"] == pytest.approx(2 / 3)


def test_rows_are_encoded_anew_when_what_encodes_them_changes(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """`datasets` keeps encoded rows, and knows the functions of a package by their name alone."""
    source = str(write_jsonl(tmp_path / "rows.jsonl", [{"words": ["a", "b"], "tags": ["O", "B-PER"]}] * 2))
    values = {"model": str(bert), "task": TASK.name, "data": source, "method": "lora", "output": "-"}

    def labels() -> list[int]:
        return prepare(parse(values)).encoded["train"].rows[0]["labels"]

    before, own = labels(), token_classification._of_first_tokens

    def mended(*row: Any) -> list[int]:
        return [1 for _ in own(*row)]

    mended.__module__, mended.__qualname__ = own.__module__, own.__qualname__
    mended.__name__ = own.__name__
    monkeypatch.setattr(token_classification, own.__name__, mended)
    assert labels() == before, "kept"
    monkeypatch.setattr(tasks_rows, "made_by", lambda: "the files of another release")
    assert labels() == [1] * len(before)
