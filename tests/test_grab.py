"""The Grab attack end to end on a one-layer random model: recovery, controls, resuming, grouping, and what it refuses.

Compilation is most of the time here: problems share shapes, and settings that only the host reads share programs.
"""

import re
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import golden as goldens

from grab_jax import client, distances, matching, models, simulate, tuning
from grab_jax.attack_config import AttackConfig
from grab_jax.attacks import discrete, grab, programs
from grab_jax.attacks import state as attack_state
from grab_jax.config import ClientConfig, Config, KnownConfig
from grab_jax.data import ClientBatch, Sentence
from grab_jax.types import Batch, Result, Vocabulary

PAD, CLS, SEP = 0, 1, 2
BERT = Vocabulary(PAD, CLS, SEP, frozenset({PAD, CLS, SEP, 3, 4}))
GPT2 = Vocabulary(59, None, None, frozenset({59}))
FAST = AttackConfig(rounds=2, steps=400, candidates=100, permutations=100, beam=4, sweeps=3, chunk=16)
EASY = (((10, 20, 30),), ((33, 22, 11),), ((51, 8, 17),))
HARD = ((10, 20, 30, 40, 12),)
TWO = ((10, 20, 30, 40), (15, 25))
HOST_ONLY = {
    "rounds": 1, "restarts": 1, "beam": 1, "sweeps": 1, "tokens": "search", "masks": "learn", "mask_start": 0.0,
    "score_masks": "learned",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def share_programs():
    """One set of quickly compiled programs for all settings that differ only in what the host reads."""
    compiled = programs.compiled
    jax.config.update("jax_disable_most_optimizations", True)
    programs.compiled = lambda model, config, *rest: compiled(model, replace(config, **HOST_ONLY), *rest)
    yield
    programs.compiled = compiled
    jax.config.update("jax_disable_most_optimizations", False)


def one_layer(family, **size):
    model = models.build(goldens.config(family, **size))
    flat = tuning.flatten(models.load(str(goldens.HERE / f"{family}-classification")).params)
    return model, tuning.unflatten({p: v for p, v in flat.items() if not re.search("(layer|h)_1/", p)})


@pytest.fixture(scope="module")
def bert():
    return one_layer("bert", num_hidden_layers=1)


def made(loaded, sentences, *, dropout, vocabulary=BERT, seed=0, known=None, frozen="embeddings", **attack):
    """A simulated client batch of 8-token rows and the attacker's problem."""
    model, params = loaded
    ids = np.full((len(sentences), 8), vocabulary.pad, np.int32)
    for row, words in zip(ids, sentences, strict=True):
        whole = words if vocabulary.cls is None else (vocabulary.cls, *words, vocabulary.sep)
        row[: len(whole)] = whole
    labels = jnp.arange(len(sentences)) % 3
    batch = Batch(jnp.asarray(ids), jnp.asarray(ids != vocabulary.pad), labels)
    texts = tuple(Sentence("", 0, row) for row in range(len(sentences)))
    settings = {"known": known or KnownConfig(), "attack": replace(FAST, **attack)}
    config = Config(client=ClientConfig(dropout=dropout, frozen=frozen), **settings)
    parts = tuning.split(params, tuning.freezes(model, frozen))
    return simulate.simulate(
        jax.random.key(seed), model, *parts, ClientBatch(0, texts, (), (), batch), vocabulary, config
    )


def keys(*seeds):
    return jax.vmap(jax.random.key)(jnp.array(seeds))


def solve(*truths, config=FAST, seeds=(7, 8), **kwargs):
    problems = [truth.problem for truth in truths]
    return grab.attack(keys(*seeds[: len(truths)]), problems, config, **kwargs)


def accuracy(result, truth):
    free = np.asarray(truth.problem.known.free)
    return (np.asarray(result.ids) == np.asarray(truth.batch.batch.ids))[free].mean()


def stages(result, phase):
    return [point["loss"] for point in result.trace if point["phase"] == phase]


@pytest.fixture(scope="module")
def plain(bert):
    """Clients without dropout that train everything."""
    return [made(bert, sentences, dropout=0.0, frozen="none") for sentences in EASY]


@pytest.fixture(scope="module")
def group(plain):
    """The first two attacked together: results and resumable states."""
    states = []
    keep = lambda state, _: state is None or states.append(state)  # noqa: E731
    return solve(*plain[:2], config=replace(FAST, rounds=5), on_segment=keep), states


@pytest.fixture(scope="module")
def dropped(bert):
    """A client with dropout, whose masks the attacker must learn."""
    return made(bert, HARD, dropout=0.1)


class Learnt(NamedTuple):
    """An attack with mask learning that ran all its rounds, and what could be seen of it."""

    seed: int
    result: Result
    states: list[attack_state.State]
    seen: list[attack_state.Progress]
    pools: list[np.ndarray]
    traces: int


@pytest.fixture(scope="module")
def learnt(dropped):
    run = programs.compiled(dropped.problem.model, FAST, BERT, programs.mesh_for(1), None, None).run
    before, search = run._cache_size(), discrete.beam.search
    for seed in range(20):  # the first that does not stop early: what follows needs both rounds
        states, seen, pools = [], [], []
        keep = lambda state, info: (seen.append(info), state is None or states.append(state))  # noqa: B023, E731
        with pytest.MonkeyPatch.context() as patch:
            spy = lambda *args, **kwargs: (pools.extend(args[3]), search(*args, **kwargs))[1]  # noqa: B023, E731
            patch.setattr(discrete.beam, "search", spy)
            (result,) = solve(dropped, seeds=(seed,), on_segment=keep)
        if not result.notes:
            return Learnt(seed, result, states, seen, pools, run._cache_size() - before)
    raise AssertionError("every seed stopped early")


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, (a.ids, a.loss, a.masks, a.labels), (b.ids, b.loss, b.masks, b.labels))
    np.testing.assert_array_equal(a.confidence, b.confidence)
    assert a.trace == b.trace
    assert a.notes == b.notes


