"""experiments/span_decoys.py: the decoys are what they say, and false certificates are counted."""

import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest
import scripts
from goldens import golden as goldens
from span_client import WIDTH, random_params
from words import SPECIAL, VOCABULARY, save_tokenizer

from grab_jax import models, tuning
from grab_jax.attacks import span
from grab_jax.types import Result, Vocabulary

common = scripts.load("common")
decoys = scripts.load("span_decoys")
pytestmark = pytest.mark.usefixtures("quick_compilation")
TEXTS = (
    "the cat sat on a mat",
    "a big dog ran",
    "the man saw a red hat",
    "dog saw the cat",
    "the old man ran",
    "a box",
)


@pytest.fixture(scope="module")
def clients(tmp_path_factory):
    """Clients of a tiny random BERT of few words."""
    folder = tmp_path_factory.mktemp("decoys")
    config = goldens.config("bert", hidden_size=WIDTH, vocab_size=len(VOCABULARY), num_labels=2)
    model = models.build(config)
    models.save(str(folder), model, random_params(model))
    save_tokenizer(folder)
    data = folder / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text, "label": 0}) + "\n" for text in TEXTS))
    return common.load(common.Setting(str(folder), str(data), None, 0.1, 0))


@pytest.fixture
def honest(clients):
    return made(clients, "untouched")


def made(clients, kind, size=2, dropout=True):
    """The client behind a case, with fresh random numbers."""
    case = decoys.Case(3, kind, 0, size, dropout)
    return decoys.Honest(clients.simulate(3, 0, size, dropout), clients, np.random.default_rng(0), case)


def away(rows, problem):
    """How far rows are from the span of the gradients."""
    basis = decoys.subspace.spectrum(decoys.gradients(problem)).basis
    return np.linalg.norm(rows - rows @ basis @ basis.T, axis=1) / np.linalg.norm(rows, axis=1)


def changed(new, old):
    """Paths of the tensors that differ."""
    return {path for path in old if not np.array_equal(new[path], old[path])}


KERNELS = {f"bert/encoder/layer_0/attention/self/{name}/kernel" for name in ("query", "key", "value")}


def test_what_feeds_the_first_layer_is_what_its_gradient_spans(honest):
    inputs = common.fed(honest.truth).inputs
    assert decoys.rank(honest.problem) == len(inputs)
    assert away(inputs, honest.problem).max() < 1e-5


def test_deleted_inputs_are_gone_and_the_others_are_there(honest):
    decoy = decoys.inputs_deleted(honest)
    gone, left = decoys.some_inputs(honest._replace(generator=np.random.default_rng(0)))
    assert len(gone) + len(left) == decoys.rank(honest.problem)
    assert decoys.rank(decoy.problem) == len(left)
    assert away(left, decoy.problem).max() < 1e-5
    assert away(gone, decoy.problem).min() > 0.1
    assert changed(decoy.problem.observed, honest.problem.observed) == KERNELS


def test_projected_inputs_leave_no_part_in_the_gradient(honest):
    decoy = decoys.inputs_projected_out(honest)
    gone, left = decoys.some_inputs(honest._replace(generator=np.random.default_rng(0)))
    assert decoys.rank(decoy.problem) == len(left)
    for old, new in zip(decoys.gradients(honest.problem), decoys.gradients(decoy.problem), strict=True):
        assert np.abs(gone @ new).max() < 1e-5 * np.abs(gone @ old).max()


def test_random_updates_have_the_rank_of_the_true_one_and_nothing_to_claim(honest):
    for make in (decoys.random_update, decoys.shuffled_coordinates):
        decoy = make(honest)
        assert decoys.rank(decoy.problem) == decoys.rank(honest.problem)
        assert away(common.fed(honest.truth).inputs, decoy.problem).min() > 0.1
        assert (decoy.sentences, decoy.pairs) == ([], set())


