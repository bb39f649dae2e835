"""Sentences without dropout: equal (position, token) pairs are one row, which may belong to several sentences.

What a shared row contributes to one sentence's equations (`assemble`) has the form `q a^T - b [k, 1]^T`, so it vanishes
under `(I - P_q) T (I - P_k)` with projectors onto the shared rows' queries and keys; the left null space of the other
rows' equations is then spanned by the private parts of the sentences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from grab_jax.span.assemble import Projections, Sentence, equations


class Shared(NamedTuple):
    """The sentences found with the rows `shared` projected out, and how clear the null space was."""

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
