"""Rows of a planted layer are decoded from the span of its gradient, with dropout (decode) and without (members).

The layer and its gradient are made in NumPy; nothing of a model is in them but embeddings, norm and masks.
"""

from collections import Counter
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from grab_jax.span import decode, inputs, members, scaling, subspace

pytestmark = pytest.mark.usefixtures("quick_compilation")
WIDTH, VOCABULARY, PLACES = 96, 300, 12
SENTENCES = ((2, 20, 30, 40, 5, 3), (2, 7, 30, 3), (2, 9, 9, 3), (2, 20, 3))
LATE = {"bert": False, "gpt2": True}


def plain_norm(x, norm):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + norm.epsilon) * norm.scale + norm.shift


def layer(late, rate, seed=0, shift=0.1, vocabulary=VOCABULARY):
    """A first layer of float32 NumPy arrays, with its norm before dropout or (`late`) after it."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    norm = inputs.Norm(1 + 0.1 * draw(WIDTH), shift * draw(WIDTH), 1e-5)
    both = {"norm": None, "later": norm} if late else {"norm": norm, "later": None}
    unused = draw(WIDTH, WIDTH), draw(WIDTH)
    return inputs.FirstAttention(
        words=draw(vocabulary, WIDTH), places=draw(PLACES, WIDTH), rate=rate, query=unused, key=unused, **both
    )


def on_device(first):
    arrays = lambda part: part and inputs.Norm(*map(jnp.asarray, part[:2]), part.epsilon)  # noqa: E731
    pairs = {"query": tuple(map(jnp.asarray, first.query)), "key": tuple(map(jnp.asarray, first.key))}
    norms = {"norm": arrays(first.norm), "later": arrays(first.later)}
    return first._replace(words=jnp.asarray(first.words), places=jnp.asarray(first.places), **norms, **pairs)


class Planted(NamedTuple):
    """A layer, the (position, token) pairs it is fed, their masks, rows before any later norm, the gradient's span."""

    first: inputs.FirstAttention
    pairs: list
    kept: np.ndarray
    values: np.ndarray
    basis: np.ndarray
    gradient: np.ndarray


def plant(late=False, rate=0.1, sentences=SENTENCES, seed=0, first=None):
    """Without dropout equal pairs are one row; rows and gradient in float32, as a client has them."""
    rng = np.random.default_rng(100 + seed)
    first = layer(late, rate, seed) if first is None else first
    pairs = [pair for s in sentences for pair in enumerate(s)]
    pairs = pairs if rate else sorted(set(pairs))
    positions, tokens = np.array(pairs).T
    x = first.words[tokens].astype(np.float64) + first.places[positions]
    x = x if late else plain_norm(x, first.norm)
    kept = rng.random(x.shape) >= rate
    values = x * kept / (1 - rate)
    fed = (plain_norm(values, first.later) if late else values).astype(np.float32)
    gradient = fed.T @ rng.normal(size=(len(pairs), 3 * WIDTH)).astype(np.float32)
    basis = np.linalg.svd(gradient.astype(np.float64), full_matrices=False)[0][:, : len(pairs)]
    return Planted(on_device(first), pairs, kept, values, basis, gradient.astype(np.float64))


def assert_found_all(rows, planted):
    """Every planted row is there once, its mask exact, and no other row."""
    assert Counter((row.position, row.token) for row in rows) == Counter(planted.pairs)
    own = {(*pair, kept.tobytes()): i for i, (pair, kept) in enumerate(zip(planted.pairs, planted.kept, strict=True))}
    where = [own[row.position, row.token, row.kept.tobytes()] for row in rows]
    assert sorted(where) == list(range(len(planted.pairs)))
    np.testing.assert_allclose([row.values for row in rows], planted.values[where], atol=1e-3)


# --- decode -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", LATE.values(), ids=LATE)
@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_decode_finds_every_row_and_its_mask(rate, late):
    """Four copies of the first token, three of the last one at 3, and one token at two positions of a sentence."""
    planted = plant(late, rate)
    rows = decode.decode(planted.first, planted.basis)
    assert_found_all(rows, planted)
    assert all(0.98 < row.certificate <= 1 + 1e-12 for row in rows)


@pytest.mark.parametrize("rate", [0.1, 0.3])
@pytest.mark.parametrize("seed", range(2))
def test_decode_finds_six_copies_of_one_sentence(seed, rate):
    planted = plant(seed == 1, rate, sentences=((2, 10, 3),) * 6, seed=seed)
    assert_found_all(decode.decode(planted.first, planted.basis, seed=seed), planted)


def test_decode_of_one_row():
    planted = plant(sentences=((17,),))
    assert_found_all(decode.decode(planted.first, planted.basis), planted)


