"""FedAvg: local training against a plain loop and one gradient, and what attackers make of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from span_client import VOCABULARY, WIDTH, random_model

from grab_jax import client, defenses, distances, local_training, matching, simulate, tuning
from grab_jax.attack_config import AttackConfig
from grab_jax.attacks import grab, programs, span, span_evaluation
from grab_jax.config import ClientConfig, Config, KnownConfig
from grab_jax.data import ClientBatch, Sentence
from grab_jax.leaves import Unit
from grab_jax.local_training import Local
from grab_jax.types import Batch, Candidate, Defended, InputError, Known, Problem

IDS = jnp.array([[2, 10, 20, 30, 3, 0], [2, 15, 25, 3, 0, 0]], jnp.int32)
REAL = IDS != 0
LABELS = jnp.eye(3)[jnp.array([2, 0])]


@pytest.fixture(scope="module", autouse=True)
def quickly(quick_compilation):
    return quick_compilation


@pytest.fixture(scope="module")
def tiny():
    """A one-layer model, its parameters split, and masks of two epochs."""
    model, params = random_model("bert", layers=1)
    trainable, frozen = tuning.split(params, tuning.freezes(model, "embeddings"))
    keys = jax.random.split(jax.random.key(5), (2, 2))
    return model, trainable, frozen, local_training.draw(list(keys), model.sites, IDS.shape[1])


@pytest.fixture(scope="module")
def gradient(tiny):
    return jax.jit(client.fedsgd(tiny[0]))


def sent(tiny, local, masks, **more):
    model, trainable, frozen, _ = tiny
    return jax.jit(local_training.fedavg(model, local, **more))(trainable, frozen, IDS, REAL, LABELS, masks)


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for path in expected:
        size = np.abs(expected[path]).max()
        np.testing.assert_allclose(found[path], expected[path], atol=tolerance * size + 1e-8, err_msg=path)


def test_one_step_of_sgd_is_minus_the_learning_rate_times_the_gradient(tiny, gradient):
    _, trainable, frozen, masks = tiny
    first = {name: mask[:, :1] for name, mask in masks.items()}
    plain = gradient(trainable, frozen, IDS, REAL, LABELS, {name: mask[:, 0] for name, mask in masks.items()})
    local = Local(lr=0.5, momentum=0.9)
    assert local.one_gradient(2)
    moved = sent(tiny, local, first, exact=True)
    assert_close(moved, {path: -0.5 * value for path, value in plain.items()}, 1e-5)
    delta = sent(tiny, local, first)
    for path, value in moved.items():  # as sent: up to the rounding of the weights
        spacing = np.spacing(np.abs(np.asarray(trainable[path])) + np.abs(np.asarray(value)))
        assert (np.abs(np.asarray(delta[path]) - np.asarray(value)) <= spacing).all(), path
    assert_close(local_training.as_gradient(moved, local, 2), dict(plain), 1e-5)


def looped(tiny, gradient, local):
    """The same training as a plain loop over steps."""
    _, trainable, frozen, masks = tiny
    weights, state = dict(trainable), None
    optimizer = optax.sgd(local.lr, momentum=local.momentum) if local.optimizer == "sgd" else optax.adamw(
        local.lr, weight_decay=local.weight_decay
    )  # fmt: skip
    state, size = optimizer.init(weights), local.batch or 2
    for epoch in range(local.epochs):
        for start in range(0, 2, size):
            rows = slice(start, start + size)
            dropped = {name: mask[rows, epoch] for name, mask in masks.items()}
            found = gradient(weights, frozen, IDS[rows], REAL[rows], LABELS[rows], dropped)
            change, state = optimizer.update(found, state, weights)
            weights = {path: weights[path] + change[path] for path in weights}
    return {path: np.asarray(weights[path], np.float64) - trainable[path] for path in weights}


@pytest.mark.parametrize(
    "local",
    [
        Local(epochs=2, batch=1, lr=0.3, momentum=0.9),
        pytest.param(Local(epochs=2, optimizer="adamw", lr=0.01, weight_decay=0.1), marks=pytest.mark.long),
    ],
    ids=["sgd", "adamw"],
)
def test_local_training_is_the_plain_loop(tiny, gradient, local):
    found = sent(tiny, local, tiny[3])
    # AdamW divides by the gradient's size: where the gradient is rounding only (key biases), so is the step.
    expected = {p: v for p, v in looped(tiny, gradient, local).items() if not p.endswith("key/bias")}
    assert_close({path: found[path] for path in expected}, expected, 2e-3)
    other = sent(tiny, local, {name: mask[:, ::-1] for name, mask in tiny[3].items()})
    away = max(float(jnp.abs(found[p] - other[p]).max() / jnp.abs(found[p]).max()) for p in expected)
    assert away > 0.05  # each epoch has its own masks


@pytest.mark.parametrize(
    "local",
    [Local(lr=0.1), pytest.param(Local(epochs=2, lr=0.05), marks=pytest.mark.long)],
    ids=["one step", "two steps"],
)
def test_an_update_divided_by_its_norms_is_matched_in_that_size(tiny, local):
    """The change's own size is gone with its norm: the learning rate says nothing of it any more."""
    model, trainable, frozen, masks = tiny
    mine = {name: mask[:, : local.epochs] for name, mask in masks.items()}
    change = sent(tiny, local, mine, exact=True)
    sent_ = defenses.noise(1e-9)(jax.random.key(0), change)
    known = Known(REAL, IDS, REAL, ~REAL, LABELS, None)
    problem = Problem(
        model, trainable, frozen, sent_, known, VOCABULARY["bert"], True, True, local=local,
        defended=Defended(normalised=True),
    )  # fmt: skip
    own = local_training.as_gradient(change, local, 2)
    (seen,) = programs.observed([problem], AttackConfig(), IDS.size)
    size = distances.l2(own, {path: Unit(jnp.zeros_like(leaf.seen)) for path, leaf in seen.items()})
    assert distances.l2(own, seen) < 1e-3 * size