def test_without_dropout_every_token_is_recovered_and_the_attack_stops_early(plain, group):
    for result, truth in zip(group[0], plain, strict=False):
        assert accuracy(result, truth) == 1
        assert result.masks is None
        assert result.labels is None
        assert len(result.notes) == 1
        assert "early" in result.notes[0]
        assert result.trace[-1]["round"] < 4
        losses = stages(result, "continuous")
        assert losses[-1] < 0.1 * losses[0]
        assert result.loss < 1e-2
        free = np.asarray(truth.problem.known.free)
        assert (np.asarray(result.confidence)[free] > 0.5).all()


@pytest.mark.long
def test_the_control_with_the_true_masks_recovers_a_batch_of_two(bert):
    truth = made(bert, ((10, 20, 30), (15, 25)), dropout=0.1, masks="true", frozen="none")
    assert truth.problem.known.masks is not None
    (result,) = solve(truth, config=replace(FAST, rounds=1, masks="true"))
    assert accuracy(result, truth) >= 0.6
    assert result.masks is None


def test_masks_are_learnt_within_bounds_and_the_loss_falls(dropped, learnt):
    result = learnt.result
    sites = dropped.problem.model.sites
    assert {name: mask.shape for name, mask in result.masks.items()} == {n: (1, *s.shape(8)) for n, s in sites.items()}
    values = np.concatenate([np.ravel(mask) for mask in result.masks.values()])
    assert ((values >= 0) & (values <= 1)).all()
    assert ((values > 0.01) & (values < 0.99)).mean() > 0.1  # they have moved away from the 0/1 draw
    tokens, discrete = stages(result, "tokens"), stages(result, "discrete")
    assert len(tokens) == len(discrete) == 2
    assert all(after <= before for before, after in zip(tokens, discrete, strict=True))
    assert discrete[1] < tokens[0]
    for r, factor in ((0, 0.3), (1, 1.0)):
        losses = [p["loss"] for p in result.trace if p["round"] == r and p["phase"] == "continuous"]
        assert losses[-1] < factor * losses[0]


def test_the_loss_is_that_of_the_returned_tokens_under_the_returned_masks(dropped, learnt):
    problem, result = dropped.problem, learnt.result
    update = jax.jit(client.fedsgd(problem.model))(
        problem.trainable, problem.frozen, jnp.asarray(result.ids), problem.known.attention, problem.known.labels,
        dict(result.masks),
    )  # fmt: skip
    gaps = [np.asarray(update[path], np.float64) - np.asarray(problem.observed[path], np.float64) for path in update]
    expected = sum(np.sqrt((gap**2).sum()) + 0.01 * np.abs(gap).sum() for gap in gaps)
    np.testing.assert_allclose(result.loss, expected, rtol=1e-3)
    assert result.loss == min(stages(result, "tokens")[-1], stages(result, "discrete")[-1])


