"""What is read off each architecture equals what its first attention layer is really fed with."""

import jax.numpy as jnp
import numpy as np
import pytest
from span_client import FAMILIES, HEADS, LENGTH, POSITIONS, TOKENS, WIDTH, client, fed, random_model

from grab_jax import tuning
from grab_jax.models import first_attention
from grab_jax.span import inputs

pytestmark = pytest.mark.usefixtures("quick_compilation")
SENTENCES = ((2, 20, 30, 40, 50, 3), (2, 7, 3), (2, 9, 9, 4, 3))
LAYER = {
    "bert": "bert/encoder/layer_0/attention/self/",
    "roberta": "roberta/encoder/layer_0/attention/self/",
    "gpt2": "transformer/h_0/attn/c_attn/",
}


def described(family):
    model, params = random_model(family)
    return first_attention.describe(model, tuning.flatten(params))


def plain_norm(x, scale, shift, epsilon):
    """Layer norm in float64."""
    x = np.asarray(x, np.float64)
    unit = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
    return unit * np.asarray(scale, np.float64) + np.asarray(shift, np.float64)


def random_norm(rng, d):
    return inputs.Norm(rng.normal(1, 0.2, d).astype(np.float32), rng.normal(0, 0.2, d).astype(np.float32), 1e-5)


# --- inputs -------------------------------------------------------------------------------------------------------


def test_normalise_equals_numpy_and_keeps_the_precision():
    rng = np.random.default_rng(0)
    x, norm = rng.normal(2, 3, (5, 16)), random_norm(rng, 16)
    found = inputs.normalise(norm, x)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, plain_norm(x, *norm), rtol=1e-12)
    found = inputs.normalise(inputs.Norm(*map(jnp.asarray, norm)), jnp.asarray(x, jnp.float32))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, plain_norm(x, *norm), atol=1e-5)


@pytest.mark.parametrize("normed", [True, False])
def test_embed_equals_numpy_for_pairs_and_for_the_whole_vocabulary(normed):
    rng = np.random.default_rng(1)
    words, places = (rng.normal(size=(n, 8)).astype(np.float32) for n in (20, 6))
    norm = random_norm(rng, 8) if normed else None
    kernel = (jnp.zeros((8, 8)), jnp.zeros(8))
    first = inputs.FirstAttention(jnp.asarray(words), jnp.asarray(places), None, 0.25, None, kernel, kernel)
    first = first._replace(norm=inputs.Norm(*map(jnp.asarray, norm)) if normed else None)
    expected = lambda x: (plain_norm(x, *norm) if normed else x) / 0.75  # noqa: E731
    tokens, positions = np.array([3, 19, 3]), np.array([0, 5, 5])
    pairs = inputs.embed(first, jnp.asarray(tokens), jnp.asarray(positions))
    np.testing.assert_allclose(pairs, expected(words[tokens] + places[positions]), atol=1e-5)
    everything = inputs.embed(first, None, jnp.asarray(4))
    np.testing.assert_allclose(everything, expected(words + places[4]), atol=1e-5)


# --- first_attention ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [True, False], ids=["dropout", "evaluation"])
@pytest.mark.parametrize("family", FAMILIES)
def test_described_rows_under_the_masks_are_what_the_model_feeds(family, dropout):
    truth = client(family, SENTENCES, dropout=dropout)
    rows, first = fed(truth), described(family)
    assert first.rate == 0.1
    first = first if dropout else first._replace(rate=0.0)
    x = inputs.embed(first, jnp.asarray(rows.tokens), jnp.asarray(rows.positions))
    x = x if rows.masks is None else x * rows.masks
    assert (first.later is None) == (family != "gpt2")
    x = x if first.later is None else inputs.normalise(first.later, x)
    np.testing.assert_allclose(x, rows.inputs, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_tables_cover_the_vocabulary_and_every_position(family):
    first = described(family)
    assert first.words.shape == (TOKENS, WIDTH)
    assert first.places.shape == (POSITIONS, WIDTH) == (random_model(family)[0].max_length, WIDTH)


@pytest.mark.parametrize("family", FAMILIES)
def test_query_and_key_are_the_layers_own(family):
    """GPT-2 keeps query, key and value side by side in one tensor."""
    flat, first = tuning.flatten(random_model(family)[1]), described(family)
    for i, (name, (kernel, bias)) in enumerate({"query": first.query, "key": first.key}.items()):
        own = {part: np.asarray(flat[LAYER[family] + ("" if family == "gpt2" else f"{name}/") + part])
               for part in ("kernel", "bias")}  # fmt: skip
        if family == "gpt2":
            own = {part: value[..., i * WIDTH : (i + 1) * WIDTH] for part, value in own.items()}
        np.testing.assert_array_equal(kernel, own["kernel"])
        np.testing.assert_array_equal(bias, own["bias"])


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_three_kernels_in_float64_and_paths_names_what_they_need(family):
    model, rng = random_model(family)[0], np.random.default_rng(0)
    shape = (WIDTH, 3 * WIDTH) if family == "gpt2" else (WIDTH, WIDTH)
    update = {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path in first_attention.paths(model)}
    names = ("",) if family == "gpt2" else ("query/", "key/", "value/")
    assert list(update) == [f"{LAYER[family]}{name}kernel" for name in names]
    found = first_attention.gradients(model, update)
    assert [(part.shape, part.dtype) for part in found] == 3 * [((WIDTH, WIDTH), np.float64)]
    np.testing.assert_array_equal(np.concatenate(found, 1), np.concatenate([*update.values()], 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_gradient_lies_in_the_span_of_what_it_is_fed(family):
    truth = client(family, SENTENCES)
    q = np.linalg.qr(fed(truth).inputs.T)[0]
    gradient = np.concatenate(first_attention.gradients(truth.problem.model, truth.problem.observed), axis=1)
    assert np.linalg.norm(gradient - q @ (q.T @ gradient)) < 1e-5 * np.linalg.norm(gradient)
    assert sum(map(len, SENTENCES)) <= LENGTH * len(SENTENCES) < WIDTH
    assert WIDTH % HEADS == 0
