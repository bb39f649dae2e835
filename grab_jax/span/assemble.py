"""Which rows belong to one sentence: linear algebra on the attention scores' gradient, no search.

With S the gradient of a head's scores (block diagonal over sentences, every row of it sums to 0), the projections'
cotangents are `dQ = S K` and `dK = S^T Q` up to one scale, so `Q^T dQ` and `dK^T K` are the same matrix, sentence by
sentence, and `dK` sums to 0. Hence for every sentence s and head

    sum over rows i of s of  T_i = 0,    T_i = q_i [dq_i, 0]^T - dk_i [k_i, 1]^T

and the left null space of the matrix with rows `vec(T_i)` is spanned by the sentences' indicator vectors. It holds
with attention dropout, causal masks and any loss. Rows carry their positions, so the order is free.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int
from scipy.optimize import linear_sum_assignment

WHOLE = 1e-3
"""Largest residual of a proven sentence without noise: right ones are below 1e-5, wrong ones above 1e-2."""

UNPROVEN = -1.0
"""Limit of a sentence that no residual proves."""


class Sentence(NamedTuple):
    """Rows of one sentence in order of position.

    `residual` is `||sum T_i|| / sum ||T_i||` over its rows: rounding when the sentence is whole and right, 0.01 to 1
    when a row is missing or false. Up to `limit` it proves the sentence.
    """

    rows: tuple[int, ...]
    residual: float
    limit: float = WHOLE


class Assembly(NamedTuple):
    """The sentences found; `singular` are the singular values of the normalised equations (smallest first)."""

    sentences: list[Sentence]
    singular: Float[np.ndarray, " n"]


class Projections(NamedTuple):
    """Per row and head: queries and keys with their cotangents."""

    query: Float[np.ndarray, "n h e"]
    key: Float[np.ndarray, "n h e"]
    query_cotangent: Float[np.ndarray, "n h e"]
    key_cotangent: Float[np.ndarray, "n h e"]


def projections(
    inputs: Float[np.ndarray, "n d"],
    gradients: Sequence[Float[np.ndarray, "d d"]],
    query: tuple[Float[Array | np.ndarray, "d d"], Float[Array | np.ndarray, " d"]],
    key: tuple[Float[Array | np.ndarray, "d d"], Float[Array | np.ndarray, " d"]],
    heads: int,
) -> Projections:
    """Queries and keys of the rows, and the cotangents that explain the gradients.

    Args:
      inputs: the layer's inputs, after any norm; together they must span the gradients' columns.
      gradients: of the query and key kernels (further ones are ignored).
      query: kernel `[d, d]` and bias `[d]`.
      key: the same.
    """
    split = lambda x: x.reshape(len(inputs), heads, -1)  # noqa: E731
    cotangents = [split(np.linalg.lstsq(inputs.T, g, rcond=None)[0]) for g in gradients[:2]]
    values = [split(inputs @ np.asarray(w, np.float64) + np.asarray(b, np.float64)[None]) for w, b in (query, key)]
    return Projections(*values, *cotangents)


def equations(p: Projections) -> Float[np.ndarray, "n h e f"]:
    """The matrices `T_i` `[h, e, e + 1]`, every head scaled to the same size."""
    (size, one), column = _scales(p), (*p.query.shape[:2], 1)
    left = p.query[..., None] * np.concatenate([p.query_cotangent, np.zeros(column)], -1)[..., None, :]
    right = p.key_cotangent[..., None] * np.concatenate([p.key, np.full(column, one)], -1)[..., None, :]
    return (left - right) / np.maximum(size, 1e-300)[None, :, None, None]


def _scales(p: Projections) -> tuple[Float[np.ndarray, " h"], float]:
    """The size of every head's equations, and what stands for the 1 beside a key."""
    norm = lambda x: np.linalg.norm(x, axis=(0, 2))  # noqa: E731
    size = norm(p.query_cotangent) * norm(p.query) + norm(p.key_cotangent) * norm(p.key)
    return size, float(np.linalg.norm(p.key) / np.sqrt(np.prod(p.key.shape[:2])))