@pytest.mark.long
def test_tokens_may_be_scored_without_masks(dropped):
    """The loss is then that of the returned tokens in evaluation mode, and differs from that under the masks."""
    (result,) = solve(dropped, config=replace(FAST, rounds=1, score_masks="off"))
    problem = dropped.problem
    score = matching.token_objective(problem.model, distances.by_name("l2+l1"), PAD)
    rest = (problem.trainable, problem.frozen, problem.observed, problem.known)
    assert result.loss == pytest.approx(float(score(jnp.asarray(result.ids), None, None, *rest)), rel=1e-4)
    assert result.loss != pytest.approx(float(score(jnp.asarray(result.ids), result.masks, None, *rest)), rel=1e-2)


def test_pinned_positions_hold_their_tokens_and_pools_no_special_ones(dropped, learnt):
    known = dropped.problem.known
    np.testing.assert_array_equal(np.asarray(known.pinned)[0], [1, 0, 0, 0, 0, 0, 1, 1])
    np.testing.assert_array_equal(learnt.result.ids[0, [0, 6, 7]], [CLS, SEP, PAD])
    embeds = np.asarray(learnt.states[-1].solution.embeds)[0, 0]
    table = np.asarray(dropped.problem.frozen[dropped.problem.model.word_table])
    np.testing.assert_array_equal(embeds[[0, 6, 7]], table[[CLS, SEP, PAD]])
    assert len(learnt.pools) == 2
    assert all(len(pool) and not set(pool.tolist()) & BERT.special for pool in learnt.pools)
    assert set(learnt.pools[0]) <= set(learnt.pools[1])  # accumulated over rounds


def test_an_attack_resumed_from_any_saved_state_is_bit_identical(dropped, learnt):
    last = {(int(s.round), attack_state.PHASES[int(s.phase)]): s for s in learnt.states}
    assert list(last) == [
        (0, "continuous"), (0, "discrete"), (1, "select"), (1, "continuous"), (1, "discrete"), (2, "select"),
    ]  # fmt: skip
    assert last[1, "continuous"].step == 350
    for state in (learnt.states[0], *last.values()):
        saved = jax.tree.map(np.array, state)  # what a checkpoint gives back
        same(solve(dropped, seeds=(learnt.seed,), state=saved)[0], learnt.result)


def test_start_has_the_structure_of_every_state(dropped, learnt):
    template = grab.start(keys(7), [dropped.problem], FAST)
    shapes = lambda state: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)  # noqa: E731
    assert all(shapes(state) == shapes(template) for state in learnt.states)


def test_progress_names_round_phase_and_step(learnt):
    seen = [(p.round, p.phase, p.step, p.steps) for p in learnt.seen if not p.scored]
    stops = range(50, 401, 50)
    assert [s for s in seen if s[1] == "continuous"] == [(r, "continuous", i, 400) for r in (0, 1) for i in stops]
    assert (1, "discrete", 1, 1) in seen
    assert max(p.scored for p in learnt.seen) > 20  # the starts at least
    assert all(p.ids.shape == (1, 1, 8) for p in learnt.seen if p.ids is not None)


def test_the_same_seed_repeats_and_another_differs_without_compiling_again(dropped, learnt):
    result = learnt.result
    assert learnt.traces <= 1
    compiled = programs.compiled(dropped.problem.model, FAST, BERT, programs.mesh_for(1), None, None)
    assert compiled is programs.compiled(dropped.problem.model, FAST, BERT, programs.mesh_for(1), None, None)
    functions = [f for f in compiled if hasattr(f, "_cache_size")]
    before = [f._cache_size() for f in functions]
    same(solve(dropped, seeds=(learnt.seed,))[0], result)
    (other,) = solve(dropped, seeds=(99,))
    assert other.trace != result.trace
    assert not np.array_equal(other.masks["embeddings"], result.masks["embeddings"])
    assert [f._cache_size() for f in functions] == before
    assert len(functions) >= 5


def auc(scores, truth):
    """Probability that a kept unit scores above a dropped one, ties counted half."""
    scores, truth = np.ravel(scores), np.ravel(truth) > 0.5
    pairs = scores[truth][:, None] - scores[~truth][None]
    return ((pairs > 0) + 0.5 * (pairs == 0)).mean()


def test_told_the_tokens_the_control_keeps_them_and_learns_the_masks(bert, learnt):
    truth = made(bert, HARD, dropout=0.1, tokens="true")
    (result,) = solve(truth, config=replace(FAST, tokens="true"))
    np.testing.assert_array_equal(result.ids, truth.batch.batch.ids)
    for site in ("classifier", "layer_0.ffn_output"):
        used = np.s_[:] if site == "classifier" else np.s_[:, :1]  # only the first token reaches the head
        assert auc(result.masks[site][used], truth.masks[site][used]) > 0.9, site


