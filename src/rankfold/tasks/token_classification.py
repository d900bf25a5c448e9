"""Words in, a tag for each out: transformers' Trainer on lists of words with their tags, such as the names in a text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rankfold.errors import short
from rankfold.tasks.classes import index_of, likeliest
from rankfold.tasks.entities import are_marked, entities, precision_recall_f1
from rankfold.tasks.rows import DataError, Encoded, Rows, mapped
from rankfold.tasks.task import LOSS, SHARE, Metric, Task
from rankfold.tasks.texts import tokens_of

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import EvalPrediction


class TokenClassification(Task):
    name = "token-classification"
    summary = "words in, a tag for each out"
    kinds = (("words", "tags"),)
    targets = ("tags",)
    foreign = ("classes", "packing", "loss_on")
    max_length = 512
    models = ("AutoModelForTokenClassification",)
    peft_type = "TOKEN_CLS"
    new_head = True
    metrics = {  # noqa: RUF012
        "f1": Metric(greater_is_better=True, bounds=SHARE),
        "precision": Metric(greater_is_better=True, bounds=SHARE),
        "recall": Metric(greater_is_better=True, bounds=SHARE),
        "accuracy": Metric(greater_is_better=True, bounds=SHARE),
        "loss": Metric(greater_is_better=False, bounds=LOSS),
    }
    loss_of_batch = True
    weighted = True
    pipeline = "token-classification"
    start = {  # noqa: RUF012
        "model": {"name": "all-minilm-l6-v2"},
        "data": {"source": "tweet-entities"},
        "method": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
        "training": {"epochs": 3, "batch_size": 16, "learning_rate": 2e-3, "seed": 0},
    }
    comparison = (
        """\
model: all-minilm-l6-v2
task: token-classification
data: {source: tweet-entities, max_length: 64}
training: {max_steps: 100, batch_size: 16, warmup: 0.1, evaluate_every: 50}
output: runs/compare-tweet-entities
""",
        "331,776",
        "334000",
    )

    def as_ours(self, split: Dataset, names: dict[str, str]) -> Dataset:
        """Columns as data sets of the hub call them: tokens, and tags that have one name such as ner_tags."""
        columns, ours = split.column_names, {}
        if names["words"] == "words" and "words" not in columns and "tokens" in columns:
            ours["tokens"] = "words"
        if names["tags"] == "tags" and "tags" not in columns:
            tags = [column for column in columns if column.endswith("_tags")]
            if len(tags) != 1:
                return split
            ours[tags[0]] = "tags"
        return split.rename_columns(ours)

    def advice(self, columns: list[str]) -> str:
        tags = next((column for column in columns if column.endswith("_tags")), "...")
        return f"{{words: {'tokens' if 'tokens' in columns else '...'}, tags: {tags}}}"

    def problem(self, value: Any, column: str, kind: tuple[str, ...]) -> str | None:
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            return f"must be a list of words, got {short(value)}"
        return None if value else "has no word; remove the row"

    def tidy(self, split: Dataset, kind: tuple[str, ...], name: str, notes: list[str]) -> Dataset:
        for number, (words, tags) in enumerate(zip(split["words"], split["tags"], strict=True), 1):
            where = f"{name}, row {number}"
            if not isinstance(tags, list):
                raise DataError(f"{where}: column 'tags' must be a list with a tag for each word, got {short(tags)}")
            if len(words) != len(tags):
                raise DataError(
                    f"{where}: {len(words):,} words but {len(tags):,} tags; give every word a tag ('O' where there is none)"
                )
            for word, tag in zip(words, tags, strict=True):
                if not isinstance(tag, str | int) or tag == "":
                    raise DataError(
                        f"{where}: the word {short(word)} has the tag {short(tag)}; a tag is text or a whole number"
                    )
        return split

    def finish(self, rows: Rows, data: Any) -> None:
        _index_tags(rows, data.labels)

    def encode(self, rows: Rows, split: str, processor: Any, max_length: int | None, data: Any) -> Encoded:
        """The first token of a word has its tag, the others none."""
        if not processor.is_fast:
            raise DataError("the model's tokenizer cannot say which token belongs to which word (it is not a fast one)")

        def encode(batch: dict[str, list]) -> dict[str, list]:
            # As one text and by the places of the letters: some tokenizers read a word alone differently from one in a text.
            texts = [" ".join(words) for words in batch["words"]]
            found, lengths = tokens_of(processor, texts, max_length=max_length, return_offsets_mapping=True)
            rows = zip(batch["words"], batch["tags"], found.pop("offset_mapping"), strict=True)
            return {**found, "labels": [_of_first_tokens(*row) for row in rows], "length": lengths}

        table = rows.splits[split]
        made = mapped(table, encode, batched=True, remove_columns=table.column_names)
        lengths = made["length"][:]
        whole = [i for i, length in enumerate(lengths) if max_length is None or length <= max_length]
        lost = sum(len(table[i]["words"]) - sum(tag != -100 for tag in made[i]["labels"]) for i in whole)
        if lost:
            rows.notes.append(
                f"{split}: words that are not learnt, because the tokenizer makes no token of them: {lost:,}"
            )
        return Encoded(made.remove_columns("length"), lengths)

    def learnable(self, rows: Dataset, kept: slice) -> Sequence[int]:
        return [i for i, labels in enumerate(rows["labels"]) if any(label != -100 for label in labels)]

    def options(self, processor: Any, labels: list[str]) -> dict[str, Any]:
        from transformers import DataCollatorForTokenClassification

        marked = are_marked(labels)

        def metrics(prediction: EvalPrediction) -> dict[str, float]:
            rows: list[Any] = list(zip(prediction.label_ids, prediction.predictions, strict=True))
            known = [(true[true != -100], said[true != -100]) for true, said in rows]
            there, found = (
                [entities([labels[i] for i in row], marked) for row in part] for part in zip(*known, strict=True)
            )
            words = sum(len(true) for true, _ in known)
            right = sum(int((true == said).sum()) for true, said in known)
            return {**precision_recall_f1(there, found), "accuracy": right / words}

        return {
            "data_collator": DataCollatorForTokenClassification(processor),
            "compute_metrics": metrics,
            "preprocess_logits_for_metrics": likeliest,
        }

    def scores(
        self, outputs: Sequence[Any], inputs: dict[str, Any], metric: str, trainer: Any
    ) -> tuple[Tensor, Tensor]:
        from torch.nn.functional import cross_entropy

        (output,) = outputs
        logits, labels = output.logits.detach(), inputs["labels"]
        known, predicted = labels != -100, logits.argmax(-1)
        if metric in _SHARES:
            return _entities(labels, predicted, known, trainer.model.config.id2label, metric)
        words = known.double().sum(1)
        if metric == "accuracy":
            total = ((predicted == labels) & known).double().sum(1)
        else:
            total = cross_entropy(logits.double().transpose(1, 2), labels, reduction="none").sum(1)
        return total / words.clamp(min=1), words


#: How often a row's entities count, of those that are there and of those that were said: each metric is a ratio of sums over rows, and
#: so a mean of ratios, each weighted with its denominator. F1 = 2·right/(there + said).
_SHARES = {"recall": (1, 0), "precision": (0, 1), "f1": (1, 1)}


def _entities(
    labels: Tensor, predicted: Tensor, known: Tensor, names: dict[int, str], metric: str
) -> tuple[Tensor, Tensor]:
    """The metric of each row's entities, and how many it is a share of."""
    import torch

    marked, shares, counts = are_marked(names.values()), [], []
    of_there, of_said = _SHARES[metric]
    for true, said, words in zip(labels, predicted, known, strict=True):
        there, found = (entities([names[i] for i in row[words].tolist()], marked) for row in (true, said))
        count = of_there * len(there) + of_said * len(found)
        shares.append((of_there + of_said) * len(there & found) / max(count, 1))
        counts.append(count)
    made = torch.tensor([shares, counts], dtype=torch.float64, device=labels.device)
    return made[0], made[1]


