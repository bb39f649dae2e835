"""Members of the gradient's row space without dropout: a projection per token, ranked over all positions.

Identical (position, token) pairs are one row here. A fixed threshold would let ghosts in: with (v, p), (w, p) and
(v, q) in the batch, (w, q) is nearly in the span, as word and position embeddings add up before the norm; only the
order of all residuals tells them apart.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from grab_jax.span.inputs import FirstAttention, embed, normalise

KEEP = 48
"""Tokens per position whose residual is computed again in float64."""
FAR = 1e-4
"""Relative residual no member reaches: two positions in a row without any below it end the scan."""


def members(
    first: FirstAttention,
    basis: Float[np.ndarray, "d r"],
    *,
    notify: Callable[[int, int], None] = lambda found, rank: None,
) -> list[tuple[int, int, Float[np.ndarray, " d"], float]]:
    """The r rows `(position, token, input, relative residual)` nearest to the span of `basis`, independent.

    Returns fewer where no more are independent; sorted by position and token.
    """
    close = []
    for position in range(len(first.places)):
        tokens = np.asarray(
            _closest(first, jnp.asarray(basis, jnp.float32), position, best=min(KEEP, len(first.words)))
        )
        rows = inputs64(first, tokens, position)
        away = np.linalg.norm(rows - rows @ basis @ basis.T, axis=1) / np.linalg.norm(rows, axis=1)
        close += [(float(a), position, int(t), row) for a, t, row in zip(away, tokens, rows, strict=True)]
        if position > 2 and min(c[0] for c in close if c[1] >= position - 1) > FAR:
            break
    found = _independent(sorted(close, key=lambda c: c[0]), basis)
    notify(len(found), basis.shape[1])
    return found


def inputs64(
    first: FirstAttention, tokens: Int[np.ndarray, " n"], position: int | Int[np.ndarray, " n"]
) -> Float[np.ndarray, "n d"]:
    """Layer inputs of tokens without dropout, in float64, after any later norm."""
    rows = np.asarray(first.words[tokens], np.float64) + np.asarray(first.places[position], np.float64)
    for norm in (first.norm, first.later):
        rows = rows if norm is None else normalise(norm, rows)
    return rows


@partial(jax.jit, static_argnames=("best",))
def _closest(first: FirstAttention, basis: Float[Array, "d r"], position, *, best: int) -> Int[Array, " n"]:
    rows = embed(first._replace(rate=0.0), None, position)
    rows = rows if first.later is None else normalise(first.later, rows)
    inside = ((rows @ basis) ** 2).sum(-1) / (rows**2).sum(-1)
    return jax.lax.top_k(inside, best)[1]


def _independent(close: list, basis: np.ndarray) -> list:
    """The nearest rows that each raise the rank by a visible amount."""
    rank, known, chosen = basis.shape[1], np.zeros((basis.shape[1], 0)), []
    for away, position, token, row in close:
        if len(chosen) == rank or away > 10 * FAR:
            break
        x = row @ basis
        x = x / np.linalg.norm(x)
        for _ in range(2):
            x = x - known @ (known.T @ x)
        if np.linalg.norm(x) > 1e-6:
            known = np.concatenate([known, x[:, None] / np.linalg.norm(x)], axis=1)
            chosen.append((position, token, row, away))
    return sorted(chosen, key=lambda c: c[:2])
