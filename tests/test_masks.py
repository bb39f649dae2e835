"""The guarantees of `masks`: what a client draws, and what an attacker starts from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grab_jax import masks, models
from grab_jax.models import Site

SITES = {
    "embeddings": Site("td", (0, 6), 0.1),
    "attention": Site("htt", (3, 0, 0), 0.4),
    "output": Site("td", (0, 6), 0.1),
    "classifier": Site("d", (64,), 0.25),
}


sample = jax.jit(lambda keys, length: masks.sample(keys, SITES, length), static_argnums=1)


def keys(seed=0, batch=4):
    return jax.random.split(jax.random.key(seed), batch)


@pytest.fixture(scope="module")
def many():
    """The masks of four sentences of 40 tokens: enough for statistics."""
    return {name: np.asarray(mask) for name, mask in sample(keys(), 40).items()}


def cut(mask, axes, length):
    """The part of one batch's mask that belongs to the first `length` positions."""
    return {"td": lambda m: m[:, :length], "htt": lambda m: m[:, :, :length, :length], "d": lambda m: m}[axes](mask)


def test_a_sentence_has_the_same_mask_alone_and_at_any_padded_length(many):
    for i in range(4):
        alone = sample(keys()[i : i + 1], 8)
        for name, site in SITES.items():
            np.testing.assert_array_equal(alone[name][0], cut(many[name], site.axes, 8)[i])


def test_a_sentence_has_the_same_mask_in_any_order_and_without_jit(many):
    order = np.array([2, 0, 3, 3])
    shuffled = sample(keys()[order], 40)
    assert all(np.array_equal(shuffled[name], many[name][order]) for name in SITES)
    eager = masks.sample(keys()[1:3], {"embeddings": SITES["embeddings"]}, 8)["embeddings"]
    np.testing.assert_array_equal(eager, many["embeddings"][1:3, :8])


def test_masks_hold_zeros_and_ones_at_the_keep_rate_of_their_site(many):
    for name, site in SITES.items():
        values = many[name]
        assert values.dtype == np.float32
        assert set(np.unique(values)) == {0.0, 1.0}
        bound = 5 * np.sqrt(site.rate * (1 - site.rate) / values.size)  # five standard deviations
        assert abs(values.mean() - (1 - site.rate)) < bound, name


def test_sites_sentences_positions_and_heads_draw_independently(many):
    hidden, attention = many["embeddings"], many["attention"]
    for a, b, rate in (
        (hidden, many["output"], 0.1),
        (hidden[1:], hidden[:-1], 0.1),
        (hidden[:, 1:], hidden[:, :-1], 0.1),
        (attention[1:], attention[:-1], 0.4),
        (attention[:, 1:], attention[:, :-1], 0.4),
        (attention[:, :, 1:], attention[:, :, :-1], 0.4),
        (attention[..., 1:], attention[..., :-1], 0.4),
        (attention[..., *np.triu_indices(40, 1)], attention.swapaxes(2, 3)[..., *np.triu_indices(40, 1)], 0.4),
    ):
        agree = (1 - rate) ** 2 + rate**2  # of two independent draws
        assert abs((a == b).mean() - agree) < 6 * np.sqrt(agree * (1 - agree) / a.size)


def test_different_keys_draw_different_masks(many):
    other = sample(keys(seed=1)[:1], 8)
    assert all(not np.array_equal(other[name], cut(many[name], site.axes, 8)[:1]) for name, site in SITES.items())


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2"])
def test_one_mask_per_site_of_a_model_in_the_shape_of_its_activation(family, request):
    model = models.build(request.getfixturevalue(f"{family}_config"))
    expected = {"embeddings": (2, 5, 32)}
    for i in range(2):
        expected[f"layer_{i}.attention"] = (2, 4, 5, 5)
        expected[f"layer_{i}.attention_output"] = expected[f"layer_{i}.ffn_output"] = (2, 5, 32)
    head = {"bert": ["classifier"], "roberta": ["classifier_in", "classifier_out"], "gpt2": []}[family]
    expected |= dict.fromkeys(head, (2, 32))
    found = jax.eval_shape(lambda: masks.sample(keys(batch=2), model.sites, 5))
    assert {name: mask.shape for name, mask in found.items()} == expected
    whole = masks.ones(model.sites, 2, 5)
    assert {name: mask.shape for name, mask in whole.items()} == expected
    assert all((np.asarray(mask) == 1).all() for mask in whole.values())


@pytest.mark.parametrize("amount", [0.0, 0.25, 1.0])
def test_relax_moves_from_the_draw_to_the_keep_rate(amount):
    drawn = {name: jnp.array([[1.0, 0.0, 1.0]]) for name in SITES}
    for name, mask in masks.relax(drawn, SITES, amount).items():
        keep = 1 - SITES[name].rate
        expected = np.where(np.asarray(drawn[name]) == 1, 1 - amount + amount * keep, amount * keep)
        np.testing.assert_allclose(mask, expected, rtol=1e-6)
    if amount == 0:
        np.testing.assert_array_equal(masks.relax(drawn, SITES)["attention"], drawn["attention"])


def test_project_clips():
    relaxed = {"a": jnp.array([[-0.5, 0.0, 0.49, 0.5, 0.7, 1.5]])}
    np.testing.assert_allclose(masks.project(relaxed)["a"], [[0, 0, 0.49, 0.5, 0.7, 1]], rtol=1e-6)
    assert masks.project(None) is None


def test_hold_puts_what_is_told_in_its_place():
    learnt = {"a": jnp.array([[0.2, 0.4, 0.6]]), "b": jnp.array([[0.5]])}
    held = masks.hold(learnt, {"a": jnp.array([[1.0, jnp.nan, 0.0]])})
    np.testing.assert_array_equal(held["a"], np.array([[1.0, 0.4, 0.0]], np.float32))
    np.testing.assert_array_equal(held["b"], learnt["b"])
    assert masks.hold(None, learnt) is None
    assert masks.hold(learnt, None) is learnt


def test_complete_fills_up_with_the_keep_rate():
    """In every site, told or not."""
    told = np.full((2, *SITES["embeddings"].shape(3)), np.nan, np.float32)
    told[1, 2] = 0
    found = masks.complete({"embeddings": jnp.asarray(told)}, SITES, 2, 3)
    whole = masks.ones(SITES, 2, 3)
    assert {name: mask.shape for name, mask in found.items()} == {name: mask.shape for name, mask in whole.items()}
    expected = np.where(np.isnan(told), np.float32(1 - SITES["embeddings"].rate), told)
    np.testing.assert_allclose(found["embeddings"], expected, rtol=1e-6)
    for name, site in SITES.items():
        if name != "embeddings":
            np.testing.assert_allclose(found[name], 1 - site.rate, rtol=1e-6)
    assert masks.complete(None, SITES, 2, 3) is None
