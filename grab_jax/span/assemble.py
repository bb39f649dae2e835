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


class Sentence(NamedTuple):
    """Rows of one sentence in order of position.

    `residual` is `||sum T_i|| / sum ||T_i||` over its rows: rounding when the sentence is whole and right, 0.01 to 1
    when a row is missing or false.
    """

    rows: tuple[int, ...]
    residual: float


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
    n, heads, _ = p.query.shape
    norm = lambda x: np.linalg.norm(x, axis=(0, 2))  # noqa: E731
    size = norm(p.query_cotangent) * norm(p.query) + norm(p.key_cotangent) * norm(p.key)
    zeros = np.zeros((n, heads, 1))
    one = np.full((n, heads, 1), np.linalg.norm(p.key) / np.sqrt(n * heads))
    left = p.query[..., None] * np.concatenate([p.query_cotangent, zeros], -1)[..., None, :]
    right = p.key_cotangent[..., None] * np.concatenate([p.key, one], -1)[..., None, :]
    return (left - right) / np.maximum(size, 1e-300)[None, :, None, None]


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


def residual(matrix: Float[np.ndarray, "n m"], rows: Sequence[int]) -> float:
    """`||sum T_i|| / sum ||T_i||` over the rows."""
    part = matrix[list(rows)]
    return float(np.linalg.norm(part.sum(0)) / max(np.linalg.norm(part, axis=1).sum(), 1e-300))
