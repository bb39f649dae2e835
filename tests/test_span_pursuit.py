"""Which of many dependent rows a gradient holds."""

import numpy as np
import pytest

from grab_jax.span import pursuit

RANK, OUT = 20, 40


def planted(rng, rows, used):
    """A gradient in the span's coordinates that holds some of the rows."""
    cotangents = np.zeros((len(rows), OUT))
    cotangents[used] = rng.normal(size=(len(used), OUT)) * rng.uniform(0.1, 3, (len(used), 1))
    return rows.T @ cotangents, cotangents


@pytest.mark.parametrize("seed", range(5))
def test_few_rows_are_told_from_many_dependent_ones(seed):
    """60 rows in 20 dimensions, 8 of them held."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(60, RANK))
    used = rng.choice(60, 8, replace=False)
    gradient, cotangents = planted(rng, rows, used)
    shares, sizes = pursuit.solutions(rows, [gradient[:, :25], gradient[:, 25:]], seed=seed)
    assert set(np.flatnonzero(shares == 1)) == set(used)
    assert set(np.flatnonzero(sizes > pursuit.USED * sizes.max())) == set(used)
    scaled = [part / np.linalg.norm(gradient[:, cut]) for part, cut in
              ((cotangents[:, :25], slice(25)), (cotangents[:, 25:], slice(25, None)))]  # fmt: skip
    expected = np.linalg.norm(np.concatenate(scaled, axis=1), axis=1) * np.linalg.norm(rows, axis=1)
    np.testing.assert_allclose(sizes, expected, atol=1e-6 * expected.max())


def test_independent_rows_have_one_solution():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(RANK, RANK))
    gradient, cotangents = planted(rng, rows, np.arange(RANK))
    shares, sizes = pursuit.solutions(rows, [gradient])
    assert (shares == 1).all()
    expected = np.linalg.norm(cotangents, axis=1) * np.linalg.norm(rows, axis=1) / np.linalg.norm(gradient)
    np.testing.assert_allclose(sizes, expected, rtol=1e-6)


def test_rows_of_position_plus_token_in_doubt_share_their_part():
    """(v, p) + (w, q) = (v, q) + (w, p): with equal cotangents nothing tells the two pairs apart."""
    words, places = np.eye(4)[:2], np.eye(4)[2:]
    rows = np.stack([w + p for w in words for p in places])
    gradient = (rows[0] + rows[3])[:, None] * np.ones((1, OUT))
    shares, _ = pursuit.solutions(rows, [gradient], seed=1)
    assert shares[[0, 3]].sum() > 0
    assert shares[[1, 2]].sum() > 0
