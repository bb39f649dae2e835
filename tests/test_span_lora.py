"""What span decoding reads from LoRA factors, and where it says that it cannot."""

import numpy as np
import pytest
from span_client import FAMILIES, client, sentence

from grab_jax import evidence, run
from grab_jax.attack_config import AttackConfig
from grab_jax.attacks import span, span_lora
from grab_jax.config import ClientConfig, Config, DefenseConfig
from grab_jax.local_training import Local
from grab_jax.models import first_attention
from grab_jax.models.lora import Lora

ADAPTERS = Lora(rank=16, alpha=32.0)


@pytest.fixture(scope="module", autouse=True)
def quickly(quick_compilation):
    return quick_compilation


def sent(family="bert", words=(4,), **settings):
    rng = np.random.default_rng(3)
    truth = client(
        family, [sentence(family, rng, n) for n in words], **{"adapters": ADAPTERS, "dropout": False} | settings
    )
    return truth, span.recover(truth.problem, 0)


@pytest.mark.parametrize("family", [pytest.param(f, marks=() if f == "bert" else pytest.mark.long) for f in FAMILIES])
def test_a_sentence_is_read_from_the_factors(family):
    truth, result = sent(family)
    (ids, real, _) = truth.batch.batch
    expected = np.asarray(ids)[np.asarray(real)].tolist()
    assert result.ids[result.confidence > 0].tolist() == expected
    assert result.evidence["rank"] == len(expected)
    assert not result.evidence["sentences"][0]["certified"]
    conditions = ADAPTERS.rank - len(expected)
    assert f"{conditions if family == 'gpt2' else 2 * conditions} linear conditions" in " ".join(result.notes)


def real_rows(truth):
    ids, real, _ = truth.batch.batch
    return {(t, int(ids[r, t])) for r, t in np.argwhere(np.asarray(real)).tolist()}


def found_sentences(result):
    return sorted(tuple(ids[sure > 0].tolist()) for ids, sure in zip(result.ids, result.confidence, strict=True))


@pytest.mark.parametrize("family", [pytest.param(f, marks=() if f == "bert" else pytest.mark.long) for f in FAMILIES])
def test_two_sentences_are_told_apart(family):
    """Without a proof, and without a row that is not there."""
    truth, result = sent(family, words=(3, 4))
    ids, real, _ = truth.batch.batch
    assert {(row["position"], row["token"]) for row in result.evidence["rows"]} == real_rows(truth)
    assert found_sentences(result) == sorted(
        tuple(row[there].tolist()) for row, there in zip(np.asarray(ids), np.asarray(real), strict=True)
    )
    assert not any(proof["certified"] for proof in result.evidence["sentences"])


def test_rows_without_adapters_of_queries_are_found_and_left_apart():
    """Only values have adapters: queries' cotangents are not in the update."""
    truth, result = sent(words=(3, 4), adapters=Lora(rank=20, alpha=32.0, targets=("value",)))
    assert real_rows(truth) <= {(row["position"], row["token"]) for row in result.evidence["rows"]}
    assert not result.evidence["sentences"]


@pytest.mark.long
def test_rows_that_others_could_replace_are_not_certified():
    """The bundled model, where rows that are in no sentence meet the conditions, too."""
    config = Config(
        batch_size=2, num_batches=6, client=ClientConfig(dropout=0.0, lora_rank=64, lora_alpha=64.0),
        attack=AttackConfig(name="span"),
    )  # fmt: skip
    session, ghosts, whole = run.prepare(config), 0, 0
    for index in range(config.num_batches):
        truth = run.simulated(session, index)
        adapters = span_lora.factors(truth.problem)
        first = first_attention.describe(truth.problem.model, {**truth.problem.frozen, **truth.problem.trainable})
        near = span_lora._near(first._replace(rate=0.0), adapters.forbidden(), adapters.rank, lambda *_: None)
        ghosts += len(near) - adapters.rank
        result = span.recover(truth.problem, 0)
        sure = {(r["position"], r["token"]) for r in result.evidence["rows"] if r["certificate"] > evidence.PROVEN_ROW}
        assert sure <= real_rows(truth)
        ids, real, _ = truth.batch.batch
        expected = [tuple(row[there].tolist()) for row, there in zip(np.asarray(ids), np.asarray(real), strict=True)]
        whole += found_sentences(result) == sorted(expected)
    assert ghosts > 0, "the test needs rows that are not there"
    assert whole >= 4, "sentences of a batch are all told apart, but for those with too many rows like them"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dropout": True}, "dropout"),
        ({"adapters": Lora(rank=5, alpha=5.0)}, "adapters of rank 5"),
    ],
)
def test_factors_that_tell_nothing_are_not_testable(settings, said):
    _, result = sent(**settings)
    assert result.evidence["not_testable"].startswith("not testable by span decoding")
    assert said in result.evidence["not_testable"]


@pytest.mark.parametrize(
    ("defense", "rank", "said"),
    [
        ({"noise": 0.01}, 16, "tokens, or noise, take 16 of its dimensions"),
        ({"sign": True}, 16, "signs alone have no low rank"),
        ({"prune": 0.5}, 16, "of the entries are missing"),
        ({"quantise": 8}, 7, "tokens, or rounding to 255 levels, take"),
    ],
)
def test_a_defense_of_factors_is_not_taken_for_more_tokens(defense, rank, said):
    _, result = sent(adapters=Lora(rank=rank, alpha=32.0), defense=DefenseConfig(**defense))
    assert said in result.evidence["not_testable"]


def test_factors_of_an_optimizer_that_is_not_told_are_not_read():
    truth, _ = sent()
    blind = truth.problem._replace(local=Local(optimizer=None, momentum=None, weight_decay=None))
    assert "one step of SGD only" in span_lora.reason(blind, span_lora.factors(blind))
