"""How far an update's entries are from the client's own gradient, read off the update itself.

Rounding shows in which precision holds every entry exactly, or in evenly spaced levels that all entries lie on. Added
noise shows in the singular values: those of a random matrix fill the interval `s (sqrt(m) +- sqrt(d))` (Marchenko &
Pastur 1967), those of a gradient do not.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

WIRES = {"bfloat16": jnp.bfloat16, "float16": jnp.float16}
"""Precisions coarser than float32 that an update may come in."""
ACCUMULATED = 6.0
"""Rounding of a float32 gradient over 2^-24 of its columns' sizes: matrix products add up rounded terms."""
LEVELS = 2**15
"""Levels of one sign that are told from float32."""
ON_LEVEL = 0.02
"""Share of their distance by which float32 moves entries from levels, generously."""
MARGIN = 1.05
"""The largest singular value of noise fluctuates by less than this."""


def precision(gradient: Float[np.ndarray, "d m"]) -> str:
    """The coarsest precision that holds every entry exactly: bfloat16, float16 or float32."""
    for name, kind in WIRES.items():
        with np.errstate(over="ignore"):
            if np.array_equal(gradient.astype(kind).astype(np.float64), gradient):
                return name
    return "float32"


def rounding(gradient: Float[np.ndarray, "d m"], wire: str) -> Float[np.ndarray, "_ m"]:
    """Standard deviations of the entries' rounding errors, `[1, m]` where they are equal within columns."""
    d = len(gradient)
    if wire == "float32":
        return ACCUMULATED * 2.0**-24 * np.linalg.norm(gradient, axis=0, keepdims=True) / np.sqrt(d)
    kind = WIRES[wire]
    smallest = float(jnp.finfo(kind).smallest_subnormal)
    # Entries that are not zero are at least one spacing; those rounded to zero were within half of the smallest.
    step = np.maximum(np.abs(np.spacing(gradient.astype(kind)).astype(np.float64)), smallest)
    return step / np.sqrt(12)


def block_steps(tensor: Float[np.ndarray, "i o"], block: int) -> Float[np.ndarray, "i o"] | None:
    """Spacing of each entry of a tensor sent in int8, where consecutive entries share a scale; None if it was not.

    The largest entry of a block is 127 steps, and all entries are whole numbers of steps. Where all are 0 or 127, these
    are signs (`spacing`).
    """
    blocks = np.pad(tensor.ravel(), (0, -tensor.size % block)).reshape(-1, block)
    steps = np.abs(blocks).max(1, keepdims=True) / 127
    counts = blocks / np.where(steps > 0, steps, 1)
    sizes = np.abs(np.round(counts))
    if np.abs(np.abs(counts) - sizes).max() > 1e-3 or not ((sizes > 0) & (sizes < 127)).any():
        return None
    return np.broadcast_to(steps, blocks.shape).ravel()[: tensor.size].reshape(tensor.shape)


def spacing(gradient: Float[np.ndarray, "d m"]) -> float | None:
    """The distance of evenly spaced levels, 0 among them, that every entry lies on; None where there are none.

    The smallest entry is on the first level: small entries are the most. Entries that are all of one size lie on
    levels of that size.
    """
    sizes = np.unique(np.abs(gradient))
    sizes = sizes[sizes > 0]
    if not 0 < len(sizes) <= LEVELS or sizes[-1] > LEVELS * sizes[0] * 1.01:
        return None
    levels = sizes / sizes[0]
    return float(sizes[0]) if np.abs(levels - np.round(levels)).max() < ON_LEVEL else None


def edge(deviation: Float[np.ndarray, "_ m"], shape: tuple[int, int]) -> float:
    """A bound of the largest singular value of noise with these standard deviations (`[d, m]` or `[1, m]`)."""
    if len(deviation) == 1 and np.ptp(deviation) < 1e-9 * deviation.max():
        return MARGIN * float(deviation.max()) * (np.sqrt(shape[0]) + np.sqrt(shape[1]))
    drawn = np.random.default_rng(0).standard_normal(shape) * deviation
    return MARGIN * float(np.linalg.norm(drawn, 2))


def level(values: Float[np.ndarray, " d"], shape: tuple[int, int], *, spare: int) -> float | None:
    """Standard deviation of the noise of one level in a matrix of these singular values (largest first).

    Args:
      shape: of the matrix, `d < m`.
      spare: how many singular values the noise must explain at least.

    Returns:
      None where the lower singular values are not those of such noise.
    """
    d, m = shape
    if d >= m or len(values) < d:
        return None
    guess = values[-1] / (np.sqrt(m) - np.sqrt(d))
    for _ in range(20):
        rank = int((values > MARGIN * guess * (np.sqrt(d) + np.sqrt(m))).sum())
        if d - rank < spare:
            return None
        before, guess = guess, np.sqrt((values[rank:] ** 2).sum() / ((d - rank) * (m - rank)))
        if abs(guess - before) < 1e-6 * guess:
            break
    lowest = guess * (np.sqrt(m - rank) - np.sqrt(d - rank))
    median = np.sqrt(m - rank) * guess  # the law's median is below its mean square by a few per cent
    if values[-1] < 0.8 * lowest or not 0.75 < np.median(values[rank:]) / median < 1.1:
        return None
    return float(guess)