def test_other_weights_keep_the_embeddings_and_the_update(honest):
    decoy = decoys.other_weights(honest)
    assert decoy.problem.observed is honest.problem.observed
    assert decoy.problem.frozen is honest.problem.frozen
    differ = changed(decoy.problem.trainable, honest.problem.trainable)
    assert differ >= KERNELS
    assert all("/attention/" in path for path in differ)


def test_other_embeddings_mix_every_coordinate(honest):
    decoy, table = decoys.other_embeddings(honest), honest.problem.model.word_table
    assert changed(decoy.problem.frozen, honest.problem.frozen) == {table}
    new, old = (np.asarray(problem.frozen[table]) for problem in (decoy.problem, honest.problem))
    np.testing.assert_array_equal(np.sort(new, axis=0), np.sort(old, axis=0))
    assert not (new[:, None] == old).all(-1).any()


def test_renamed_words_are_the_same_rows_and_special_tokens_stay(honest):
    decoy, table = decoys.renamed_words(honest), honest.problem.model.word_table
    new, old = (np.asarray(problem.frozen[table]) for problem in (decoy.problem, honest.problem))
    same = (new[:, None] == old).all(-1)
    assert (same.sum(0) == 1).all()
    assert same[: len(SPECIAL), : len(SPECIAL)].diagonal().all()
    assert not same.diagonal().all()


def test_a_wrong_rate_or_mode_is_all_that_changes(honest):
    rate, mode = decoys.wrong_rate(honest).problem, decoys.wrong_mode(honest).problem
    assert rate.model.sites["embeddings"].rate in decoys.WRONG_RATES
    assert rate._replace(model=honest.problem.model) == honest.problem
    assert (honest.problem.dropout, mode.dropout) == (True, False)


def test_two_clients_are_both_there(honest):
    decoy = decoys.two_clients(honest)
    assert len(decoy.sentences) == 4
    assert decoys.rank(decoy.problem) == sum(map(len, decoy.sentences))
    assert away(common.fed(honest.truth).inputs, decoy.problem).max() < 1e-5
    assert common.fed(honest.truth).pairs < decoy.pairs


def test_a_fused_kernel_gets_the_three_gradients_side_by_side(honest):
    """GPT-2's."""
    config = goldens.config("gpt2")
    model, parts = models.build(config), [np.full((config.n_embd,) * 2, i, np.float32) for i in range(3)]
    path = "transformer/h_0/attn/c_attn/kernel"
    problem = honest.problem._replace(model=model, observed={path: jnp.zeros(()), "other": jnp.ones(())})
    new = decoys.with_gradients(problem, parts)
    assert changed(new.observed, problem.observed) == {path}
    np.testing.assert_array_equal(decoys.gradients(new), parts)


def test_cases_go_through_kinds_then_dropout_then_sizes():
    kinds = len(decoys.KINDS)
    every = decoys.cases(6 * kinds, [1, 2, 4])
    assert [case.kind for case in every[:kinds]] == list(decoys.KINDS)
    own = [case for case in every if case.kind == "untouched"]
    assert [(case.size, case.dropout) for case in own] == [(n, on) for n in (1, 2, 4) for on in (True, False)]
    assert all(case.dropout for case in every if case.kind == "wrong rate")
    assert all(b.start - a.start == 2 * a.size for a, b in itertools.pairwise(every))


# --- counting -----------------------------------------------------------------------------------------------------


def result(sentences, rows):
    """What an attack claims; of the sentences, all are certified but those that end in 9."""
    ids = np.zeros((len(sentences), 5), np.int32)
    for row, tokens in zip(ids, sentences, strict=True):
        row[: len(tokens)] = tokens
    evidence = {
        "rank": 7,
        "sentences": [{"certified": tokens[-1] != 9} for tokens in sentences],
        "rows": [{"position": p, "token": t, "certificate": c} for p, t, c in rows],
    }
    return Result(ids, np.zeros(ids.shape), 0.0, None, None, [], [], evidence)


