"""Last tokens under a next-token loss, from the head's gradient: tiny random GPT-2s, and the counting by hand."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from span_client import client, random_model, sentence
from test_span_attack import certified, sentences_of, solve

from grab_jax import defenses
from grab_jax.attacks import last_token
from grab_jax.span import targets

pytestmark = pytest.mark.usefixtures("quick_compilation")
DROPOUT = pytest.mark.parametrize("dropout", [True, False], ids=["dropout", "evaluation"])


def lm(sentences, frozen="none", **more):
    """A client that trains a next-token loss, the tied head with it."""
    return client("gpt2", sentences, task="causal_lm", frozen=frozen, **more)


def ends(result):
    return [one["last"] for one in result.evidence["sentences"]]


def drawn(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [sentence("gpt2", rng, n) for n in lengths]


# --- counting -----------------------------------------------------------------------------------------------------


def head_of(rng, wanted, vocabulary=30, width=12, mean=1.0):
    """A head's gradient by its definition, for targets `wanted`; with scale, shift and probabilities."""
    scale, shift = rng.uniform(0.5, 2, width), rng.normal(mean, 0.3, width)
    normal = rng.normal(size=(len(wanted), width))
    hidden = (normal - normal.mean(1, keepdims=True)) * scale + shift
    probabilities = rng.dirichlet(np.full(vocabulary, 0.3), len(wanted))
    return (probabilities - np.eye(vocabulary)[wanted]).T @ hidden / len(wanted), scale, shift, probabilities


def test_the_balance_is_targets_less_probabilities():
    rng = np.random.default_rng(0)
    wanted = [3, 3, 7, 9, 3, 12, 7]
    head, scale, shift, probabilities = head_of(rng, wanted)
    found = targets.balance(head, scale, shift, len(wanted))
    count = np.bincount(wanted, minlength=30)
    np.testing.assert_allclose(found.values, count - probabilities.sum(0), atol=1e-12)
    assert (targets.at_least(found) <= count).all()
    assert targets.at_least(found)[3] >= 2


def test_a_norm_without_shift_tells_no_balance():
    head, scale, shift, _ = head_of(np.random.default_rng(0), [1, 2, 3])
    assert not targets.at_least(targets.balance(head, scale, 0 * shift, 3)).any()


# --- one sentence -------------------------------------------------------------------------------------------------


@DROPOUT
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))])
def test_the_last_token_of_one_sentence_is_proven(dropout, seed):
    sentences = drawn([7], seed)
    (result,) = solve(lm(sentences, dropout=dropout, seed=seed).problem)
    assert sentences_of(result) == certified(result) == sentences
    assert ends(result) == ["proven"]
    assert "1 proven" in " ".join(result.notes)


@DROPOUT
def test_a_last_token_that_is_an_input_too_is_proven(dropout):
    """The word's row of the gradient holds what the input receives, which is told from the target's part."""
    own = [(20, 30, 40, 50, 30)]
    (result,) = solve(lm(own, dropout=dropout).problem)
    assert certified(result) == own
    assert ends(result) == ["proven"]


@DROPOUT
def test_a_repeated_token_ends_a_sentence(dropout):
    own = [(20, 30, 30, 30, 30)]
    (result,) = solve(lm(own, dropout=dropout).problem)
    assert sentences_of(result) == own


# --- several sentences --------------------------------------------------------------------------------------------


def test_without_dropout_every_last_token_is_proven():
    """They differ, and some are inputs of other sentences at a position where words differ."""
    own = [(20, 30, 40, 50), (60, 70, 20), (80, 90, 30, 70, 60)]
    (result,) = solve(lm(own, dropout=False).problem)
    assert sorted(certified(result)) == sorted(own)
    assert ends(result) == ["proven"] * 3


def test_with_dropout_one_token_that_ends_all_sentences_is_proven():
    own = [(20, 30, 40, 50), (60, 70, 41, 50), (80, 90, 31, 71, 61, 50)]
    (result,) = solve(lm(own).problem)
    assert sorted(certified(result)) == sorted(own)
    assert ends(result) == ["proven"] * 3


def test_with_dropout_different_last_tokens_are_told_but_not_of_which_sentence():
    own = [(20, 30, 40, 50), (60, 70, 41, 55), (80, 90, 31, 71, 61, 57)]
    (result,) = solve(lm(own).problem)
    assert sorted(certified(result)) == sorted(s[:-1] for s in own)
    assert ends(result) == ["unknown"] * 3
    assert any("ids 50, 55, 57" in note for note in result.notes)


def test_identical_sentences_without_dropout_are_one_with_its_last_token():
    own = [(20, 30, 40, 50)] * 3
    (result,) = solve(lm(own, dropout=False).problem)
    assert certified(result) == own[:1]
    assert ends(result) == ["proven"]


