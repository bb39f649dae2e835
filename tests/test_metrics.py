"""Metrics against values computed by hand, and the properties that must hold for every input."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from grab_jax import metrics

texts = st.lists(st.sampled_from(["the", "cat", "sat", "on", "a", "mat", "."]), max_size=7).map(" ".join)
tokens = st.lists(st.sampled_from("abcd"), max_size=8)


# --- one sentence --------------------------------------------------------------------------------------------


def test_rouge_by_hand():
    # reference 6 words, prediction 4; shared: the, cat, the, mat = 4 -> P 4/4, R 4/6, F 0.8
    # bigrams: 5 and 3; shared: "the cat", "the mat" = 2 -> P 2/3, R 2/5, F 0.5; LCS "the cat the mat" = 4 -> 0.8
    scores = metrics.rouge("The cat sat on the mat", "the cat the mat")
    assert scores == pytest.approx({"rouge1": 80.0, "rouge2": 50.0, "rougeL": 80.0})


def test_rouge_order_only_matters_beyond_words():
    scores = metrics.rouge("a b c d", "d c b a")
    assert scores == pytest.approx({"rouge1": 100.0, "rouge2": 0.0, "rougeL": 25.0})


@pytest.mark.parametrize(("a", "b"), [("", ""), ("word", ""), ("", "word"), ("?!", "?!")])
def test_rouge_without_words_is_zero(a, b):
    assert metrics.rouge(a, b) == {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}


def test_rouge_keeps_other_scripts():
    assert metrics.rouge("Москва спит", "москва спит")["rouge2"] == 100.0
    assert metrics.rouge("我爱你", "我爱")["rouge1"] == pytest.approx(80.0)


@given(st.text(st.characters(max_codepoint=127), max_size=30), st.text(st.characters(max_codepoint=127), max_size=30))
def test_rouge_equals_the_library_on_ascii(a, b):
    reference = RougeScorer(["rouge1", "rouge2", "rougeL"]).score(a, b)
    assert metrics.rouge(a, b) == pytest.approx({k: 100 * v.fmeasure for k, v in reference.items()})


def test_token_accuracy_by_hand():
    assert metrics.token_accuracy("abcd", "abxd") == 75.0
    assert metrics.token_accuracy("abcd", "ab") == 50.0
    assert metrics.token_accuracy("ab", "abcd") == 100.0
    assert metrics.token_accuracy("", "") == 100.0
    assert metrics.token_accuracy("", "a") == 0.0


def test_exact_match():
    assert metrics.exact_match(["a", "b"], ["a", "b"])
    assert not metrics.exact_match(["a", "b"], ["a", "b", "c"])


def test_longest_span_by_hand():
    assert metrics.longest_span("xabcy", "zzabc") == 3
    assert metrics.longest_span("abab", "baba") == 3
    assert metrics.longest_span("abc", "") == 0
    assert metrics.longest_span("a" * 300, "a" * 300) == 300


def test_align_by_hand():
    # position 0 right; "b" and "c" swapped; the second "a" of the prediction has no partner left
    marks = metrics.align(["a", "b", "c", "d"], ["a", "c", "b", "a"])
    assert marks.truth == ["right", "moved", "moved", "missing"]
    assert marks.prediction == ["right", "moved", "moved", "wrong"]


def test_align_of_nothing():
    assert metrics.align(["a"], []) == (["missing"], [])
    assert metrics.align([], ["a"]) == ([], ["wrong"])


@given(tokens, tokens)
def test_align_respects_counts(truth, prediction):
    marks = metrics.align(truth, prediction)
    assert len(marks.truth) == len(truth)
    assert len(marks.prediction) == len(prediction)
    for kind in ("right", "moved"):
        shown = sorted(t for t, m in zip(truth, marks.truth, strict=True) if m == kind)
        assert shown == sorted(t for t, m in zip(prediction, marks.prediction, strict=True) if m == kind)
    missing = [t for t, m in zip(truth, marks.truth, strict=True) if m == "missing"]
    assert not set(missing) & {t for t, m in zip(prediction, marks.prediction, strict=True) if m == "wrong"}


@given(tokens, tokens)
def test_token_scores_agree(truth, prediction):
    accuracy = metrics.token_accuracy(truth, prediction)
    assert 0 <= accuracy <= 100
    if truth:
        assert accuracy == pytest.approx(100 * metrics.align(truth, prediction).truth.count("right") / len(truth))
    if metrics.exact_match(truth, prediction):
        assert accuracy == 100
        assert metrics.longest_span(truth, prediction) == len(truth)


# --- matchings -----------------------------------------------------------------------------------------------


def test_one_to_one_uses_each_prediction_once():
    # ROUGE-1 of the pairs: 80 and 50, 100 and 66.7; in order 146.7, crossed 150, which the greedy first pick misses
    assert metrics.match_one_to_one(["a b c", "a b"], ["a b", "a"]) == [1, 0]
    assert metrics.match_one_to_one(["a b", "a c"], ["a c", "z a"]) == [1, 0]


def test_one_to_one_breaks_ties_by_order_of_words():
    assert metrics.match_one_to_one(["a b c", "c b a"], ["c b a", "a b c"]) == [1, 0]
    assert metrics.match_one_to_one(["!", "?"], ["?", "!"]) == [1, 0]


def test_one_to_one_without_enough_predictions():
    assert metrics.match_one_to_one(["a", "b"], ["b"]) == [None, 0]
    assert metrics.match_one_to_one(["a", "b"], []) == [None, None]
    assert metrics.match_one_to_one([], ["a"]) == []


def test_paper_takes_each_best_on_its_own():
    # p0 has all words in no order; p1 has the only right bigram and the longest subsequence
    (best,) = metrics.match_paper(["a b c d"], ["d c b a", "a b x y"])
    assert best == pytest.approx({"rouge1": 100.0, "rouge2": 100 / 3, "rougeL": 50.0})
    assert metrics.match_paper(["a"], []) == [{"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}]


@given(st.lists(texts, max_size=4), st.lists(texts, max_size=4))
def test_paper_is_the_plain_maximum(references, predictions):
    for reference, best in zip(references, metrics.match_paper(references, predictions), strict=True):
        for kind in metrics.KINDS:
            plain = max((metrics.rouge(reference, text)[kind] for text in predictions), default=0.0)
            assert best[kind] == pytest.approx(plain)


@given(st.lists(texts, min_size=1, max_size=4), st.randoms())
def test_one_to_one_is_optimal(references, random):
    from itertools import permutations

    predictions = random.sample(references, len(references))
    value = lambda order: sum(  # noqa: E731
        metrics.rouge(r, predictions[j])["rouge1"] for r, j in zip(references, order, strict=True)
    )
    best = max(value(order) for order in permutations(range(len(references))))
    assert value(metrics.match_one_to_one(references, predictions)) == pytest.approx(best, abs=1e-3)


# --- intervals ----------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-100, 100), max_size=12))
def test_interval_never_warns(values):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bounds = metrics.interval(values, 0)
    if len(values) < 2:
        assert bounds is None
    if bounds is not None:
        assert min(values) - 1e-9 <= bounds[0] <= bounds[1] <= max(values) + 1e-9


def test_interval_of_special_data():
    assert metrics.interval([], 0) is None
    assert metrics.interval([5.0], 0) is None
    assert metrics.interval([5.0, math.nan], 0) is None
    assert metrics.interval([7.0] * 4, 0) == (7.0, 7.0)
    assert metrics.interval([0.0] * 4, 0) == (0.0, 0.0)


def test_interval_is_near_the_normal_one_and_seeded():
    values = np.random.default_rng(0).normal(50, 10, 200)
    low, high = metrics.interval(values, 1)
    assert (low, high) == metrics.interval(values, 1)
    error = values.std(ddof=1) / np.sqrt(200)
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.25)


def test_paired_interval_sees_the_constant_difference():
    assert metrics.paired_interval([3.0, 9.0, 5.0], [1.0, 7.0, 3.0], 0) == (2.0, 2.0)


def test_share_interval_by_hand():
    # Wilson, 0 of 10: upper end z^2 / (n + z^2) with z = 1.95996
    low, high = metrics.share_interval(0, 10)
    assert low == pytest.approx(0.0, abs=1e-9)
    assert high == pytest.approx(100 * 3.8415 / 13.8415, abs=1e-2)
    assert metrics.share_interval(0, 0) is None


def test_auc_by_hand():
    # pairs (positive, negative): 0.9>0.1, 0.9>0.5, 0.5>0.1, 0.5=0.5 -> 3.5 of 4
    assert metrics.auc([0.9, 0.5, 0.1, 0.5], [1, 1, 0, 0]) == pytest.approx(0.875)
    assert metrics.auc([[1.0, 0.0]], [[0, 1]]) == 0.0
    assert metrics.auc([1, 1, 1], [1, 0, 1]) == 0.5
    assert metrics.auc([1, 2], [1, 1]) is None


def test_known_is_a_finite_float_or_none():
    assert [metrics.known(v) for v in (2, np.float32(0.5), 0.0)] == [2.0, 0.5, 0.0]
    assert [metrics.known(v) for v in (None, True, "1", math.nan, -math.inf, [])] == [None] * 6
