"""A subspace of layer inputs as the box solver wants it: coordinates scaled to unit size over the vocabulary."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from grab_jax.span.inputs import FirstAttention, embed


class Space(NamedTuple):
    """The subspace as the solver wants it: coordinates scaled to unit size over the vocabulary.

    `basis` `[d, r]` is orthonormal in scaled coordinates, `padded` the same in float32 with columns of zeros up to a
    bucket; `inputs` `[d, r]` spans the layer's inputs themselves. `basis` times `mixing` gives vectors whose entries
    have standard deviations `blur`.
    """

    scale: Float[np.ndarray, " d"]
    basis: Float[np.ndarray, "d r"]
    padded: Float[Array, "d p"]
    inputs: Float[np.ndarray, "d r"]
    mixing: Float[np.ndarray, "r r"]
    blur: Float[np.ndarray, "d r"]

    def deviation(self, points: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
        """Standard deviations of the coordinates of scaled points of the subspace, from the noise of its basis."""
        shares = np.linalg.solve(self.mixing, self.basis.T @ points.T)
        return np.sqrt(shares.T**2 @ self.blur.T**2)


def scaled_space(
    first: FirstAttention, basis: Float[np.ndarray, "d r"], blur: Float[np.ndarray, "d r"] | None = None
) -> Space:
    """Prepare a subspace of layer inputs for the solver; `blur` holds the standard deviations of the basis's entries.

    Where a norm follows the dropout, `x = scale (h - mean) / deviation + shift`, so h lies in the span of
    `basis / scale`, `shift / scale` and 1: two more basis vectors shared by all rows.
    """
    inputs, blur = basis, np.zeros_like(basis) if blur is None else blur
    if first.later is not None:
        gain, shift = (np.asarray(part, np.float64) for part in first.later[:2])
        more = [np.ones(len(gain))] + ([shift / gain] if np.linalg.norm(shift) > 1e-6 else [])
        basis = np.concatenate([basis / gain[:, None]] + [(m / np.linalg.norm(m))[:, None] for m in more], axis=1)
        blur = np.pad(blur / np.abs(gain)[:, None], ((0, 0), (0, len(more))))
    scale = _scale(first)
    scaled, mixing = np.linalg.qr(basis * scale[:, None])
    return Space(scale, scaled, jnp.asarray(filled(scaled)), inputs, mixing, blur * scale[:, None])


def filled(basis: Float[np.ndarray, "d r"]) -> Float[np.ndarray, "d p"]:
    """A basis in float32 with columns of zeros up to a bucket, which change no projection: few shapes."""
    width = min(bucket(basis.shape[1], 8), max(basis.shape))
    return np.pad(basis, ((0, 0), (0, width - basis.shape[1]))).astype(np.float32)


def bucket(size: int, least: int) -> int:
    """The next of 8, 12, 16, 24, 32, 48, ... (from `least`, a power of 2) at or above `size`: few shapes."""
    width = least
    while width < size:
        width = width * 3 // 2 if width & (width - 1) == 0 else width * 4 // 3
    return width


def _scale(first: FirstAttention) -> Float[np.ndarray, " d"]:
    """One over the root mean square of each coordinate, over the vocabulary at a few positions."""
    sizes = [np.asarray(_mean_square(first, p)) for p in range(min(4, len(first.places)))]
    return 1 / np.sqrt(np.maximum(np.mean(sizes, axis=0), 1e-12)).astype(np.float64)


@jax.jit
def _mean_square(first: FirstAttention, position) -> Float[Array, " d"]:
    return (embed(first, None, position) ** 2).mean(0)
