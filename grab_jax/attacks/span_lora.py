"""Span decoding of a LoRA client in evaluation mode: what the gradients of low-rank factors say of the layer's inputs.

The gradient of B is `(X A)^T dY`: it holds the first attention layer's inputs X through their projections `A^T x` only,
and these span N of the rank's r dimensions while the batch has N < r tokens. Every input is orthogonal to what A makes
of the r - N others: 2 (r - N) linear conditions with adapters of query and value, which no other token meets by chance.
Which rows belong together is not in the factors; rows with one token at each position are a sentence all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from grab_jax import local_training
from grab_jax.attacks.span_evaluation import Found, blocks_rounding, only_sentence
from grab_jax.models import first_attention
from grab_jax.span import members, subspace
from grab_jax.span.assemble import Sentence
from grab_jax.span.completion import PRUNED
from grab_jax.span.inputs import FirstAttention
from grab_jax.span.rows import Row
from grab_jax.types import Problem

NEAR = 1e-3
"""Relative residual of a true row at most: measured up to 1.4e-4, and from 0.019 for the nearest other token."""
CONDITIONS = 8
"""Fewest linear conditions that tell tokens apart."""


class Factors(NamedTuple):
    """The adapters of the first attention layer: A, and the spectrum of B's gradient, one of each per kernel."""

    a: list[Float[np.ndarray, "d r"]]
    spectra: list[subspace.Spectrum]

    @property
    def rank(self) -> int:
        """Token rows of the batch, as far as the adapters' rank shows them."""
        return max(found.rank for found in self.spectra)

    def forbidden(self) -> Float[np.ndarray, "d c"]:
        """Orthonormal directions that no input has a part in."""
        others = [a @ found.rest for a, found in zip(self.a, self.spectra, strict=True)]
        return np.linalg.qr(np.concatenate(others, axis=1))[0]


def factors(problem: Problem) -> Factors | None:
    """The first attention layer's adapters; None where there are none."""
    layers = [path.removesuffix("/kernel") for path in first_attention.paths(problem.model)]
    layers = [layer for layer in layers if f"{layer}/lora_b" in problem.observed]
    if not layers:
        return None
    a = [np.asarray(problem.trainable[f"{layer}/lora_a"], np.float64) for layer in layers]
    b = [np.asarray(problem.observed[f"{layer}/lora_b"], np.float64) for layer in layers]
    return Factors(a, [subspace.spectrum([gradient]) for gradient in b])


def reason(problem: Problem, found: Factors) -> str | None:
    """Why these factors tell nothing, or None."""
    if problem.dropout:
        return "under dropout every projection has a mask of its own, which a few numbers do not determine"
    if local_training.several(problem) or (problem.local is not None and problem.local.optimizer != "sgd"):
        return "LoRA factors are read from one step of SGD only"
    if found.rank == 0:
        return "the gradient of the first attention layer's adapters is zero or not finite"
    if any(one.wire == subspace.SIGNS for one in found.spectra):
        return "the entries of the adapters' gradients are of one size, and signs alone have no low rank"
    rank = found.a[0].shape[1]
    if sum(rank - one.rank for one in found.spectra) >= CONDITIONS:
        return None
    blur, missing = _blur(problem, found), max(one.missing for one in found.spectra)
    if missing > PRUNED and not blur.endswith(("levels", "int8")):  # which round small entries to zero
        share = f"{100 * missing:.0f} % of the entries are missing or rounded to zero"
        return f"{share}, so the adapters' gradients have no low rank"
    return (
        f"adapters of rank {rank} hold the batch's tokens only while these are fewer, and here tokens, or "
        f"{blur}, take {found.rank} of its dimensions"
    )


def _blur(problem: Problem, found: Factors) -> str:
    """What may take dimensions as tokens do: few singular values do not tell noise from them, but rounding shows."""
    paths = [path for path in problem.observed if path.endswith("/lora_b")]
    if any(blocks_rounding(problem, [path]) is not None for path in paths):
        return "rounding to int8"
    coarse = sorted({one.wire for one in found.spectra} - {"float32"})
    return f"rounding to {coarse[0]}" if coarse else "noise"


def solve(
    problem: Problem, first: FirstAttention, found: Factors, notify: Callable[[int, int], None] = lambda *_: None
) -> Found:
    """Rows that meet all conditions, and the sentence that they are if every position has one token."""
    width = problem.model.width
    forbidden = found.forbidden()
    allowed = np.linalg.qr(forbidden, mode="complete")[0][:, forbidden.shape[1] :]
    rows: list[Row] = []
    for position in range(len(first.places)):
        near = members.at_position(first, allowed, position, NEAR)
        rows += [Row(m.position, m.token, m.values, np.ones(width, bool), 1.0 - m.away) for m in near]
        notify(min(len(rows), found.rank), found.rank)
        if not near:
            break
    notes = (f"read from LoRA factors, through {forbidden.shape[1]} linear conditions on every token's input",)
    numbers = {(row.position, row.token): i for i, row in enumerate(rows)}
    sentences = [
        Sentence(tuple(numbers[pair] for pair in enumerate(ids)), 1.0, 0.0)
        for ids in (only_sentence(set(numbers), problem.vocabulary) if rows else [])
    ]
    return Found(rows, sentences, notes=notes)
