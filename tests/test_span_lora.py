"""What span decoding reads from LoRA factors, and where it says that it cannot."""

import numpy as np
import pytest
from span_client import FAMILIES, client, sentence

from grab_jax.attacks import span
from grab_jax.models.lora import Lora

ADAPTERS = Lora(rank=16, alpha=32.0)


@pytest.fixture(scope="module", autouse=True)
def quickly(quick_compilation):
    return quick_compilation


def sent(family="bert", words=(4,), **settings):
    rng = np.random.default_rng(3)
    truth = client(
        family, [sentence(family, rng, n) for n in words], **{"adapters": ADAPTERS, "dropout": False} | settings
    )
    return truth, span.recover(truth.problem, 0)


@pytest.mark.parametrize("family", [pytest.param(f, marks=() if f == "bert" else pytest.mark.long) for f in FAMILIES])
def test_a_sentence_is_read_from_the_factors(family):
    truth, result = sent(family)
    (ids, real, _) = truth.batch.batch
    expected = np.asarray(ids)[np.asarray(real)].tolist()
    assert result.ids[result.confidence > 0].tolist() == expected
    assert result.evidence["rank"] == len(expected)
    assert not result.evidence["sentences"][0]["certified"]
    conditions = ADAPTERS.rank - len(expected)
    assert f"{conditions if family == 'gpt2' else 2 * conditions} linear conditions" in " ".join(result.notes)


def test_rows_of_two_sentences_are_found_and_left_apart():
    truth, result = sent(words=(3, 4))
    ids, real, _ = truth.batch.batch
    expected = {(t, int(ids[r, t])) for r, t in np.argwhere(np.asarray(real)).tolist()}
    assert expected <= {(row["position"], row["token"]) for row in result.evidence["rows"]}
    assert not result.evidence["sentences"]
    assert any("belong to no sentence" in note for note in result.notes)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dropout": True}, "dropout"),
        ({"adapters": Lora(rank=5, alpha=5.0)}, "adapters of rank 5"),
    ],
)
def test_factors_that_tell_nothing_are_not_testable(settings, said):
    _, result = sent(**settings)
    assert result.evidence["not_testable"].startswith("not testable by span decoding")
    assert said in result.evidence["not_testable"]
