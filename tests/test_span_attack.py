"""Span decoding end to end on tiny random models: whole batches, certificates that never lie, and a whole run."""

import json
import os
import signal
from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import span_client
from goldens import golden as goldens
from span_client import FAMILIES, POSITIONS, TOKENS, WIDTH, client, random_model, random_params, sentence
from test_run import TEXTS, do, records
from words import VOCABULARY, save_tokenizer

from grab_jax import defenses, models, tuning
from grab_jax.attack_config import AttackConfig
from grab_jax.attacks import ATTACKS, span, span_evaluation
from grab_jax.models import first_attention
from grab_jax.types import Problem, Result

pytestmark = pytest.mark.usefixtures("quick_compilation")
BEGINNING = "not testable by span decoding:"


def solve(*problems, seed=0, **kwargs):
    """Attack the problems and check what holds for every result."""
    keys = jax.vmap(jax.random.key)(seed + jnp.arange(len(problems)))
    results = span.attack(keys, problems, AttackConfig(name="span"), **kwargs)
    for problem, result in zip(problems, results, strict=True):
        well_formed(problem, result)
    return results


def well_formed(problem, result):
    """Shapes agree, and the evidence is plain data."""
    assert json.loads(json.dumps(result.evidence, allow_nan=False)) == result.evidence
    shape = result.ids.shape
    assert result.confidence.shape == shape
    assert ((result.confidence >= 0) & (result.confidence <= 1)).all()
    assert shape[0] == max(len(result.evidence["sentences"]), 1)
    if "not_testable" not in result.evidence:
        assert (result.masks is None) == (not problem.dropout)
    if result.masks is not None:
        assert result.masks["embeddings"].shape == (*shape, WIDTH)
    assert result.evidence["width"] == WIDTH
    assert len(result.evidence["spectrum"]) == WIDTH
    if problem.dropout:  # without it, rows of a batch may be linearly dependent
        assert result.evidence["rank"] >= len(result.evidence["rows"])
    assert all(0 <= row["token"] < TOKENS for row in result.evidence["rows"])


def rows_of(ids, confidence):
    """A sentence's tokens, where something was found."""
    return tuple(np.asarray(ids)[np.asarray(confidence) > 0].tolist())


def sentences_of(result):
    return [rows_of(*row) for row in zip(result.ids, result.confidence, strict=True)]


def certified(result):
    """Sentences claimed to be proven."""
    told = result.evidence["sentences"]
    return [s for s, one in zip(sentences_of(result), told, strict=False) if one["certified"]]


def assert_solved(result, truth, sentences):
    """Every sentence is there, certified, in its masks, and nothing else."""
    assert Counter(certified(result)) == Counter(sentences)
    assert len(result.evidence["sentences"]) == len(sentences)
    assert result.loss == max(s["residual"] for s in result.evidence["sentences"]) < span.WHOLE
    assert result.evidence["rank"] == len(result.evidence["rows"]) == sum(map(len, sentences))
    assert all(row["used"] for row in result.evidence["rows"])
    assert result.notes == []
    own = Counter((s, mask_of(truth.masks, i, len(s))) for i, s in enumerate(sentences))
    assert Counter((s, mask_of(result.masks, i, len(s))) for i, s in enumerate(sentences_of(result))) == own


def mask_of(masks, i, length):
    return np.asarray(masks["embeddings"])[i, :length].astype(bool).tobytes()


