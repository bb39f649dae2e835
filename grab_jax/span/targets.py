"""How often each token is a next-token target, read off a tied head's gradient with dropout masks unknown.

With h_i the final hidden state of prediction i (after the last layer norm), p_i the model's probabilities and y_i the
target, the head's gradient under the mean loss over M predictions is `G = sum_i (p_i - e_{y_i}) h_i^T / M`. What a
layer norm scales by `a` and shifts by `b` sums to 0 before: `(h_i - b) . (1/a) = 0`. So `u = (1/a) / sum(b/a)` has
`h_i . u = 1` for every i, whatever dropout did, and

    -M G u = n - sum_i p_i

with n_v the number of predictions whose target is v. Probabilities are positive: `n_v > (-M G u)_v`, a proof.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

ROUNDING = 1e-4
"""Relative rounding of a head's gradient, generously."""
MARGIN = 0.02
"""What a bound must clear besides rounding."""


class Balance(NamedTuple):
    """`values` are n_v less the probability the model gave v, summed over predictions; `noise` bounds their error."""

    values: Float[np.ndarray, " v"]
    noise: Float[np.ndarray, " v"]


def balance(
    head: Float[np.ndarray, "v d"],
    scale: Float[np.ndarray, " d"],
    shift: Float[np.ndarray, " d"],
    predictions: int,
) -> Balance:
    """Targets less probabilities, token by token; the noise is infinite where the norm has no shift.

    Args:
      head: gradient of the head under the mean loss.
      scale: of the last layer norm.
      shift: of the last layer norm.
      predictions: M, over which the loss is the mean.
    """
    total = (shift / scale).sum()
    if not total:
        return Balance(np.zeros(len(head)), np.full(len(head), np.inf))
    along = predictions / scale / total
    return Balance(-head @ along, MARGIN + ROUNDING * (np.abs(head) @ np.abs(along)))


def at_least(found: Balance) -> Float[np.ndarray, " v"]:
    """The number of predictions that certainly have each token as their target."""
    return np.ceil(np.maximum(found.values - found.noise, 0.0))
