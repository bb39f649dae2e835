"""Epsilon against dp-accounting's own values, and clip and noise as measured on simulated clients."""

import math

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import span_client
from dp_accounting import pld, rdp
from scipy.stats import norm

from grab_jax import privacy, simulate, tuning
from grab_jax.config import ClientConfig, Config, DefenseConfig
from grab_jax.privacy import Measured


@pytest.mark.parametrize(("multiplier", "sampling", "steps"), [(1.1, 0.01, 1000), (0.7, 0.05, 100), (4.0, 0.2, 50)])
def test_epsilon_of_dp_sgd_is_that_of_the_renyi_accountant(multiplier, sampling, steps):
    """And above that of the tighter one by privacy loss distributions, which is another method altogether."""
    event = dp_accounting.PoissonSampledDpEvent(sampling, dp_accounting.GaussianDpEvent(multiplier))
    found = privacy.epsilon(multiplier, sampling=sampling, steps=steps, delta=1e-5)
    assert found == pytest.approx(rdp.RdpAccountant().compose(event, steps).get_epsilon(1e-5), rel=1e-9)
    tight = pld.PLDAccountant(value_discretization_interval=1e-3).compose(event, steps).get_epsilon(1e-5)
    assert tight < found < 1.25 * tight


@pytest.mark.parametrize("multiplier", [1e-4, 1e-3, 0.05, 1.0, 30.0])
@pytest.mark.parametrize("steps", [1, 17000])
def test_epsilon_without_sampling_is_exact(multiplier, steps):
    """Balle & Wang, theorem 8: delta of the epsilon found, in logarithms, is the delta asked for."""
    found, mu = privacy.epsilon(multiplier, steps=steps, delta=1e-6), math.sqrt(steps) / multiplier
    if found == 0:
        assert 2 * norm.cdf(mu / 2) - 1 <= 1e-6
        return
    gain, loss = norm.logcdf(mu / 2 - found / mu), found + norm.logcdf(-mu / 2 - found / mu)
    assert gain + math.log1p(-math.exp(loss - gain)) == pytest.approx(math.log(1e-6), abs=1e-3)
    event = dp_accounting.GaussianDpEvent(multiplier)
    assert found <= rdp.RdpAccountant().compose(event, steps).get_epsilon(1e-6)


def test_epsilon_at_the_ends():
    assert privacy.epsilon(0.0) == math.inf
    assert privacy.epsilon(1e-4) == pytest.approx(5e7, rel=0.01)  # 1 / (2 multiplier^2) and a little
    assert privacy.epsilon(1e-4, sampling=0.5) <= privacy.epsilon(1e-4)
    assert 0 <= privacy.epsilon(1e6) < 1e-4
    assert privacy.epsilon(1e-200) == math.inf  # dp-accounting gives up
    assert privacy.epsilon(math.inf) == 0


def test_clip_and_noise_are_measured():
    rng = np.random.default_rng(0)
    shares = {"a": jnp.asarray(rng.normal(size=(3, 50, 40)), jnp.float32), "b": jnp.zeros((3, 7))}
    noisy = {p: v.sum(0) + jnp.asarray(0.3 * rng.normal(size=v.shape[1:]), jnp.float32) for p, v in shares.items()}
    found = privacy.measured(shares, noisy)
    assert found.clip == pytest.approx(max(np.linalg.norm(row) for row in np.asarray(shares["a"])), rel=1e-5)
    assert found.deviation == pytest.approx(0.3, rel=0.06)
    assert found.multiplier == found.deviation / found.clip
    assert privacy.together([Measured(1.0, 3.0), Measured(2.0, 1.0)]) == Measured(2.0, math.sqrt(5))
    assert privacy.together([]) is None


def test_noise_on_the_mean_counts_as_declared_too():
    """0.3 on a mean of 4 is 1.2 on the sum: 0.6 of a clip norm of 2; beside a multiplier of 0.8 that is 1."""
    said = DefenseConfig(clip=2.0, noise_multiplier=0.8, noise=0.3, noise_on="raw")
    assert privacy.declared(said, 4) == pytest.approx(1.0)
    assert privacy.declared(DefenseConfig(noise=0.3), 1) is None
    assert privacy.declared(DefenseConfig(noise=0.3, clip=1.0), 1) is None
    assert privacy.declared(DefenseConfig(noise=0.3, clip=1.0, noise_multiplier=2.0), 1) == 2


WELL = Measured(1.0, 1.0)


def said(found, **given):
    return privacy.notes(privacy.account(DefenseConfig(**given), 1, found))


