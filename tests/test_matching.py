"""Gradient matching: zero at the truth, larger elsewhere, and smooth to second order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import golden as goldens

from grab_jax import client, distances, matching, models, tuning
from grab_jax.types import Candidate, Known

PAD, CLS, SEP = 0, 1, 2
IDS = np.array([[CLS, 10, 20, 30, 40, SEP], [CLS, 15, 25, SEP, PAD, PAD]], np.int32)
L2_L1 = distances.by_name("l2+l1")


@pytest.fixture(scope="module", autouse=True)
def compile_quickly():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def model():
    return models.build(goldens.config("bert", num_hidden_layers=1))


@pytest.fixture(scope="module")
def params():
    flat = tuning.flatten(models.load(str(goldens.HERE / "bert-classification")).params)
    return tuning.unflatten({path: value for path, value in flat.items() if "layer_1/" not in path})


def truth(model, simulate, params, frozen, dtype="float32"):
    """Everything an objective takes: the true masks and embeddings, and a client's update."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda value: jnp.asarray(value, dtype), params)
    trainable, held = tuning.split(params, tuning.freezes(model, frozen))
    masks = {name: jnp.asarray(rng.random((2, *s.shape(6))) < 1 - s.rate, dtype) for name, s in model.sites.items()}
    labels = jnp.asarray(np.eye(3)[[2, 0]], dtype)
    attention = jnp.asarray(IDS != PAD)
    observed = simulate(trainable, held, jnp.asarray(IDS), attention, labels, masks)
    known = Known(attention, jnp.asarray(IDS), ~attention, attention, labels, None)
    embeds = jnp.asarray(np.asarray(tuning.flatten(params)[model.word_table])[IDS], dtype)
    return Candidate(embeds, masks, None), (trainable, held, observed, known)


@pytest.fixture(scope="module")
def practical(model, simulate, params):
    return truth(model, simulate, params, "embeddings")


@pytest.fixture(scope="module")
def benchmark(model, simulate, params):
    return truth(model, simulate, params, "none")


@pytest.fixture(scope="module")
def objective(model):
    return jax.jit(matching.embedding_objective(model, L2_L1))


@pytest.fixture(scope="module")
def score(model):
    return jax.jit(matching.token_objective(model, L2_L1, PAD))


@pytest.fixture(scope="module")
def simulate(model):
    return jax.jit(client.fedsgd(model))


def by_hand(update, observed):
    """Grab's distance in NumPy."""
    gaps = [np.asarray(update[path], np.float64) - np.asarray(observed[path], np.float64) for path in update]
    return sum(np.sqrt((gap**2).sum()) + 0.01 * np.abs(gap).sum() for gap in gaps)


def test_embedding_objective_is_zero_at_the_truth_and_larger_elsewhere(practical, objective):
    candidate, context = practical
    whole = by_hand({p: np.zeros(v.shape) for p, v in context[2].items()}, context[2])
    assert objective(candidate, *context) < 1e-4 * whole
    swapped = candidate._replace(embeds=candidate.embeds[:, jnp.array([0, 2, 1, 3, 4, 5])])
    kept = candidate._replace(masks={name: jnp.ones_like(mask) for name, mask in candidate.masks.items()})
    flipped = dict(candidate.masks, classifier=1 - candidate.masks["classifier"])
    for other in (swapped, kept, candidate._replace(masks=flipped)):
        assert objective(other, *context) > 1e-2 * whole
    assert objective(candidate, *context[:3], context[3]._replace(labels=jnp.eye(3)[jnp.array([0, 0])])) > 1e-2 * whole


def test_what_the_candidate_lacks_comes_from_what_is_known(practical, objective):
    candidate, (*context, known) = practical
    told = known._replace(masks=candidate.masks, labels=None)
    soft = Candidate(candidate.embeds, None, known.labels)
    np.testing.assert_allclose(objective(soft, *context, told), objective(candidate, *context, known), atol=1e-3)
    wrong = soft._replace(labels=jnp.eye(3)[jnp.array([1, 1])])
    assert objective(wrong, *context, told) > 1


def test_where_no_mask_is_told_nothing_is_dropped(practical, objective, score):
    """Masks may be told of some sites, there of some positions; evaluation mode elsewhere."""
    candidate, (*context, known) = practical
    soft = candidate._replace(masks=None)
    blank = {"embeddings": jnp.full_like(candidate.masks["embeddings"], jnp.nan)}
    some = {"embeddings": blank["embeddings"].at[0].set(candidate.masks["embeddings"][0])}
    untold, told = (known._replace(masks=masks) for masks in (blank, some))
    plain = objective(soft, *context, known)
    np.testing.assert_allclose(objective(soft, *context, untold), plain, rtol=1e-3)
    assert abs(objective(soft, *context, told) - plain) > 1e-3 * plain
    scores = [score(jnp.asarray(IDS), None, None, *context, k) for k in (known, untold, told)]
    np.testing.assert_allclose(scores[1], scores[0], rtol=1e-3)
    assert abs(scores[2] - scores[0]) > 1e-3 * scores[0]