def test_decode_where_the_later_norm_shifts_nothing():
    first = layer(True, 0.1, shift=0.0)
    planted = plant(True, first=first)
    assert_found_all(decode.decode(planted.first, planted.basis), planted)


@pytest.mark.parametrize("size", [40, 513])
def test_no_row_names_a_token_outside_the_vocabulary(size):
    """The last token of the vocabulary is in the batch; sizes below and above the blocks of the scan."""
    first = layer(False, 0.1, vocabulary=size)
    planted = plant(first=first, sentences=((size - 1, size - 2), (size - 1, 1, size - 1)) * 3)
    assert_found_all(decode.decode(planted.first, planted.basis), planted)


def test_decode_repeats_with_its_seed():
    planted = plant()
    once, again = (decode.decode(planted.first, planted.basis, seed=3) for _ in range(2))
    assert [row[:2] for row in once] == [row[:2] for row in again]
    for a, b in zip(once, again, strict=True):
        np.testing.assert_array_equal(a.values, b.values)


@pytest.mark.parametrize("late", LATE.values(), ids=LATE)
@pytest.mark.parametrize("wrong", ["words", "basis"])
def test_under_wrong_assumptions_nothing_is_decoded(wrong, late):
    planted = plant(late)
    first, basis = planted.first, planted.basis
    if wrong == "words":
        first = first._replace(words=on_device(layer(late, 0.1, seed=9)).words)
    else:
        basis = np.linalg.qr(np.random.default_rng(0).normal(size=basis.shape))[0]
    assert decode.decode(first, basis) == []


def test_a_rate_told_too_low_decodes_nothing():
    """More is dropped than the rate allows."""
    planted = plant(rate=0.3)
    assert decode.decode(planted.first._replace(rate=0.02), planted.basis) == []


def test_a_rate_told_too_high_decodes_no_wrong_row():
    """The rate only scales the rows, which a subspace cannot tell; the sentences' equations can."""
    planted = plant(rate=0.1)
    rows = decode.decode(planted.first._replace(rate=0.3), planted.basis)
    own = {(*pair, kept.tobytes()) for pair, kept in zip(planted.pairs, planted.kept, strict=True)}
    assert {(row.position, row.token, row.kept.tobytes()) for row in rows} <= own


def test_rows_that_are_not_in_the_vocabulary_do_not_hide_the_others():
    """A foreign direction in the space: every planted row is found, and no row explains the rest."""
    planted = plant()
    foreign = np.random.default_rng(5).normal(size=(WIDTH, 2))
    basis = np.linalg.qr(np.concatenate([planted.basis, foreign], axis=1))[0]
    assert_found_all(decode.decode(planted.first, basis), planted)


def test_accept_is_the_certificate_that_a_row_must_exceed():
    planted = plant()
    assert decode.decode(planted.first, planted.basis, accept=1.0) == []


def test_notify_counts_the_rows_found():
    planted, seen = plant(), []
    rows = decode.decode(planted.first, planted.basis, notify=lambda found, rank: seen.append((found, rank)))
    counts, ranks = zip(*seen, strict=True)
    assert list(counts) == sorted(counts)
    assert counts[-1] == len(rows)
    assert set(ranks) == {len(planted.pairs)}


@pytest.mark.parametrize("late", LATE.values(), ids=LATE)
def test_space_holds_the_scaled_rows(late):
    planted = plant(late)
    space, more = scaling.scaled_space(planted.first, planted.basis), 2 * late
    r = len(planted.pairs) + more
    assert space.basis.shape == (WIDTH, r)
    np.testing.assert_allclose(space.basis.T @ space.basis, np.eye(r), atol=1e-10)
    rows = planted.values * space.scale
    np.testing.assert_allclose(rows @ space.basis @ space.basis.T, rows, atol=1e-4)
    np.testing.assert_array_equal(space.inputs, planted.basis)
    assert space.padded.dtype == jnp.float32
    np.testing.assert_allclose(space.padded[:, :r], space.basis, atol=1e-6)
    assert not space.padded[:, r:].any()


@pytest.mark.parametrize("least", [8, 16])
def test_buckets_are_few_and_waste_at_most_half(least):
    sizes = range(1, 129)
    found = [scaling.bucket(size, least) for size in sizes]
    assert all(size <= width <= max(least, 1.5 * size) for size, width in zip(sizes, found, strict=True))
    assert set(found) <= {8, 12, 16, 24, 32, 48, 64, 96, 128}


