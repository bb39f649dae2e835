"""Sentences to rows: by length, by label, proven ones first; always the same, and never two in one seat."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grab_jax.attacks import seating


def seat(sentences, sure, rows, told=True, labels=None, score=None):
    return seating.seat(
        sentences, sure, rows, told=told, labels=labels, score=score or (lambda _: pytest.fail("asked"))
    )


@pytest.mark.parametrize(
    ("sentences", "sure", "rows", "told", "expected"),
    [
        ([5, 3, 8], [True] * 3, [3, 8, 5], True, (1, 2, 0)),
        ([5, 8], [True] * 2, [3, 8, 5], True, (None, 1, 0)),
        ([5, 7], [True] * 2, [3, 8, 5], True, (None, None, 0)),  # 7 tokens are no sentence of this batch
        ([5, 7], [True, False], [3, 8, 5], True, (None, 1, 0)),  # an unproven one may lack a token
        ([5, 5], [False, True], [5, 9], True, (1, 0)),  # the proven one has the choice
        ([5, 5, 5], [False, True, True], [5, 5], True, (1, 2)),  # more sentences than rows
        ([9, 4], [True, True], [8, 8], False, (1, None)),  # longer than the longest
        ([], [], [4, 4], True, (None, None)),
    ],
)
def test_by_length(sentences, sure, rows, told, expected):
    found = seat(sentences, sure, rows, told)
    assert found == expected or (not told and Counter(found) == Counter(expected))


@given(st.lists(st.tuples(st.integers(1, 6), st.booleans()), max_size=6), st.lists(st.integers(1, 6), max_size=6))
def test_every_sentence_at_most_once_and_the_same_again(sentences, rows):
    lengths, sure = [length for length, _ in sentences], [ok for _, ok in sentences]
    found = seat(lengths, sure, rows)
    taken = [s for s in found if s is not None]
    assert len(taken) == len(set(taken))
    assert all(lengths[s] == rows[r] for r, s in enumerate(found) if s is not None and sure[s])
    assert found == seat(lengths, sure, rows)


@pytest.mark.parametrize("told", [True, False])
def test_labels_decide_between_rows_of_one_length(told):
    """The score counts the sentences in the wrong place; only rows that may swap are tried."""
    right = (2, 3, 1, 0)
    tried = []

    def score(seats):
        tried.append(seats)
        return sum(a != b for a, b in zip(seats, right, strict=True))

    rows = [5, 5, 5, 5]
    assert seat([5] * 4, [True] * 4, rows, told, labels=[0, 1, 2, 0], score=score) == right
    tried.clear()
    found = seat([5, 5, 6, 7], [True] * 4, [5, 5, 6, 7], True, labels=[0, 1, 2, 0], score=score)
    assert Counter(found[:2]) == Counter((0, 1))
    assert found[2:] == (2, 3)
    assert len(tried) == 2


def test_the_score_is_not_asked_where_it_cannot_matter():
    assert seat([5, 5], [True, True], [5, 5], labels=[1, 1]) == (0, 1)
    assert seat([5, 6], [True, True], [5, 6], labels=[0, 1]) == (0, 1)
    assert seat([], [], [5, 5], labels=[0, 1]) == (None, None)


def test_a_sentence_may_move_to_an_empty_row():
    assert seat([5], [True], [5, 5], labels=[0, 1], score=lambda seats: seats[0] is not None) == (None, 0)


def test_scores_that_are_no_numbers_change_nothing():
    assert seat([5, 5], [True, True], [5, 5], labels=[0, 1], score=lambda _: float("nan")) == (0, 1)