def test_without_sweeps_the_continuous_tokens_are_the_answer(dropped):
    config = replace(FAST, rounds=1, sweeps=0)
    (result,) = solve(dropped, config=config)
    assert stages(result, "discrete") == stages(result, "tokens") == [result.loss]
    assert result.notes == []


def test_an_update_of_nans_ends_in_an_infinite_loss_not_in_an_error(dropped):
    broken = {path: jnp.full_like(value, jnp.nan) for path, value in dropped.problem.observed.items()}
    (result,) = grab.attack(keys(7), [dropped.problem._replace(observed=broken)], FAST)
    assert result.loss == np.inf
    assert result.ids.shape == (1, 8)
    assert ((result.confidence >= 0) & (result.confidence <= 1)).all()


def test_a_result_does_not_depend_on_the_rest_of_its_group(plain, group):
    first, _, third = plain
    moved = solve(third, first, config=replace(FAST, rounds=5), seeds=(8, 7))
    assert accuracy(moved[0], third) == 1
    np.testing.assert_array_equal(moved[1].ids, group[0][0].ids)
    ours, theirs = ([(p["round"], p["phase"], p["step"]) for p in r.trace] for r in (moved[1], group[0][0]))
    assert ours == theirs
    starts = [stages(result, "continuous")[:3] for result in (moved[1], group[0][0])]
    np.testing.assert_allclose(*starts, rtol=1e-3)


def test_a_batch_that_stops_last_keeps_the_trace_of_its_last_round(plain, group):
    results, states = group
    last = results[0].trace[-1]["round"]
    before = next(s for s in states if (int(s.round), int(s.phase), int(s.step)) == (last, attack_state.DISCRETE, 0))
    assert not before.done[0]
    ended = before._replace(done=np.array([False, True]))  # the other has stopped already
    resumed = solve(*plain[:2], config=replace(FAST, rounds=5), state=ended)
    assert stages(resumed[0], "discrete") == stages(results[0], "discrete")


@pytest.mark.long
def test_what_is_not_told_is_searched_and_all_restarts_feed_the_pools(bert, monkeypatch):
    truth = made(bert, TWO, dropout=0.0, known=KnownConfig(labels=False, lengths=False))
    known = truth.problem.known
    np.testing.assert_array_equal(known.pinned, [[1, 0, 0, 0, 0, 0, 1, 1]] * 2)  # [CLS] and beyond the longest
    np.testing.assert_array_equal(known.free, ~np.asarray(known.pinned))
    assert known.labels is None
    pools, states, search = [], [], discrete.beam.search

    def spy(score, begin, free, allowed, **kwargs):
        pools.extend(allowed)
        return search(score, begin, free, allowed, **kwargs)

    monkeypatch.setattr(discrete.beam, "search", spy)
    config = replace(FAST, rounds=1, restarts=2)
    (result,) = solve(truth, config=config, on_segment=lambda state, _: state is None or states.append(state))
    assert result.labels.shape == (2,)
    assert set(result.labels) <= {0, 1, 2}
    assert all({PAD, SEP} <= set(pool) and CLS not in pool for pool in pools)
    np.testing.assert_array_equal(result.ids[:, 0], CLS)
    np.testing.assert_array_equal(result.ids[:, 6:], PAD)
    assert np.isfinite(result.loss)
    assert stages(result, "discrete")[0] < stages(result, "continuous")[0]
    restarts = np.asarray(states[-2].descent.candidate.embeds)[0]
    assert restarts.shape == (2, 2, 8, 32)
    assert not np.array_equal(*restarts)
    table = np.asarray(truth.problem.frozen[truth.problem.model.word_table])
    tokens = (restarts @ table.T / np.linalg.norm(table, axis=1)).argmax(-1)  # of both restarts: the pool has all
    for row in range(2):
        assert set(np.nonzero(states[-1].pools[0, row])[0]) == set(tokens[:, row, 1:6].ravel())


@pytest.mark.long
def test_a_model_without_special_tokens():
    loaded = one_layer("gpt2", n_layer=1)
    truth = made(loaded, ((5, 17, 23, 42),), dropout=0.0, vocabulary=GPT2, frozen="none")
    np.testing.assert_array_equal(truth.problem.known.free, [[1, 1, 1, 1, 0, 0, 0, 0]])
    (result,) = solve(truth, config=replace(FAST, rounds=1))
    np.testing.assert_array_equal(result.ids[0, 4:], 59)
    assert accuracy(result, truth) >= 0.5
