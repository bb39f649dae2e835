"""The summary of a run against values computed by hand: scores per sentence, baseline, outcome."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grab_jax import metrics, summary

texts = st.lists(st.sampled_from(["the", "cat", "sat", "on", "a", "mat", "."]), max_size=7).map(" ".join)
RUN = {"attack": "grab", "model": "tiny", "data": "cola", "seed": 3}


def record(truths, founds, *, index=0, control=False, loss=0.1, **more):
    sentences = [
        {"text": t, "tokens": t.split(), "label": 0, "row": i, "truncated": False} for i, t in enumerate(truths)
    ]
    predictions = [{"text": t, "tokens": t.split(), "confidence": [0.5] * len(t.split())} for t in founds]
    seconds = {"compile": 2.0, "attack": 10.0}
    base = {"id": f"{index:04x}", "index": index, "control": control, "loss": loss, "trace": [], "masks": None}
    return base | {"sentences": sentences, "predictions": predictions, "cosine": {}, "seconds": seconds} | more


@given(st.lists(texts, max_size=4), st.lists(texts, max_size=4))
def test_one_to_one_never_beats_paper(references, predictions):
    for row in summary.score_batch(record(references, predictions)):
        for kind in metrics.KINDS:
            assert row[kind] <= row["paper"][kind] + 1e-9
        assert not row["exact"] or row["token_accuracy"] == 100


def test_score_batch_by_hand():
    rows = summary.score_batch(record(["a b c d", "e f"], ["e g", "a b c d"], index=7))
    assert [row["prediction"] for row in rows] == [1, 0]
    assert rows[0]["exact"]
    assert rows[0]["rouge2"] == 100
    assert rows[0]["longest_span"] == rows[0]["tokens"] == 4
    assert rows[1] | {"paper": None} == {
        "batch": 7, "sentence": 1, "prediction": 0, "tokens": 2, "rouge1": 50.0, "rouge2": 0.0, "rougeL": 50.0,
        "paper": None, "exact": False, "token_accuracy": 50.0, "longest_span": 1,
    }  # fmt: skip


def test_baseline_leaves_the_own_batch_out():
    a, b = record(["a b"], ["a b"], index=0), record(["a c"], ["z z"], index=1)
    assert summary.sentence_baselines([a, b])[0] == {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}
    assert summary.sentence_baselines([a, b])[1] == {"rouge1": 50.0, "rouge2": 0.0, "rougeL": 50.0}
    assert summary.baseline([a, b]) == {"rouge1": 25.0, "rouge2": 0.0, "rougeL": 25.0}


def test_baseline_uses_control_records_and_may_be_missing():
    a = record(["a b"], ["a b"])
    control = record(["q"], ["a q"], index=1, control=True)
    assert summary.baseline([a, control])["rouge1"] == 50.0
    assert summary.baseline([a]) is None
    assert summary.baseline([]) is None
    assert summary.baseline([a, record(["x"], [], index=1)])["rouge1"] == 0.0


def no_nan(text):
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in the JSON"))


def test_summary_by_hand():
    masks = {"auc": {"embeddings": 0.8}, "mean": 0.8}
    records = [
        record(["a b c d"], ["a b c d"], index=0, masks=masks),
        record(["e f g h"], ["e f x y"], index=1),
        record(["r s"], ["q q"], index=2, control=True),
    ]
    found = summary.summarise(records, RUN)
    assert found["schema"] == "grab_jax.summary/1"
    assert {key: found[key] for key in RUN} == RUN
    assert (found["n_sentences"], found["n_batches"]) == (2, 2)
    assert found["rouge"]["one_to_one"] == pytest.approx({"rouge1": 75.0, "rouge2": 200 / 3, "rougeL": 75.0})
    assert found["rouge"]["paper"] == pytest.approx(found["rouge"]["one_to_one"])
    assert (found["exact_match"], found["token_accuracy"]) == (50.0, 75.0)
    assert (found["longest_span"], found["longest_span_mean"]) == (4, 3.0)
    assert found["worst"] == {"rougeL": 100.0, "batch": 0, "sentence": 0, "exact": True, "longest_span": 4}
    assert found["baseline"] == {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}
    assert found["seconds"] == {"compile": 4.0, "attack": 20.0}
    assert found["masks_auc"] == 0.8
    assert found["outcome"] == summary.LEAK
    assert found["reason"] == "1 of 2 sentences was recovered word for word, the longest with 4 tokens."
    assert set(found["intervals"]) == {"rouge1", "rouge2", "rougeL", "exact_match", "token_accuracy"}


def outcome(records):
    found = summary.summarise(records, RUN)
    no_nan(json.dumps(found))
    assert found["reason"].endswith(".")
    return found["outcome"]


def test_not_testable():
    assert outcome([]) == summary.NOT_TESTABLE
    assert outcome([record(["a"], ["a"], control=True)]) == summary.NOT_TESTABLE
    assert outcome([record([], ["a b"])]) == summary.NOT_TESTABLE
    for loss in (math.nan, math.inf, None):
        assert outcome([record(["a b c d"], ["x"], loss=loss)] * 4) == summary.NOT_TESTABLE


def test_a_verbatim_sentence_counts_whatever_the_loss():
    assert outcome([record(["a b c d"], ["a b c d"], loss=math.nan)]) == summary.LEAK
    assert outcome([record(["a b c"], ["a b c"], loss=math.nan)]) == summary.NOT_TESTABLE


def words(k):
    return [f"w{k}{i}" for i in range(8)]


def batches(n, right):
    """n batches of one sentence of its own words, of which the first `right` are found."""
    return [
        record([" ".join(words(k))], [" ".join([*words(k)[:right], *["x"] * (8 - right)])], index=k) for k in range(n)
    ]


def test_difference_to_the_baseline_decides():
    # own words: baseline 0 (but for the shared filler, absent from the truth); ROUGE-L is 12.5 per right word
    assert outcome(batches(4, 1)) == summary.LEAK
    assert outcome(batches(4, 0)) == summary.NO_LEAK
    assert outcome(batches(2, 1)) == summary.NO_LEAK  # 12.5 points on two sentences are below 20
    assert outcome(batches(2, 2)) == summary.LEAK


def test_one_lucky_sentence_is_not_enough():
    # 37.5 points on one of four sentences: the interval of the mean reaches from 0 to far above 5
    assert outcome([batches(4, 3)[0], *batches(4, 0)[1:]]) == summary.NO_LEAK


def test_without_a_baseline_chance_is_granted_generously():
    assert outcome(batches(1, 4)) == summary.NO_LEAK  # 50 - 30 is not above 20
    assert outcome(batches(1, 5)) == summary.LEAK


def test_the_same_wrong_answer_for_all_is_no_leak():
    truths = ["the cat sat on a mat", "the dog sat on a log", "the man sat on a hat"]
    records = [record([t], ["the sat on a"], index=k) for k, t in enumerate(truths)]
    assert outcome(records) == summary.NO_LEAK


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.lists(texts, max_size=2), st.lists(texts, max_size=2), st.booleans()), max_size=3))
def test_summary_is_always_plain_json(shapes):
    records = [
        record(truths, founds, index=k, control=control, loss=math.nan, masks={"auc": {}, "mean": math.nan})
        for k, (truths, founds, control) in enumerate(shapes)
    ]
    found = summary.summarise(records, {})
    no_nan(json.dumps(found))
    assert found["outcome"] in (summary.LEAK, summary.NO_LEAK, summary.NOT_TESTABLE)
    assert found["masks_auc"] is None


def test_finite():
    value = {"a": [math.nan, np.float32(2.0), np.int64(3)], "b": (math.inf, True, None), 3: np.array([np.nan, 1.0])}
    assert summary.finite(value) == {"a": [None, 2.0, 3], "b": [None, True, None], "3": [None, 1.0]}
