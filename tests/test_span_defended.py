"""Span decoding and DAGER under DP-SGD, signs and quantisation: a true certificate, or a reason; never a false one."""

import itertools
from collections import Counter

import jax
import numpy as np
import pytest
from span_client import FAMILIES, client
from test_span_attack import certified, drawn, solve

from grab_jax.attack_config import AttackConfig
from grab_jax.attacks import dager, span
from grab_jax.config import DefenseConfig
from grab_jax.local_training import Local
from grab_jax.span import noise, subspace

CLIP = 1e-3
"""Below the norm of every example's gradient here."""
DEFENSES = {
    **{
        f"{bits} bits, {by}": DefenseConfig(quantise=bits, quantise_by=by)
        for bits, by in itertools.product((2, 4, 8, 12), ("nearest", "stochastic"))
    },
    **{
        f"clip and noise {multiplier:g}": DefenseConfig(clip=CLIP, noise_multiplier=multiplier)
        for multiplier in (0.0, 1e-6, 1e-4, 1e-2, 1.0)
    },
    "sign": DefenseConfig(sign=True),
    "prune, then sign": DefenseConfig(prune=0.5, sign=True),
    "prune, then 8 bits": DefenseConfig(prune=0.3, quantise=8),
    "all of them": DefenseConfig(clip=CLIP, noise_multiplier=1e-6, prune=0.3, quantise=12),
}
SOON = {("bert", True, "sign")}
CASES = [
    pytest.param(*case, marks=() if case in SOON else pytest.mark.long)
    for case in itertools.product(FAMILIES, (True, False), DEFENSES)
]


@pytest.mark.parametrize(("family", "dropout", "name"), CASES)
def test_a_defense_ends_in_true_certificates_or_in_a_reason(family, dropout, name):
    sentences, said = drawn(family, (3, 6, 4), seed=7), DEFENSES[name]
    problem = client(family, sentences, dropout=dropout, layers=3, defense=said).problem
    found = dager.attack(jax.random.split(jax.random.key(0), 1), [problem], AttackConfig(name="dager"))
    for result in (*solve(problem), *found):
        assert Counter(certified(result)) <= Counter(sentences)
        assert ("signs alone" in result.evidence.get("not_testable", "")) == (said.sign or said.quantise == 2)
        assert result.notes or result.evidence["sentences"]
    if name == "clip and noise 0" and dropout:  # what clipping does to a sentence's gradient is to scale it
        assert Counter(certified(solve(problem)[0])) == Counter(sentences)


def test_levels_are_read_off_the_entries():
    rng = np.random.default_rng(0)
    exact = rng.normal(size=(40, 30))
    for levels in (1, 7, 2047):
        step = np.abs(exact).max() / levels
        found = noise.spacing(np.float32(np.round(exact / step) * step).astype(np.float64))
        assert found == pytest.approx(step, rel=1e-6)
    assert noise.spacing(np.float32(exact).astype(np.float64)) is None
    assert noise.spacing(np.where(rng.random((40, 30)) < 0.5, 0, exact)) is None
    assert noise.spacing(np.zeros((2, 2))) is None


def test_quantised_gradients_keep_their_rank_and_are_told_from_pruned_ones():
    """Small entries are zero in both; the errors of levels are allowed for, kernel by kernel."""
    rng = np.random.default_rng(1)
    kernels = [scale * rng.normal(size=(48, 3)) @ rng.normal(size=(3, 32)) for scale in (1.0, 30.0)]
    steps = [np.abs(kernel).max() / 127 for kernel in kernels]
    sent = [np.float32(np.round(kernel / step) * step) for kernel, step in zip(kernels, steps, strict=True)]
    found = subspace.spectrum(sent)
    assert (found.rank, found.wire, found.sigma) == (3 + 3, "255 levels", 0)
    np.testing.assert_allclose(found.deviations, np.repeat(steps, 32) / 2, rtol=1e-5)
    assert found.noise > 0


@pytest.mark.long
def test_the_last_token_of_a_clipped_causal_client_is_not_read():
    """Its sentences weigh less in the head's gradient, by unknown factors."""
    said = {"task": "causal_lm", "frozen": "none", "defense": DefenseConfig(clip=CLIP)}
    (result,) = solve(client("gpt2", drawn("gpt2", (5, 4)), **said).problem)
    assert [proof["last"] for proof in result.evidence["sentences"]] == ["unknown"] * 2


@pytest.mark.parametrize(
    ("family", "words", "said"),
    [
        ("bert", (5,), DefenseConfig(noise=1e-6)),  # its tensors are brought to one size each, first
        ("gpt2", (3, 6, 4), DefenseConfig(quantise=12)),
        pytest.param("gpt2", (3, 6, 4), DefenseConfig(noise=1e-4), marks=pytest.mark.long),
        pytest.param("bert", (5,), DefenseConfig(quantise=12), marks=pytest.mark.long),
    ],
)
def test_decoded_rows_under_noise_make_sentences_that_nothing_proves(family, words, said):
    """Without dropout and without a second layer that judges, the equations hold up to the noise only."""
    sentences = drawn(family, words, seed=7)
    (result,) = solve(client(family, sentences, dropout=False, defense=said).problem)
    found = [tuple(ids[sure > 0].tolist()) for ids, sure in zip(result.ids, result.confidence, strict=True)]
    assert Counter(found) == Counter(sentences)
    assert not certified(result)


def test_noise_on_tensors_of_one_size_leaves_the_equations_to_rounding():
    """The key gradient's own norm is read off the rows: without it the residual is 0.02."""
    (result,) = solve(
        client("bert", drawn("bert", (5,), seed=7), dropout=False, defense=DefenseConfig(noise=1e-6)).problem
    )
    assert result.loss < 1e-4


def test_an_optimizer_that_is_not_told_may_be_why_there_is_no_low_rank():
    full = subspace.spectrum([np.random.default_rng(0).normal(size=(8, 24))])
    blind = Local(optimizer=None, momentum=None, weight_decay=None)
    assert "optimizer, which was not told" in span.not_testable(full, 8, local=blind)
    assert "optimizer" not in span.not_testable(full, 8, local=Local())
