"""What a client does to its update before sending it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grab_jax import defenses
from grab_jax.config import ClientConfig, Config, DefenseConfig
from grab_jax.simulate import defense


def update(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {"a": jax.random.normal(keys[0], (80, 50)), "b": 9 * jax.random.normal(keys[1], (300,)), "z": jnp.zeros(4)}


def test_noise_has_its_deviation_and_differs_between_tensors_and_keys():
    clean = update()
    sent = defenses.noise(0.3, normalised=False)(jax.random.key(1), clean)
    other = defenses.noise(0.3, normalised=False)(jax.random.key(2), clean)
    for path in ("a", "b"):
        added = np.asarray(sent[path] - clean[path])
        assert added.std() == pytest.approx(0.3, rel=0.15)
        assert abs(added.mean()) < 0.1
        assert not np.array_equal(sent[path], other[path])


def test_normalised_noise_is_added_to_tensors_of_unit_norm():
    clean = update()
    sent = defenses.noise(1e-6)(jax.random.key(1), clean)
    assert float(jnp.linalg.norm(sent["b"])) == pytest.approx(1, abs=1e-4)
    np.testing.assert_allclose(sent["a"], clean["a"] / jnp.linalg.norm(clean["a"]), atol=1e-5)
    assert np.isfinite(sent["z"]).all()


@pytest.mark.parametrize("by", ["random", "magnitude"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_pruning_sets_exactly_its_share_to_zero_and_keeps_the_rest(by, share):
    clean = update()
    sent = defenses.prune(share, by)(jax.random.key(0), clean)
    for path in ("a", "b"):
        gone = np.asarray(sent[path] == 0)
        assert gone.sum() == int(share * gone.size)
        np.testing.assert_array_equal(np.asarray(sent[path])[~gone], np.asarray(clean[path])[~gone])
        if by == "magnitude" and gone.any():
            assert np.abs(clean[path])[gone].max() <= np.abs(clean[path])[~gone].min()


@pytest.mark.parametrize(("kind", "step"), [("bfloat16", 2.0**-8), ("float16", 2.0**-11)])
def test_the_wire_rounds_to_its_precision(kind, step):
    clean = update()
    sent = defenses.wire(kind)(jax.random.key(0), clean)["a"]
    assert sent.dtype == jnp.float32
    assert 0.1 * step < (jnp.abs(sent - clean["a"]) / jnp.abs(clean["a"])).max() <= step


def test_a_chain_is_one_after_the_other_and_none_changes_nothing():
    clean, key = update(), jax.random.key(0)
    assert defenses.chain()(key, clean) is clean
    sent = defenses.chain(defenses.noise(0.1), defenses.prune(0.5))(key, clean)
    assert (sent["a"] == 0).mean() == 0.5
    assert jnp.linalg.norm(sent["a"]) < jnp.linalg.norm(clean["a"])


def test_the_settings_name_the_chain():
    clean, key = update(), jax.random.key(0)
    assert defense(Config())(key, clean) is clean
    config = Config(client=ClientConfig(wire="bfloat16"), defense=DefenseConfig(noise=0.1, noise_on="raw", prune=0.25))
    sent = defense(config)(key, clean)["b"]
    assert (sent == 0).mean() == 0.25
    np.testing.assert_array_equal(sent, sent.astype(jnp.bfloat16).astype(jnp.float32))
    assert jnp.linalg.norm(sent) > 10
