"""experiments/span_reliability.py: which candidates are true, the bins, the table and the figure."""

import numpy as np
import pytest
import scripts
from span_client import client, sentence

from grab_jax.models import first_attention
from grab_jax.span.decode import ACCEPT

common = scripts.load("common")
reliability = scripts.load("span_reliability")
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def truth():
    rng = np.random.default_rng(0)
    return client("bert", tuple(sentence("bert", rng, words) for words in (3, 5)))


def found(truth, sigma):
    """What the script makes of a client with this much noise."""
    real, observed = common.fed(truth), first_attention.gradients(truth.problem.model, truth.problem.observed)
    noisy, first = reliability.noisy(observed, sigma, np.random.default_rng(0)), common.described(truth.problem)
    parts = [reliability.judged(some, real) for some in reliability.candidates(first, noisy, 7)]
    return reliability.Judged(*map(np.concatenate, zip(*parts, strict=True)))


def test_every_row_is_a_candidate_and_noise_takes_certificates_away_only(truth):
    accepted = {}
    for sigma in (0.0, 1e-4, 1e-2):
        level = found(truth, sigma)
        accepted[sigma] = level.enough & (level.certificates > ACCEPT)
        assert not (accepted[sigma] & ~level.true).any()
        assert sigma or np.array_equal(accepted[sigma], level.true)
        assert len(level.true) == 7 * reliability.decode.BEST
    assert accepted[0.0].sum() >= len(common.fed(truth).pairs)
    assert accepted[1e-2].sum() < accepted[0.0].sum()


def test_noise_is_relative_to_the_norm():
    gradients = [np.full((40, 40), size) for size in (1.0, 100.0)]
    clear, noisy = (reliability.noisy(gradients, sigma, np.random.default_rng(0)) for sigma in (0.0, 0.01))
    np.testing.assert_allclose([np.linalg.norm(g) for g in clear], 1)
    np.testing.assert_allclose([np.std(b - a) for a, b in zip(clear, noisy, strict=True)], 0.01, rtol=0.1)


def test_a_candidate_is_true_with_the_mask_of_a_copy():
    """Two copies of one token with different masks; then another mask, another position, another token."""
    masks = np.random.default_rng(0).random((3, 400)) > 0.1
    nearly = masks[0] ^ (np.arange(400) < 4)
    real = common.Fed(np.array([0, 0]), np.array([2, 2]), np.zeros((2, 400)), masks[:2])
    kept = np.stack([masks[0], masks[1], nearly, masks[2], masks[0], masks[0]])
    positions, tokens = np.array([0, 0, 0, 0, 1, 0]), np.array([2, 2, 2, 2, 2, 3])
    some = reliability.Candidates(positions, tokens, np.ones(6), kept, np.ones(6, bool))
    assert reliability.judged(some, real).true.tolist() == [True, True, True, False, False, False]


@pytest.fixture
def level():
    """At the level of acceptance, above, negative, and one that keeps too few coordinates."""
    certificates = np.array([ACCEPT, 0.99, 1.0, -3.0, 1.0])
    return reliability.Judged(certificates, np.array([1, 1, 1, 1, 0], bool), np.array([1, 1, 1, 0, 0], bool))


def test_the_bins_split_at_the_level_of_acceptance(level):
    low, under, accepted = reliability.bins(level)
    assert (low.high, low.count, low.true) == (0, 1, 0)
    assert (under.low, under.high, under.count, under.true) == (0.95, ACCEPT, 1, 1)
    assert (accepted.low, accepted.high, accepted.count, accepted.true) == (ACCEPT, 1, 2, 2)
    assert accepted.mean == pytest.approx(0.995)
    assert 20 < accepted.interval[0] < accepted.interval[1] == pytest.approx(100)


def test_the_table_names_levels_and_bins(level):
    lines = reliability.lines(1e-5, level)
    assert lines[0] == "| 1e-05 | too few kept | 1 | 0 |  |  |"
    assert lines[1].startswith("| 1e-05 | at most 0 | 1 | 0 | 0.0 % |")
    assert lines[-1].startswith("| 1e-05 | 0.98 to 1 | 2 | 2 | 100.0 % |")


def test_the_figure_has_both_panels_and_survives_a_level_without_candidates(level, tmp_path):
    none = level._replace(enough=np.zeros(5, bool))
    made = reliability.figure({0.0: level, 1e-5: none})
    above, below = made.axes
    assert {text.get_text() for text in above.get_legend().get_texts()} == {"no noise", "noise 1e-05"}
    assert (below.get_yscale(), below.get_xlabel()) == ("log", "certificate of the row")
    made.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000
