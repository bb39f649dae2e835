"""DLG, TAG and LAMP on a one-layer random model: recovery, moves of words, the prior that judges them, resuming."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import golden as goldens
from test_grab import BERT, CLS, EASY, GPT2, PAD, SEP, accuracy, keys, made, one_layer, same

from grab_jax import matching, models
from grab_jax.attack_config import AttackConfig
from grab_jax.attacks import ATTACKS, lamp, prior, programs
from grab_jax.config import KnownConfig
from grab_jax.search import descent
from grab_jax.types import Candidate, InputError, Known

pytestmark = pytest.mark.usefixtures("quick_compilation")
FOLDER = str(goldens.HERE / "gpt2-causal_lm")
LAMP = AttackConfig(
    name="lamp", steps=300, candidates=50, permutations=50, moves=30, chunk=32, prior=FOLDER, prior_weight=0.05
)
RECIPES = {
    "dlg": AttackConfig(name="dlg", steps=500),
    "tag": AttackConfig(name="tag", steps=500, l1=0.001),
    "lamp": LAMP,
}


@pytest.fixture(scope="module")
def bert():
    return one_layer("bert", num_hidden_layers=1)


def solve(config, *truths, **kwargs):
    problems = [truth.problem for truth in truths]
    return ATTACKS[config.name].attack(keys(*range(7, 7 + len(truths))), problems, config, **kwargs)


@pytest.fixture(scope="module")
def plain(bert):
    """A client without dropout that trains everything."""
    return made(bert, EASY[1], dropout=0.0, frozen="none")


@pytest.fixture(scope="module")
def moved(plain):
    """LAMP with a prior: its result and resumable states."""
    states = []
    (result,) = solve(LAMP, plain, on_segment=lambda state, _: state is None or states.append(state))
    return result, states


def falls(result):
    losses = [point["loss"] for point in result.trace if point["phase"] == "continuous"]
    return losses[-1] / losses[0]


@pytest.mark.parametrize("name", ["dlg", "tag"])
def test_plain_matching_finds_the_words(name, plain):
    """If not their order, which descent on embeddings alone often misses."""
    (result,) = solve(RECIPES[name], plain)
    assert falls(result) < 0.05
    assert len(set(EASY[1][0]) & set(result.ids.ravel().tolist())) >= 2
    assert result.masks is None


def test_lamp_recovers_a_sentence(plain, moved):
    result, states = moved
    assert falls(result) < 0.1
    assert accuracy(result, plain) == 1
    assert {int(state.step) for state in states} >= {75, 150, 225}


def test_a_resumed_lamp_is_bit_identical(plain, moved):
    result, states = moved
    saved = states[1:5:2]
    assert len(saved) == 2
    for state in saved:
        same(solve(LAMP, plain, state=jax.tree.map(np.array, state))[0], result)


def test_special_tokens_are_found_only_where_lengths_are_not_told(plain):
    problem = plain.problem
    words = programs.allowed(problem, LAMP)
    assert set(np.nonzero(~words)[0]) == set(BERT.special)
    unknown = programs.allowed(problem._replace(lengths=False), LAMP)
    assert set(np.nonzero(~unknown)[0]) == BERT.special - {PAD, SEP}
    assert programs.allowed(problem, replace(LAMP, vocabulary="all")).all()


def test_words_move_every_so_many_steps_after_the_first_tenth():
    config = replace(LAMP, steps=400, moves_every=25)
    assert [step for step in range(401) if lamp.due(config, step)] == list(range(50, 400, 25))
    assert not any(lamp.due(replace(config, moves=0), step) for step in range(401))
    assert [lamp.following(config, step) for step in (0, 24, 25)] == [25, 25, 50]


# --- moves ------------------------------------------------------------------------------------------------


def scrambled(free, seed=0):
    """Two rows whose true order is that of their tokens, scrambled at the free positions."""
    table = np.random.default_rng(seed).normal(size=(20, 6)).astype(np.float32)
    order = np.tile(np.arange(5, 13), (2, 1))
    ids = order.copy()
    for row, here in zip(ids, free, strict=True):
        row[here] = np.random.default_rng(seed + 1).permutation(row[here])
    known = Known(jnp.ones((2, 8), bool), jnp.full((2, 8), -1), jnp.zeros((2, 8), bool), jnp.asarray(free), None, None)
    return table, order, ids, known


@pytest.mark.parametrize("seed", range(3))
def test_a_discrete_step_lowers_what_it_judges_by_and_moves_free_positions_only(seed):
    """Judged by tokens out of place: never worse, and after a few steps in order."""
    free = np.array([[0, 1, 1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 0, 0, 0]], bool)
    table, order, ids, known = scrambled(free, seed)

    def rate(candidate, tokens, params, context):
        apart = jnp.abs(candidate.embeds - jnp.asarray(table)[tokens]).sum()  # tokens and embeddings move together
        return (tokens != order).sum() + params * apart

    move = lamp.mover(rate, replace(LAMP, moves=40), 16)
    given = jnp.asarray(table), jnp.ones(20, bool), jnp.float32(9.0), (known,)
    step = jax.jit(lambda key, state: move(key, state, *given))
    state = descent.State(Candidate(jnp.asarray(table[ids]), None, None), ())
    wrong = [(ids != order).sum()]
    for key in jax.random.split(jax.random.key(seed), 6):
        state = step(key, state)
        found = np.abs(np.asarray(state.candidate.embeds)[:, :, None] - table).sum(-1).argmin(-1)
        np.testing.assert_array_equal(np.sort(found), np.sort(ids))
        np.testing.assert_array_equal(found[~free], ids[~free])
        wrong.append((found != order).sum())
    assert wrong == sorted(wrong, reverse=True)
    assert wrong[1] < wrong[0]
    assert wrong[-1] == 0


def test_the_rating_is_matching_and_prior_loss_weighted():
    model = goldens.config("gpt2")
    judge = models.build(model, "causal_lm")
    params = jax.jit(judge.init)(jax.random.key(0))
    ids = jnp.array([[CLS, 7, 8, SEP, PAD]])
    candidate = Candidate(jnp.ones((1, 5, 2)), None, None)
    objective = lambda candidate, factor: factor * candidate.embeds.sum()  # noqa: E731
    both = lamp.rating(objective, replace(LAMP, prior_weight=0.7), judge, BERT)
    loss = jax.jit(lambda ids: prior.loss(judge, params, ids, BERT))(ids)
    alone = lamp.rating(objective, LAMP, None, BERT)(candidate, ids, None, (2.0,))
    assert alone == 20.0
    whole = jax.jit(lambda candidate, ids: both(candidate, ids, params, (2.0,)))(candidate, ids)
    np.testing.assert_allclose(whole - alone, 0.7 * loss, rtol=1e-4)


def test_the_penalty_is_on_the_mean_norm_of_visible_embeddings(plain):
    problem = plain.problem
    plain_objective = lambda *_: jnp.float32(3.0)  # noqa: E731
    penalised = matching.with_norm_penalty(problem.model, plain_objective, 25.0)
    embeds = np.random.default_rng(0).normal(size=(1, 8, 32)).astype(np.float32)
    table = np.asarray(problem.trainable[problem.model.word_table])
    shown = np.asarray(problem.known.attention)
    gap = np.linalg.norm(embeds, axis=-1)[shown].mean() - np.linalg.norm(table, axis=-1).mean()
    context = problem.trainable, problem.frozen, None, problem.known
    value = penalised(Candidate(jnp.asarray(embeds), None, None), *context)
    np.testing.assert_allclose(value, 3 + 25 * gap**2, rtol=1e-4)
    assert matching.with_norm_penalty(problem.model, plain_objective, 0.0) is plain_objective


# --- the prior --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [BERT, GPT2], ids=["wrapped", "bare"])
def test_the_priors_loss_is_the_mean_over_tokens_that_have_a_word_before_them(vocabulary):
    """By hand from the logits; without [CLS] the start token of the model (59) goes first."""
    judge = prior.load(FOLDER, 60, 6)
    rows = np.array([[CLS, 7, 8, 9, SEP, 0], [CLS, 11, SEP, 0, 0, 0]])
    if vocabulary is GPT2:
        rows = np.array([[7, 8, 9, 59, 59, 59], [11, 12, 59, 59, 59, 59]])
    real = rows != vocabulary.pad
    if vocabulary is GPT2:
        rows, real = np.insert(rows, 0, 59, axis=1), np.insert(real, 0, True, axis=1)
    logits = jax.jit(judge.model.apply)(judge.params, jnp.asarray(rows), jnp.asarray(real))
    logits = np.asarray(logits, np.float64)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = [logs[r, t - 1, rows[r, t]] for r, t in np.argwhere(real) if t > 0]
    given = rows[:, 1:] if vocabulary is GPT2 else rows
    found = jax.jit(lambda ids: prior.loss(judge.model, judge.params, ids, vocabulary))(jnp.asarray(given, jnp.int32))
    np.testing.assert_allclose(found, -np.mean(picked), rtol=1e-4)


def test_priors_that_do_not_fit_are_refused_in_a_sentence(tmp_path):
    assert prior.load("none", 60, 6) is None
    for name, words, length, part in (
        (FOLDER, 61, 6, "60 tokens, not 61"),
        (FOLDER, 60, 24, "at most 23 tokens"),
        (str(goldens.HERE / "bert-classification"), 60, 6, "no causal language model"),
        (str(tmp_path / "none"), 60, 6, "does not exist"),
    ):
        with pytest.raises(InputError, match=part) as caught:
            prior.load(name, words, length)
        assert f"--attack_prior={name}" in str(caught.value)
        assert "\n" not in str(caught.value)


# --- dropout on -------------------------------------------------------------------------------------------


def test_dropout_is_ignored_by_default(bert):
    truth = made(bert, EASY[1], dropout=0.1, frozen="none")
    (result,) = solve(LAMP, truth)
    assert falls(result) < 0.8
    assert result.masks is None


@pytest.mark.long
def test_masks_and_labels_are_learned_where_asked(bert):
    truth = made(bert, EASY[0], dropout=0.1, known=KnownConfig(labels=False))
    config = AttackConfig(name="lamp", steps=60, candidates=4, permutations=4, moves=8, chunk=8, masks="learn")
    (result,) = solve(config, truth)
    assert falls(result) < 1
    assert np.isfinite(result.loss)
    assert result.labels.shape == (1,)
    assert set(result.masks) == set(truth.problem.model.sites)
