"""The row space of the first attention layer's gradient: its rank and an orthonormal basis, in float64 on the host.

A kernel's gradient is `X.T @ dY`, so the columns of the query, key and value gradients, side by side, span the
layer's inputs: one dimension per token while the batch has fewer tokens than the model is wide.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

ROUNDING = 2.0**-24
"""Relative rounding error of float32."""


class Spectrum(NamedTuple):
    """Singular values of the stacked gradient (largest first), the noise floor, the chosen rank and a basis.

    `rank` counts the values above `floor`, or is the place of the largest ratio `gap_rank` where all values between the
    two are near the floor; `gap` is the ratio of the two values around it. `basis` is `[d, rank]`, orthonormal.
    """

    values: Float[np.ndarray, " d"]
    floor: float
    rank: int
    gap: float
    gap_rank: int
    basis: Float[np.ndarray, "d r"]


def spectrum(
    gradients: Sequence[Float[np.ndarray, "d o"]], *, relative: float = ROUNDING, sigma: float = 0.0
) -> Spectrum:
    """Rank and basis of the space that the gradients' columns span.

    Args:
      gradients: kernels' gradients `[d, o]` that share their inputs (query, key, value).
      relative: rounding error of an entry relative to its size (2^-24 for float32, 2^-9 for bfloat16).
      sigma: standard deviation of noise added to every entry; columns are then not normalised.

    The noise floor is that of a random matrix of the same shape: `s (sqrt(columns) + sqrt(d))` for entries of standard
    deviation s.
    """
    stacked = np.concatenate([np.asarray(g, np.float64) for g in gradients], axis=1)
    norms = np.linalg.norm(stacked, axis=0)
    alive = norms > 1e-9 * norms.max(initial=0.0)
    d = stacked.shape[0]
    if not alive.any() or not np.isfinite(stacked).all():
        return Spectrum(np.zeros(d), 0.0, 0, 0.0, 0, np.zeros((d, 0)))
    edge = np.sqrt(alive.sum()) + np.sqrt(d)
    if sigma:
        stacked, floor = stacked[:, alive], 1.05 * sigma * edge
    else:  # rounding is relative to each column
        stacked = stacked[:, alive] / norms[alive]
        floor = 6.0 * relative / np.sqrt(d) * edge
    left, values, _ = np.linalg.svd(stacked, full_matrices=False)
    values = np.pad(values, (0, d - len(values)))
    ratios = values[:-1] / np.maximum(values[1:], floor / 10)
    rank = _rank(values, floor, int(ratios.argmax()) + 1)
    gap = float(values[rank - 1] / max(values[rank], floor / 10)) if 0 < rank < d else 0.0
    return Spectrum(values, float(floor), rank, gap, int(ratios.argmax()) + 1, left[:, :rank])


def _rank(values: np.ndarray, floor: float, gap_rank: int) -> int:
    """Values above the floor, less those just above it behind the largest gap.

    Where a gradient's columns cancel (keys do not see what all rows share), rounding is relative to the terms and may
    pass a floor that is relative to their sum.
    """
    rank = int((values > floor).sum())
    return gap_rank if gap_rank < rank and values[gap_rank] < 20 * floor else rank
