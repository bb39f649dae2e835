"""Which rows make up a sentence, from the gradients of real (tiny, random) models."""

from functools import lru_cache

import numpy as np
import pytest
from span_client import FAMILIES, HEADS, VOCABULARY, Fed, client, fed, sentence

from grab_jax import tuning
from grab_jax.models import first_attention
from grab_jax.span import assemble
from grab_jax.span import merged as merged_rows

pytestmark = pytest.mark.usefixtures("quick_compilation")
LENGTHS = {"bert": (3, 5, 4), "roberta": (3, 5, 4), "gpt2": (3, 6, 5)}


@lru_cache
def made(family, dropout=True):
    """Three sentences of several lengths: the client, and what feeds its first layer."""
    rng = np.random.default_rng(3)
    truth = client(family, tuple(sentence(family, rng, n) for n in LENGTHS[family]), dropout=dropout, seed=3)
    return truth, fed(truth)


def projected(truth, inputs):
    """Queries, keys and cotangents of some inputs under a client's gradient."""
    problem = truth.problem
    first = first_attention.describe(problem.model, tuning.flatten(tuning.merge(problem.trainable, problem.frozen)))
    gradients = first_attention.gradients(problem.model, problem.observed)
    return assemble.projections(inputs, gradients, first.query, first.key, HEADS)


def equations(truth, inputs):
    return assemble.equations(projected(truth, inputs)).reshape(len(inputs), -1)


def groups(rows: Fed):
    """The true sentences, as tuples of row numbers in order of position."""
    of = lambda s: np.flatnonzero(rows.sentences == s)  # noqa: E731
    return {tuple(int(i) for i in of(s)[np.argsort(rows.positions[of(s)])]) for s in set(rows.sentences.tolist())}