def test_one_step_of_adamw_is_compared_by_its_signs(tiny, gradient):
    """A true gradient has almost no wrong sign, while it is nothing like the change itself."""
    _, trainable, frozen, _ = tiny
    truth = simulated(tiny, algorithm="fedavg", optimizer="adamw", lr=0.01)
    own = gradient(trainable, frozen, IDS, REAL, LABELS, truth.masks)
    away = {}
    for view in ("auto", "all"):
        (seen,) = programs.observed([truth.problem], AttackConfig(view=view), IDS.size)
        away[view] = distances.l2_l1(own, seen)
    assert away["auto"] < 0.05 * away["all"]
    several = simulated(tiny, algorithm="fedavg", optimizer="adamw", lr=0.01, epochs=2)
    assert not local_training.left(several.problem).signs  # its training is repeated


def batch_of(ids):
    texts = tuple(Sentence("", 0, row) for row in range(len(ids)))
    return ClientBatch(0, texts, (), (), Batch(ids, ids != 0, jnp.arange(len(ids)) % 3))


def simulated(tiny, **client_settings):
    known = {name: client_settings.pop(name) for name in ("lr_known", "optimizer_known") if name in client_settings}
    config = Config(
        batch_size=2, client=ClientConfig(**{"dropout": 0.1} | client_settings),
        known=KnownConfig(**{name.removesuffix("_known"): value for name, value in known.items()}),
        attack=dataclasses.replace(Config().attack, distance="cosine"),
    )  # fmt: skip
    return simulate.simulate(jax.random.key(1), *tiny[:3], batch_of(IDS), VOCABULARY["bert"], config)


def test_a_client_of_one_local_step_has_the_masks_of_fedsgd_and_later_epochs_others(tiny):
    plain = simulated(tiny)
    once = simulated(tiny, algorithm="fedavg", lr=0.25)
    twice = simulated(tiny, algorithm="fedavg", lr=0.25, epochs=2)
    for name, mask in plain.masks.items():
        np.testing.assert_array_equal(once.masks[name], mask)
        np.testing.assert_array_equal(twice.masks[name][:, 0], mask)
    assert not np.array_equal(twice.masks["embeddings"][:, 1], plain.masks["embeddings"])
    assert local_training.repeated(once.problem) is None
    assert_close(local_training.matched(once.problem), dict(plain.problem.observed), 1e-4)


def test_what_is_not_told_makes_it_one_gradient(tiny):
    told = simulated(tiny, algorithm="fedavg", epochs=2)
    assert local_training.repeated(told.problem) == Local(epochs=2)
    for name in ("lr_known", "optimizer_known"):
        blind = simulated(tiny, algorithm="fedavg", epochs=2, **{name: False})
        assert local_training.repeated(blind.problem) is None
        similar = distances.similarity(
            local_training.matched(blind.problem)["classifier/kernel"],
            local_training.matched(told.problem)["classifier/kernel"],
        )
        assert similar == pytest.approx(1, abs=1e-5)  # the direction stays


