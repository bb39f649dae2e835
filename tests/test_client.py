"""Losses and tuning by hand; the simulated client's update in its dense and its factored form."""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from goldens import golden as goldens

from grab_jax import client, leaves, losses, models, tuning

FAMILIES = ("bert", "roberta", "gpt2")
TABLES = {
    "bert": ("bert/embeddings/word_embeddings/embedding", "bert/embeddings/position_embeddings/embedding"),
    "roberta": ("roberta/embeddings/word_embeddings/embedding", "roberta/embeddings/position_embeddings/embedding"),
    "gpt2": ("transformer/wte/embedding", "transformer/wpe/embedding"),
}


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.fixture(scope="module", autouse=True)
def compile_quickly():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


class Loaded(NamedTuple):
    model: Any
    params: Any


@pytest.fixture(scope="module")
def loaded(family):
    """The golden's model with its first layer only: half the compilation."""
    model = models.build(goldens.config(family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": 1}))
    flat = tuning.flatten(models.load(str(goldens.HERE / f"{family}-classification")).params)
    return Loaded(model, tuning.unflatten({p: v for p, v in flat.items() if not re.search("(layer|h)_1/", p)}))


@pytest.fixture(scope="module")
def simulate(loaded):
    return jax.jit(client.fedsgd(loaded.model))


@pytest.fixture(scope="module")
def golden(family):
    return goldens.read(family, "classification")


def test_classification_is_mean_cross_entropy_against_hard_and_soft_labels():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, 3)).astype(np.float32)
    logp = log_softmax(logits.astype(np.float64))
    hard = np.array([2, 0, 0, 1])
    found = losses.classification(jnp.asarray(logits), jax.nn.one_hot(hard, 3))
    np.testing.assert_allclose(found, -np.mean([logp[i, c] for i, c in enumerate(hard)]), rtol=1e-6)
    soft = rng.uniform(size=(4, 3)).astype(np.float32)  # rows do not sum to 1: taken as they are
    found = losses.classification(jnp.asarray(logits), jnp.asarray(soft))
    np.testing.assert_allclose(found, -(soft * logp).sum() / 4, rtol=1e-6)


def test_next_token_is_the_mean_over_real_targets_and_ignores_padding():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(2, 5, 7)).astype(np.float32)
    ids = rng.integers(0, 7, size=(2, 5)).astype(np.int32)
    lengths = (5, 3)
    attention = np.arange(5)[None] < np.array(lengths)[:, None]
    logp = log_softmax(logits.astype(np.float64))
    terms = [-logp[j, i, ids[j, i + 1]] for j in range(2) for i in range(lengths[j] - 1)]
    found = losses.next_token(*map(jnp.asarray, (logits, ids, attention)))
    np.testing.assert_allclose(found, np.mean(terms), rtol=1e-6)
    logits[1, 2:], ids[1, 3:] = 100.0, 0
    np.testing.assert_allclose(losses.next_token(*map(jnp.asarray, (logits, ids, attention))), found, rtol=1e-6)


def test_flatten_joins_paths_and_unflatten_is_its_inverse():
    tree = {"a": {"b": {"c": jnp.ones(2)}, "d": jnp.zeros(3)}, "e": jnp.arange(4)}
    flat = tuning.flatten(tree)
    assert {path: value.shape for path, value in flat.items()} == {"a/b/c": (2,), "a/d": (3,), "e": (4,)}
    back = tuning.unflatten(flat)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, back, tree)


@pytest.mark.parametrize("frozen", ["embeddings", "none"])
def test_freezing_takes_the_word_and_position_tables_and_merge_puts_them_back(family, loaded, frozen):
    trainable, held = tuning.split(loaded.params, tuning.freezes(loaded.model, frozen))
    assert sorted(held) == sorted(TABLES[family] if frozen == "embeddings" else ())
    assert sorted([*trainable, *held]) == sorted(tuning.flatten(loaded.params))
    if family != "gpt2":
        assert f"{family}/embeddings/token_type_embeddings/embedding" in trainable
        assert f"{family}/embeddings/LayerNorm/scale" in trainable
    whole = tuning.merge(trainable, held)
    assert jax.tree.structure(whole) == jax.tree.structure(dict(loaded.params))
    jax.tree.map(np.testing.assert_array_equal, whole, dict(loaded.params))


