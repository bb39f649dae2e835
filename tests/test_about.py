"""What `run.json` says in words: the assumptions of an attack are those it makes, and no other's."""

from types import SimpleNamespace

import pytest
from test_flags import parse

from grab_jax import about

MODEL = SimpleNamespace(family="bert", width=384, config=SimpleNamespace(num_hidden_layers=6))


LOCAL = "--client_algorithm=fedavg", "--client_epochs=2"


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


def test_span_decoding_of_adapters_uses_these_and_their_rank():
    text = said("--attack=span", "--client_dropout=0", "--client_lora_rank=16")
    assert "adapters only (of their B)" in text
    assert "fewer tokens than the adapters' rank (16)" in text
    assert "wide" not in text
    assert "key and value" not in text
    assert "needs a client without dropout, which" in said("--attack=span", "--client_lora_rank=16")
    assert "as many tokens as the adapters' rank (16)" in said("--attack_init=span", "--client_lora_rank=16")


def test_adapters_that_count_are_decoded_under_dropout():
    """Of a later round, and after the first local step."""
    for later in (["--client_lora_from=adapter"], ["--client_lora_rank=16", *LOCAL]):
        text = said("--attack=span", *later)
        assert "adapters only, with the weights" in text
        assert "knows the dropout rate (0.1), and decodes the masks" in text
        assert "fewer tokens than the first attention layer's adapters have ranks together" in text


def test_last_tokens_are_read_off_the_output_layer_where_it_is_trained():
    causal = "--attack=span", "--model_task=causal_lm", "--client_frozen=none"
    assert "gradient of the tied output layer" in said(*causal)
    for other in (said(*causal[:2]), said(*causal, "--defense_clip=1"), said(causal[0], causal[2])):
        assert "output layer" not in other, other


def test_adapters_are_described_as_they_are_trained():
    setting = lambda *args: " ".join(about.about(parse(*args), MODEL, 1, [], [])["setting"])  # noqa: E731
    adapters = "--client_lora_rank=4", "--client_lora_dropout=0.1"
    assert "adapters and the classification head trained (rank 4" in setting(*adapters)
    assert ", dropout 0.1)" in setting(*adapters)
    assert "dropout 0.1" not in setting(*adapters, "--client_dropout=0")
    assert "head" not in setting("--attack=span", "--model_task=causal_lm", *adapters)


@pytest.mark.parametrize(("view", "part"), [("auto", "which it compares"), ("all", "for a gradient, whose size")])
def test_what_is_compared_of_one_step_of_adamw(view, part):
    text = said("--client_algorithm=fedavg", "--client_optimizer=adamw", f"--attack_view={view}")
    assert part in text, text