@pytest.mark.long
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_repeated_training_matches_at_the_truth_and_differentiates(tiny, optimizer):
    truth = simulated(tiny, algorithm="fedavg", epochs=2, optimizer=optimizer, lr=0.02)
    problem, local = truth.problem, local_training.repeated(truth.problem)
    table = {**problem.frozen, **problem.trainable}[problem.model.word_table]
    objective = matching.embedding_objective(problem.model, distances.by_name("cosine"), local=local)
    observed = dict(local_training.matched(problem))
    rest = (problem.trainable, problem.frozen, observed, problem.known._replace(attention=REAL))
    scored = jax.jit(jax.value_and_grad(lambda embeds: objective(Candidate(embeds, truth.masks, None), *rest)))
    value, slope = scored(table[IDS])
    # AdamW's step is the gradient's sign almost: entries that are rounding point anywhere.
    assert value < (1e-4 if optimizer == "sgd" else 2e-2)
    other, away = scored(table[IDS.at[0, 2].set(44)])
    assert other > 5 * value
    for found in (slope, away):
        assert np.isfinite(found).all()
    assert float(jnp.abs(away).max()) > 0


@pytest.mark.long
def test_gradient_matching_descends_through_the_local_steps_and_learns_masks_of_every_epoch(tiny):
    truth = simulated(tiny, algorithm="fedavg", epochs=2, local_batch=1, lr=0.05)
    fast = {"rounds": 1, "steps": 25, "candidates": 4, "permutations": 0, "sweeps": 0, "distance": "cosine"}
    (result,) = grab.attack(jax.random.split(jax.random.key(0), 1), [truth.problem], AttackConfig(name="grab", **fast))
    losses = [point["loss"] for point in result.trace if point["phase"] == "continuous"]
    assert losses[-1] < 0.9 * losses[0]
    assert result.masks["embeddings"].shape == truth.masks["embeddings"].shape == (2, 2, 6, WIDTH)
    (own,) = grab.attack(
        jax.random.split(jax.random.key(0), 1), [truth.problem], AttackConfig(name="grab", masks="random", **fast)
    )
    assert own.masks is None
    assert own.loss != result.loss


def spanned(**client_settings):
    """Span decoding of a two-layer client's delta."""
    model, params = random_model("bert", layers=2)
    parts = tuning.split(params, tuning.freezes(model, "embeddings"))
    truth = simulated((model, *parts), algorithm="fedavg", **client_settings)
    return truth, span.recover(truth.problem, 0)


@pytest.mark.long
@pytest.mark.parametrize(("epochs", "lr", "dropout"), [(1, 0.1, 0.1), (2, 0.01, 0.0)])
def test_span_decoding_of_local_training_finds_all_above_the_rounding_of_the_weights(epochs, lr, dropout):
    """In a second step the trained norm of the embeddings moves all inputs a little, and queries and keys differ."""
    _, result = spanned(lr=lr, epochs=epochs, dropout=dropout)
    expected = {tuple(row[real].tolist()) for row, real in zip(np.asarray(IDS), np.asarray(REAL), strict=True)}
    assert result.evidence["rank"] == sum(map(len, expected))
    found = {tuple(ids[sure > 0].tolist()) for ids, sure in zip(result.ids, result.confidence, strict=True)}
    assert found == expected
    assert any("rounding" in note for note in result.notes)


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ({(0, 2), (2, 3), (1, 15)}, [(2, 15, 3)]),
        ({(0, 2), (1, 15), (1, 16), (2, 3)}, []),  # two tokens at a position: two sentences, or a wrong row
        ({(0, 2), (2, 3)}, []),
        ({(0, 2), (1, 15)}, []),  # no end
    ],
)
def test_rows_of_one_token_a_position_are_a_sentence_whatever_moved(pairs, expected):
    assert span_evaluation.only_sentence(pairs, VOCABULARY["bert"]) == expected


