"""What span decoding reads from LoRA factors, and where it says that it cannot."""

import numpy as np
import pytest
from span_client import FAMILIES, client, sentence

from grab_jax import evidence
from grab_jax import session as sessions
from grab_jax.attack_config import AttackConfig
from grab_jax.attacks import span, span_lora, span_lora_trained
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
    session, ghosts, whole = sessions.prepare(config), 0, 0
    for index in range(config.num_batches):
        truth = sessions.simulated(session, index)
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


ALL_THREE = Lora(rank=16, alpha=32.0, targets=("query", "key", "value"))


def expected(truth):
    ids, real, _ = truth.batch.batch
    return sorted(tuple(row[there].tolist()) for row, there in zip(np.asarray(ids), np.asarray(real), strict=True))


def certified(result):
    return [proof["certified"] for proof in result.evidence["sentences"]]


@pytest.mark.parametrize("dropout", [True, False])
@pytest.mark.parametrize("family", [pytest.param(f, marks=() if f == "bert" else pytest.mark.long) for f in FAMILIES])
def test_adapters_that_count_give_a_sentence_with_its_proof(family, dropout):
    """Under dropout, too: A's gradient holds the inputs in all dimensions, masks included."""
    truth, result = sent(family, trained=True, dropout=dropout)
    assert found_sentences(result) == expected(truth)
    assert certified(result) == [True]
    assert "which span" in result.notes[0]
    if dropout:
        real = np.asarray(truth.batch.batch.attention)[0]
        kept = np.asarray(truth.masks["embeddings"])[0][real]
        np.testing.assert_array_equal(result.masks["embeddings"][0][: real.sum()], kept)


@pytest.mark.parametrize(
    ("adapters", "proven"), [(ADAPTERS, False), pytest.param(ALL_THREE, True, marks=pytest.mark.long)]
)
def test_adapters_that_count_tell_two_sentences_apart_under_dropout(adapters, proven):
    """Proven where queries and keys have adapters, whose cotangents enter the sentences' equations."""
    truth, result = sent(words=(3, 4), trained=True, dropout=True, adapters=adapters)
    assert found_sentences(result) == expected(truth)
    assert certified(result) == [proven] * 2


@pytest.mark.long
def test_more_tokens_than_one_adapter_has_ranks_are_found_and_left_apart():
    """And as many as all of them have together are not testable."""
    truth, result = sent(words=(3, 4), trained=True, dropout=True, adapters=Lora(rank=8, alpha=32.0))
    assert {(row["position"], row["token"]) for row in result.evidence["rows"]} == real_rows(truth)
    assert not result.evidence["sentences"]
    _, result = sent(words=(3, 4), trained=True, dropout=True, adapters=Lora(rank=5, alpha=32.0))
    assert "A hold up to 10 tokens" in result.evidence["not_testable"]


@pytest.mark.long
def test_dropout_of_the_adapters_own_is_decoded_and_not_taken_for_the_embeddings():
    truth, result = sent(trained=True, dropout=True, adapters=Lora(rank=16, alpha=32.0, dropout=0.1))
    assert found_sentences(result) == expected(truth)
    assert certified(result) == [True]
    assert result.masks is None, "what is kept is kept by two dropouts"
    _, result = sent("gpt2", trained=True, dropout=True, adapters=Lora(rank=16, alpha=32.0, dropout=0.1))
    assert "layer norm has mixed" in result.evidence["not_testable"]


@pytest.mark.long
def test_a_rate_that_is_not_told_is_read_off_adapters():
    truth, _ = sent(words=(3, 4), trained=True, dropout=True)
    result = span.recover(truth.problem._replace(rate=False), 0)
    assert found_sentences(result) == expected(truth)
    assert "dropout rate was not told" in " ".join(result.notes)


@pytest.mark.long
@pytest.mark.parametrize(
    ("trained", "dropout"), [(True, True), (True, False), (False, False)], ids=["both", "trained", "new"]
)
def test_adapters_are_read_after_several_local_steps_and_nothing_is_proven(trained, dropout):
    """What rounding of A's small change hides, B's tells a client without dropout."""
    truth, result = sent(trained=trained, dropout=dropout, training={"algorithm": "fedavg", "epochs": 2, "lr": 0.5})
    assert found_sentences(result) == expected(truth)
    assert certified(result) == [False]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"noise": 1.0, "noise_on": "raw"}, "adapters' A is all noise"),
        ({"sign": True}, "signs alone have no low rank"),
        ({"prune": 0.5}, "of the entries are missing"),
    ],
)
def test_a_defense_of_adapters_that_count_is_called_by_its_name(setting, said):
    _, result = sent(trained=True, dropout=True, defense=DefenseConfig(**setting))
    assert said in result.evidence["not_testable"]


def test_adapters_whose_b_has_little_rank_hold_as_few_tokens():
    truth, _ = sent(trained=True, dropout=True)
    weak = {path: value * (np.arange(len(value)) < 2)[:, None] if path.endswith("lora_b") else value
            for path, value in truth.problem.trainable.items()}  # fmt: skip
    layers = span_lora.adapted(truth.problem.model, weak)
    held = {"dropout": True, "moving": False}
    assert span_lora_trained.room(truth.problem.model, truth.problem.trainable, layers, **held) == 32
    assert span_lora_trained.room(truth.problem.model, weak, layers, **held) == 4


@pytest.mark.long
def test_a_sentence_is_found_where_rounding_breaks_its_equations():
    """Its rows are all there are; nothing is proven."""
    truth, result = sent("gpt2", trained=True, training={"wire": "bfloat16"})
    assert found_sentences(result) == expected(truth)
    assert certified(result) == [False]


def test_factors_of_an_optimizer_that_is_not_told_are_not_read():
    truth, _ = sent()
    blind = truth.problem._replace(local=Local(optimizer=None, momentum=None, weight_decay=None))
    assert "steps of SGD only" in span_lora.reason(blind, span_lora.factors(blind))
