"""What a client does to its update before sending it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grab_jax import defenses
from grab_jax.config import ClientConfig, Config, DefenseConfig
from grab_jax.simulate import defense
from grab_jax.span import noise
from grab_jax.types import InputError


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


def test_signs_are_the_signs():
    clean = update()
    sent = defenses.sign()(jax.random.key(0), clean)
    for path, value in clean.items():
        np.testing.assert_array_equal(sent[path], np.sign(np.asarray(value)))
    assert set(np.unique(sent["a"])) == {-1, 1}
    assert not np.asarray(sent["z"]).any()


@pytest.mark.parametrize("by", ["nearest", "stochastic"])
@pytest.mark.parametrize("bits", [2, 5])
def test_quantised_entries_lie_on_their_levels_and_are_right_on_average(bits, by):
    clean = update()
    clean = {path: value.reshape(-1)[:200] for path, value in clean.items()}
    draw = jax.jit(jax.vmap(lambda key: defenses.quantise(bits, by)(key, clean)))
    sent = draw(jax.random.split(jax.random.key(3), 300))
    assert not np.asarray(sent["z"]).any()
    for path in ("a", "b"):
        exact, found = np.asarray(clean[path]), np.asarray(sent[path])
        step = np.abs(exact).max() / (2 ** (bits - 1) - 1)
        assert np.abs(found / step - np.round(found / step)).max() < 1e-4
        assert len(np.unique(np.round(found / step))) <= 2**bits - 1
        assert np.abs(found).max() == pytest.approx(np.abs(exact).max(), rel=1e-6)
        assert np.abs(found - exact).max() <= step * (0.5 if by == "nearest" else 1) * (1 + 1e-4)
        if by == "stochastic":  # 300 draws: 5 standard errors of at most step / 2 each
            assert np.abs(found.mean(0) - exact).max() < 5.5 * step / 2 / np.sqrt(300)
            assert not np.array_equal(found[0], found[1])
        else:
            assert np.array_equal(found[0], found[1])


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


def test_int8_is_within_half_a_step_of_every_block_and_is_recognised():
    clean = {path: np.asarray(value) for path, value in update().items()}
    sent = {p: np.asarray(v) for p, v in defenses.wire("int8")(jax.random.key(0), update()).items()}
    for path, value in clean.items():
        flat, got = (np.pad(x.ravel(), (0, -x.size % 64)).reshape(-1, 64) for x in (value, sent[path]))
        step = np.abs(flat).max(1, keepdims=True) / 127
        assert (np.abs(got - flat) <= 0.501 * step).all()
        assert len(np.unique(got[0])) <= 255
        assert sent[path].shape == value.shape
    found = noise.block_steps(sent["a"].astype(np.float64), 64)
    np.testing.assert_allclose(found.ravel()[:64], np.abs(clean["a"].ravel()[:64]).max() / 127, rtol=1e-5)
    assert noise.block_steps(clean["a"].astype(np.float64), 64) is None


def test_the_noise_of_dp_sgd_is_first_and_shrinks_with_the_number_of_examples():
    """Multiplier 2 at clip 3: a deviation of 6 on the sum of 5 examples, so of 1.2 on their mean."""
    clean, key = update(), jax.random.key(0)
    private = DefenseConfig(clip=3.0, noise_multiplier=2.0)
    added = np.asarray(defense(Config(defense=private), 5)(key, clean)["a"] - clean["a"])
    assert added.std() == pytest.approx(1.2, rel=0.05)
    sent = defense(Config(defense=dataclasses.replace(private, sign=True, prune=0.5, quantise=4)), 5)(key, clean)["a"]
    assert (sent == 0).mean() == 0.5  # signs of pruned entries; levels leave signs as they are
    there = np.asarray(sent != 0)
    assert set(np.unique(sent)) == {-1, 0, 1}
    np.testing.assert_array_equal(sent[there], np.sign(np.asarray(clean["a"] + added)[there]))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"noise_multiplier": 1.0}, "--defense_clip"),
        ({"clip": 0.0}, "--defense_clip=0"),
        ({"clip": 1.0, "noise_multiplier": -1.0}, "--defense_noise_multiplier"),
        ({"quantise": 1}, "--defense_quantise=1"),
    ],
)
def test_settings_that_make_no_sense_are_named(given, named):
    with pytest.raises(InputError, match=named):
        DefenseConfig(**given)


def test_clip_and_local_training_exclude_each_other():
    with pytest.raises(InputError, match=r"--defense_clip=1 .*--client_algorithm=fedavg"):
        Config(client=ClientConfig(algorithm="fedavg"), defense=DefenseConfig(clip=1.0))


def test_signs_and_levels_are_not_taken_for_int8():
    signs = np.where(np.random.default_rng(0).random((64, 64)) < 0.5, -1.0, 1.0)
    assert noise.block_steps(signs, 64) is None
    assert noise.block_steps(signs * (np.arange(64) < 32), 64) is None
    levels = defenses.quantise(4)(jax.random.key(0), update())["a"]
    assert noise.block_steps(np.asarray(levels, np.float64), 64) is None
