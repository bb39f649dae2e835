"""The dropout rate read off an update: the share of coordinates dropped, then where the sentences' equations hold.

A subspace does not tell the scale `1 / (1 - rate)` of its rows, so rows are found at any rate assumed; queries and keys
have biases, so the equations of `assemble` hold at the true scale only.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float
from scipy.optimize import minimize_scalar

WIDEST = 0.5
"""The largest rate sought."""
SPREAD = 6
"""Standard deviations of the share of dropped coordinates within which the rate is sought."""


def dropped_share(kept: Bool[np.ndarray, "n d"]) -> tuple[float, float]:
    """The share of dropped coordinates over all rows, and its standard deviation."""
    share = 1 - kept.mean()
    return float(share), float(np.sqrt(max(share * (1 - share), 1 / kept.size) / kept.size))


def fit(kept: Bool[np.ndarray, "n d"], singular: Callable[[float], Float[np.ndarray, " n"]], sentences: int) -> float:
    """The rate at which as many combinations of the rows' equations vanish as there are sentences.

    Args:
      kept: the rows' dropout masks.
      singular: rate -> singular values of the normalised equations, smallest first.
      sentences: rows at position 0.
    """
    share, deviation = dropped_share(kept)
    if not sentences:
        return share
    low, high = max(share - SPREAD * deviation, 1e-4), min(share + SPREAD * deviation, WIDEST)
    rest = lambda rate: float(singular(rate)[:sentences].sum())  # noqa: E731
    return float(minimize_scalar(rest, bounds=(low, high), method="bounded", options={"xatol": 1e-7}).x)
