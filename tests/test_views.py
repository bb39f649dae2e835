"""Views follow defenses: the true batch explains, through the view of its defense, what the client sent."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import span_client

from grab_jax import client, distances, leaves, matching, simulate, tuning, views
from grab_jax.attack_config import AttackConfig
from grab_jax.attacks import programs
from grab_jax.config import Config, DefenseConfig
from grab_jax.leaves import Outer, Pruned, Signs, Unit
from grab_jax.types import Candidate, Defended, InputError

CLIP = 0.02
DEFENSES = {
    "noise": DefenseConfig(noise=1e-9),
    "prune": DefenseConfig(prune=0.9),
    "noise, then prune": DefenseConfig(noise=1e-9, prune=0.9),
    "sign": DefenseConfig(sign=True),
    "prune, then sign": DefenseConfig(prune=0.5, sign=True),
    "clip": DefenseConfig(clip=CLIP),
    "clip, noise, then prune": DefenseConfig(clip=CLIP, noise=1e-9, prune=0.5),
}
NAMES = ("l2+l1", "squared", "cosine", "normalised")


@pytest.fixture(scope="module")
def truth():
    """Two sentences, whose gradients differ in size; word tables are trained."""
    rng = np.random.default_rng(1)
    sentences = [span_client.sentence("bert", rng, words) for words in (2, 5)]
    found = span_client.client("bert", sentences, layers=1, frozen="none")
    kinds = "query/kernel|key/bias|output/LayerNorm/scale|/(word|position)_embeddings|classifier"  # one of each
    trainable, frozen = tuning.split(span_client.random_model("bert", layers=1)[1], lambda p: not re.search(kinds, p))
    observed = {path: found.problem.observed[path] for path in trainable}
    return found._replace(problem=found.problem._replace(trainable=trainable, frozen=frozen, observed=observed))


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("some", "distance_names"),
    [
        pytest.param(("noise, then prune", "clip"), ("l2+l1",), id="some"),
        pytest.param(tuple(DEFENSES), NAMES, id="all", marks=pytest.mark.long),
    ],
)
def test_the_true_batch_is_at_distance_zero_through_the_view_of_the_defense_only(truth, some, distance_names):
    problem, (ids, attention, labels) = truth.problem, truth.batch.batch
    config = {name: Config(batch_size=2, defense=said) for name, said in DEFENSES.items() if name in some}
    args = (problem.trainable, problem.frozen, ids, attention, jax.nn.one_hot(labels, 3), truth.masks)
    clean = {None: problem.observed, CLIP: jax.jit(client.clipped(client.fedsgd(problem.model), CLIP))(*args)}
    sent = {n: simulate.defense(c, 2)(jax.random.key(0), clean[c.defense.clip]) for n, c in config.items()}
    told = {name: simulate.defended(c) for name, c in config.items()}
    seen = {
        view: {name: views.seen([sent[name]], ids.size, view, "", told[name])[0] for name in sent}
        for view in ("auto", "all")
    }

    @jax.jit
    def found(args, seen):
        updates = {clip: matching.simulation(problem.model, clip=clip)(*args) for clip in (None, CLIP)}
        through = {"auto": lambda name: config[name].defense.clip, "all": lambda name: None}
        return {
            (view, name, distance): distances.by_name(distance)(updates[through[view](name)], seen[view][name])
            for view in seen
            for name in sent
            for distance in distance_names
        }

    found = found(args, seen)
    for name in sent:
        for distance in distance_names:
            plain, adapted = (float(found[view, name, distance]) for view in ("all", "auto"))
            if distance in ("cosine", "normalised") and (name == "noise" or "sign" in name):
                assert adapted <= plain + 1e-5, (name, distance)  # neither sees sizes, plain or not
            else:
                assert adapted < 0.02 * plain, (name, distance)


@pytest.mark.long
@pytest.mark.usefixtures("quick_compilation")
def test_embeddings_are_clipped_as_tokens_are(truth):
    """The word table, which they do not touch, counts for the norm: distinct tokens have the position table's."""
    problem, (ids, attention, labels) = truth.problem, truth.batch.batch
    candidate = Candidate(problem.trainable[problem.model.word_table][ids], truth.masks, jax.nn.one_hot(labels, 3))
    context = problem.trainable, problem.frozen
    known = problem.known._replace(attention=attention)

    @jax.jit
    def found(candidate, observed):
        objective = matching.embedding_objective(problem.model, distances.by_name("l2"), clip=CLIP)
        return jax.value_and_grad(objective)(candidate, *context, observed, known)

    args = (*context, ids, attention, candidate.labels, truth.masks)
    observed = jax.jit(client.clipped(client.fedsgd(problem.model), CLIP))(*args)
    assert all(len(set(row[:n])) == n for row, n in zip(np.asarray(ids).tolist(), attention.sum(1), strict=True))
    value, slope = found(candidate, observed)
    size = distances.l2(observed, jax.tree.map(jnp.zeros_like, observed))
    assert value < 1e-3 * size
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slope))


