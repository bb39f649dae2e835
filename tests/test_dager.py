"""DAGER on tiny random models: whole batches without dropout, what it cannot do with the reason, and whole runs."""

import json
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from span_client import FAMILIES, TOKENS, WIDTH, client, random_model, random_params
from test_flags import parse
from test_run import do, quick, records, xla  # noqa: F401  # fixtures of whole runs
from test_span_attack import certified, drawn, replaced, sentences_of

from grab_jax import dry_run, models, simulate, tuning
from grab_jax.attack_config import AttackConfig
from grab_jax.attacks import ATTACKS, dager
from grab_jax.config import ClientConfig, Config
from grab_jax.models import first_attention
from grab_jax.span import context, enumeration, subspace

LAYERS = 3


def solve(problem, on_segment=None, **settings):
    config = AttackConfig(name="dager", **settings)
    (result,) = dager.attack(jax.random.split(jax.random.key(0), 1), [problem], config, on_segment=on_segment)
    assert json.loads(json.dumps(result.evidence, allow_nan=False)) == result.evidence
    assert result.confidence.shape == result.ids.shape
    assert ((result.confidence >= 0) & (result.confidence <= 1)).all()
    assert result.masks is None
    assert len(result.ids) == max(1, len(result.evidence["sentences"]))
    assert all(0 <= row["token"] < TOKENS for row in result.evidence["rows"])
    return result


def batch(family, lengths, seed=0, **kwargs):
    sentences = drawn(family, lengths, seed)
    return sentences, client(family, sentences, dropout=False, layers=LAYERS, **kwargs).problem


@pytest.mark.parametrize(
    ("family", "kernels"), [("bert", "query"), ("bert", "all"), ("roberta", "query"), ("gpt2", "query")]
)
def test_a_batch_of_random_tokens_is_recovered(family, kernels):
    sentences, problem = batch(family, (3, 6, 4))
    result = solve(problem, dager_kernels=kernels)
    assert Counter(certified(result)) == Counter(sentences_of(result)) == Counter(sentences)
    assert 0 < result.loss < 1e-4
    assert result.notes == []


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fixed_distances_of_the_paper_do_as_well_here(family):
    sentences, problem = batch(family, (3, 6, 4), seed=1)
    assert Counter(sentences_of(solve(problem, dager_near=1e-5, dager_whole=1e-3))) == Counter(sentences)


def test_a_distance_of_less_than_rounding_finds_nothing():
    _, problem = batch("gpt2", (3, 4, 5))
    result = solve(problem, dager_near=1e-12)
    assert result.evidence["rows"] == result.evidence["sentences"] == []
    assert "no token of the vocabulary lies in the span at the first position" in result.notes


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_what_the_second_layer_refuses_is_a_best_effort(family):
    """All tokens are there, none of the sentences passes: as many as the batch holds are returned, none proven."""
    sentences, problem = batch(family, (3, 5, 4))
    result = solve(problem, dager_whole=1e-12)
    assert len(result.evidence["sentences"]) == 3
    assert certified(result) == []
    assert any(note.startswith("3 of the sentences are best efforts") for note in result.notes)
    assert set(sentences_of(result)) & set(sentences)
    assert {(r["position"], r["token"]) for r in result.evidence["rows"]} >= {
        p for s in sentences for p in enumerate(s)
    }


def test_combinations_stay_within_the_budget(monkeypatch):
    """Sentences of one length are tried up to the budget; what was left out is said."""
    _, problem = batch("bert", (6, 6, 6), seed=2)
    tried = Counter()
    measured = context.Second.measured

    def counted(self, ids, *args):
        tried[ids.shape[1]] += len(ids)
        return measured(self, ids, *args)

    monkeypatch.setattr(context.Second, "measured", counted)
    result = solve(problem, dager_budget=50)
    assert 0 < tried[8] <= 50
    assert any("--attack_dager_budget=50" in note for note in result.notes)