def batch_of(golden, model, dtype):
    labels = jax.nn.one_hot(golden.labels, 3, dtype=dtype)
    dropped = {name: jnp.asarray(mask, dtype) for name, mask in golden.masks.items() if name in model.sites}
    return jnp.asarray(golden.ids, jnp.int32), jnp.asarray(golden.attention, bool), labels, dropped


def cast(tree, dtype):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


def assert_same_update(found, expected, tolerance):
    """Relative per tensor; the key bias, zero in theory, relative to the whole."""
    assert found.keys() == expected.keys()
    norm = np.sqrt(sum(np.square(value).sum() for value in expected.values()))
    for path in expected:
        bound = norm if path.endswith("key/bias") else np.linalg.norm(expected[path])
        assert bound > 0, path
        assert np.linalg.norm(np.asarray(found[path]) - np.asarray(expected[path])) <= tolerance * bound, path


@pytest.mark.parametrize(
    ("family", "dtype", "tolerance"),
    [*((family, "float64", 1e-10) for family in FAMILIES), ("bert", "float32", 1e-5)],
    indirect=["family"],
)
def test_factored_leaves_made_dense_are_the_dense_gradient(loaded, golden, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        params = cast(loaded.params, dtype)
        ids, attention, labels, dropped = batch_of(golden, loaded.model, dtype)

        @jax.jit
        def both(params, dropped):
            found = {}
            for frozen in ("embeddings", "none"):
                parts = tuning.split(params, tuning.freezes(loaded.model, frozen))
                for mode, given in (("eval", None), ("masked", dropped)):
                    args = (*parts, ids, attention, labels, given)
                    factored = client.fedsgd(loaded.model, factored=True)(*args)
                    assert any(isinstance(leaf, leaves.Outer) for leaf in factored.values())
                    made = {path: leaves.dense(leaf) for path, leaf in factored.items()}
                    found[frozen, mode] = made, client.fedsgd(loaded.model)(*args)
            return [found[key] for key in sorted(found)]

        for made, dense in both(params, dropped):
            assert_same_update(made, dense, tolerance)


def test_the_update_has_one_entry_per_trained_tensor(loaded, golden):
    ids, attention, labels, dropped = batch_of(golden, loaded.model, "float32")
    parts = tuning.split(loaded.params, tuning.freezes(loaded.model, "embeddings"))
    for factored in (False, True):
        simulate = client.fedsgd(loaded.model, factored=factored)
        update = jax.eval_shape(
            lambda s=simulate: {p: leaves.dense(v) for p, v in s(*parts, ids, attention, labels, dropped).items()}
        )
        assert {path: value.shape for path, value in update.items()} == {p: v.shape for p, v in parts[0].items()}


def test_masks_padding_and_embeddings_as_input(loaded, golden, simulate):
    """Masks matter; columns of padding do not; word embeddings as input give the update of their ids."""
    model = loaded.model
    ids, attention, labels, _ = batch_of(golden, model, "float32")
    rng = np.random.default_rng(0)
    long = {
        name: jnp.asarray(rng.integers(0, 2, (3, *site.shape(13))), jnp.float32) for name, site in model.sites.items()
    }
    cut = {"td": lambda m: m[:, :9], "htt": lambda m: m[:, :, :9, :9], "d": lambda m: m}
    short = {name: cut[model.sites[name].axes](mask) for name, mask in long.items()}
    parts = tuning.split(loaded.params, tuning.freezes(model, "none"))
    update = simulate(*parts, ids, attention, labels, short)

    wide = jnp.pad(ids, ((0, 0), (0, 4)), constant_values=model.config.pad_token_id)
    assert_same_update(simulate(*parts, wide, jnp.pad(attention, ((0, 0), (0, 4))), labels, long), update, 1e-5)

    trainable, held = tuning.split(loaded.params, lambda path: path == model.word_table)
    embeds = jnp.asarray(np.asarray(held[model.word_table])[np.asarray(ids)])
    by_embeds = simulate(trainable, held, embeds, attention, labels, short)
    assert_same_update(by_embeds, {path: update[path] for path in trainable}, 1e-6)

    flipped = simulate(*parts, ids, attention, labels, {name: 1 - mask for name, mask in short.items()})
    kernel = next(path for path in update if path.endswith("/kernel"))
    assert np.linalg.norm(flipped[kernel] - update[kernel]) > 0.1 * np.linalg.norm(update[kernel])


def test_a_causal_lm_client_predicts_the_next_token():
    """Its gradient is that of the mean log loss of the real targets, by hand; labels do not enter."""
    loaded = models.load(str(goldens.HERE / "gpt2-causal_lm"), task="causal_lm")
    trainable, frozen = tuning.split(loaded.params, tuning.freezes(loaded.model, "embeddings"))
    ids = jnp.array([[5, 9, 11, 7], [8, 6, 0, 0]])
    attention = jnp.array([[True] * 4, [True, True, False, False]])

    def mean_loss(trained):
        logits = loaded.model.apply(tuning.merge(trained, frozen), ids, attention)
        picked = [jax.nn.log_softmax(logits[b, t])[ids[b, t + 1]] for b, t in ((0, 0), (0, 1), (0, 2), (1, 0))]
        return -sum(picked) / 4

    expected = jax.grad(mean_loss)(trainable)
    found = client.fedsgd(loaded.model)(trainable, frozen, ids, attention, jnp.zeros((2, 3)))
    for path, value in expected.items():
        np.testing.assert_allclose(found[path], value, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("family", ["bert"], indirect=True)
def test_clipped_examples_are_those_of_optax_and_infinite_clip_is_the_plain_update(loaded, golden):
    ids, attention, labels, dropped = batch_of(golden, loaded.model, "float32")
    parts = tuning.split(loaded.params, tuning.freezes(loaded.model, "none"))
    dense, factored = (client.fedsgd(loaded.model, factored=f) for f in (False, True))

    @jax.jit
    def found(clip):
        args = (*parts, ids, attention, labels, dropped)
        thin = client.clipped(factored, clip)(*args)
        assert any(isinstance(leaf, leaves.Outer) for leaf in thin.values())
        return (
            dense(*args), client.examples(dense, clip)(*args), client.clipped(dense, clip)(*args),
            {path: leaves.dense(leaf) for path, leaf in thin.items()},
        )  # fmt: skip

    plain, alone, whole, thin = found(jnp.inf)
    assert_same_update(whole, plain, 1e-5)
    assert_same_update(thin, plain, 1e-5)
    square = lambda v: (np.asarray(v, np.float64) ** 2).reshape(3, -1).sum(1)  # noqa: E731
    size = lambda update: np.sqrt(sum(map(square, update.values())))  # noqa: E731
    sizes = size(alone)
    clip = float(np.sort(sizes)[1] * 0.999)  # the smallest stays as it is, two are cut
    _, each, mean, thin = found(clip)
    np.testing.assert_allclose(size(each), np.minimum(sizes, clip), rtol=1e-5)
    total, number = optax.per_example_global_norm_clip(list(alone.values()), clip)
    assert number == 2
    wanted = {path: np.asarray(value) / 3 for path, value in zip(alone, total, strict=True)}
    assert_same_update(mean, wanted, 1e-5)
    assert_same_update(thin, wanted, 1e-5)


def test_clipping_by_hand_and_a_tensor_that_counts_twice():
    """Examples (3, 4) and (0.3, 0.4): norms 5 and 0.5; with b twice the first is sqrt(9 + 32)."""
    step = lambda trainable, frozen, x, *rest: {"a": x[0, :1], "b": x[0, 1:]}  # noqa: E731
    x = jnp.array([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    args = ({}, {}, x, x, x, None)
    np.testing.assert_allclose(client.examples(step, 1.0)(*args)["b"][:, 0], [0.8, 0.4, 0], rtol=1e-6)
    np.testing.assert_allclose(client.clipped(step, 1.0)(*args)["a"], [(0.6 + 0.3) / 3], rtol=1e-6)
    found = client.examples(step, 1.0, twice="b")(*args)["a"][:, 0]
    np.testing.assert_allclose(found, [3 / np.sqrt(41), 0.3, 0], rtol=1e-6)
    assert np.isfinite(jax.grad(lambda x: client.clipped(step, 1.0)({}, {}, x, x, x, None)["a"].sum())(x)).all()