def _of_first_tokens(words: list[str], tags: list[int], places: list[tuple[int, int]]) -> list[int]:
    """The tag of a word at the first of its tokens, −100 elsewhere.

    Args:
        places: of the tokens in the words joined by spaces, as letters from and to; (0, 0) for special tokens.
    """
    labels, token, begin = [-100] * len(places), 0, 0
    for word, tag in zip(words, tags, strict=True):
        end = begin + len(word)
        while token < len(places) and places[token][1] <= begin:
            token += 1
        if token < len(places) and places[token][0] < end:
            labels[token] = tag
            token += 1
        begin = end + 1
    return labels


def _index_tags(rows: Rows, order: list[str | int] | None) -> None:
    """Replaces tags by indices; whole numbers are taken for indices of `order` where they do not occur in it."""
    tags = {name: split["tags"][:] for name, split in rows.splits.items()}
    rows.counted = "words"
    counts: dict[str, Counter[str | int]] = {
        name: Counter(tag for row in all_ for tag in row) for name, all_ in tags.items()
    }
    numbers = all(isinstance(tag, int) for counter in counts.values() for tag in counter)
    if numbers and order is None:
        rows.notes.append(
            "train: the tags are numbers; name them in data.labels, as in [O, B-PER, I-PER], to have entities counted"
        )
    elif numbers and order is not None and not {str(tag) for tag in counts["train"]} <= set(map(str, order)):
        for name, counter in counts.items():
            if wrong := [tag for tag in counter if not 0 <= int(tag) < len(order)]:
                raise DataError(
                    f"{name}: the tag {wrong[0]} is not the index of one of the {len(order)} names in data.labels"
                )
        tags = {name: [[order[tag] for tag in row] for row in all_] for name, all_ in tags.items()}
        counts = {name: Counter(tag for row in all_ for tag in row) for name, all_ in tags.items()}
    index = index_of(rows, counts, order, "tag")
    for name, split in rows.splits.items():
        indices = [[index[str(tag)] for tag in row] for row in tags[name]]
        rows.splits[name] = split.remove_columns("tags").add_column("tags", indices)


TASK = TokenClassification()
