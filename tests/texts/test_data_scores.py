"""Scores by hand-counted cases."""

import math

import pytest

from fastdistil.data.scores import accuracy, entity_f1, macro_f1


def rows(text):
    return [line.split() for line in text.split("/")]


def test_entities_are_strict():
    # The second prediction begins with I-: lenient scoring, seqeval's default, would count it as right.
    found = entity_f1(rows("B-PER I-PER O / B-LOC O"), rows("B-PER I-PER O / I-LOC O"))
    assert found["f1"] == pytest.approx(200 / 3)
    assert (found["precision"], found["recall"]) == (100, 50)
    assert (found["entities"], found["predicted"]) == (2, 1)
    assert found["types"]["LOC"] == {"f1": 0.0, "precision": 0.0, "recall": 0.0, "entities": 1}
    assert found["types"]["PER"]["f1"] == 100


@pytest.mark.parametrize(
    ("true", "predicted", "f1"),
    [
        ("B-A I-A I-A", "B-A I-A O", 0),  # another end
        ("B-A I-A", "B-B I-B", 0),  # another type
        ("B-A B-A", "B-A I-A", 0),  # two entities as one
        ("B-A O B-A", "B-A O O", 200 / 3),
        ("B-A-x O", "B-A-x O", 100),
    ],
)
def test_what_is_right(true, predicted, f1):
    assert entity_f1(rows(true), rows(predicted))["f1"] == pytest.approx(f1)


def test_no_entity_is_no_figure():
    for predicted, count in (("O O", 0), ("O B-A", 1)):
        found = entity_f1(rows("O O"), rows(predicted))
        assert (found["f1"], found["precision"], found["recall"]) == (None, None, None)
        assert (found["entities"], found["predicted"], found["types"]) == (0, count, {})
    assert entity_f1([], [])["f1"] is None
    assert entity_f1([[]], [[]])["f1"] is None


def test_types_that_are_predicted_alone():
    found = entity_f1(rows("B-A O"), rows("B-A B-Z"))
    assert set(found["types"]) == {"A"}
    assert found["precision"] == 50
    assert not any(math.isnan(found[name]) for name in ("f1", "precision", "recall"))


def test_accuracy_and_macro_f1():
    assert accuracy(["a", "b", "b"], ["a", "b", "a"]) == pytest.approx(200 / 3)
    # a: precision 1/2, recall 1; b: precision 1, recall 1/2
    assert macro_f1(["a", "b", "b"], ["a", "b", "a"]) == pytest.approx(200 / 3)
    assert macro_f1(["a", "a", "b"], ["a", "a", "a"]) == pytest.approx(40)
    assert accuracy([], []) is None
    assert macro_f1([], []) is None


@pytest.mark.parametrize(
    ("true", "predicted", "message"),
    [
        ("O / O", "O", "predicted has 1 sentences, expected 2 as true"),
        ("O O", "O", "predicted has 1 tags in sentence 0, expected 2 as true"),
        ("O", "PER", "sentence 0 has the tag 'PER', expected O, B-TYPE or I-TYPE"),
    ],
)
def test_bad_calls(true, predicted, message):
    with pytest.raises(ValueError, match=message):
        entity_f1(rows(true), rows(predicted))