def test_token_objective_is_zero_at_the_truth_and_equals_the_clients_distance_elsewhere(practical, score, simulate):
    candidate, context = practical
    trainable, held, observed, known = context
    masks = candidate.masks
    at_truth = score(jnp.asarray(IDS), masks, None, *context)
    other = IDS.copy()
    other[0, 2] = 33
    update = simulate(trainable, held, jnp.asarray(other), known.attention, known.labels, masks)
    expected = by_hand(update, observed)
    np.testing.assert_allclose(score(jnp.asarray(other), masks, None, *context), expected, rtol=1e-4)
    assert at_truth < 1e-3 * expected


def test_padding_is_attended_to_nowhere_but_a_first_token_always_is(practical, score, simulate):
    candidate, (trainable, held, observed, known) = practical
    middle = IDS.copy()
    middle[0, 2] = PAD
    empty = IDS.copy()
    empty[1] = PAD
    for ids, row, visible in ((middle, 0, [1, 1, 0, 1, 1, 1]), (empty, 1, [1, 0, 0, 0, 0, 0])):
        attention = np.array(known.attention)
        attention[row] = visible
        args = jnp.asarray(ids), jnp.asarray(attention), known.labels, candidate.masks
        expected = by_hand(simulate(trainable, held, *args), observed)
        found = score(jnp.asarray(ids), candidate.masks, None, trainable, held, observed, known)
        np.testing.assert_allclose(found, expected, rtol=1e-4)
        args = args[0], known.attention, *args[2:]
        assert abs(by_hand(simulate(trainable, held, *args), observed) - expected) > 1e-2 * expected


def test_the_word_table_is_matched_by_tokens_only_and_only_where_it_is_trained(model, benchmark, objective, score):
    candidate, (trainable, held, observed, known) = benchmark
    shift = np.zeros(observed[model.word_table].shape, np.float32)
    shift[7, 3] = 2.0  # ||.||_2 = 2 and 0.01 ||.||_1 = 0.02
    moved = dict(observed) | {model.word_table: observed[model.word_table] + shift}
    embedded = [objective(candidate, trainable, held, target, known) for target in (observed, moved)]
    assert embedded[0] == embedded[1]
    tokens = [
        score(jnp.asarray(IDS), candidate.masks, None, trainable, held, target, known) for target in (observed, moved)
    ]
    np.testing.assert_allclose(tokens[1] - tokens[0], 2.02, rtol=1e-2)
    np.testing.assert_allclose(tokens[0], 0, atol=1e-2)


def test_a_score_that_is_not_a_number_is_the_worst(practical, score):
    candidate, (trainable, held, observed, known) = practical
    broken = {path: jnp.full_like(value, jnp.nan) for path, value in observed.items()}
    assert score(jnp.asarray(IDS), candidate.masks, None, trainable, held, broken, known) == np.inf


def test_gradients_of_the_objective_equal_finite_differences(model, simulate, params):
    """Second order: the objective is a distance between gradients, its slope differentiates them once more."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        true, context = truth(model, simulate, params, "embeddings", "float64")
        relaxed = {p: jnp.asarray(rng.uniform(0.1, 1, mask.shape)) for p, mask in true.masks.items()}
        embeds = true.embeds + jnp.asarray(rng.normal(size=true.embeds.shape)) * 0.2
        candidate = Candidate(embeds, relaxed, jnp.asarray(rng.uniform(0.1, 1, (2, 3))))

        @jax.jit
        @jax.value_and_grad
        def objective(candidate, share):  # one compilation for both distances
            mixed = lambda a, b: share * distances.cosine(a, b) + (1 - share) * distances.l2(a, b)  # noqa: E731
            return matching.embedding_objective(model, mixed)(candidate, *context)

        for share in (0.0, 1.0):
            slope = objective(candidate, share)[1]
            for part in ("embeds", "masks", "labels"):
                noise = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), getattr(candidate, part))
                direction = jax.tree.map(jnp.zeros_like, candidate)._replace(**{part: noise})
                moved = lambda step, d=direction: jax.tree.map(lambda x, way: x + step * way, candidate, d)  # noqa: E731
                ahead, behind = (float(objective(moved(step), share)[0]) for step in (1e-5, -1e-5))
                expected = (ahead - behind) / 2e-5
                assert abs(expected) > 1e-3
                products = jax.tree.map(lambda a, b: float((a * b).sum()), slope, direction)
                np.testing.assert_allclose(sum(jax.tree.leaves(products)), expected, rtol=1e-5)
