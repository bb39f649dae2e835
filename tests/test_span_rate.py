"""The dropout rate read off the update."""

import numpy as np
import pytest
from span_client import FAMILIES, client, sentence

from grab_jax.attacks import span
from grab_jax.span import rate

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_dropped_share_and_its_deviation():
    kept = np.array([[True, True, True, False]] * 100)
    share, deviation = rate.dropped_share(kept)
    assert share == 0.25
    np.testing.assert_allclose(deviation, np.sqrt(0.25 * 0.75 / 400))


@pytest.mark.parametrize("true", [0.1, 0.27])
def test_the_rate_is_where_the_singular_values_vanish(true):
    """The share of dropped coordinates only says where to look."""
    kept = np.random.default_rng(0).random((20, 64)) >= true
    singular = lambda p: np.array([abs(p - true), 3 * abs(p - true), 0.4, 0.5])  # noqa: E731
    np.testing.assert_allclose(rate.fit(kept, singular, 2), true, atol=1e-5)
    assert rate.fit(kept, singular, 0) == rate.dropped_share(kept)[0]


@pytest.mark.parametrize("true", [0.1, 0.3])
@pytest.mark.parametrize("family", FAMILIES)
def test_sentences_are_proven_without_the_rate(family, true):
    """GPT-2's norm after dropout hides the scale: there the share of dropped coordinates is all there is to read."""
    rng = np.random.default_rng(5)
    sentences = tuple(sentence(family, rng, n) for n in (3, 6, 4))
    problem = client(family, sentences, rate=true).problem._replace(rate=False)
    result = span.recover(problem, 0)
    found = {tuple(row[: len(s)].tolist()) for s in sentences for row in result.ids}
    assert set(sentences) <= found
    assert all(one["certified"] for one in result.evidence["sentences"])
    (note,) = (note for note in result.notes if "dropout rate" in note)
    read = float(note.split()[-1])
    np.testing.assert_allclose(read, true, atol=0.05 if family == "gpt2" else 1e-3)
