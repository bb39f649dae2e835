"""What `run.json` says in words: the assumptions of an attack are those it makes, and no other's."""

from types import SimpleNamespace

import pytest
from test_flags import parse

from grab_jax import about

MODEL = SimpleNamespace(family="bert", width=384, config=SimpleNamespace(num_hidden_layers=6))


def said(*args):
    """Assumptions as one text."""
    return " ".join(about.about(parse(*args), MODEL, 1, [], [])["assumptions"])


@pytest.mark.parametrize("told", [(), ("--noknown_labels", "--noknown_lengths")])
def test_span_decoding_is_told_little(told):
    text = said("--attack=span", "--client_dropout=0.25", "--attack_masks=off", *told)
    for part in (
        "not told the labels",
        "or the batch size",
        "dropout rate (0.25)",
        "tokens than the model is wide (384)",
    ):
        assert part in text, text
    for part in ("ignores dropout", "learns the masks", "told every", "longest length", "knows the batch size"):
        assert part not in text, text


def test_span_decoding_without_dropout():
    text = said("--attack=span", "--client_dropout=0")
    assert "trains without dropout" in text
    assert "masks" not in text


@pytest.mark.parametrize(("rate", "end"), [("0", "trains without dropout."), ("0.1", "dropout, which it does not.")])
def test_dager_is_told_the_batch_size(rate, end):
    text = said("--attack=dager", f"--client_dropout={rate}")
    for part in ("not told the labels", "knows the batch size", end, "tokens than the model is wide (384)"):
        assert part in text, text


def test_grab_is_told_what_the_flags_say():
    text = said("--noknown_labels", "--client_dropout=0.1")
    for part in ("knows the batch size", "not told the labels", "every sentence's length", "learns the masks"):
        assert part in text, text
    assert "Control: it is given the true tokens." in said("--attack_tokens=true")
    assert "span decoding" not in text


def test_attacks_without_mask_learning_ignore_dropout_and_a_prior_is_named():
    for name in ("dlg", "tag", "lamp"):
        text = said(f"--attack={name}", "--client_dropout=0.1")
        assert "ignores dropout" in text
        assert "learns the masks" not in text
        assert "language model for" not in text
    assert "learns the masks" in said("--attack=lamp", "--attack_masks=learn", "--client_dropout=0.1")
    assert "language model for the model's tokenizer, runs/prior" in said("--attack=lamp", "--attack_prior=runs/prior")


def test_grab_that_starts_from_span_decoding_says_so():
    text = said("--attack_init=span")
    for part in ("knows the batch size", "first decodes", "holds the tokens and masks", "model is wide (384)"):
        assert part in text, text