def assemble(matrix: Float[np.ndarray, "n m"], positions: Int[np.ndarray, " n"]) -> Assembly:
    """Sentences of rows that all belong to exactly one sentence (dropout on: no two rows are merged).

    Args:
      matrix: rows `vec(T_i)`.
      positions: of the rows; each row at position 0 starts a sentence.
    """
    roots = np.flatnonzero(positions == 0)
    values, vectors = np.linalg.eigh(matrix @ matrix.T)
    singular = np.sqrt(np.maximum(values, 0))
    if not len(roots):
        return Assembly([], singular)
    null = vectors[:, : len(roots)]
    membership = null @ np.linalg.pinv(null[roots], rcond=1e-4)
    groups = [[int(root)] for root in roots]
    for position in range(1, int(positions.max()) + 1):
        here = np.flatnonzero(positions == position)
        rows, sentences = linear_sum_assignment(-membership[here])
        for row, sentence in zip(here[rows], sentences, strict=True):
            # A row joins a sentence that has just the position before it; what is left over stays unassigned.
            if membership[row, sentence] > 0.5 or len(groups) == 1:
                groups[sentence].append(int(row))
    return Assembly([Sentence(tuple(g), residual(matrix, g)) for g in groups], singular)


def key_scale(p: Projections) -> float:
    """The factor of the key cotangents under which all rows' equations add up: 1 unless tensors were rescaled."""
    left = np.einsum("nha,nhb->hab", p.query, p.query_cotangent)
    right = np.einsum("nha,nhb->hab", p.key_cotangent, p.key)
    return float((left * right).sum() / max((right**2).sum(), 1e-300))


def bounded(
    sentence: Sentence,
    matrix: Float[np.ndarray, "n m"],
    p: Projections,
    inputs: Float[np.ndarray, "n d"],
    noise: tuple[Float[np.ndarray, " d"], Float[np.ndarray, " d"]],
) -> Sentence:
    """The sentence with the residual that proves it: what noise explains, if every row of it would be missed.

    Args:
      matrix: rows `vec(T_i)`.
      inputs: the rows themselves, by which the cotangents were fitted.
      noise: standard deviations of the query and key gradients, for every column.
    """
    rows = list(sentence.rows)
    sizes = np.linalg.norm(matrix[rows], axis=1)
    total = max(sizes.sum(), 1e-300)
    expected, weakest = _expected(rows, p, inputs, noise) / total, sizes.min() / total
    return sentence._replace(limit=float(min(max(WHOLE, 3 * expected), weakest / 4)) if expected < weakest / 5 else 0.0)


def _expected(rows: list[int], p: Projections, inputs: np.ndarray, noise: tuple[np.ndarray, np.ndarray]) -> float:
    """Root mean square of `||sum T_i||` over rows of one sentence, from the noise of the cotangents."""
    size, one = _scales(p)
    spread = np.linalg.pinv(inputs @ inputs.T)[np.ix_(rows, rows)]
    heads = len(size)
    keys = np.concatenate([p.key, np.full((*p.key.shape[:2], 1), one)], -1)
    parts = [
        np.einsum("ihe,jhe,ij->h", x[rows], x[rows], spread) * (deviation.reshape(heads, -1) ** 2).sum(1)
        for x, deviation in zip((p.query, keys), noise, strict=True)
    ]
    return float(np.sqrt(np.divide(sum(parts), size**2, out=np.zeros(heads), where=size > 0).sum()))


def residual(matrix: Float[np.ndarray, "n m"], rows: Sequence[int]) -> float:
    """`||sum T_i|| / sum ||T_i||` over the rows."""
    part = matrix[list(rows)]
    return float(np.linalg.norm(part.sum(0)) / max(np.linalg.norm(part, axis=1).sum(), 1e-300))
