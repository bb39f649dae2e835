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


# --- dropout off: one row may belong to several sentences -------------------------------------------------------


class Shared(NamedTuple):
    """Projected equations: rows suspected of belonging to several sentences (`shared`) are projected out.

    What such a row contributes to one sentence has the form `q a^T - b [k, c]^T`, so it vanishes under
    `(I - P_q) T (I - P_k)` with projectors onto the shared rows' queries and keys; the left null space of the other
    rows' equations is then spanned by the private parts of the sentences.
    """

    shared: tuple[int, ...]
    sentences: list[Sentence]
    nullity: int
    next_singular: float

    @property
    def explained(self) -> set[int]:
        """Rows that belong to a sentence that is whole."""
        return {row for sentence in self.sentences for row in sentence.rows}

    @property
    def merit(self) -> tuple[int, int, float]:
        """More rows explained, then more null vectors, then a smaller singular value next to them."""
        return len(self.explained), self.nullity, -self.next_singular


def assemble_merged(
    p: Projections,
    positions: Int[np.ndarray, " n"],
    tokens: Int[np.ndarray, " n"],
    *,
    cls: int | None,
    sep: int | None,
    null: float = 2e-5,
    whole: float = 1e-4,
    patience: int = 4,
) -> list[Sentence]:
    """Sentences of rows of which some are shared (dropout off); the number of sentences is not given.

    Candidates for shared rows are taken in order of likelihood (position 0, [SEP], then low token ids, which tokenizers
    give to frequent tokens), more and more of them, until every row belongs to a whole sentence; then greedily the
    row that explains most, until `patience` additions in a row explain nothing more. Only whole sentences are
    returned: positions 0..n-1 once each, residual below `whole`.
    """
    problem = _Merged(equations(p), p.query, p.key, positions, tokens, cls, sep, null, whole)
    order = sorted(range(len(tokens)), key=lambda i: (positions[i] != 0, tokens[i] != sep, tokens[i]))
    most = p.query.shape[-1] - 6
    best = problem.solve(())
    for size in (1, 4, 8, 12, 16, 20, 24, 32, 48):
        if len(best.explained) == len(tokens) or size > min(most, len(tokens) - 1):
            break
        best = max(best, problem.solve(tuple(order[:size])), key=lambda s: s.merit)
    last, stale = best, 0
    while len(best.explained) < len(tokens) and len(last.shared) < most and stale < patience:
        open_rows = [i for i in range(len(tokens)) if i not in best.explained and i not in last.shared]
        if not open_rows:
            break
        last = max((problem.solve((*last.shared, i)) for i in open_rows), key=lambda s: s.merit)
        stale = 0 if len(last.explained) > len(best.explained) else stale + 1
        best = max(best, last, key=lambda s: s.merit[:1])
    return best.sentences


class _Merged(NamedTuple):
    """What every choice of shared rows is solved with."""

    matrices: np.ndarray
    query: np.ndarray
    key: np.ndarray
    positions: np.ndarray
    tokens: np.ndarray
    cls: int | None
    sep: int | None
    null: float
    whole: float

    def solve(self, shared: tuple[int, ...]) -> Shared:
        """Private parts from the null space, then which shared rows complete each of them."""
        private = np.array([i for i in range(len(self.tokens)) if i not in shared])
        if not len(private):
            return Shared(shared, [], 0, 0.0)
        flat = self._project(self.matrices[private], shared).reshape(len(private), -1)
        values, vectors = np.linalg.eigh(flat @ flat.T)
        singular = np.sqrt(np.maximum(values, 0))
        nullity = int((singular < self.null).sum())
        sentences = [self._complete(private[group], shared) for group in _parallel(vectors[:, :nullity])]
        after = float(singular[nullity]) if nullity < len(singular) else 0.0
        return Shared(shared, [s for s in sentences if s is not None], nullity, after)

    def _project(self, matrices: np.ndarray, shared: Sequence[int]) -> np.ndarray:
        if not len(shared):
            return matrices
        left, right = (np.linalg.qr(x[list(shared)].transpose(1, 2, 0))[0] for x in (self.query, self._keys()))
        matrices = matrices - np.einsum("hab,hcb,nhcd->nhad", left, left, matrices, optimize=True)
        return matrices - np.einsum("nhad,hdb,hcb->nhac", matrices, right, right, optimize=True)

    def _keys(self) -> np.ndarray:
        n, heads, _ = self.key.shape
        one = np.full((n, heads, 1), np.linalg.norm(self.key) / np.sqrt(n * heads))
        return np.concatenate([self.key, one], -1)

    def _complete(self, private: np.ndarray, shared: tuple[int, ...]) -> Sentence | None:
        """The private rows with those shared ones without which their sum does not vanish; None if not a sentence."""
        total = self.matrices[private].sum(0, keepdims=True)
        size = sum(np.linalg.norm(self.matrices[i]) for i in private)
        away = lambda rows: float(np.linalg.norm(self._project(total, rows)) / size)  # noqa: E731
        needed = [u for u in shared if away([v for v in shared if v != u]) > 20 * self.null]
        rows = sorted([*private, *needed], key=lambda i: self.positions[i])
        if list(self.positions[rows]) != list(range(len(rows))) or (away(needed)) > self.whole:
            return None
        ends = (self.cls, self.tokens[rows[0]]), (self.sep, self.tokens[rows[-1]])
        if any(known is not None and known != token for known, token in ends):
            return None
        return Sentence(tuple(int(i) for i in rows), away(needed))


def _parallel(space: Float[np.ndarray, "n m"]) -> list[np.ndarray]:
    """Groups of rows that point the same way: disjoint indicator vectors seen through any basis of their span."""
    size = np.linalg.norm(space, axis=1)
    unit, left, groups = space / np.maximum(size, 1e-12)[:, None], set(np.flatnonzero(size > 0.02)), []
    while left:
        first = max(left, key=lambda i: size[i])
        group = {i for i in left if unit[i] @ unit[first] > 0.95}
        left -= group
        groups.append(np.array(sorted(group)))
    return groups
