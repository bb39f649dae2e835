"""Redaction: what counts as private, and that it is hidden in truths and predictions alike."""

import copy

import pytest
from fake_run import SECRET, record
from hypothesis import given
from hypothesis import strategies as st

from grab_jax import redact


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("Yesterday I met Mary and Dr. Who.", "Yesterday I met [name] and Dr. [name]."),
        ("He left. She called Bob O'Neil!", "He left. She called [name] [name]!"),
        ("Write to anna.k@example.org, please.", "Write to [mail], please."),
        ("Call +1 (415) 555-0132 now", "Call [phone] now"),
        ("It cost 45,000 euros at 14:30 in B12.", "It cost [number] euros at [number] in [number]."),
        ("I think I'm right and I’ll stay.", "I think I'm right and I’ll stay."),
        ("in Zürich lebt Ödön", "in [name] lebt [name]"),
        ("nothing private here.", "nothing private here."),
        ("", ""),
    ],
)
def test_redact_text(text, redacted):
    assert redact.redact_text(text) == redacted


def test_redaction_keeps_one_piece_per_token():
    truth, found = redact.readable(SECRET, redact.private([SECRET]))
    assert [len(row) for row in (*truth, *found)] == [22, 8]
    assert [piece.text for piece in truth[0][:9]] == ["please", "ask", "[name]", "·", "·", "(", "born", "[number]", ")"]


def texts_of(row):
    return [piece.text for piece in row]


def test_a_known_name_is_hidden_at_the_start_of_a_sentence():
    one = record(truths=["We saw Mary . Mary left ."], founds=[])
    truth, _ = redact.readable(one, redact.private([one]))
    assert texts_of(truth[0]) == ["we", "saw", "[name]", ".", "[name]", "left", "."]


def test_names_of_other_batches_are_hidden_too():
    one, other = record(truths=["We saw Mary"], founds=[]), record(founds=["mary sat"])
    assert texts_of(redact.readable(other, redact.private([one, other]))[1][0]) == ["[name]", "sat"]


def test_marks_inside_a_hidden_item_are_hidden():
    one = record(truths=["at 14:30 sharp"], founds=["at 14 : 30 sharp"])
    one["sentences"][0]["tokens"] = ["at", "14", ":", "30", "sharp"]
    truth, found = redact.readable(one, redact.private([one]))
    assert texts_of(truth[0]) == texts_of(found[0]) == ["at", "[number]", "·", "·", "sharp"]


def test_redaction_changes_no_record():
    before = copy.deepcopy(SECRET)
    redact.readable(SECRET, redact.private([SECRET]))
    assert before == SECRET


def test_byte_level_names_are_hidden():
    one = record(truths=["We saw Zoë."], founds=["Zoë saw"])
    one["sentences"][0]["tokens"] = ["We", "Ġsaw", "ĠZo", "Ã«", "."]
    one["predictions"][0]["tokens"] = ["ĠZo", "Ã«", "Ġsaw"]
    assert [p.text for p in redact.readable(one, None)[0][0]] == ["We", "saw", "Zo", "ë", "."]
    truth, found = redact.readable(one, redact.private([one]))
    assert [p.text for p in truth[0]] == ["We", "saw", "[name]", "·", "."]
    assert [p.text for p in found[0]][-1] == "saw"
    assert "Zo" not in "".join(p.text for p in found[0])


def test_a_name_whose_letter_spans_two_tokens_is_one_item():
    one = record(truths=["We saw Zoë."], founds=["sat Zoë"])
    one["sentences"][0]["tokens"] = ["We", "Ġsaw", "ĠZo", "Ã", "«", "."]
    one["predictions"][0]["tokens"] = ["Ġsat", "ĠZo", "Ã", "«"]
    truth, found = redact.readable(one, redact.private([one]))
    assert texts_of(truth[0]) == ["We", "saw", "[name]", "·", "·", "."]
    assert texts_of(found[0]) == ["sat", "[name]", "·", "·"]


@given(st.text(max_size=40), st.text(max_size=40))
def test_hiding_never_fails(truth, found):
    one = record(truths=[truth], founds=[found])
    for hide in (None, redact.private([one])):
        shown_truth, shown_found = redact.readable(one, hide)
        assert len(shown_truth[0]) == len(one["sentences"][0]["tokens"])
        assert len(shown_found[0]) == len(one["predictions"][0]["tokens"])
