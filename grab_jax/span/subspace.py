"""The row space of the first attention layer's gradient: its rank and an orthonormal basis, in float64 on the host.

A kernel's gradient is `X.T @ dY`, so the columns of the query, key and value gradients, side by side, span the
layer's inputs: one dimension per token while the batch has fewer tokens than the model is wide. What stands above the
noise of the update (`noise`) is kept; how far that noise moves the basis follows from first-order perturbation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from grab_jax.span import noise

SPARE = 32
"""Singular values that the noise alone must explain before it counts as noise."""
VAGUE = 20.0
"""Floors up to which values behind the largest gap are rounding in float32."""
CLEAR = 10.0
"""Ratio of the values around a gap from which what is behind it is movement between steps: measured 26 to 700."""

SIGNS = "signs"
"""The precision of an update whose entries are all of one size."""


class Spectrum(NamedTuple):
    """Singular values of the stacked gradient (largest first), the noise floor, the chosen rank and a basis.

    `rank` counts the values above `floor`, or is the place of the largest ratio `gap_rank` where all values between the
    two are near the floor; `gap` is the ratio of the two values around it. `basis` is `[d, rank]`, orthonormal, and
    `blur` the standard deviations of its entries (0 for float32), `deviations` those of the gradients' columns (their
    root mean squares). `wire` is the precision the gradients came in, `sigma` the standard deviation of the noise that
    was added to their entries, as read off them (0: none). `rest` completes `basis`: the directions below the floor.
    `missing` is the share of entries that are exactly zero, in columns that are not.
    """

    values: Float[np.ndarray, " d"]
    floor: float
    rank: int
    gap: float
    gap_rank: int
    basis: Float[np.ndarray, "d r"]
    blur: Float[np.ndarray, "d r"]
    deviations: Float[np.ndarray, " m"]
    wire: str = "float32"
    sigma: float = 0.0
    rest: Float[np.ndarray, "d q"] | None = None
    missing: float = 0.0

    @property
    def noise(self) -> float:
        """How far noise moves a unit vector of the span at most (root mean square)."""
        return float(self.bounds.max(initial=0.0))

    @property
    def bounds(self) -> Float[np.ndarray, " r"]:
        """How far noise moves each vector of the basis (root mean square)."""
        return np.linalg.norm(self.blur, axis=0)

    def widened(self, columns: int) -> tuple[Float[np.ndarray, "d c"], Float[np.ndarray, " c"]]:
        """The first `columns` singular vectors, and how far noise moves each at most (Wedin 1972, to first order).

        That is the noise's largest singular value, as expected or as it shows behind the rank, over the vector's own: a
        unit vector x of the span looks away from `basis` by `||bounds * (basis.T @ x)||` at most. Vectors below the
        floor are taken as they are, with bound 0.
        """
        basis = self.basis if self.rest is None else np.concatenate([self.basis, self.rest], axis=1)
        bounds = np.zeros(min(columns, basis.shape[1]))
        own = min(self.rank, len(bounds))
        behind = float(self.values[self.rank]) if self.rank < len(self.values) else 0.0
        bounds[:own] = max(self.floor, min(behind, VAGUE * self.floor)) / self.values[:own]
        return basis[:, : len(bounds)], bounds


def spectrum(
    gradients: Sequence[Float[np.ndarray, "d o"]],
    *,
    vectors: bool = True,
    rounded: Float[np.ndarray, "d m"] | None = None,
    drifting: bool = False,
    averaged: str = "float32",
) -> Spectrum:
    """Rank and basis of the space that the gradients' columns span.

    Args:
      gradients: kernels' gradients `[d, o]` that share their inputs (query, key, value).
      vectors: False leaves the basis empty, in a quarter of the time.
      rounded: standard deviations of the noise that the stacked entries are known to carry besides: in a change of
        weights, the rounding of these.
      drifting: the gradients are a sum over training steps, whose inputs move a little with the weights before them:
        what lies behind the largest gap, if it is a clear one, is that movement.
      averaged: the precision in which each of several clients sent what was averaged, which does not show in the mean.

    Columns are scaled to equal noise. The noise is rounding to the precision they came in; if nothing is below that
    and the lower singular values are those of noise of one level, it is this.
    """
    stacked = np.concatenate([np.asarray(g, np.float64) for g in gradients], axis=1)
    norms = np.linalg.norm(stacked, axis=0)
    alive = norms > 1e-9 * norms.max(initial=0.0)
    d = stacked.shape[0]
    if not alive.any() or not np.isfinite(stacked).all():
        return Spectrum(np.zeros(d), 0.0, 0, 0.0, 0, *(np.zeros((d, 0)),) * 2, np.zeros(len(alive)))
    stacked = stacked[:, alive]
    wire, deviation = _rounding(gradients, stacked, alive)
    vague = VAGUE if wire == "float32" and rounded is None else 1.0
    if averaged != "float32":
        # An entry of the mean errs as one client's would, as both shrink by the same root; where the clients' entries
        # cancel it errs by more.
        wire, deviation, vague = averaged, noise.rounding(stacked, averaged), VAGUE
    if rounded is not None:
        deviation = np.hypot(deviation, rounded[:, alive])
    found = _above(stacked, deviation, vague, vectors, drifting)
    missing = float((stacked == 0).mean())
    sigma = 0.0
    if found.rank == min(stacked.shape):
        raw = np.linalg.svd(stacked, compute_uv=False)
        sigma = noise.level(raw, tuple(sorted(stacked.shape)), spare=SPARE) or 0.0
        found = _above(stacked, np.full((1, stacked.shape[1]), sigma), 1.0, vectors) if sigma else found
    deviations = np.zeros(len(alive))
    deviations[alive] = found.deviations
    blurred = wire != "float32" or sigma or rounded is not None  # float32's own rounding stays below every tolerance
    blur = found.blur if blurred else np.zeros_like(found.basis)
    if (drifting or averaged != "float32") and found.rank < d and found.floor:
        blur = blur * max(1.0, found.values[found.rank] / found.floor)
    return found._replace(blur=blur, deviations=deviations, wire=wire, sigma=sigma, missing=missing)


def _rounding(gradients, stacked, alive) -> tuple[str, Float[np.ndarray, "_ m"]]:
    """The precision the gradients came in, and the standard deviations of their entries' rounding errors.

    Levels have a distance of their own in every kernel; rounding up or down at random errs by half of it at most.
    """
    wire = noise.precision(stacked)
    largest = [float(np.abs(g).max()) for g in gradients]
    steps = [
        noise.spacing(np.asarray(g, np.float64)) if most else 0.0 for g, most in zip(gradients, largest, strict=True)
    ]
    if None in steps:
        return wire, noise.rounding(stacked, wire)
    count = max(round(most / step) for most, step in zip(largest, steps, strict=True) if step)
    if count > 1 and wire != "float32":
        return wire, noise.rounding(stacked, wire)
    columns = [np.full((1, g.shape[1]), step / 2) for g, step in zip(gradients, steps, strict=True)]
    return SIGNS if count == 1 else f"{2 * count + 1} levels", np.concatenate(columns, axis=1)[:, alive]


def _above(
    stacked: Float[np.ndarray, "d m"],
    deviation: Float[np.ndarray, "_ m"],
    vague: float,
    vectors: bool,
    drifting: bool = False,
) -> Spectrum:
    """What stands above noise of these standard deviations (`[d, m]` or `[1, m]`); see `_rank` for the others."""
    d, m = stacked.shape
    columns = np.sqrt((deviation**2).mean(0))
    scale = 1 / columns
    scale /= np.sqrt(np.mean((np.linalg.norm(stacked, axis=0) * scale) ** 2))  # columns of about unit size
    deviation = deviation * scale
    floor = noise.edge(deviation, (d, m))
    if vectors:
        left, values, right = np.linalg.svd(stacked * scale, full_matrices=False)
    else:
        values = np.linalg.svd(np.linalg.qr((stacked * scale).T, mode="r"), compute_uv=False)
        left, right = np.zeros((d, 0)), np.zeros((0, m))
    values = np.pad(values, (0, d - len(values)))
    ratios = values[:-1] / np.maximum(values[1:], floor / 10)
    gap_rank = int(ratios.argmax()) + 1
    rank = _rank(values, floor, gap_rank, np.inf if drifting and ratios[gap_rank - 1] > CLEAR else vague)
    gap = float(values[rank - 1] / max(values[rank], floor / 10)) if 0 < rank < d else 0.0
    # A left singular vector moves by noise @ right vector / singular value, to first order.
    moved = np.sqrt(np.broadcast_to(deviation**2, (d, m)) @ (right[:rank].T ** 2)) / values[: len(right[:rank])]
    return Spectrum(values, float(floor), rank, gap, gap_rank, left[:, :rank], moved, columns, rest=left[:, rank:])


def _rank(values: np.ndarray, floor: float, gap_rank: int, vague: float) -> int:
    """Values above the floor, less those behind the largest gap and below `vague` floors.

    Where a gradient's columns cancel (keys do not see what all rows share), rounding is relative to the terms and may
    pass a floor that is relative to their sum.
    """
    rank = int((values > floor).sum())
    return gap_rank if gap_rank < rank and values[gap_rank] < vague * floor else rank