def test_the_name_of_a_view_and_what_it_follows():
    told = Defended(clip=1.0, normalised=True, pruned=True)
    assert views.through("auto", told) == told
    assert views.through("auto", Defended(signs=True)) == Defended(signs=True, normalised=True)
    assert views.through("auto", Defended()) == views.through("all", told) == Defended()
    assert views.through("normalised", told) == Defended(normalised=True)
    assert views.through("unpruned", Defended()) == Defended(pruned=True)
    observed = {"query/kernel": jnp.ones((2, 2)), "self/key/bias": jnp.ones(2)}
    (seen,) = views.seen([observed], 4, "auto", "", told)
    assert seen.keys() == {"query/kernel"}  # the other one is rounding brought to a norm of 1
    assert isinstance(seen["query/kernel"].seen, Pruned)
    (seen,) = views.seen([observed], 4, "signs")
    assert isinstance(seen["self/key/bias"], Signs)


def test_a_unit_leaf_by_hand():
    """(3, 4) against (0.6, 0.5), of which the second was pruned or not; factored or not."""
    for leaf in (jnp.array([[3.0, 4.0]]), Outer(jnp.ones((1, 1)), jnp.array([[3.0, 4.0]]))):
        ours, theirs = leaves.through(leaf, Unit(jnp.array([[0.6, 0.5]])))
        np.testing.assert_allclose(leaves.residual_norms(ours, theirs), (0.09, 0.3), rtol=1e-5)
        ours, theirs = leaves.through(leaf, Unit(Pruned(jnp.array([[0.5, 0.0]]))))
        np.testing.assert_allclose(leaves.residual_norms(ours, theirs), (0.01, 0.1), rtol=1e-4)
    slope = jax.grad(lambda a: leaves.residual_norms(*leaves.through(a, Unit(jnp.ones(2))))[0])(jnp.zeros(2))
    assert np.isfinite(slope).all()


def test_a_view_of_norms_brings_both_sides_to_one_unless_the_client_did():
    """A true gradient is at distance 0 of a client that sent it as it is; noise after the division stays."""
    true = {"query/kernel": jnp.array([[3.0, 4.0]])}
    (seen,) = views.seen([true], 4, "normalised")
    assert distances.l2_l1(true, seen) < 1e-6
    (seen,) = views.seen([true], 4, "normalised", "", Defended(normalised=True))
    np.testing.assert_array_equal(seen["query/kernel"].seen, true["query/kernel"])


@pytest.mark.parametrize(
    ("layers", "distance", "view"),
    [
        ("key/bias", "cosine", "auto"),
        ("key/bias", "normalised", "all"),
        ("key/bias", "l2", "normalised"),
        ("word_embeddings", "l2", "auto"),
    ],
)
def test_an_attack_without_a_tensor_to_match_is_refused(truth, layers, distance, view):
    with pytest.raises(InputError, match=f"--attack_layers={layers} leaves nothing to match"):
        programs.observed([truth.problem], AttackConfig(layers=layers, distance=distance, view=view), 16)


def test_key_biases_alone_are_matched_by_their_size(truth):
    (seen,) = programs.observed([truth.problem], AttackConfig(layers="key/bias", distance="l2"), 16)
    assert all(path.endswith("key/bias") for path in seen)
