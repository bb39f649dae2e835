"""Entries that pruning left out of a low-rank gradient, from those it left in: matrix completion.

A gradient `[d, m]` of rank r has `r (d + m - r)` degrees of freedom; with clearly more entries than that, alternating
least squares over its two factors (Jain, Netrapalli & Sanghavi 2013) finds the others to rounding. The rank is grown
until the entries left in are explained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.sparse.linalg
from jaxtyping import Bool, Float

LEAST = 0.05
"""Columns with a smaller share of their entries are left out: they say little, and little says what is missing."""
SLOW = 0.97
"""A round that leaves more than this of the residual: the rank is too low."""
UNDERFLOW = 2.0**-24
"""The smallest number that float16 holds."""
PRUNED = 0.001
"""Share of zeros from which on entries count as pruned."""
MOST = 0.5
"""Degrees of freedom tried, over the entries left in: beyond it a completion is slow, then not unique."""
EXACT = 1e-6
"""Relative residual of the entries left in at which a completion counts as found."""


class Completion(NamedTuple):
    """The completed gradient, the rank used and the relative residual of the entries left in."""

    gradient: Float[np.ndarray, "d m"]
    rank: int
    residual: float


def left_in(gradient: Float[np.ndarray, "d m"]) -> Bool[np.ndarray, "d m"] | None:
    """Entries that were not pruned, or None where nothing was: an exact 0 in a column that is not all zero.

    None as well where float16 may have rounded entries to 0, which tells them from pruned ones no more.
    """
    alive = (gradient != 0).any(0, keepdims=True)
    there = (gradient != 0) | ~alive
    smallest = np.abs(gradient[gradient != 0]).min(initial=np.inf)
    return there if (~there).sum() > PRUNED * alive.sum() * len(gradient) and smallest != UNDERFLOW else None


def complete(
    gradient: Float[np.ndarray, "d m"],
    there: Bool[np.ndarray, "d m"],
    *,
    rounds: int = 2000,
    notify: Callable[[int], None] = lambda rank: None,
) -> Completion | None:
    """Fill in the entries that are not `there`; None where no low rank explains those that are.

    One direction is added at a time, the strongest of what is not explained: a rank too high leaves the entries of its
    spare directions to chance.

    Args:
      rounds: of alternating least squares in all.
      notify: called with the rank so far after every round.
    """
    norms = np.linalg.norm(gradient, axis=0)
    alive = (norms > 0) & (there.mean(0) > LEAST)
    if not alive.any():
        return None
    scaled, seen = gradient[:, alive] / norms[alive], there[:, alive].astype(np.float64)
    size, (d, m) = np.linalg.norm(scaled), scaled.shape
    left, residual = np.zeros((d, 0)), np.inf
    rest = scaled
    for _ in range(rounds):
        before, residual = residual, float(np.linalg.norm(rest) / size)
        if residual < EXACT and residual > 0.9 * before:
            filled = np.zeros_like(gradient)
            filled[:, alive] = np.where(there[:, alive], scaled, left @ right.T) * norms[alive]
            return Completion(filled, left.shape[1], residual)
        if residual > SLOW * before or not left.size:
            left = np.concatenate([left, scipy.sparse.linalg.svds(rest, 1)[0]], axis=1)
            residual = np.inf
        if left.shape[1] * (d + m - left.shape[1]) > MOST * seen.sum():
            return None
        left, right = _round(scaled, seen, left)
        rest = seen * (scaled - left @ right.T)
        notify(left.shape[1])
    return None


def _round(scaled, seen, left) -> tuple[Float[np.ndarray, "d r"], Float[np.ndarray, "m r"]]:
    """Both factors fitted in turn; the left one orthonormal."""
    right = np.linalg.qr(_fit(scaled, seen, left))[0]
    left = np.linalg.qr(_fit(scaled.T, seen.T, right))[0]
    return left, _fit(scaled, seen, left)


def _fit(scaled, seen, left) -> Float[np.ndarray, "m r"]:
    """For every column the least-squares coefficients of the factor on the entries seen."""
    r = left.shape[1]
    gram = (seen.T @ (left[:, :, None] * left[:, None, :]).reshape(len(left), -1)).reshape(-1, r, r)
    gram += 1e-12 * np.eye(r) * np.maximum(np.trace(gram, axis1=1, axis2=2), 1e-300)[:, None, None]
    return np.linalg.solve(gram, (scaled.T @ left)[..., None])[..., 0]