def test_neither_labels_nor_lengths_nor_upper_layers_are_needed():
    sentences, problem = batch("gpt2", (3, 6, 4))
    few = {path: problem.observed[path] for layer in (0, 1) for path in first_attention.paths(problem.model, layer)}
    known = problem.known._replace(labels=None, attention=jnp.ones_like(problem.known.attention))
    result = solve(problem._replace(observed=few, known=known))
    assert Counter(certified(result)) == Counter(sentences)


def test_progress_and_registration():
    seen = []
    _, problem = batch("gpt2", (3, 4, 5))
    solve(problem, on_segment=lambda state, progress: seen.append((state, progress.phase)))
    assert set(seen) == {(None, "rows")}
    assert ATTACKS["dager"].attack is dager.attack


# --- odd batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_identical_sentences_are_one(family):
    (one,) = drawn(family, (4,))
    result = solve(client(family, (one,) * 3, dropout=False, layers=LAYERS).problem)
    assert certified(result) == sentences_of(result) == [one]


@pytest.mark.parametrize("family", FAMILIES)
def test_sentences_of_one_word(family):
    sentences, problem = batch(family, (1, 1, 5))
    assert set(certified(solve(problem))) == set(sentences)


def test_a_batch_of_one_token():
    """Its query and key have no gradient, its value has."""
    sentences, problem = batch("gpt2", (1,))
    assert certified(solve(problem)) == list(sentences)


def test_an_empty_text():
    sentences, problem = batch("bert", (0, 4, 3))
    assert set(certified(solve(problem))) == set(sentences)


def test_a_sentence_that_begins_another_is_not_told_apart():
    long, other = drawn("gpt2", (5, 4))
    result = solve(client("gpt2", (long, long[:3], other), dropout=False, layers=LAYERS).problem)
    assert set(certified(result)) == {long, other}
    assert len(result.ids) == 2


def test_the_last_token_is_invisible_under_a_next_token_loss():
    """And with it the whole gradient of sentences of one token."""
    config = Config(client=ClientConfig(dropout=0.0))
    model = models.build(random_model("gpt2", layers=LAYERS)[0].config, "causal_lm")
    shared = tuning.split(random_params(model), tuning.freezes(model, "embeddings"))

    def problem(*sentences):
        known = client("gpt2", sentences, dropout=False, layers=LAYERS)
        key, vocabulary = jax.random.key(0), known.problem.vocabulary
        return simulate.simulate(key, model, *shared, known.batch, vocabulary, config).problem

    result = solve(problem((7, 8, 9, 10), (11, 12, 13), (7, 14, 15)))
    assert set(certified(result)) == {(7, 8, 9), (11, 12), (7, 14)}
    assert result.evidence["open_end"]
    assert any("last token" in note for note in result.notes)
    assert_said(solve(problem((7,), (8,), (9,))), "zero or not finite")


# --- what cannot be tested ------------------------------------------------------------------------------------------


def assert_said(result, reason):
    said = result.evidence["not_testable"]
    assert said.startswith("not testable by DAGER: ")
    assert reason in said
    assert result.notes == [said]
    assert result.evidence["rows"] == result.evidence["sentences"] == []
    assert not np.asarray(result.confidence).any()


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_dropout_is_the_reason_for_finding_nothing(family):
    problem = client(family, drawn(family, (3, 6, 4)), layers=LAYERS).problem
    why = (
        "dropout zeroes and rescales entries of the input embeddings, so no vocabulary row lies in the gradient's span"
    )
    assert_said(solve(problem), f"{why} (0 of {TOKENS} tokens do at position 0)")


def test_as_many_tokens_as_the_width_are_not_testable():
    problem, rng = batch("bert", (3, 6, 4))[1], np.random.default_rng(0)
    full = replaced(problem, lambda g: jnp.asarray(rng.normal(size=g.shape), jnp.float32))
    assert_said(solve(full), f"{WIDTH} tokens or more >= width {WIDTH}")


