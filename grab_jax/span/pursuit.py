"""Which of many linearly dependent rows a gradient really holds: the solution with the fewest, by reweighting.

The gradient is `sum_i x_i c_i^T` over the batch's rows. Where more rows lie in its span than it has dimensions, many
choices of cotangents c explain it; the true one uses few rows. Minimising `sum_i ||c_i||^p` by iteratively reweighted
least squares (FOCUSS: Gorodnitsky & Rao 1997; many columns: Cotter et al. 2005), first with p = 1, which is convex,
then with p = 1/2, finds it or a solution that differs in a few rows; random starts show which rows are in doubt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

USED = 1e-6
"""Size relative to the largest row's above which a row belongs to a solution."""


def solutions(
    rows: Float[np.ndarray, "n r"],
    gradients: Sequence[Float[np.ndarray, "r _"]],
    *,
    starts: int = 8,
    seed: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Solve from several starts.

    Args:
      rows: candidates, in coordinates of the span.
      gradients: in the same coordinates; each is scaled to the same norm.
      tick: called after every start.

    Returns:
      The share of the solutions that use each row, and `||x_i|| ||c_i||` in the first of them (equal start weights).
    """
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    target = _compressed(gradients)
    generator = np.random.default_rng(seed)
    found = []
    for start in range(starts if len(rows) > rows.shape[1] else 1):
        weights = generator.exponential(size=len(rows)) if start else np.ones(len(rows))
        sizes = _reweight(unit, target, weights, power=1.0, rounds=15 if start else 40)
        found.append(_reweight(unit, target, sizes, power=0.5, rounds=60))
        tick()
    used = np.stack([sizes > USED * sizes.max() for sizes in found])
    return used.mean(0), found[0]


def _compressed(gradients: Sequence[Float[np.ndarray, "r _"]]) -> Float[np.ndarray, "r r"]:
    """The gradients side by side, in coordinates of their own row space: the sizes of cotangents stay the same."""
    together = np.concatenate([g / max(np.linalg.norm(g), 1e-300) for g in gradients], axis=1)
    left, values, _ = np.linalg.svd(together, full_matrices=False)
    return left * values


def _reweight(rows, target, weights, *, power: float, rounds: int) -> Float[np.ndarray, " n"]:
    """Sizes of the cotangents after some rounds of `min sum ||c_i||^2 / w_i`, `w = ||c||^(2 - power)`."""
    sizes = weights
    for _ in range(rounds):
        weighted = weights[:, None] * rows
        gram = rows.T @ weighted
        gram += 1e-14 * np.trace(gram) * np.eye(len(gram))
        sizes = np.linalg.norm(weighted @ np.linalg.solve(gram, target), axis=1)
        weights = sizes ** (2 - power) + 1e-13 * sizes.max()
    return sizes
