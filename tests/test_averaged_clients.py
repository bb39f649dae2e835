"""Several clients whose mean update alone is seen, and a batch of unknown size."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from span_client import VOCABULARY, random_model

from grab_jax import advice, distances, local_training, matching, privacy, simulate, tuning
from grab_jax.attacks import span
from grab_jax.config import ClientConfig, Config, DefenseConfig, KnownConfig
from grab_jax.data import ClientBatch, Sentence
from grab_jax.local_training import Local
from grab_jax.span import subspace
from grab_jax.types import Batch, Candidate, InputError

IDS = jnp.array([[2, 10, 20, 30, 3, 0], [2, 15, 25, 3, 0, 0]], jnp.int32)
LABELS = jnp.array([2, 0])


@pytest.fixture(scope="module", autouse=True)
def quickly(quick_compilation):
    return quick_compilation


def split(layers):
    model, params = random_model("bert", layers=layers)
    return model, *tuning.split(params, tuning.freezes(model, "embeddings"))


@pytest.fixture(scope="module")
def parts():
    return split(1)


@pytest.fixture(scope="module")
def deep():
    """Enough layers for span decoding."""
    return split(2)


def batch_of(rows):
    """A batch of some of the sentences, which keep their rows in the data and so their masks."""
    chosen = jnp.array(rows)
    ids, labels = IDS[chosen], LABELS[chosen]
    texts = tuple(Sentence("", int(LABELS[row]), row) for row in rows)
    return ClientBatch(0, texts, (), (), Batch(ids, ids != 0, labels))


def settings(clients, rows=(0, 1), known=None, defense=None, **client):
    return Config(
        batch_size=len(rows), client=ClientConfig(count=clients, **({"dropout": 0.1} | client)),
        known=known or KnownConfig(), defense=defense or DefenseConfig(),
        attack=dataclasses.replace(Config().attack, name="span"),
    )  # fmt: skip


def simulated(parts, clients, rows=(0, 1), **given):
    config = settings(clients, rows, **given)
    return simulate.simulate(jax.random.key(1), *parts, batch_of(rows), VOCABULARY["bert"], config)


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for path in expected:
        size = np.abs(expected[path]).max()
        np.testing.assert_allclose(found[path], expected[path], atol=tolerance * size + 1e-8, err_msg=path)


def sentences(result):
    """What was found, as token ids."""
    rows = zip(np.asarray(result.ids), np.asarray(result.confidence), strict=True)
    return sorted(tuple(ids[sure > 0].tolist()) for ids, sure in rows)


TRUTH = sorted(tuple(row[row != 0].tolist()) for row in np.asarray(IDS))


def test_the_mean_of_gradients_is_the_gradient_of_all_sentences(parts):
    alone, two = simulated(parts, 1), simulated(parts, 2)
    assert_close(two.problem.observed, dict(alone.problem.observed), 1e-5)


@pytest.mark.parametrize(
    "given",
    [{"epochs": 2, "lr": 0.3}, pytest.param({"lr": 0.01, "optimizer": "adamw"}, marks=pytest.mark.long)],
    ids=["sgd", "adamw"],
)
def test_the_mean_of_changes_is_that_of_clients_that_trained_alone(parts, given):
    given |= {"algorithm": "fedavg"}
    two = simulated(parts, 2, **given)
    alone = [simulated(parts, 1, rows=(row,), **given).problem.observed for row in (0, 1)]
    expected = {path: (alone[0][path] + alone[1][path]) / 2 for path in alone[0] if not path.endswith("key/bias")}
    assert_close({path: two.problem.observed[path] for path in expected}, expected, 2e-3)
    together = simulated(parts, 1, **given).problem.observed
    assert max(float(jnp.abs(together[p] - v).max() / jnp.abs(v).max()) for p, v in expected.items()) > 0.02


@pytest.mark.long
def test_an_attacker_that_repeats_the_training_matches_at_the_truth_only(parts):
    truth = simulated(parts, 2, algorithm="fedavg", epochs=2, lr=0.2)
    problem, local = truth.problem, local_training.repeated(truth.problem)
    assert local == Local(epochs=2, lr=0.2, clients=2)
    assert (local.steps(2), local.steps(8), dataclasses.replace(local, batch=2).steps(8)) == (2, 2, 4)
    objective = matching.embedding_objective(problem.model, distances.by_name("cosine"), local=local)
    rest = problem.trainable, problem.frozen, dict(local_training.matched(problem)), problem.known
    score = jax.jit(lambda embeds: objective(Candidate(embeds, truth.masks, None), *rest))
    table = {**problem.frozen, **problem.trainable}[problem.model.word_table]
    assert score(table[IDS]) < 1e-4 < 0.2 * score(table[IDS.at[0, 2].set(44)])
    one = matching.embedding_objective(
        problem.model, distances.by_name("cosine"), local=dataclasses.replace(local, clients=1)
    )
    assert one(Candidate(table[IDS], truth.masks, None), *rest) > 1e-3


@pytest.mark.parametrize(
    "given",
    [{}, {"algorithm": "fedavg", "lr": 0.1}, pytest.param({"wire": "bfloat16"}, marks=pytest.mark.long)],
    ids=str,
)
def test_span_decoding_reads_the_mean(deep, given):
    assert sentences(span.recover(simulated(deep, 2, **given).problem, 0)) == TRUTH


@pytest.mark.long
def test_every_client_adds_noise_of_its_own(parts):
    """Half of each of two noises has the root of half the variance, and the accountant knows."""
    clip, defense = 0.01, DefenseConfig(clip=0.01, noise_multiplier=0.5)
    config = settings(2, defense=defense)
    found = simulate.measure(jax.random.key(1), *parts, batch_of((0, 1)), config)
    assert found.clip == pytest.approx(clip / 2, rel=1e-4)
    assert found.deviation == pytest.approx(0.5 * clip / math.sqrt(2), rel=0.02)
    account = privacy.account(defense, 2, found, 2)
    assert account["measured"]["epsilon"] == pytest.approx(account["epsilon"], rel=0.05)
    sent = simulated(parts, 2, defense=defense).problem.observed
    biases = np.concatenate([sent[path] for path in sent if path.endswith("key/bias")])  # nothing but noise
    assert biases.std() == pytest.approx(found.deviation, rel=0.2)


@pytest.mark.parametrize("opposite", [False, True])
@pytest.mark.parametrize("wire", ["bfloat16", "float16"])
def test_the_rank_of_a_mean_is_that_of_what_clients_rounded(wire, opposite):
    """Not that of the mean's own digits, nor raised where a part that clients share with opposite signs cancels."""
    rng, means = np.random.default_rng(0), []
    shared = rng.standard_normal((2, 64, 1)) @ rng.standard_normal((2, 1, 192))
    for sign in (1, -1):
        own = rng.standard_normal((64, 5)) @ rng.standard_normal((5, 192)) + sign * opposite * shared[0]
        means.append(np.asarray(jnp.asarray(2e-4 * own, wire), np.float64) / 2)
    stacked = np.float32(sum(means))
    assert subspace.spectrum(np.split(stacked, 3, axis=1), averaged=wire).rank == 10
    assert subspace.spectrum(np.split(stacked, 3, axis=1)).rank != 10


