"""The summary of a run against values computed by hand: scores per sentence, baseline, outcome."""

import json
import math

import numpy as np
import pytest
from fake_run import barred, proofs, span
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


@settings(deadline=None)
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
        "paper": None, "exact": False, "token_accuracy": 50.0, "longest_span": 1, "proof": "", "proven": False,
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


# --- attacks that prove what they find ------------------------------------------------------------------------


def verdict(records):
    found = summary.summarise(records, RUN)
    no_nan(json.dumps(found))
    return found["outcome"], found["reason"]


def counted(records):
    found = summary.summarise(records, RUN)
    return [found[key] for key in ("certified", "certified_of", "certified_wrong")]


TEXTS = ("the cat sat on the mat", "a dog ran off")


def test_certified_sentences_are_counted():
    assert counted([span(0, TEXTS), span(1, TEXTS, certified=[True, False])]) == [3, 4, 0]
    assert counted([record(["a b"], ["a b"])]) == [None, None, None]
    assert counted([span(0, (), TEXTS)]) == [2, 2, None]  # no truth to compare with


def test_certificates_against_the_truth_one_to_one():
    assert counted([span(0, TEXTS, [TEXTS[0], "a dog ran on"])]) == [2, 2, 1]
    assert counted([span(0, TEXTS, [TEXTS[0], TEXTS[0]])]) == [2, 2, 1]  # the batch holds it once
    assert counted([span(0, (TEXTS[0], TEXTS[0]), [TEXTS[0], TEXTS[0]])]) == [2, 2, 0]
    assert counted([span(0, TEXTS, ["x", "y"], certified=[False, False])]) == [0, 2, 0]


@pytest.mark.parametrize(
    ("certified", "part"),
    [
        ([True, True], "2 of 2 sentences were recovered word for word, all of them proven by their certificates;"),
        ([True, False], "recovered word for word, 1 of them proven by its certificate;"),
        ([False, False], "recovered word for word, none of them proven by a certificate;"),
    ],
)
def test_the_reason_tells_how_many_are_proven(certified, part):
    outcome, reason = verdict([span(0, TEXTS, certified=certified)])
    assert outcome == summary.LEAK
    assert part in reason
    assert reason.endswith("the longest has 6 tokens.")


def test_one_sentence_proven():
    (_, reason) = verdict([span()])
    assert "was recovered word for word, proven by its certificate;" in reason


def test_a_proven_sentence_counts_however_short():
    assert verdict([span(0, ("a b c",))])[1].startswith("1 of 1 sentence was recovered word for word, proven")
    assert verdict([span(0, ("a b c",), certified=[False])])[1].startswith("ROUGE-L")


def test_a_wrong_certificate_is_told_and_trusted_no_more():
    outcome, reason = verdict([span(0, TEXTS, [TEXTS[0], "a dog ran on"])])
    assert outcome == summary.LEAK  # one sentence is word for word right, whatever proves it
    assert "proven" not in reason
    assert "Warning: 1 certified reconstruction differs from the truth" in reason


def test_proofs_without_a_truth_are_a_leak():
    assert verdict([span(0, (), TEXTS)]) == (
        summary.LEAK,
        "2 of 2 reconstructions are proven by their certificates; there is no true sentence to compare with.",
    )
    assert verdict([span(0, (), TEXTS, certified=[False, False])])[0] == summary.NOT_TESTABLE


def test_every_batch_too_wide():
    text = "Not testable by span decoding: 400 tokens or more >= width 384"
    assert verdict([barred(), barred(1)]) == (summary.NOT_TESTABLE, f"{text}.")
    other = barred(1, reason="not testable by span decoding: 390 tokens or more >= width 384")
    assert verdict([barred(), other])[1] == f"{text}, and the like in 2 batches."


TRACE = [{"round": 0, "phase": "discrete", "step": 1, "loss": 1.0}]


def test_what_a_search_took_over_is_tested():
    """It counts as any search does, with a certificate or without."""
    searched = [barred(k) | {key: b[key] for key in ("sentences", "predictions")} for k, b in enumerate(batches(4, 1))]
    outcome, reason = verdict([r | {"trace": TRACE, "loss": 1.0} for r in searched])
    assert outcome == summary.LEAK
    assert "not testable" not in reason
    outcome, reason = verdict([barred(truths=TEXTS) | {"trace": TRACE, "predictions": span(0, TEXTS)["predictions"]}])
    assert reason.startswith("2 of 2 sentences were recovered word for word, none of them proven by a certificate;")
    assert "not testable" not in reason