def test_the_nominal_epsilon_stands_beside_the_measured_one():
    assert said(None) == []
    sound = {"clip": 1.0, "noise_multiplier": 1.0, "dp_steps": 10, "dp_sampling": 0.1}
    account = privacy.account(DefenseConfig(**sound), 1, Measured(1.0, 1.0))
    assert account["nominal"] == account["epsilon"] == account["measured"]["epsilon"]
    (line,) = privacy.notes(account)
    assert f"nominal {account['nominal']:.3g}" in line
    assert "sampling rate 0.1, 10 step(s)" in line
    assert "less private than claimed" in said(Measured(1.0, 0.5), **sound)[1]
    assert "less private than claimed" in said(Measured(1.0, 1.0), **sound, epsilon_nominal=0.1)[1]
    assert "stay below the clip norm" in said(Measured(0.5, 1.0), **sound)[1]
    assert "epsilon infinite" in said(Measured(1.0, 0.0), clip=1.0)[0]
    assert len(said(Measured(1.0, 0.0), clip=1.0)) == 1  # infinite as declared
    assert "these sentences only" in said(Measured(1.0, 0.1), noise=0.1, noise_on="raw")[1]
    assert len(said(Measured(1.0, 0.1), noise=0.1)) == 1  # a normalised tensor has a norm of 1
    assert "nominal 8 cannot be checked" in said(None, epsilon_nominal=8.0)[0]


@pytest.mark.parametrize("broken", [Measured(math.nan, 1.0), Measured(1.0, math.nan), Measured(math.inf, 1.0)])
def test_what_is_not_finite_is_not_measured(broken):
    """Of several clients one is enough, in any order."""
    for found in (broken, *(privacy.together(pair) for pair in ((broken, WELL), (WELL, broken)))):
        account = privacy.account(DefenseConfig(clip=1.0, noise_multiplier=1.0), 1, found)
        assert account["measured"] is None
        (line,) = privacy.notes(account)
        assert "cannot be measured" in line
        assert "not finite" in line


@pytest.mark.parametrize(
    ("given", "examples", "why"),
    [
        ({"noise": 0.1}, 2, "norms that several sentences share"),
        ({"noise": 0.1}, 1, "local training"),
        ({"noise": 0.1, "noise_on": "raw"}, 2, "local training"),
    ],
)
def test_noise_without_an_epsilon_is_not_passed_over(given, examples, why):
    (line,) = privacy.notes(privacy.account(DefenseConfig(**given), examples, None))
    assert line.startswith("privacy: epsilon cannot be measured: ")
    assert why in line


def clients(defense, words=(3, 4)):
    """What `simulate.measure` says of a batch, and its update."""
    rng = np.random.default_rng(0)
    sentences = [span_client.sentence("bert", rng, n) for n in words]
    truth = span_client.client("bert", sentences, defense=defense)
    problem, config = truth.problem, Config(client=ClientConfig(dropout=0.1), defense=defense)
    weights = problem.model, problem.trainable, problem.frozen
    return simulate.measure(jax.random.key(0), *weights, truth.batch, config), problem.observed


@pytest.mark.long
@pytest.mark.usefixtures("quick_compilation")
def test_the_simulated_client_keeps_clip_and_noise():
    """Both are over the number of examples in the mean that is sent; the noise measured is that of the update."""
    clip = 0.01
    found, sent = clients(DefenseConfig(clip=clip, noise_multiplier=0.5))
    assert found.clip == pytest.approx(clip / 2, rel=1e-4)
    assert found.deviation == pytest.approx(0.5 * clip / 2, rel=0.02)
    key_bias = np.concatenate([sent[path] for path in sent if path.endswith("key/bias")])  # nothing but noise
    assert key_bias.std() == pytest.approx(0.5 * clip / 2, rel=0.2)
    assert clients(DefenseConfig(clip=clip))[0].deviation < 1e-7


@pytest.mark.long
def test_noise_that_is_not_that_of_dp_sgd_is_measured_where_it_can_be():
    assert clients(DefenseConfig())[0] is None
    assert clients(DefenseConfig(noise=0.1))[0] is None  # two examples share a tensor's norm
    alone, sent = clients(DefenseConfig(noise=0.1), words=(3,))
    assert alone.clip == pytest.approx(math.sqrt(len(sent)), rel=0.05)  # some tensors are zero
    assert alone.deviation == pytest.approx(0.1, rel=0.02)
    raw, _ = clients(DefenseConfig(noise=0.1, noise_on="raw"))
    assert raw.deviation == pytest.approx(0.1, rel=0.02)


def test_noise_on_the_normalised_tensors_of_one_sentence_is_measured():
    model, params = span_client.random_model("bert")
    truth = span_client.client("bert", [(2, 7, 9, 3)])
    config = Config(client=ClientConfig(dropout=0.0), defense=DefenseConfig(noise=0.01))
    weights = tuning.split(params, tuning.freezes(model, "embeddings"))
    found = simulate.measure(jax.random.key(0), model, *weights, truth.batch, config)
    assert found is not None
    assert found.deviation == pytest.approx(0.01, rel=0.05)
