"""Sentences of rows from the queries' cotangents alone: what a query attends to is its sentence.

With S the gradient of a head's scores and K the keys, a query's cotangent is `dq_i = sum_j S_ij k_j` over the rows j of
its own sentences. While a head has as many dimensions as there are rows, the keys are linearly independent, so `dq_i`
holds no part of another sentence's keys. Without dropout equal (position, token) pairs are one row of several
sentences: such a row attends to all of them, every other row to one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

NOTHING = 1e-4
"""Share of a cotangent up to which a key has no part in it: measured below 9e-6 across sentences, 1.8e-3 within."""


def shares(query_cotangent: Float[np.ndarray, "n h e"], key: Float[np.ndarray, "n h e"]) -> Float[np.ndarray, "n n"]:
    """How much of each query's cotangent lies along what distinguishes each key from all others, from 0 to 1.

    Over the heads together; all ones where a head has fewer dimensions than there are rows, so that nothing is told.
    """
    if len(key) > key.shape[-1]:
        return np.ones((len(key), len(key)))
    own = np.linalg.pinv(key.transpose(1, 0, 2))  # [h e n]: column j is orthogonal to every key but the j-th
    own /= np.maximum(np.linalg.norm(own, axis=1, keepdims=True), 1e-300)
    parts = np.einsum("ihe,hej->hij", query_cotangent, own, optimize=True)
    size = np.linalg.norm(query_cotangent, axis=(1, 2))
    return np.sqrt((parts**2).sum(0)) / np.maximum(size, 1e-300)[:, None]


def sentences(
    shares: Float[np.ndarray, "n n"], positions: Int[np.ndarray, " n"], nothing: float = NOTHING
) -> list[tuple[tuple[int, ...], float]]:
    """Sets of rows with each position once, from 0 on, that some row attends to, the largest only.

    Args:
      nothing: share up to which a key has no part in a cotangent.

    Returns:
      Their rows in order of position, and the largest share that a row they belong to alone has outside of them.
    """
    attended = [frozenset(np.flatnonzero(row > nothing).tolist()) | {i} for i, row in enumerate(shares)]
    whole = {rows for rows in attended if sorted(positions[list(rows)]) == list(range(len(rows)))}
    largest = [rows for rows in whole if not any(rows < other for other in whole)]
    ordered = sorted(tuple(sorted(rows, key=lambda i: positions[i])) for rows in largest)
    return [(rows, _outside(shares, rows, [i for i in rows if attended[i] == set(rows)])) for rows in ordered]


def _outside(shares: Float[np.ndarray, "n n"], rows: Sequence[int], private: Sequence[int]) -> float:
    others = [j for j in range(len(shares)) if j not in rows]
    return float(shares[np.ix_(private, others)].max(initial=0.0))
