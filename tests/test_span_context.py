"""Sentences found and proven by what a layer computes from all of a sentence."""

import jax.numpy as jnp
import numpy as np
import pytest

from grab_jax.span import context

WIDTH, CLS, SEP = 48, 0, 1
WHOLE = 1e-4
_rng = np.random.default_rng(0)
OWN, OTHERS = (jnp.asarray(_rng.normal(size=(40, WIDTH)), jnp.float32) for _ in range(2))
PLACES = jnp.asarray(_rng.normal(size=(16, WIDTH)), jnp.float32)
SENTENCES = ((CLS, 5, 6, 7, SEP), (CLS, 7, 5, 9, SEP), (CLS, 8, 30, 6, 11, 5, SEP))


def mixed(ids, real):
    """A layer's inputs: each token with its place, and a little of every other token of the sentence."""
    weight = jnp.asarray(real, jnp.float32)[..., None]
    around = (OTHERS[ids] * weight).sum(1, keepdims=True) / weight.sum(1, keepdims=True)
    return jnp.tanh(OWN[ids] + PLACES[None, : ids.shape[1]] + around)


def layer(*sentences):
    rows = [np.asarray(mixed(np.array([s]), np.ones((1, len(s)))))[0] for s in sentences]
    return context.Second(mixed, np.linalg.qr(np.concatenate(rows).astype(np.float64).T)[0])


def choices(*sentences, without=()):
    found = {}
    for sentence in sentences:
        for position, token in enumerate(sentence):
            if (position, token) not in without and token not in found.setdefault(position, []):
                found[position].append(token)
    return found


def searched(**settings):
    return context.Search(layer(*SENTENCES), cls=CLS, sep=SEP, whole=WHOLE, **settings)


@pytest.mark.parametrize("sentence", SENTENCES)
def test_residuals_are_rounding_for_a_sentence_and_large_with_one_token_wrong(sentence):
    second = layer(*SENTENCES)
    assert second.residuals(np.array([sentence])).max() < 1e-5
    for position in range(1, len(sentence) - 1):
        wrong = np.array([sentence])
        wrong[0, position] = 20
        assert second.residuals(wrong).max() > 1e-2


def test_residuals_do_not_depend_on_the_company():
    second = layer(*SENTENCES)
    many = np.random.default_rng(1).integers(0, 40, (context.MOST + 7, 6))
    alone = np.concatenate([second.residuals(row[None]) for row in many])
    np.testing.assert_allclose(second.residuals(many), alone, atol=1e-5)


def test_all_sentences_are_found():
    seen = []
    search = searched(notify=lambda *counts: seen.append(counts))
    assert search.draw(choices(*SENTENCES)) == len(SENTENCES)
    assert set(search.found) == set(SENTENCES)
    assert all(seen.residual < 1e-5 and seen.limit == WHOLE for seen in search.found.values())
    assert search.complete
    total = sum(map(len, SENTENCES))
    assert seen
    assert all(found <= total == told for found, told in seen)


def test_a_known_sentence_is_not_reached_again():
    search = searched()
    assert search.check(SENTENCES[0]) < 1e-5
    assert search.check((CLS, 5, 6, 20, SEP)) > 1e-2
    assert list(search.found) == [SENTENCES[0]]
    assert search.draw(choices(*SENTENCES[:2])) == 1
    assert SENTENCES[0] not in map(tuple, search.reached[5].tolist())


def test_the_ends_are_not_sought_inside():
    search = searched()
    search.draw(choices(*SENTENCES, (CLS, CLS, SEP, SEP, SEP)))
    reached = np.concatenate([rows[:, 1:-1].ravel() for rows in search.reached.values()])
    assert not set(reached.tolist()) & {CLS, SEP}


def test_whole_is_the_residual_that_a_sentence_stays_below():
    search = context.Search(layer(*SENTENCES), cls=CLS, sep=SEP, whole=1e-9)
    assert search.draw(choices(*SENTENCES)) == 0
    assert search.found == {}


def blurred(second, noise):
    """The layer with a basis that noise turned, as is told."""
    moved = second.basis + noise / np.sqrt(WIDTH) * np.random.default_rng(2).normal(size=second.basis.shape)
    return second._replace(basis=np.linalg.qr(moved)[0], bounds=np.full(moved.shape[1], noise))


@pytest.mark.parametrize(("noise", "found"), [(1e-3, True), (1e-2, True), (0.1, False)])
def test_noise_widens_the_limits_of_a_sentence_until_it_tells_nothing(noise, found):
    search = context.Search(blurred(layer(*SENTENCES), noise), cls=CLS, sep=SEP, whole=WHOLE)
    away = search.check(SENTENCES[0])
    assert WHOLE < away < context.ROOM * noise
    assert search.check((CLS, 5, 6, 20, SEP)) > context.OUTSIDE
    assert list(search.found) == ([SENTENCES[0]] if found else [])
    if found:
        assert away <= search.found[SENTENCES[0]].limit <= context.OUTSIDE


@pytest.mark.parametrize(("noise", "distinct"), [(0, True), (1e-4, True), (1e-2, False)])
def test_a_sentence_is_distinct_while_noise_hides_no_other_one(noise, distinct):
    """Token 21 is almost token 20; all others are far from each other."""
    table = OWN.at[21].set(OWN[20] + 0.05 * OWN[22])
    sentence, other = (CLS, 5, 20, 7, SEP), (CLS, 5, 21, 7, SEP)
    near = lambda ids, real: mixed(jnp.where(ids == 21, 20, ids), real) + 0.5 * jnp.tanh(table[ids])  # noqa: E731
    inputs = np.asarray(near(np.array([sentence]), np.ones((1, 5))))[0].astype(np.float64)
    second = blurred(context.Second(near, np.linalg.qr(inputs.T)[0]), noise)
    search = context.Search(second, cls=CLS, sep=SEP, whole=WHOLE)
    assert search.check(sentence) < max(WHOLE, context.ROOM * noise)
    assert search.distinct(sentence, choices(sentence, (CLS, 9, 30, 11, SEP)))
    assert search.distinct(sentence, choices(sentence, other)) == distinct


def test_nothing_is_tried_once_all_tokens_are_found_or_the_budget_is_used():
    calls = []
    second = layer(*SENTENCES)
    counted = second._replace(inputs=lambda *args: calls.append(1) or mixed(*args))
    for budget, known in ((context.BUDGET, SENTENCES), (0, ())):
        search = context.Search(counted, cls=CLS, sep=SEP, whole=WHOLE, budget=budget)
        for sentence in known:
            search.check(sentence)
        assert search.complete == bool(known)
        assert search.spent != bool(known)
        calls.clear()
        assert search.draw(choices(*SENTENCES)) == search.widen(choices(*SENTENCES)) == 0
        assert not calls


def test_a_wider_choice_brings_what_a_narrow_one_lacks():
    search = searched()
    assert search.draw(choices(*SENTENCES, without={(2, 30)})) == 2
    assert not search.complete
    assert search.widen(choices(*SENTENCES)) == 1
    assert set(search.found) == set(SENTENCES)


def test_nothing_is_found_in_the_span_of_others():
    search = context.Search(layer((CLS, 12, 13, 14, 15, SEP)), cls=CLS, sep=SEP, whole=WHOLE)
    assert search.draw(choices(*SENTENCES)) == search.widen(choices(*SENTENCES)) == 0
    assert search.found == {}
