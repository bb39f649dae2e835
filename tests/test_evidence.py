"""What a run's evidence says, by hand."""

import pytest
from fake_run import barred, proofs, record, span

from grab_jax import evidence

TWO = ("the cat sat", "a dog ran")


def test_proven_in_the_order_of_the_predictions():
    assert evidence.proven(span(0, TWO, certified=[False, True])) == [False, True]
    assert evidence.proven(barred()) == [False]  # its blank prediction stands for no sentence
    assert evidence.proven(record()) == [False]
    assert evidence.proven(record(founds=[])) == []


@pytest.mark.parametrize(
    ("founds", "certified", "wrong"),
    [
        (TWO, [True, True], [False, False]),
        (TWO[::-1], [True, True], [False, False]),
        ((TWO[0], TWO[0]), [True, True], [False, True]),
        ((TWO[0], TWO[0]), [False, True], [False, False]),  # the uncertified one takes no sentence away
        ((TWO[0], "a dog sat"), [True, False], [False, False]),
        ((TWO[0], "a dog sat"), [True, True], [False, True]),
        ((*TWO, "the end"), [True, True, True], [False, False, True]),
    ],
)
def test_contradicted(founds, certified, wrong):
    assert evidence.contradicted(span(0, TWO, founds, certified)) == wrong


@pytest.mark.parametrize(
    ("founds", "last", "words"),
    [
        (TWO, ["proven", "proven"], ["proven", "proven"]),
        (("the cat", "a dog"), ["unknown", "unknown"], ["proven except its last token"] * 2),
        (("the cat ran", "a dog sat"), ["likely", "likely"], ["proven except its last token"] * 2),
        (("the cat ran", TWO[1]), ["proven", "proven"], ["certificate wrong", "proven"]),
        (("the dog ran", TWO[1]), ["likely", "proven"], ["certificate wrong", "proven"]),
        (TWO, ["unknown", "proven"], ["certificate wrong", "proven"]),
    ],
)
def test_a_certificate_under_a_next_token_loss_may_leave_the_last_token_open(founds, last, words):
    found = span(0, TWO, founds, [True, True])
    for sentence, end in zip(found["evidence"]["sentences"], last, strict=True):
        sentence["last"] = end
    assert evidence.words(found) == words
    assert evidence.contradicted(found) == [word == "certificate wrong" for word in words]


def test_a_sentence_named_in_full_takes_its_truth_before_one_with_an_open_end():
    found = span(0, ("the cat sat", "the cat ran"), ("the cat", "the cat sat"), [True, True])
    for sentence, end in zip(found["evidence"]["sentences"], ("unknown", "proven"), strict=True):
        sentence["last"] = end
    assert evidence.words(found) == ["proven except its last token", "proven"]


def test_records_without_a_word_on_the_last_token():
    """Of a next-token loss they leave it open."""
    found = span(0, TWO, ("the cat", "a dog"), [True, True])
    found["evidence"]["open_end"] = True
    assert evidence.contradicted(found) == [False, False]


def test_without_a_truth_nothing_is_contradicted():
    assert evidence.contradicted(span(0, (), TWO)) == [False, False]


def test_tested():
    blind = span(founds=[""], evidence=proofs((), rows=0))
    assert [evidence.tested(r) for r in (record(), span(), barred(), blind)] == [True, True, False, False]
    trace = record()["trace"]
    assert all(evidence.tested(r | {"trace": trace}) for r in (barred(), blind))  # a search took over


def test_table():
    weak = proofs([True, False, True], rows=11, gap_rank=9)
    weak["rows"][3]["certificate"] = 0.99
    weak["sentences"][2]["residual"] = 5e-6
    assert evidence.table([record(), span(4, evidence=weak), barred(5)]) == [
        {
            "batch": 4, "rank": 12, "gap_rank": 9, "width": 384, "not_testable": None, "rows": 11, "weakest": 0.99,
            "sentences": 3, "certified": 2, "residual": 5e-6,
        },
        {
            "batch": 5, "rank": 384, "gap_rank": 384, "width": 384, "rows": 0, "weakest": None, "sentences": 0,
            "certified": 0, "residual": None,
            "not_testable": "not testable by span decoding: 400 tokens or more >= width 384",
        },
    ]  # fmt: skip


def test_the_residual_of_an_uncertified_sentence_is_not_shown():
    (row,) = evidence.table([span(evidence=proofs([False]))])
    assert (row["certified"], row["sentences"], row["residual"]) == (0, 1, None)


def test_widest():
    assert evidence.widest([span(evidence=proofs(rank=20)), span(evidence=proofs(rank=31))]) == (31, 384)
    assert evidence.widest([record()]) is None
    assert evidence.widest([span(evidence={"sentences": [], "rows": []})]) is None


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({}, "the dropout rate"),
        ({"sigma": 0.002}, "noise of standard deviation 0.002 hides them"),
        ({"wire": "bfloat16"}, "rounding to bfloat16 hides them"),
        ({"wire": "float32", "sigma": 0.0, "noise": 1e-3}, "rounding hides them"),
    ],
)
def test_rows_hidden_by_noise_are_not_blamed_on_what_was_assumed(found, said):
    why = evidence.why_untested([span(founds=[""], evidence=proofs((), rows=0, **found))])
    assert f"was found: {said}" in why
