"""Entities and their scores against values counted by hand."""

from __future__ import annotations

import pytest

from rankfold.tasks.entities import are_marked, entities, precision_recall_f1


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("", set()),
        ("O O O", set()),
        ("B-A I-A O B-B", {(0, 2, "A"), (3, 4, "B")}),
        ("B-A B-A I-A", {(0, 1, "A"), (1, 3, "A")}),
        ("B-A I-B I-B O", {(0, 1, "A"), (1, 3, "B")}),  # another type: an entity of its own
        ("O I-A I-A", {(1, 3, "A")}),  # IOB1
        ("I-A B-A", {(0, 1, "A"), (1, 2, "A")}),
        ("S-A B-B I-B E-B S-B", {(0, 1, "A"), (1, 4, "B"), (4, 5, "B")}),  # BIOES
        ("U-A B-B L-B I-B", {(0, 1, "A"), (1, 3, "B"), (3, 4, "B")}),  # BILOU, and one that begins with I
        ("E-A E-A", {(0, 1, "A"), (1, 2, "A")}),
        ("B-geo-loc I-geo-loc", {(0, 2, "geo-loc")}),
    ],
)
def test_entities(tags: str, found: set[tuple[int, int, str]]):
    assert entities(tags.split()) == found


def test_tags_of_words_alone():
    assert are_marked(["O", "B-PER", "I-PER"])
    assert are_marked(["S-X", "E-X", "O"])
    for tags in (["O"], ["NOUN", "VERB", "O"], ["B-PER", "PER"], ["0", "1"], ["B-", "O"]):
        assert not are_marked(tags)
    assert entities(["NOUN", "NOUN", "X"], marked=False) == {(0, 1, "NOUN"), (1, 2, "NOUN"), (2, 3, "X")}


def test_scores_by_hand():
    """Three of A there, two of them found; one of B there and found with a wrong end; one C found that is not there."""
    true = [entities(["B-A", "I-A", "O", "B-A"]), entities(["B-A", "O", "B-B", "I-B"])]
    said = [entities(["B-A", "I-A", "O", "B-A"]), entities(["O", "B-C", "B-B", "O"])]
    scores = precision_recall_f1(true, said)
    assert scores["precision"] == 2 / 4
    assert scores["recall"] == 2 / 4
    assert scores["f1"] == 0.5
    assert scores["f1_A"] == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))
    assert scores["f1_B"] == 0
    assert "f1_C" not in scores


def test_scores_of_nothing():
    assert precision_recall_f1([set()], [set()]) == {"precision": 0, "recall": 0, "f1": 0}
    assert precision_recall_f1([{(0, 1, "A")}], [set()]) == {"precision": 0, "recall": 0, "f1": 0, "f1_A": 0}


def test_words_alone_are_scored_as_accuracy():
    true, said = ["N", "V", "N", "X"], ["N", "V", "V", "X"]
    scores = precision_recall_f1([entities(true, marked=False)], [entities(said, marked=False)])
    assert scores["precision"] == scores["recall"] == scores["f1"] == 3 / 4