def test_last_tokens_of_averaged_clients_are_left_open():
    """Each client's mean is over its own tokens, so no token weighs what it would in one batch."""
    model, params = random_model("gpt2", layers=2, task="causal_lm")
    weights = tuning.split(params, tuning.freezes(model, "none"))
    ids = jnp.array([[10, 20, 30, 40, 50, 60], [15, 25, 35, 199, 199, 199]], jnp.int32)
    texts = tuple(Sentence("", 0, row) for row in range(2))
    batch = ClientBatch(0, texts, (), (), Batch(ids, ids != 199, jnp.zeros(2, jnp.int32)))
    for clients, open_ in ((1, False), (2, True)):
        config = settings(clients, dropout=0.0, frozen="none")
        truth = simulate.simulate(jax.random.key(1), model, *weights, batch, VOCABULARY["gpt2"], config)
        result = span.recover(truth.problem, 0)
        assert {one["last"] == "unknown" for one in result.evidence["sentences"]} == {open_}, clients


@pytest.mark.parametrize(("sentences", "expected"), [(8, 8), (9.5, 12), (1, 4)])
def test_advice_keeps_equal_shares(sentences, expected):
    assert advice._whole({"client_count": 2, "client_local_batch": 2}, sentences) == expected


def test_averaged_noise_is_accounted_for():
    alone = privacy.account(DefenseConfig(clip=1.0, noise_multiplier=0.5), 2, None)
    two = privacy.account(DefenseConfig(clip=1.0, noise_multiplier=0.5), 2, None, 2)
    assert two["noise_multiplier"] == pytest.approx(math.sqrt(2) * alone["noise_multiplier"])
    assert two["epsilon"] < alone["epsilon"]
    raw = DefenseConfig(clip=1.0, noise=0.1, noise_on="raw")  # on means of one and of two examples
    assert privacy.account(raw, 2, None, 2)["noise_multiplier"] == pytest.approx(0.1 * math.sqrt(2))
    assert privacy.account(raw, 2, None)["noise_multiplier"] == pytest.approx(0.2)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_batch_of_unknown_size_is_counted(deep, dropout):
    truth = simulated(deep, 1, known=KnownConfig(size=False), dropout=dropout)
    known = truth.problem.known
    assert known.ids.shape == (1, 6)
    assert known.labels is None
    assert not truth.problem.lengths
    assert np.asarray(known.ids).tolist() == [[2, -1, -1, -1, -1, 0]]  # where the longest ends is not pinned
    assert sentences(span.recover(truth.problem, 0)) == TRUTH


def test_a_mean_of_unknown_size_is_counted(deep):
    truth = simulated(deep, 2, known=KnownConfig(size=False), algorithm="fedavg", lr=0.1)
    assert truth.problem.known.ids.shape == (1, 6)
    assert sentences(span.recover(truth.problem, 0)) == TRUTH


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"client": ClientConfig(count=4)}, "--client_count=4 does not divide --batch_size=6"),
        (
            {"client": ClientConfig(count=2, algorithm="fedavg", local_batch=2)},
            "--client_local_batch=2 does not divide --batch_size=6 / --client_count=2",
        ),
        ({"client": ClientConfig(count=2), "defense": DefenseConfig(noise=0.1)}, "--defense_noise_on=normalised"),
        ({"client": ClientConfig(count=2), "defense": DefenseConfig(prune=0.5)}, "--defense_prune=0.5"),
        ({"client": ClientConfig(count=2), "defense": DefenseConfig(sign=True)}, "--defense_sign"),
        ({"client": ClientConfig(count=2, wire="int8")}, "--client_wire=int8"),
        ({"client": ClientConfig(count=2, algorithm="fedavg", optimizer="adamw")}, "--client_optimizer=adamw"),
        ({"known": KnownConfig(size=False)}, "--noknown_size needs --attack=span"),
        (
            {
                "known": KnownConfig(size=False), "client": ClientConfig(algorithm="fedavg", local_batch=2),
                "attack": dataclasses.replace(Config().attack, name="span"),
            },
            "needs --noknown_steps",
        ),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(given, said):
    with pytest.raises(InputError, match=said):
        Config(batch_size=6, **given)