def test_sentences_that_differ_in_their_last_token_only_are_not_completed_without_dropout():
    """They are one sentence of rows, which has no single last token."""
    own = [(20, 30, 40, 50), (20, 30, 40, 60)]
    (result,) = solve(lm(own, dropout=False).problem)
    assert certified(result) == [own[0][:-1]]
    assert ends(result) == ["unknown"]


@DROPOUT
def test_sentences_of_one_and_two_tokens(dropout):
    """One token is no prediction: the update holds nothing of it. Of two there is one row, without an equation.

    Without dropout that row is put into no sentence, so that the batch is not complete.
    """
    own = [(77,), (20, 50), (60, 70, 41, 50)]
    (result,) = solve(lm(own, dropout=dropout).problem)
    assert certified(result) == [own[2] if dropout else own[2][:-1]]
    assert Counter((row["position"], row["token"]) for row in result.evidence["rows"]) == Counter(
        pair for s in own for pair in enumerate(s[:-1])
    )
    if dropout:
        assert sorted(sentences_of(result)) == sorted(own[1:])
    else:
        assert ends(result) == ["unknown"]


# --- what is not proven -------------------------------------------------------------------------------------------


@DROPOUT
def test_a_frozen_head_tells_no_last_token(dropout):
    own = drawn([6])
    (result,) = solve(lm(own, frozen="embeddings", dropout=dropout).problem)
    assert certified(result) == [own[0][:-1]]
    assert ends(result) == ["unknown"]
    assert "no gradient" in result.notes[-1]


def changed_head(problem, change):
    path = problem.model.word_table
    return problem._replace(observed={**problem.observed, path: change(problem.observed[path])})


CHANGES = {
    "other client": lambda g: lm(drawn([7], 9)).problem.observed["transformer/wte/embedding"],
    "zero": lambda g: 0 * g,
    "negative": lambda g: -g,
    "noise": lambda g: g + 0.05 * jnp.abs(g).max() * jnp.sin(1e5 * g + jnp.arange(g.shape[1])[None]),
    "shuffled": lambda g: jnp.roll(g, 7, axis=0),
}


@DROPOUT
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("lengths", [(7,), (4, 6, 5)])
def test_a_head_gradient_of_something_else_proves_no_wrong_last_token(change, lengths, dropout):
    own = drawn(lengths)
    (result,) = solve(changed_head(lm(own, dropout=dropout).problem, CHANGES[change]))
    for found, end in zip(sentences_of(result), ends(result), strict=True):
        assert end != "proven" or found in own


@pytest.mark.parametrize("defense", [defenses.wire("bfloat16"), defenses.noise(1e-5), defenses.prune(0.3)])
def test_a_defended_head_proves_no_wrong_last_token(defense):
    own = drawn([7])
    problem = lm(own).problem
    (result,) = solve(problem._replace(observed=defense(jax.random.key(0), dict(problem.observed))))
    assert ends(result) in ([], ["unknown"])


@DROPOUT
@pytest.mark.long
def test_no_wrong_last_token_is_proven_in_random_batches(dropout):
    """Of few words, so that last tokens are inputs and targets elsewhere."""
    told = Counter()
    for seed in range(6):
        rng = np.random.default_rng(seed)
        own = [tuple(rng.integers(20, 26, n).tolist()) for n in rng.integers(3, 6, 2)]
        (result,) = solve(lm(own, dropout=dropout, seed=seed).problem)
        told.update(ends(result))
        assert all(e != "proven" or s in own for s, e in zip(sentences_of(result), ends(result), strict=True))
    assert dropout or told["proven"] >= 8


def test_a_head_is_shared_where_the_word_table_is_trained():
    own = drawn([4])
    assert last_token.shared(lm(own).problem)
    assert not last_token.shared(lm(own, frozen="embeddings").problem)
    assert not last_token.shared(client("gpt2", own, frozen="none").problem)


def test_the_tied_head_sees_what_the_logits_are_made_of():
    """`passes` against the model's own logits, and its gradient against the word table's, less the head's part."""
    model, params = random_model("gpt2", task="causal_lm")
    ids, real = jnp.asarray([[20, 30, 40, 50]]), jnp.ones((1, 4), bool)
    found = last_token.tied_head.passes(model, params, ids, real, real[:, 1:], None)
    logits = model.apply(params, ids, real)
    np.testing.assert_allclose(found.hidden @ params["transformer"]["wte"]["embedding"].T, logits, atol=1e-5)
    np.testing.assert_allclose(jnp.exp(found.log_probabilities).sum(-1), 1.0, atol=1e-5)
    problem = lm([(20, 30, 40, 50)], dropout=False).problem
    places = problem.observed["transformer/wpe/embedding"][:4]
    np.testing.assert_allclose(found.words[0] / 3, places, atol=1e-6)