@pytest.mark.long
def test_span_decoding_of_adamw_is_not_testable():
    _, result = spanned(lr=0.01, optimizer="adamw")
    assert "AdamW" in result.evidence["not_testable"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"client": ClientConfig(algorithm="fedavg", local_batch=2)}, "--client_local_batch=2 does not divide"),
        ({"client": ClientConfig(algorithm="fedavg"), "known": KnownConfig(lr=False)}, "--noknown_lr leaves the size"),
        (
            {"client": ClientConfig(algorithm="fedavg"), "known": KnownConfig(steps=False)},
            "--noknown_steps leaves the size",
        ),
        (
            {"client": ClientConfig(algorithm="fedavg"), "known": KnownConfig(optimizer=False)},
            "--noknown_optimizer leaves the size",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, said):
    with pytest.raises(InputError, match=said):
        Config(batch_size=3, **settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"algorithm": "fedavg", "optimizer": "adamw", "momentum": 0.9}, "--client_momentum=0.9 needs .*sgd"),
        ({"algorithm": "fedavg", "weight_decay": 0.1}, "--client_weight_decay=0.1 needs .*adamw"),
        ({"lora_alpha": 4.0}, "--client_lora_alpha=4.0 needs --client_lora_rank"),
        ({"lora_targets": "query", "lora_from": "folder"}, "--client_lora_targets=query needs --client_lora_rank"),
        ({"lora_dropout": 0.1, "lora_from": "folder"}, "--client_lora_dropout=0.1 needs --client_lora_rank"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(settings, said):
    with pytest.raises(InputError, match=said):
        ClientConfig(**settings)


def test_local_training_needs_fedavg():
    with pytest.raises(InputError, match="--client_epochs=2 needs --client_algorithm=fedavg"):
        ClientConfig(epochs=2)


# --- the weights in the middle --------------------------------------------------------------------------------------


def with_local(truth, **changed):
    return truth.problem._replace(local=dataclasses.replace(truth.problem.local, **changed))


@pytest.mark.parametrize(("steps", "momentum"), [(1, 0.0), (2, 0.0), (5, 0.0), (4, 0.9)])
def test_mean_weights_are_those_of_equal_steps(steps, momentum):
    """Against SGD itself, under a gradient that stays the same."""
    sgd = optax.sgd(0.1, momentum=momentum or None)
    weight, reached = jnp.array([1.0, -2.0]), []
    state = sgd.init(weight)
    for _ in range(steps):
        reached.append(weight)
        change, state = sgd.update(jnp.array([3.0, 5.0]), state)
        weight = weight + change
    truth, _ = tiny_truth(epochs=steps, momentum=momentum)
    problem = truth.problem._replace(
        trainable={"w": reached[0], "frozen": jnp.zeros(1)}, observed={"w": weight - reached[0]}
    )
    found = local_training.mean_weights(problem)
    np.testing.assert_allclose(found["w"], np.mean(reached, axis=0), rtol=1e-5)
    np.testing.assert_array_equal(found["frozen"], 0)


@pytest.mark.parametrize("untold", ["epochs", "batch", "momentum", "optimizer"])
def test_mean_weights_are_those_sent_where_the_training_is_not_told(untold):
    truth, _ = tiny_truth(epochs=2)
    problem = with_local(truth, **{untold: None})
    assert local_training.mean_weights(problem) is problem.trainable


def tiny_truth(**client_settings):
    model, params = random_model("bert", layers=1)
    parts = tuning.split(params, tuning.freezes(model, "embeddings"))
    return simulated((model, *parts), algorithm="fedavg", lr=0.01, dropout=0.0, **client_settings), model


@pytest.mark.parametrize("epochs", [1, 2, 4])
def test_changes_of_weights_prove_sentences_where_a_second_layer_judges(epochs):
    """Small steps: the first layer's equations are blurred by rounding, the second layer's span is not."""
    model, params = random_model("bert", layers=3)
    parts = tuning.split(params, tuning.freezes(model, "embeddings"))
    truth = simulated((model, *parts), algorithm="fedavg", epochs=epochs, lr=1e-3, dropout=0.0)
    result = span.recover(truth.problem, 0)
    expected = {tuple(row[real].tolist()) for row, real in zip(np.asarray(IDS), np.asarray(REAL), strict=True)}
    found = [tuple(ids[sure > 0].tolist()) for ids, sure in zip(result.ids, result.confidence, strict=True)]
    assert set(found) == expected
    assert all(proof["certified"] for proof in result.evidence["sentences"])
    assert result.evidence["contextual"]