def test_the_width_may_be_reached_above_the_first_layer_only():
    """Equal rows of sentences are one in the first layer, and differ in the second: the larger rank counts."""
    problem, rng = batch("bert", (3, 6, 4))[1], np.random.default_rng(0)
    above = first_attention.paths(problem.model, 1)
    full = {path: jnp.asarray(rng.normal(size=(WIDTH, WIDTH)), jnp.float32) for path in above}
    assert_said(solve(problem._replace(observed={**problem.observed, **full})), f"width {WIDTH}")


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_a_gradient_without_information_is_not_testable(value):
    problem = batch("bert", (3, 4, 5))[1]
    assert_said(solve(replaced(problem, lambda g: jnp.full_like(g, value))), "zero or not finite")


def test_a_second_layer_is_needed():
    problem = batch("bert", (3, 4, 5))[1]
    few = {path: problem.observed[path] for path in first_attention.paths(problem.model)}
    assert_said(solve(problem._replace(observed=few)), "second attention layer")
    shallow = problem._replace(model=random_model("bert", layers=2)[0])
    assert "second attention layer" in dager.not_testable(shallow, dager.measure(shallow, AttackConfig(name="dager")))


def test_dimensions_that_the_span_leaves_free():
    """49 tokens of 64 dimensions: 20 stay free by default, and a lower number brings the sentences back."""
    sentences = drawn("gpt2", (7,) * 7, seed=3)
    problem = client("gpt2", sentences, dropout=False, layers=LAYERS).problem
    assert any("--attack_dager_spare=20" in note for note in solve(problem).notes)
    assert set(sentences_of(solve(problem, dager_spare=4))) == set(sentences)


def test_another_clients_weights_prove_nothing():
    problem = batch("gpt2", (3, 6, 4))[1]
    changed = {path: value[::-1] for path, value in problem.trainable.items() if "h_0/" in path and "kernel" in path}
    assert certified(solve(problem._replace(trainable={**problem.trainable, **changed}))) == []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sigma", [1e-6, 1e-3])
def test_noise_never_proves_a_sentence(family, sigma):
    _, problem = batch(family, (3, 6, 4))
    rng = np.random.default_rng(1)
    noisy = {
        p: g + sigma * jnp.linalg.norm(g) * rng.normal(size=g.shape).astype(np.float32)
        for p, g in problem.observed.items()
    }
    assert certified(solve(problem._replace(observed=noisy))) == []


# --- parts ----------------------------------------------------------------------------------------------------------


