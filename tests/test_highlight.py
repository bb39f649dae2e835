"""The highlight of a record on the terminal."""

import re

from fake_run import SECRET, record, span
from hypothesis import given
from hypothesis import strategies as st

from grab_jax.highlight import highlight, terminal


def test_highlight_pairs_pieces_with_marks():
    (line,) = highlight(record(truths=["a b"], founds=["b c"]))
    assert [(piece.text, mark) for piece, mark in line.truth] == [("a", "missing"), ("b", "moved")]
    assert [(piece.text, mark) for piece, mark in line.found] == [("b", "moved"), ("c", "wrong")]
    assert line.score["rouge1"] == 50.0
    assert highlight(record(founds=[]))[0].found is None


def test_terminal_by_hand():
    text = terminal(record(), colour=False)
    assert text.splitlines()[:3] == [
        "batch 0, sentence 0: ROUGE-L 66.7, 2 of 6 tokens in place",
        "  truth  the cat _sat_ ~on~ ~the~ ~mat~",
        "  found  the cat ~on~ !rug! ~mat~ ~the~",
    ]
    assert "legend: right   ~right token, wrong place~   !wrong!   _missing_" in text


def test_terminal_says_what_is_proven():
    assert "6 of 6 tokens in place, proven\n" in terminal(span(), colour=False)
    assert "proven" not in terminal(span(certified=[False]), colour=False)
    assert "proven" not in terminal(span(founds=["the cat sat on the rug"]), colour=False)  # certified, and wrong


def test_terminal_with_colour_keeps_the_marks():
    text = terminal(record(), colour=True)
    assert re.sub(r"\x1b\[[\d;]*m", "", text) == terminal(record(), colour=False)
    assert text.count("\x1b[") % 2 == 0


def test_terminal_without_prediction_and_redacted():
    assert "(nothing)" in terminal(record(founds=[]), colour=False)
    assert "(nothing)" in terminal(record(founds=[""]), colour=False)
    text = terminal(SECRET, colour=False, redact=True)
    assert "lop" not in text
    assert "[name]" in text


@given(st.text(max_size=40), st.text(max_size=40))
def test_terminal_writes_no_control_character(truth, found):
    text = terminal(record(truths=[truth], founds=[found]), colour=False)
    assert all(char.isprintable() or char == "\n" for char in text)
