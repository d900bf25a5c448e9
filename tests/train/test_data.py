"""Rows: every source, every kind, and every way they can be wrong."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pandas
import pytest
from datasets import ClassLabel, Dataset
from tiny import byte_tokenizer, sentiment, write_jsonl

from rankfold.runfile.load import parse
from rankfold.tasks import table
from rankfold.tasks.rows import DataError, Rows
from rankfold.train.data import load_rows
from rankfold.train.datafile import read_file
from rankfold.train.tokens import longest_row, note_cut_off


def rows_of(task: str, **data):
    method = {"name": "lora", "r": 2}
    return load_rows(parse({"model": "m", "task": task, "data": data, "method": method, "output": "o"}))


def error_of(task: str, **data) -> str:
    with pytest.raises(DataError) as error:
        rows_of(task, **data)
    return str(error.value)


def lengths(task: str, rows: Rows, loss_on: str = "completion") -> list[int]:
    """Of the training rows in tokens."""
    data = SimpleNamespace(loss_on=loss_on)
    return table.get(task).encode(rows, "train", byte_tokenizer(), 64, data).lengths


def error_in(path) -> str:
    with pytest.raises(DataError) as error:
        read_file(path)
    return str(error.value).replace(str(path), path.name)


# --- files --------------------------------------------------------------------------------------------------------------


def test_jsonl_csv_tsv_and_parquet_are_the_same_rows(tmp_path):
    rows = sentiment(6)
    jsonl = write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f'"{r["text"]}",{r["label"]}\n' for r in rows))
    (tmp_path / "a.tsv").write_text("text\tlabel\n" + "".join(f"{r['text']}\t{r['label']}\n" for r in rows))
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    for suffix in ("json", "csv", "tsv", "parquet"):
        assert read_file(tmp_path / f"a.{suffix}").to_list() == read_file(jsonl).to_list() == rows


def test_csv_values_stay_the_text_they_are(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\nNA,007\n,null\n1e3,True\n")
    assert read_file(tmp_path / "a.csv").to_list() == [
        {"text": "NA", "label": "007"},
        {"text": "", "label": "null"},
        {"text": "1e3", "label": "True"},
    ]


def test_csv_has_long_texts_lines_in_quotes_and_an_index_of_pandas(tmp_path):
    rows = [{"text": 'so "so",\nyes', "label": "a"}, {"text": "x" * 200_000, "label": "b"}]
    pandas.DataFrame(rows).to_csv(tmp_path / "a.csv")
    found = read_file(tmp_path / "a.csv")
    assert found.remove_columns("Unnamed: 0").to_list() == rows
    assert found["Unnamed: 0"][:] == ["0", "1"]


def test_text_that_looks_like_a_time_is_text(tmp_path):
    call = [{"name": "book", "arguments": {"day": "2024-01-01"}}]
    rows = [
        {"prompt": "when?", "completion": f"202{i}-01-01", "words": ["2024-01-01 10:00:00"], "calls": call}
        for i in range(3)
    ]
    assert read_file(write_jsonl(tmp_path / "a.jsonl", rows)).to_list() == rows
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert read_file(tmp_path / "a.json").to_list() == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl: the file is empty"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n{"text": "c"}\n', "a.jsonl:2: malformed JSON"),
        ("a.jsonl", b'{"text": "a"}\n\n["b"]\n', "a.jsonl:3: must be an object"),
        ("a.jsonl", b"\n\n", "a.jsonl: the file has no rows"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "a.jsonl:2: not UTF-8 text"),
        ("a.json", b'{"text": "a"}{"text"', "a.json:1: malformed JSON"),
        ("a.csv", b"text,label\n", "a.csv: the file has no rows"),
        ("a.csv", b"text,label\na,b\nc,d,e\n", "a.csv:3: the header has 2 columns, this row has 3"),
        ("a.csv", b"text,label\n\na fine, good film,b\n", "a.csv:3: the header has 2 columns, this row has 3"),
        ("a.csv", b"text,label\na\nc,d\n", "a.csv:2: the header has 2 columns, this row has 1; a text that holds ','"),
        ("a.tsv", b'text\tlabel\na\tb\n"Good\tc\nso "so\td\n', "a.tsv:3: a quote mark begins a field and does not end it"),
        ("a.tsv", b'text\tlabel\na\tb\n"Good\tc\nso so\td\n', "a.tsv:3: a quote mark begins a field and does not end it"),
        ("a.csv", b"text,label\n\xff,b\n", "a.csv:2: not UTF-8 text"),
        ("a.parquet", b"PAR1 and no more", "a.parquet: cannot be read"),
        ("a.txt", b"hello", "a.txt: cannot read '.txt' files; use one of .jsonl, .json, .csv, .tsv, .parquet"),
    ],
)  # fmt: skip
def test_broken_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    assert error_in(path).startswith(message)


def test_missing_file(tmp_path):
    assert "no data file" in error_in(tmp_path / "none.jsonl")
    assert "no data file 'none.csv'" in error_of("classification", source="none.csv")


# --- sources ------------------------------------------------------------------------------------------------------------


def test_a_folder_with_splits(reviews):
    rows = rows_of("classification", source=str(reviews))
    assert {name: len(split) for name, split in rows.splits.items()} == {"train": 32, "validation": 8, "test": 8}
    assert rows.kind == ("text", "label")
    assert rows.labels == ["neg", "pos"]
    assert rows.splits["train"][1] == {"text": "good film number 1", "label": 1}
    assert rows.notes == []


def test_files_for_each_split_and_limits(reviews):
    files = {split: str(reviews / f"{split}.jsonl") for split in ("train", "validation", "test")}
    rows = rows_of("classification", **files, max_train=10, max_test=100)
    assert {name: len(split) for name, split in rows.splits.items()} == {"train": 10, "validation": 8, "test": 8}
    assert (
        rows.splits["train"]["text"][:] == rows_of("classification", **files, max_train=10).splits["train"]["text"][:]
    )


def test_a_split_by_name(reviews):
    rows = rows_of("classification", source=str(reviews), validation="test", test=str(reviews / "validation.jsonl"))
    assert rows.splits["validation"][0]["text"] == "bad film number 200"
    assert "'tests' is neither a file" in (text := error_of("classification", source=str(reviews), validation="tests"))
    assert "did you mean 'test'?" in text


def test_unknown_sources(tmp_path):
    message = error_of("classification", source="movie-review")
    assert (
        "'movie-review' is neither a local file or folder nor a bundled data set; did you mean 'movie-reviews'?"
        in message
    )
    assert "has no file train.jsonl" in error_of("classification", source=str(tmp_path))


def test_a_folder_with_two_files_of_one_split(reviews):
    (reviews / "train.csv").write_text("text,label\na,neg\nb,pos\n")
    assert "has both train.jsonl and train.csv; remove one, or name the files in data.train" in error_of(
        "classification", source=str(reviews)
    )


def test_held_out_shares_keep_duplicates_on_one_side(tmp_path):
    texts = [f"{'good' if i % 2 else 'bad'} film number {i % 150}" for i in range(300)]  # each one twice
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": t, "label": t[0]} for t in texts])
    rows = rows_of("classification", source=str(path), validation=0.2, test=0.1)
    sizes = {name: len(split) for name, split in rows.splits.items()}
    assert sum(sizes.values()) == 300
    assert 30 <= sizes["validation"] <= 90
    assert 10 <= sizes["test"] <= 60
    assert rows.notes == []
    again = rows_of("classification", source=str(path), validation=0.2, test=0.1)
    assert again.splits["test"].to_list() == rows.splits["test"].to_list()
    # a row keeps its side when others are added
    more = write_jsonl(
        tmp_path / "b.jsonl",
        [{"text": f"new {i}", "label": "b"} for i in range(50)] + [{"text": t, "label": t[0]} for t in texts],
    )
    grown = rows_of("classification", source=str(more), validation=0.2, test=0.1)
    assert set(rows.splits["test"]["text"]) <= set(grown.splits["test"]["text"])


def test_a_share_of_too_few_rows(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", sentiment(3))
    assert "data.validation: a share of 0.001 of 3 rows leaves none" in error_of(
        "classification", source=str(path), validation=0.001
    )


# --- columns ------------------------------------------------------------------------------------------------------------


def test_columns_are_mapped(tmp_path):
    rows = [{"review": r["text"], "stars": int(r["label"] == "pos"), "id": i} for i, r in enumerate(sentiment(6))]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    found = rows_of("classification", source=str(path), columns={"text": "review", "label": "stars"})
    assert found.splits["train"].column_names == ["text", "label"]
    assert found.labels == ["0", "1"]
    assert "train has no column 'text' for the text" in (text := error_of("classification", source=str(path)))
    assert "it has: id, review, stars" in text
    near = error_of("classification", source=str(path), columns={"text": "revue", "label": "stars"})
    assert "did you mean 'review'?" in near


def test_pairs_of_texts(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"a": "x", "b": "y", "label": "n"}, {"a": "x", "b": "z", "label": "m"}])
    rows = rows_of("classification", source=str(path), columns={"text": "a", "text_pair": "b"})
    assert rows.kind == ("text", "text_pair", "label")
    assert lengths("classification", rows) == [2, 2]


@pytest.mark.parametrize(
    ("row", "columns", "kind"),
    [
        ({"text": "a", "other": 1}, {}, ("text",)),
        ({"prompt": "a", "completion": "b", "text": "c"}, {}, ("prompt", "completion")),
        ({"prompt": "a", "completion": "b", "body": "c"}, {"text": "body"}, ("text",)),
        ({"question": "a", "answer": "b"}, {"prompt": "question", "completion": "answer"}, ("prompt", "completion")),
        ({"messages": [{"role": "user", "content": "a"}]}, {}, ("messages",)),
        ({"conversations": [{"from": "user", "value": "a"}]}, {"messages": "conversations"}, ("messages",)),
    ],
)
def test_kinds_of_language_model_rows(tmp_path, row, columns, kind):
    rows = rows_of("causal-lm", source=str(write_jsonl(tmp_path / "a.jsonl", [row, row])), columns=columns)
    assert rows.kind == kind
    assert tuple(rows.splits["train"].column_names) == kind
    if kind == ("messages",):
        assert rows.splits["train"][0]["messages"] == [{"role": "user", "content": "a"}]


def test_no_known_column(tmp_path):
    message = error_of("causal-lm", source=str(write_jsonl(tmp_path / "a.jsonl", [{"body": "x"}])))
    assert "train has none of the columns messages, prompt + completion, or text; it has: body" in message
    assert "data.columns: {text: body}" in message


# --- contents -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": 7}, "train, row 2: column 'text' holds 7, not text"),
        ({"text": None}, "train, row 2: column 'text' holds None, not text"),
        ({"prompt": "a", "completion": None}, "train, row 2: column 'completion' is missing"),
        (
            {"prompt": "a", "completion": 7},
            "train, row 2: column 'completion' holds 7; it must be text, or a list of {role",
        ),
        ({"messages": []}, "train, row 2: column 'messages' must be a list of {role, content}, got []"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "train, row 2: column 'messages' has the role 'robot'"),
        (
            {"messages": [{"role": "user", "content": None}]},
            "train, row 2: column 'messages' has a message that says nothing: {'role': 'user', 'content': None}",
        ),
        ({"messages": [{"role": "user", "content": 7}]}, "train, row 2: column 'messages' has the content 7, not text"),
    ],
)
def test_bad_rows_have_a_number(tmp_path, row, message):
    good = {
        "text": "a",
        "prompt": "a",
        "completion": "b",
        "messages": [{"role": "user", "content": "a"}],
    }
    path = write_jsonl(tmp_path / "a.jsonl", [{k: good[k] for k in row}, row])
    assert error_of("causal-lm", source=str(path)).startswith(message)


def test_empty_texts_are_counted(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [*sentiment(4), {"text": "  ", "label": "pos"}])
    assert rows_of("classification", source=str(path)).notes == ["train: 1 of 5 rows have an empty text"]


def test_duplicates_between_train_and_test_are_reported(tmp_path):
    train = write_jsonl(tmp_path / "a.jsonl", sentiment(6))
    test = write_jsonl(tmp_path / "b.jsonl", [{"text": "GOOD  film number 1", "label": "pos"}, *sentiment(3, 50)])
    (note,) = rows_of("classification", train=str(train), test=str(test)).notes
    assert note.startswith("test: 1 of 4 rows also occur in train")


# --- labels -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_label_never_seen_in_training(tmp_path, split):
    train = write_jsonl(tmp_path / "a.jsonl", sentiment(6))
    other = write_jsonl(tmp_path / "b.jsonl", [*sentiment(2, 50), {"text": "so so", "label": "meh"}])
    message = error_of("classification", train=str(train), **{split: str(other)})
    assert message == f"{split}: the label 'meh' (1 row) is never seen in train; known labels: neg, pos"


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["pos", None], "train, row 2: the label is missing"),
        ([0.5, 1.5], "train, row 1: the label is 0.5; a class is text or a whole number"),
        (["pos", "pos"], "train has the single label 'pos'; classification needs at least two"),
    ],
)
def test_bad_labels(tmp_path, labels, message):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"t{i}", "label": label} for i, label in enumerate(labels)])
    assert error_of("classification", source=str(path)) == message


def test_a_split_without_labels(tmp_path, reviews):
    secret = Dataset.from_dict({"text": ["a", "b"], "label": [-1, -1]})
    secret.cast_column("label", ClassLabel(names=["neg", "pos"])).to_parquet(tmp_path / "test.parquet")
    message = error_of("classification", source=str(reviews), test=str(tmp_path / "test.parquet"))
    assert message.startswith(
        "test: no row has a label, as where they are kept secret; name another split or file in data.test"
    )


def test_the_order_of_labels(tmp_path):
    stars = write_jsonl(tmp_path / "a.jsonl", [{"text": f"t{i}", "label": str(i)} for i in (10, 9, 1)])
    assert rows_of("classification", source=str(stars)).labels == ["1", "9", "10"]
    assert rows_of("classification", source=str(stars), labels=["10", "1", 9]).labels == ["10", "1", "9"]
    assert "train: the label '10' (1 row) is not in data.labels" in error_of(
        "classification", source=str(stars), labels=["1", "9"]
    )
    assert "names '1' more than once" in error_of("classification", source=str(stars), labels=["1", 1])
    (note,) = rows_of("classification", source=str(stars), labels=["1", "9", "10", "7"]).notes
    assert note == "train: no row has the label 7 of data.labels"


def test_the_rows_of_some_classes(tmp_path):
    stars = write_jsonl(tmp_path / "a.jsonl", [{"text": f"t{i}", "label": i % 3} for i in range(9)])
    rows = rows_of("classification", source=str(stars), classes=["2", 0])
    assert (rows.labels, rows.class_counts) == (["0", "2"], {"0": 3, "2": 3})
    rows = rows_of("classification", source=str(stars), classes=[1], labels=[0, 1, 2])
    assert (rows.labels, rows.splits["train"]["label"][:]) == (["0", "1", "2"], [1, 1, 1])
    message = "data.classes: no row of train has the class '3'; it has: 0, 1, 2"
    assert error_of("classification", source=str(stars), classes=[3]) == message
    none = write_jsonl(tmp_path / "b.jsonl", [{"text": "t", "label": 1}])
    message = "test has no row of data.classes (0, 2); it has: 1"
    assert error_of("classification", source=str(stars), classes=[0, 2], test=str(none)) == message


# --- tokens -------------------------------------------------------------------------------------------------------------


def test_texts_that_are_cut_off_are_counted(tmp_path):
    rows = [{"prompt": "a" * n, "completion": "b"} for n in (1, 5, 9)]
    found = rows_of("causal-lm", source=str(write_jsonl(tmp_path / "a.jsonl", rows)))
    counts = lengths("causal-lm", found)
    assert counts == [3, 7, 11]  # with the end of the text, which is learnt too
    note_cut_off(found, {"train": counts}, 8)
    (note,) = found.notes
    assert note.startswith("train: 1 of 3 rows are longer than 8 tokens and are cut off there (the longest has 11)")


def test_chats_are_counted_with_their_template(tmp_path):
    chat = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]
    found = rows_of("causal-lm", source=str(write_jsonl(tmp_path / "a.jsonl", [{"messages": chat}])))
    assert lengths("causal-lm", found) == [len("<|user|>ab<|assistant|>c") + 1]


def test_the_longest_row_that_fits(bert):
    from transformers import AutoConfig

    config, tokenizer = AutoConfig.from_pretrained(bert), byte_tokenizer()

    def longest(**data):
        run = parse(
            {"model": "m", "task": "classification", "data": {"source": "s", **data}, "method": "lora", "output": "o"}
        )
        return longest_row(run, config, tokenizer)

    assert longest() == 64
    assert longest(max_length=10) == 10
    with pytest.raises(DataError, match=r"data\.max_length: 65 tokens do not fit the model, which takes 64"):
        longest(max_length=65)


# --- labels of CSV files, which are all text ----------------------------------------------------------------------------


def csv_of(tmp_path, labels, split="train"):
    path = tmp_path / f"{split}.csv"
    path.write_text("text,label\n" + "".join(f"row {split} {i},{label}\n" for i, label in enumerate(labels)))
    return str(path)


@pytest.mark.parametrize("empty", ["", "  ", '"  "'])
def test_an_empty_label_is_missing(tmp_path, empty):
    assert error_of("classification", source=csv_of(tmp_path, ["pos", empty, "neg"])) == (
        "train, row 2: the label is missing"
    )


def test_suspicious_labels_are_named(tmp_path):
    rows = rows_of("classification", source=csv_of(tmp_path, ["pos", '" pos"', "Pos", "neg", '"odd "']))
    assert (
        "train: the labels ' pos', 'Pos', 'pos' differ in case or spaces alone; if they are one class, write them alike"
        in (rows.notes)
    )
    assert "train: the label 'odd ' begins or ends with a space" in rows.notes
    (note,) = rows_of("classification", source=csv_of(tmp_path, [f"{i / 4}" for i in range(6)])).notes
    assert note.startswith("train: 6 of 6 labels are numbers with a fraction (such as 0.0)")
    assert rows_of("classification", source=csv_of(tmp_path, ["1", "-2", "nan", "1.x"])).notes == []
    assert rows_of("classification", source=csv_of(tmp_path, ["1.0", "1.1"]), labels=["1.0", "1.1"]).notes == []


def test_classes_are_counted(tmp_path):
    rows = rows_of("classification", source=csv_of(tmp_path, ["pos", "pos", "neg"]))
    assert rows.classes_in_words() == "2: neg 1, pos 2"
    many = rows_of("classification", source=csv_of(tmp_path, [f"c{i:02}" for i in range(14)]))
    assert many.classes_in_words().startswith("14: c00 1, c01 1, ")
    assert many.classes_in_words().endswith(", c11 1, ...")


def test_a_class_that_only_validation_has_may_be_named(tmp_path):
    files = {"train": csv_of(tmp_path, ["a", "b"]), "validation": csv_of(tmp_path, ["c"], "validation")}
    assert "validation: the label 'c' (1 row) is never seen in train" in error_of("classification", **files)
    rows = rows_of("classification", **files, labels=["a", "b", "c"])
    assert rows.notes == ["train: no row has the label c of data.labels"]
    assert "is not in data.labels" in error_of("classification", **files, labels=["a", "b", "d"])