@pytest.mark.parametrize("family", FAMILIES)
def test_projections_explain_the_gradients(family):
    truth, rows = made(family)
    found = projected(truth, rows.inputs)
    assert {part.shape for part in found} == {(len(rows.inputs), HEADS, rows.inputs.shape[1] // HEADS)}
    gradients = first_attention.gradients(truth.problem.model, truth.problem.observed)
    for cotangent, gradient in zip(found[2:], gradients[:2], strict=True):
        again = rows.inputs.T @ cotangent.reshape(len(rows.inputs), -1)
        assert np.linalg.norm(again - gradient) < 1e-5 * np.linalg.norm(gradient)


@pytest.mark.parametrize("dropout", [True, False], ids=["dropout", "evaluation"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sentences_equations_sum_to_zero(family, dropout):
    """In evaluation mode equal rows are merged, so only all of them together."""
    truth, rows = made(family, dropout)
    rows = rows if dropout else rows.distinct()
    matrix = equations(truth, rows.inputs)
    for group in groups(rows) if dropout else [range(len(rows.inputs))]:
        assert assemble.residual(matrix, group) < 1e-5
        assert min(np.linalg.norm(matrix[i]) for i in group) > 1e-4  # not because nothing is there
        for part in (group[:-1], group[1:]):
            assert assemble.residual(matrix, part) > 1e-2


def test_equations_by_hand():
    """One head of width 1: `T = [q dq - dk k, -dk c]` over the head's size, c the mean size of the keys."""
    column = lambda *values: np.array(values, float).reshape(-1, 1, 1)  # noqa: E731
    found = assemble.equations(assemble.Projections(column(3, 4), column(1, 7), column(0, 2), column(1, -1)))
    size, c = 2 * 5 + np.sqrt(2) * np.sqrt(50), 5
    expected = np.array([[0 - 1, -c], [8 + 7, c]]) / size
    np.testing.assert_allclose(found.reshape(2, 2), expected)


def test_residual_by_hand():
    matrix = np.array([[3.0, 4.0], [-3.0, 0.0], [9.0, 9.0]])
    np.testing.assert_allclose(assemble.residual(matrix, (0, 1)), 4 / 8)
    assert assemble.residual(np.zeros((2, 3)), (0, 1)) == 0


# --- dropout on ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_sentences_of_several_lengths_are_found_whatever_the_order_of_rows(family):
    truth, rows = made(family)
    rows = rows.take(np.random.default_rng(0).permutation(len(rows.inputs)))
    found = assemble.assemble(equations(truth, rows.inputs), rows.positions)
    assert {sentence.rows for sentence in found.sentences} == groups(rows)
    assert all(sentence.residual < 1e-5 for sentence in found.sentences)
    assert (np.diff(found.singular) >= 0).all()
    assert (found.singular < 1e-4 * found.singular[-1]).sum() == 3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("gone", [0, 4, -1])
def test_without_one_row_no_sentence_looks_whole(family, gone):
    truth, rows = made(family)
    rows = rows.take(np.delete(np.arange(len(rows.inputs)), gone))
    found = assemble.assemble(equations(truth, rows.inputs), rows.positions)
    assert min(sentence.residual for sentence in found.sentences) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_with_a_wrong_row_no_sentence_looks_whole(family):
    truth, rows = made(family)
    rows.inputs[4], right = np.random.default_rng(0).normal(size=rows.inputs.shape[1]), rows.inputs[4].copy()
    found = assemble.assemble(equations(truth, rows.inputs), rows.positions)
    rows.inputs[4] = right
    assert min(sentence.residual for sentence in found.sentences) > 1e-2


def test_rows_without_a_first_position_make_no_sentence():
    truth, rows = made("bert")
    matrix = equations(truth, rows.inputs)
    assert assemble.assemble(matrix, rows.positions + 1).sentences == []


def test_the_sentences_of_another_client_do_not_look_whole():
    _, rows = made("bert")
    other = client("bert", ((2, 9, 8, 3), (2, 11, 3), (2, 14, 15, 16, 3)), seed=5)
    found = assemble.assemble(equations(other, rows.inputs), rows.positions)
    assert min(sentence.residual for sentence in found.sentences) > 1e-2


# --- dropout off --------------------------------------------------------------------------------------------------


def merged(family, sentences, rows=None):
    """Sentences found among the distinct rows, as tuples of tokens, and the rows."""
    truth = client(family, sentences, dropout=False)
    rows = fed(truth).distinct() if rows is None else rows
    vocabulary = VOCABULARY[family]
    ends = {"cls": vocabulary.cls, "sep": vocabulary.sep}
    found = merged_rows.assemble_merged(projected(truth, rows.inputs), rows.positions, rows.tokens, **ends)
    assert all(rows.positions[list(s.rows)].tolist() == list(range(len(s.rows))) for s in found)
    assert all(s.residual < 1e-4 for s in found)
    return [tuple(rows.tokens[list(s.rows)].tolist()) for s in found], rows


SHARING = {
    "the ends": ((2, 20, 30, 3), (2, 40, 50, 3), (2, 60, 70, 80, 3)),
    "a word": ((2, 20, 30, 3), (2, 20, 50, 3), (2, 60, 70, 80, 3)),
    "a beginning": ((2, 20, 30, 60, 3), (2, 20, 30, 70, 80, 3), (2, 20, 30, 60, 3)),
}


@pytest.mark.parametrize("sentences", SHARING.values(), ids=SHARING)
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_merged_rows_are_untangled(family, sentences):
    found, _ = merged(family, sentences)
    assert sorted(found) == sorted(set(sentences))


@pytest.mark.parametrize("seed", range(8))
def test_of_merged_rows_nothing_wrong_is_claimed(seed):
    """Few different words, so that rows are shared by many sentences, some entirely; then one row is a wrong one."""
    rng = np.random.default_rng(seed)
    family = FAMILIES[seed % 3]
    words = lambda: rng.integers(10, 13, rng.integers(1, 5)).tolist()  # noqa: E731
    vocabulary = VOCABULARY[family]
    ends = lambda inner: inner if vocabulary.cls is None else [vocabulary.cls, *inner, vocabulary.sep]  # noqa: E731
    sentences = tuple(tuple(ends(words())) for _ in range(3))
    found, rows = merged(family, sentences)
    assert set(found) <= set(sentences)
    rows.inputs[seed % len(rows.inputs)] = rng.normal(size=rows.inputs.shape[1])
    wrong, _ = merged(family, sentences, rows)
    assert set(wrong) <= set(sentences)