def test_what_is_claimed_is_compared_one_to_one(honest):
    problem = honest.problem._replace(vocabulary=Vocabulary(0, 2, 3, frozenset()))
    decoy = decoys.Decoy(problem, [(2, 5, 3), (2, 6, 3)], {(0, 2), (1, 5)})
    rows = [(0, 2, 1.0), (1, 5, 0.5), (1, 7, 0.99), (1, 8, 0.5)]
    found = decoys.judged(decoy, result([(2, 5, 3), (2, 5, 3), (2, 6, 3), (2, 7, 9)], rows))
    assert (found["rank"], found["rows"], found["rows_certified"], found["sentences_certified"]) == (7, 4, 2, 3)
    assert found["rows_false"] == [{"position": 1, "token": 7, "certificate": 0.99}]
    assert found["sentences_false"] == [(2, 5, 3)]


def solved(clients, kind, size=2):
    return decoys.solved(decoys.Case(3, kind, 0, size, True), clients)


def test_controls_show_that_the_count_works(clients):
    """What is true is certified, and a lie no certificate can see is counted."""
    honest, lie = solved(clients, "untouched"), solved(clients, "renamed words")
    assert (honest["sentences_certified"], honest["sentences_false"], honest["rows_false"]) == (2, [], [])
    assert len(lie["sentences_false"]) == lie["sentences_certified"] == 2
    assert lie["rows_false"]


@pytest.mark.parametrize("kind", ["inputs deleted", "other weights"])
def test_certificates_that_accept_everything_are_caught(clients, kind, monkeypatch):
    assert solved(clients, kind)["sentences_false"] == []
    monkeypatch.setattr(span, "certified", lambda *_: True)
    assert solved(clients, kind)["sentences_false"]


def test_rows_that_are_always_accepted_are_caught(clients, monkeypatch):
    assert solved(clients, "random update")["rows_false"] == []
    row = {"position": 1, "token": 5, "certificate": 1.0}
    monkeypatch.setattr(span, "recover", lambda *_: result([], [(1, 5, 1.0)]))
    assert solved(clients, "random update")["rows_false"] == [row]


def test_a_run_continues_and_other_settings_do_not_mix(clients, tmp_path, monkeypatch):
    asked = []
    found = {"rank": 1, "rows": 1, "rows_certified": 1, "rows_false": [], "sentences_certified": 1}
    fake = lambda one, _: asked.append(one) or {**one._asdict(), **found, "sentences_false": [], "seconds": 2.0}  # noqa: E731
    monkeypatch.setattr(decoys, "solved", fake)
    monkeypatch.setattr(common, "load", lambda setting: clients)
    every, out = decoys.cases(12, [1]), tmp_path / "results.jsonl"
    half = decoys.run(clients.setting, every[:6], out)
    assert decoys.run(clients.setting, every, out)[:6] == half
    assert asked == every
    decoys.run(clients.setting._replace(seed=1), every[:1], out)
    assert len(asked) == 13


def test_the_table_has_a_line_per_kind_and_one_for_all_decoys():
    found = {"rank": 5, "rows": 4, "rows_certified": 3, "rows_false": [1, 2], "sentences_certified": 1, "seconds": 2.0}
    records = [{**found, "kind": kind, "sentences_false": [0]} for kind in ("wrong rate", "wrong rate", "untouched")]
    lines = decoys.table(records).splitlines()
    numbers = "2 | 10 | 8 | 6 | 4 | 2 | 2 | 2.0 |"
    assert lines[2:4] == [f"| wrong rate | {numbers}", f"| **all decoys** | {numbers}"]
    assert lines[4] == "| control: untouched | 1 | 5 | 4 | 3 | 2 | 1 | 1 | 2.0 |"


def test_other_attention_reaches_every_layer(honest):
    flat = tuning.flatten(honest.clients.loaded.params)
    layers = {path.split("/")[2] for path in changed(decoys.with_other_attention(flat, honest.clients), flat)}
    assert layers == {"layer_0", "layer_1"}