def drawn(family, lengths, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(sentence(family, rng, n) for n in lengths)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_recovered_with_its_masks(family):
    sentences = drawn(family, (3, 6, 4))
    truth = client(family, sentences)
    (result,) = solve(truth.problem)
    assert_solved(result, truth, sentences)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_recovered_without_dropout(family):
    sentences = drawn(family, (3, 6, 4), seed=1)
    (result,) = solve(client(family, sentences, dropout=False).problem)
    assert sorted(certified(result)) == sorted(sentences)
    assert result.masks is None
    assert not any("not found" in note for note in result.notes)


CYCLES = ((2, 50, 60, 70, 3), (2, 60, 50, 80, 3), (2, 70, 80, 50, 3), (2, 80, 70, 60, 90, 3))


def pairs_of(sentences):
    return {pair for sentence in sentences for pair in enumerate(sentence)}


def test_linearly_dependent_rows_do_not_hide_the_sentences():
    """Four words at three positions: more rows than dimensions, and other words at other places in their span."""
    (result,) = solve(client("bert", CYCLES, dropout=False, layers=3).problem)
    assert result.evidence["rank"] < len(pairs_of(CYCLES))
    assert sorted(certified(result)) == sorted(CYCLES)
    assert {(row["position"], row["token"]) for row in result.evidence["rows"]} == pairs_of(CYCLES)
    assert result.notes == []
    assert result.evidence["contextual"]


def test_a_row_that_others_could_replace_is_not_certified():
    """The same rows with no second layer to tell which are there."""
    problem = client("bert", CYCLES, dropout=False, layers=3).problem
    few = {path: problem.observed[path] for path in first_attention.paths(problem.model)}
    (result,) = solve(problem._replace(observed=few))
    sure = {(r["position"], r["token"]) for r in result.evidence["rows"] if r["certificate"] > span.ACCEPT}
    assert (0, 2) in sure
    assert sure <= pairs_of(CYCLES)
    assert not result.evidence["contextual"]
    assert set(certified(result)) <= set(CYCLES)


@pytest.mark.parametrize("layers", [2, 3])
def test_the_second_layer_judges_where_it_has_a_gradient_of_every_token(layers):
    """A classifier's last layer has one of the first token's query only: of three layers the second is in between."""
    sentences = drawn("bert", (6, 5), seed=4)
    problem = client("bert", sentences, dropout=False, layers=layers).problem
    assert (span_evaluation.judge(problem, 1) is not None) == (layers == 3)
    (result,) = solve(problem)
    assert sorted(certified(result)) == sorted(sentences)


def test_noise_of_the_second_layer_alone_leaves_only_distinct_sentences_proven(monkeypatch):
    """The first layer's tensors are exact, the second's in bfloat16: others are tried, and here one is as near."""
    sentences = drawn("bert", (3, 4), seed=1)
    problem = client("bert", sentences, dropout=False, layers=3).problem
    rounded = {path: problem.observed[path].astype(jnp.bfloat16).astype(jnp.float32)
               for path in first_attention.paths(problem.model, 1)}  # fmt: skip
    mixed = problem._replace(observed={**problem.observed, **rounded})
    assert sorted(certified(solve(mixed)[0])) == sorted(sentences)
    monkeypatch.setattr(span_evaluation.context.Search, "distinct", lambda *_: False)
    (result,) = solve(mixed)
    assert sorted(sentences_of(result)) == sorted(sentences)
    assert certified(result) == []


def test_the_second_layer_does_not_judge_without_dimensions_to_spare():
    """64 - 32 of the width: then a wrong sentence could lie in the span by chance."""
    for count, judges in ((4, True), (5, False)):
        sentences = drawn("bert", (5,) * count, seed=4)
        problem = client("bert", sentences, dropout=False, layers=3).problem
        assert (span_evaluation.judge(problem, 1) is not None) == judges


def test_a_sentence_that_the_second_layer_does_not_confirm_is_shown_and_not_certified(monkeypatch):
    sentences = drawn("bert", (3, 4), seed=1)
    problem = client("bert", sentences, dropout=False, layers=3).problem
    second = span_evaluation.judge(problem, 1)
    blind = second._replace(basis=np.roll(second.basis, 1, axis=0))
    monkeypatch.setattr(span_evaluation, "judge", lambda *_: blind)
    (result,) = solve(problem)
    assert sorted(sentences_of(result)) == sorted(sentences)
    assert certified(result) == []


def test_the_attack_needs_neither_labels_nor_lengths_nor_other_tensors():
    """What is known and every other tensor's update may be missing."""
    sentences = drawn("bert", (3, 6, 4))
    truth = client("bert", sentences)
    problem, known = truth.problem, truth.problem.known
    free = known._replace(
        labels=None, attention=jnp.ones_like(known.attention), pinned=jnp.zeros_like(known.pinned), ids=known.ids * 0
    )
    few = {path: problem.observed[path] for path in first_attention.paths(problem.model)}
    (result,) = solve(problem._replace(known=free, observed=few, lengths=False))
    assert_solved(result, truth, sentences)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_identical_sentences_are_told_apart_by_their_masks(family):
    sentences = drawn(family, (3,)) * 3
    truth = client(family, sentences, seed=1)
    (result,) = solve(truth.problem)
    assert_solved(result, truth, sentences)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_identical_sentences_without_dropout_are_one(family):
    sentences = drawn(family, (4,)) * 3
    (result,) = solve(client(family, sentences, dropout=False).problem)
    assert certified(result) == [sentences[0]]


@pytest.mark.parametrize("dropout", [True, False], ids=["dropout", "evaluation"])
def test_the_row_of_a_sentence_of_one_token_is_found(dropout):
    """It attends to nothing else, so nothing but its value has a gradient, and no equation proves it."""
    sentences = ((77,), *drawn("gpt2", (5, 4)))
    (result,) = solve(client("gpt2", sentences, dropout=dropout).problem)
    assert set(certified(result)) <= set(sentences)
    assert set(certified(result)) >= set(sentences[1:])
    assert Counter((row["position"], row["token"]) for row in result.evidence["rows"]) == Counter(
        pair for s in sentences for pair in enumerate(s)
    )


def test_an_empty_text_is_recovered():
    """[CLS] [SEP] alone."""
    sentences = ((2, 3), *drawn("bert", (4, 5)))
    truth = client("bert", sentences)
    (result,) = solve(truth.problem)
    assert_solved(result, truth, sentences)


@pytest.mark.parametrize("dropout", [True, False], ids=["dropout", "evaluation"])
def test_special_tokens_inside_the_text_are_recovered(dropout):
    """[UNK], [MASK] and padding as words, and [SEP] between two parts."""
    sentences = ((2, 1, 20, 3), (2, 30, 4, 40, 3), (2, 50, 3, 0, 70, 3))
    truth = client("bert", sentences, dropout=dropout)
    (result,) = solve(truth.problem)
    assert sorted(certified(result)) == sorted(sentences)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sentence_of_the_longest_length_is_recovered(family, monkeypatch):
    """As many tokens as the model has positions."""
    monkeypatch.setattr(span_client, "LENGTH", POSITIONS)
    sentences = drawn(family, (POSITIONS - 2 * (family != "gpt2"),))
    assert len(sentences[0]) == random_model(family)[0].max_length
    truth = client(family, sentences)
    (result,) = solve(truth.problem)
    assert_solved(result, truth, sentences)


def test_several_batches_are_attacked_one_by_one():
    """Each as if it were alone, in the order given; progress counts rows."""
    sentences = [drawn("bert", (3, 6, 4), seed) for seed in range(2)]
    problems, seen = [client("bert", s).problem for s in sentences], []
    results = solve(*problems, on_segment=lambda state, progress: seen.append((state, progress)))
    assert [sorted(certified(r)) for r in results] == [sorted(s) for s in sentences]
    (alone,) = solve(problems[1], seed=1)
    np.testing.assert_array_equal(alone.ids, results[1].ids)
    assert alone.evidence == results[1].evidence
    assert {(state, progress.phase) for state, progress in seen} == {(None, "rows")}
    assert (seen[-1][1].step, seen[-1][1].steps) == (19, 19)


def test_the_attack_is_listed():
    assert ATTACKS["span"].attack is span.attack


# --- what cannot be tested ----------------------------------------------------------------------------------------


def replaced(problem: Problem, change) -> Problem:
    """The problem with the three kernels' updates changed."""
    own = set(first_attention.paths(problem.model))
    observed = {path: change(value) if path in own else value for path, value in problem.observed.items()}
    return problem._replace(observed=observed)


def assert_said(result: Result, reason: str):
    assert result.evidence["not_testable"].startswith(BEGINNING)
    assert reason in result.evidence["not_testable"]
    assert result.notes == [result.evidence["not_testable"]]
    assert result.evidence["sentences"] == result.evidence["rows"] == []
    assert not np.asarray(result.confidence).any()
    assert result.masks is None
    assert np.isnan(result.loss)


def test_as_many_tokens_as_the_width_are_not_testable():
    """The gradient of 64 random inputs of width 64, and of 63: then there is something to test."""
    problem, rng = client("bert", drawn("bert", (3, 6, 4))).problem, np.random.default_rng(0)
    inputs = rng.normal(size=(WIDTH, WIDTH)).astype(np.float32)
    of = lambda n: lambda g: jnp.asarray(inputs[:n].T @ rng.normal(size=(n, g.shape[1])).astype(np.float32))  # noqa: E731
    assert_said(solve(replaced(problem, of(WIDTH)))[0], "width 64")
    assert "not_testable" not in solve(replaced(problem, of(WIDTH - 1)))[0].evidence


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_a_gradient_without_information_is_not_testable(value):
    problem = client("bert", drawn("bert", (3, 6, 4))).problem
    assert_said(solve(replaced(problem, lambda g: jnp.full_like(g, value)))[0], "zero or not finite")


# --- certificates do not lie --------------------------------------------------------------------------------------


class Corruption(NamedTuple):
    """What is done to a problem."""

    name: str
    change: object


def other_weights(problem: Problem) -> Problem:
    params = random_model(problem.model.family, 0.1, 1, problem.model.config.num_hidden_layers)[1]
    trainable, frozen = tuning.split(params, tuning.freezes(problem.model, "embeddings"))
    return problem._replace(trainable=trainable, frozen=frozen)


def other_attention(problem: Problem) -> Problem:
    """The embeddings are right, so that rows are found; the projections are another model's."""
    params = tuning.flatten(random_model(problem.model.family, 0.1, 1, problem.model.config.num_hidden_layers)[1])
    own = {path: params[path] for path in problem.trainable if "attention/self" in path or "attn" in path}
    return problem._replace(trainable={**problem.trainable, **own})


CORRUPTIONS = (
    Corruption("none", lambda problem: problem),
    Corruption("rows deleted", lambda problem: replaced(problem, lambda g: g.at[::7].set(0))),
    Corruption("columns deleted", lambda problem: replaced(problem, lambda g: g.at[:, ::3].set(0))),
    Corruption("noise", lambda problem: replaced(problem, lambda g: g + 1e-3 * jnp.abs(g).mean() * jnp.sin(1e5 * g))),
    Corruption("signs", lambda problem: replaced(problem, jnp.sign)),
    Corruption("other weights", other_weights),
    Corruption("other attention", other_attention),
    Corruption("mode", lambda problem: problem._replace(dropout=not problem.dropout)),
)


@pytest.mark.parametrize("corruption", CORRUPTIONS, ids=lambda c: c.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_wrong_sentence_is_certified(family, corruption):
    """Random batches with few words: dropout on; off, without and with a second layer that judges sentences."""
    for dropout, layers in ((True, 2), (False, 2), (False, 3)):
        rng = np.random.default_rng([FAMILIES.index(family), dropout])
        sentences = tuple(sentence(family, rng, n) for n in rng.integers(2, 6, 3))
        problem = corruption.change(client(family, sentences, dropout=dropout, seed=2, layers=layers).problem)
        (result,) = solve(problem)
        claimed = certified(result)
        if corruption.name == "none":
            assert sorted(claimed) == sorted(sentences)
        elif corruption.name not in ("columns deleted", "mode", "noise"):  # which leave the rows' span as it is, nearly
            assert claimed == []
        assert set(claimed) <= set(sentences)


def test_a_certified_sentence_has_every_position_and_its_ends():
    """One row of a true batch renamed: the residual alone would still be small."""
    truth = client("bert", drawn("bert", (3, 6, 4)))
    rows = [span.Row(p, t, np.ones(4), np.ones(4, bool), 1.0) for p, t in enumerate((2, 20, 3))]
    sentence = lambda *rows, residual=1e-6: span.Sentence(rows, residual)  # noqa: E731
    ok = lambda s, rows=rows: span.certified(s, rows, truth.problem)  # noqa: E731
    assert ok(sentence(0, 1, 2))
    assert not ok(sentence(0, 1, 2, residual=5e-3))
    assert not ok(sentence(0, 2))
    assert not ok(sentence(0, 1))
    assert not ok(sentence(0, 1, 2), [rows[0]._replace(token=5), *rows[1:]])


# --- what the client does to its update ---------------------------------------------------------------------------

DEFENSES = {
    "bfloat16": defenses.wire("bfloat16"),
    "float16": defenses.wire("float16"),
    "noise": defenses.noise(1e-5),
    "raw noise": defenses.noise(1e-7, normalised=False),
    "pruned": defenses.prune(0.3),
    "pruned by magnitude": defenses.prune(0.3, "magnitude"),
}


def defended(problem: Problem, defense) -> Problem:
    return problem._replace(observed=defense(jax.random.key(0), dict(problem.observed)))


@pytest.mark.parametrize("dropout", [True, False], ids=["dropout", "evaluation"])
@pytest.mark.parametrize("name", DEFENSES)
def test_a_mild_defense_does_not_hide_a_sentence(name, dropout):
    """Its tokens are found; what it was is read off the update and said."""
    (sentence,) = drawn("bert", (5,))
    problem = client("bert", [sentence], dropout=dropout, layers=3).problem
    (result,) = solve(defended(problem, DEFENSES[name]))
    found = Counter((row["position"], row["token"]) for row in result.evidence["rows"])
    assert found == Counter(enumerate(sentence))
    assert set(certified(result)) <= {sentence}
    assert len(result.notes) >= 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "defense",
    [*DEFENSES.values(), *map(defenses.noise, (1e-6, 1e-4, 1e-3, 1e-2, 1.0)), *map(defenses.prune, (0.7, 0.99))],
)
def test_certificates_do_not_lie_under_a_defense(family, defense):
    for dropout in (True, False):
        sentences = drawn(family, (3, 6, 4), seed=7)
        (result,) = solve(defended(client(family, sentences, dropout=dropout, layers=3).problem, defense))
        assert Counter(certified(result)) <= Counter(sentences)


def test_a_gradient_of_nothing_but_noise_is_not_testable():
    problem = client("bert", drawn("bert", (3, 6, 4))).problem
    (result,) = solve(defended(problem, defenses.noise(10.0)))
    assert "all noise" in result.evidence["not_testable"]


# --- a whole run --------------------------------------------------------------------------------------------------


@pytest.fixture
def settings():
    """`run` changes process-wide settings, which are put back."""
    umask, terminated = os.umask(0o022), signal.getsignal(signal.SIGTERM)
    yield
    jax.config.update("jax_default_matmul_precision", None)
    os.umask(umask)
    signal.signal(signal.SIGTERM, terminated)


@pytest.fixture
def folder(tmp_path):
    """A Hugging Face folder of a tiny random BERT of few words, with its tokenizer."""
    config = goldens.config("bert", hidden_size=WIDTH, vocab_size=len(VOCABULARY), num_labels=2)
    model = models.build(config)
    models.save(str(tmp_path / "bert"), model, random_params(model))
    save_tokenizer(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("dropout", [0.1, pytest.param(0.0, marks=pytest.mark.long)])
def test_a_whole_run_recovers_the_text(folder, tmp_path, dropout):
    """From the command line's arguments to the records: four sentences, two to a batch, exactly."""
    data = tmp_path / "four.jsonl"
    data.write_text("".join(json.dumps({"text": text, "label": i % 2}) + "\n" for i, text in enumerate(TEXTS)))
    args = (f"--model={folder}", f"--data={data}", "--attack=span", "--num_batches=2", "--batch_size=2")
    do(*args, f"--client_dropout={dropout}", f"--run_dir={tmp_path / 'run'}")
    found = records(tmp_path / "run")
    assert len(found) == 2
    for record in found:
        told = sorted(s["tokens"] for s in record["sentences"])
        assert sorted(p["tokens"] for p in record["predictions"]) == told
        assert all(s["certified"] for s in record["evidence"]["sentences"])
        assert record["cosine"] == {}
        assert (record["masks"] is None) == (dropout == 0)
        assert dropout == 0 or record["masks"]["auc"]["embeddings"] == 1
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["attack"] == "span"
    assert (tmp_path / "run" / "report.html").stat().st_size > 5000


UNUSUAL = (
    "the \u202ecat\u202c sat\u200b",
    "a \U0001f600 dog \u0000 ran",
    "[MASK] the [unused1] mat",
    "the e\u0301 box",
)


@pytest.mark.usefixtures("settings")
def test_unusual_texts_are_recovered_as_the_tokenizer_reads_them(folder, tmp_path):
    """Text direction, zero width, emoji, a null character, a combining accent; special and unused tokens by name."""
    data = tmp_path / "unusual.jsonl"
    data.write_text("".join(json.dumps({"text": text, "label": 0}) + "\n" for text in UNUSUAL))
    args = (f"--model={folder}", f"--data={data}", "--attack=span", "--num_batches=2", "--batch_size=2")
    do(*args, "--client_dropout=0.1", f"--run_dir={tmp_path / 'run'}")
    found = records(tmp_path / "run")
    assert sum(len(record["sentences"]) for record in found) == len(UNUSUAL)
    for record in found:
        assert all(s["certified"] for s in record["evidence"]["sentences"])
        assert len(record["evidence"]["rows"]) == record["evidence"]["rank"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["certified_wrong"] == 0