def test_scan_ranks_the_tokens_of_each_position_first():
    planted = plant()
    space = scaling.scaled_space(planted.first, planted.basis)
    scale = jnp.asarray(space.scale, jnp.float32)
    score, tokens = decode.scan(
        planted.first, scale, space.padded, jnp.arange(3), None, iterations=5, best=8
    )  # fmt: skip
    assert score.shape == tokens.shape == (3, 8)
    assert (np.diff(score) <= 0).all()
    for position in range(3):
        own = {token for p, token in planted.pairs if p == position}
        assert own == set(np.asarray(tokens)[position, : len(own)].tolist())


# --- members ------------------------------------------------------------------------------------------------------


def decoded(planted):
    near = members.members(planted.first, planted.basis, [planted.gradient])
    return members.independent(near, planted.basis)


@pytest.mark.parametrize("late", LATE.values(), ids=LATE)
def test_members_are_the_rows_sorted_and_in_float64(late):
    planted = plant(late, rate=0.0)
    found = decoded(planted)
    assert [member[:2] for member in found] == planted.pairs
    host = layer(late, 0.0)
    for position, token, row, away, *_ in found:
        x = host.words[token].astype(np.float64) + host.places[position]
        np.testing.assert_allclose(row, plain_norm(x, host.later if late else host.norm), rtol=1e-6, atol=1e-9)
        outside = row - planted.basis @ (planted.basis.T @ row)
        np.testing.assert_allclose(away, np.linalg.norm(outside) / np.linalg.norm(row), rtol=1e-6)
        assert away < 1e-5


@pytest.mark.parametrize("late", LATE.values(), ids=LATE)
@pytest.mark.parametrize("seed", range(4))
def test_ghosts_are_told_from_members(seed, late):
    """(50, 1), (60, 1) and (50, 2) are there, so (60, 2) is nearly in the span: all but the norm adds up."""
    planted = plant(late, 0.0, ((2, 50, 50, 8), (2, 60, 9, 50), (2, 70, 70)), seed)
    found = decoded(planted)
    assert [member[:2] for member in found] == planted.pairs


@pytest.mark.parametrize("size", [40, 513])
def test_members_of_small_and_odd_vocabularies(size):
    first = layer(False, 0.0, vocabulary=size)
    planted = plant(False, 0.0, ((size - 1, size - 2, size - 1), (1, size - 1)), first=first)
    found = decoded(planted)
    assert [member[:2] for member in found] == planted.pairs


def test_other_spaces_have_no_members():
    planted = plant(rate=0.0)
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=planted.basis.shape))[0]
    assert members.members(planted.first, basis, [planted.gradient]) == []


def test_members_under_noise_are_those_that_noise_explains_row_by_row():
    """A row of small cotangents lets noise turn one direction by much: rows along the others are told all the same."""
    planted, rng = plant(rate=0.0), np.random.default_rng(4)
    sizes = np.where(np.arange(len(planted.values)) == 5, 2e-3, 1.0)[:, None]
    gradient = planted.values.T @ (sizes * rng.normal(size=(len(sizes), 3 * WIDTH)))
    noise = 2e-5 * np.abs(gradient).max() * np.ones_like(gradient)
    sent = gradient + noise * rng.normal(size=gradient.shape)
    space = subspace.spectrum([sent], rounded=noise)
    inside = [
        {m[:2] for m in members.members(planted.first, space.basis, [sent], bounds=bounds) if m.within(members.NEAR)}
        for bounds in (space.bounds, np.full(space.rank, space.noise))
    ]
    assert space.rank == len(planted.pairs)
    assert space.noise > 0.02
    assert set(planted.pairs) <= inside[0] < inside[1]


def test_members_notify_counts_up_to_the_rank():
    planted, seen = plant(rate=0.0), []
    members.members(
        planted.first, planted.basis, [planted.gradient], notify=lambda found, rank: seen.append((found, rank))
    )
    rank = len(planted.pairs)
    assert seen[0][0] < rank  # positions are added one by one
    assert seen[-1] == (rank, rank)
    assert all(found <= rank == told for found, told in seen)


def test_rows_are_irreplaceable_only_outside_of_dependencies_that_are_all_in_sight():
    """c = a + b close a dependency, d stands alone; where the rows do not span the space, none is safe."""
    a, b, d = np.random.default_rng(0).normal(size=(3, 3))
    found = members.irreplaceable(np.stack([a, b, a + b, d]))
    assert found.tolist() == [False, False, False, True]
    assert members.irreplaceable(np.stack([a, b, d])).all()
    assert not members.irreplaceable(np.stack([a, a + b])).any()
    assert not members.irreplaceable(np.stack([a, b, a + b])).any()


def test_inputs64_equals_numpy():
    host = layer(True, 0.0)
    found = members.inputs64(on_device(host), np.array([4, 8, 4]), np.array([0, 1, 2]))
    expected = plain_norm(host.words[[4, 8, 4]].astype(np.float64) + host.places[[0, 1, 2]], host.later)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)
    assert found.dtype == np.float64