def test_bounds_follow_from_the_singular_values():
    """Two dimensions stand out of the rounding: theirs are the floor over their values, the third has none."""
    rng = np.random.default_rng(0)
    gradient = np.float32(rng.normal(size=(16, 2)) * [1, 1e-3] @ rng.normal(size=(2, 40)))
    found = subspace.spectrum([gradient])
    basis, bounds = found.widened(3)
    assert found.rank == 2
    assert basis.shape == (16, 3)
    np.testing.assert_allclose(basis.T @ basis, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(bounds, [found.floor / found.values[0], found.floor / found.values[1], 0])
    flat = subspace.spectrum([gradient], vectors=False)
    assert (flat.rank, flat.basis.shape) == (2, (16, 0))
    np.testing.assert_allclose(flat.values, found.values, rtol=1e-6, atol=1e-9)


class Told:
    """A second layer of which one knows what is in its span."""

    def __init__(self, *sentences, causal):
        self.inside = {s[: n + 1] if causal else (s, n) for s in sentences for n in range(len(s))}
        self.causal, self.tried = causal, 0

    def measured(self, ids, tick):
        self.tried += len(ids)
        away = np.array([[self._away(tuple(s.tolist()), n) for n in range(ids.shape[1])] for s in ids])
        return np.stack([away, np.zeros_like(away)])

    def _away(self, sentence, n):
        return 0.0 if (sentence[: n + 1] if self.causal else (sentence, n)) in self.inside else 0.5


def test_prefixes_grow_as_long_as_they_stay_inside():
    sentences = ((1, 2, 3), (1, 4), (5, 2, 3, 4))
    second = Told(*sentences, causal=True)
    choices = {0: [1, 5, 6], 1: [2, 4, 7], 2: [3], 3: [4, 8]}
    found = enumeration.grow(enumeration.Judge(second, 1e-5), choices, 8, kept=3, budget=1000)
    assert set(found.found) == set(sentences)
    assert (found.best, found.tokens, found.cut) == ({}, 8, False)
    assert second.tried == 3 + 2 * 3 + 3 * 1 + 2 * 2


def test_the_best_prefixes_outside_grow_on():
    """Position 1 of the only sentence is missing: what is returned ends there, or goes on outside."""
    second = Told((1, 2, 3), causal=True)
    choices = {0: [1], 1: [7, 8], 2: [3]}
    found = enumeration.grow(enumeration.Judge(second, 1e-5), choices, 3, kept=1, budget=1000)
    assert set(found.found) == {(1,)}
    assert set(found.best) == {(1, 7, 3)}
    assert found.tokens == 1


@pytest.mark.parametrize(("budget", "tried", "whole"), [(1000, 1 + 4 * 9, True), (9, 1 + 4 + 4 * 9, False)])
def test_combinations_of_every_length(budget, tried, whole):
    """Ends stand at the ends only; with a small budget two tokens a position, and those of sentences found no more."""
    sentences = ((0, 2, 9), (0, 3, 4, 9))
    second = Told(*sentences, causal=False)
    choices = {0: [0, 5], 1: [2, 3, 6, 9], 2: [9, 4, 7, 8]}
    choices |= {3: [9]}
    found = enumeration.combine(enumeration.Judge(second, 1e-5), choices, 7, ends=(0, 9), kept=2, budget=budget)
    assert set(found.found) == set(sentences)
    assert found.tokens == 7
    assert not found.cut
    assert second.tried <= tried


def test_a_sentence_may_share_a_token_with_one_found_before():
    """2 at position 1 is used up, and 7 there is in the span by chance: tried first, and the other one after it."""
    sentences = ((0, 2, 9), (0, 2, 4, 5, 9))
    second = Told(*sentences, causal=False)
    choices = {0: [0], 1: [2, 7], 2: [9, 4], 3: [5, 3, 8, 6, 1, 11], 4: [9]}
    found = enumeration.combine(enumeration.Judge(second, 1e-5), choices, 8, ends=(0, 9), kept=2, budget=11)
    assert set(found.found) == set(sentences)
    assert second.tried <= 2 + 11


# --- whole runs -----------------------------------------------------------------------------------------------------

ODD = ("naïve café — “déjà vu” 🙂", "ﷺ ☃ ﬁ Ω≈ç√ 你好", "hm", "the same words", "the same words", "zxqv jjkw 0x7f %%%")

RUN = ("--model=builtin:gpt2-mini", "--attack=dager", "--num_batches=1", "--batch_size=6")


@pytest.fixture
def odd(tmp_path):
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps({"text": text, "label": i % 2}) + "\n" for i, text in enumerate(ODD)))
    return f"--data={path}"


@pytest.mark.long
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_whole_run_on_odd_text(odd, tmp_path, dropout):
    """Unusual characters, a sentence of one word, one that comes twice, nonsense: found, or why not."""
    where = tmp_path / "run"
    args = (*RUN, odd)
    do(*args, f"--client_dropout={dropout}", f"--run_dir={where}")
    for record in records(where):
        texts = {s["text"] for s in record["sentences"]}
        if dropout:
            assert "dropout" in record["evidence"]["not_testable"]
        else:
            assert {tuple(p["tokens"]) for p in record["predictions"]} == {
                tuple(s["tokens"]) for s in record["sentences"]
            }
            assert len(record["predictions"]) == len(texts)
    summary = json.loads((where / "summary.json").read_text())
    assert summary["outcome"] == ("not testable" if dropout else "leak shown")
    assert ("dropout" in summary["reason"]) == bool(dropout)


def test_the_plan_names_the_attack(odd):
    said = dry_run.describe(parse(*RUN, "--client_dropout=0", odd))
    assert "attack       dager: tokens by the span" in said