def test_a_sentence_that_a_search_completed_is_not_proven():
    sentences = [{"certified": True, "residual": 1e-7}, {"certified": False, "residual": None}]
    completed = span(0, TEXTS) | {"evidence": proofs() | {"sentences": sentences}, "loss": 1.0, "trace": TRACE}
    outcome, reason = verdict([completed])
    assert outcome == summary.LEAK
    assert "2 of 2 sentences were recovered word for word, 1 of them proven by its certificate;" in reason
    assert counted([completed]) == [1, 2, 0]


def test_no_row_found():
    none = proofs((), rows=0, rank=20)
    blind = [span(i, founds=[""], evidence=none) for i in range(2)]
    reason = "None of the 40 input rows was found: "
    reason += "the dropout rate, the weights or the embeddings assumed are not the client's."
    assert verdict(blind) == (summary.NOT_TESTABLE, reason)
    assert verdict([blind[0], barred()])[1] == reason.replace("40", "20")


def test_some_batches_too_wide():
    outcome, reason = verdict([span(0, TEXTS), barred(1), span(2, founds=[""], evidence=proofs((), rows=0))])
    assert outcome == summary.LEAK
    assert reason.startswith("2 of 4 sentences were recovered")
    assert "1 of 3 batches was not testable: 400 tokens or more >= width 384." in reason
    assert reason.endswith("1 of 3 batches was not testable: none of the input rows was found.")


def test_an_untested_batch_counts_neither_for_nor_against():
    # 12.5 points per right word, as above: four blank answers of untested batches would pull the mean below 20
    found = [b | {"evidence": proofs([False], rows=3), "index": k} for k, b in enumerate(batches(2, 2))]
    assert verdict([*found, *(barred(k) for k in range(2, 6))])[0] == summary.LEAK
    # and blank answers are no baseline: without another one, 30 points are granted to chance
    assert verdict([found[0], barred(1)])[0] == summary.NO_LEAK


def test_rows_without_a_sentence_are_a_leak():
    loose = proofs((), rows=11)
    outcome, reason = verdict([span(0, founds=[""], evidence=loose)])
    assert outcome == summary.LEAK
    assert "11 of the 12 input rows were found and certified" in reason


def test_rows_left_over_beside_whole_sentences_are_told():
    found = proofs([True])
    assert "further" not in verdict([span(evidence=found)])[1]
    found["rows"][4]["used"] = False
    assert verdict([span(evidence=found)])[1].endswith(
        " 1 further input row, a token with its position, was found without the sentence around it."
    )
    found["rows"][5]["used"] = False
    assert " 2 further input rows" in verdict([span(evidence=found)])[1]


def test_rows_without_a_certificate_or_a_sentence_are_no_clean_bill():
    """All words of a batch with their places, in no sentence: ROUGE sees nothing of them."""
    unsure = proofs((), rows=11)
    unsure["rows"] = [row | {"certificate": 0.9} for row in unsure["rows"]]
    there = {"found": 12, "right": 10, "of": 11}
    outcome, reason = verdict([span(0, founds=[""], evidence=unsure) | {"placed": there}])
    assert outcome == "leak shown"
    assert "10 of the 11 tokens were found at their positions, without a certificate (2 other tokens" in reason
    by_chance = there | {"found": 40}
    assert verdict([span(0, founds=[""], evidence=unsure) | {"placed": by_chance}])[0] != "leak shown"


@pytest.mark.parametrize(
    "rows",
    [
        proofs((), rows=5),  # with [CLS] and [SEP], only three words
        proofs((), rows=11, width=40),  # so few coordinates to spare that chance may pass
        proofs(()) | {"rows": [{"position": 0, "token": 1, "certificate": 0.9}] * 11},
    ],
)
def test_few_or_weak_rows_are_none(rows):
    assert verdict([span(0, founds=[""], evidence=rows)])[0] == summary.NO_LEAK


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
