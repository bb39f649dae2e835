"""From an approximate member to an exact one: which coordinates are kept, which dropped, and a certificate.

Every coordinate of a member is either 0 or the token's value. Fitting the subspace's r coordinates to the clear cases
fixes the row; the other d - r coordinates are then a check that a row of wrong values does not pass by chance. (Zero
passes it for every token: whoever accepts a row must also ask that about the expected share is kept.) Float64, on the
host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

CLEAR = 0.05
"""A coordinate is clear when its distance to the nearest level is below this times the row's mean size."""
SPARE = 32
"""Redundant coordinates without which a row may pass by chance."""
DEVIATIONS = 3.0
"""Standard deviations by which noise may move a coordinate."""

Deviation = Callable[[Float[np.ndarray, "n d"]], Float[np.ndarray, "n d"]]


class Polished(NamedTuple):
    """Rows of the subspace, certificates (share of redundant coordinates explained, at most 1), kept coordinates."""

    rows: Float[np.ndarray, "n d"]
    certificate: Float[np.ndarray, " n"]
    kept: Bool[np.ndarray, "n d"]


def polish(
    targets: Float[np.ndarray, "n d"],
    basis: Float[np.ndarray, "d r"],
    start: Float[np.ndarray, "n d"],
    *,
    tolerance: float = 2e-3,
    accept: float = 0.98,
    deviation: Deviation = np.zeros_like,
) -> Polished:
    """Snap approximate members `start` of the tokens `targets` to exact ones.

    Least squares on the clear coordinates; where the certificate stays at or below `accept`, coordinates are deleted
    one by one by their studentised residual, which finds a single wrong level of high leverage.

    Args:
      tolerance: largest distance to a level, over the row's mean size, of an explained coordinate.
      deviation: points of the subspace -> standard deviations of their coordinates; tolerances are at least 3 of them.
    """
    targets, start = np.asarray(targets, np.float64), np.asarray(start, np.float64)
    size, noise, rows = np.abs(targets).mean(-1, keepdims=True), DEVIATIONS * deviation(start), start
    for scale in (1.0, 1.0, 0.25, 0.25):
        near, limit = _levels(rows, targets), np.maximum(scale * CLEAR * size, noise)
        rows = _fit(basis, near, (np.abs(rows - near) < limit) & (np.abs(targets) > 2.5 * limit))
    limit = lambda points, size: np.maximum(tolerance * size, DEVIATIONS * deviation(points))  # noqa: E731
    found = _certified(rows, targets, basis, limit(rows, size))
    weak = np.flatnonzero(found.certificate <= accept)
    if len(weak):
        tried = _delete(targets[weak], basis, start[weak], noise[weak])
        better = _certified(tried, targets[weak], basis, limit(tried, size[weak]))
        up = better.certificate > found.certificate[weak]
        for new, old in zip(better, found, strict=True):
            old[weak[up]] = new[up]
    return found


def _levels(rows: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The nearer of 0 and the target, coordinate by coordinate."""
    return np.where(np.abs(rows - targets) <= np.abs(rows), targets, 0.0)


def _fit(basis: np.ndarray, values: np.ndarray, use: np.ndarray) -> np.ndarray:
    """Members of the subspace closest to `values` on the coordinates `use`."""
    return np.linalg.solve(_normal(basis, use), ((use * values) @ basis)[..., None])[..., 0] @ basis.T


def _normal(basis: np.ndarray, use: np.ndarray) -> np.ndarray:
    """Gram matrices of the basis on each problem's used coordinates."""
    return np.stack([basis[u].T @ basis[u] for u in use]) + 1e-10 * np.eye(basis.shape[1])


def _certified(rows: np.ndarray, targets: np.ndarray, basis: np.ndarray, limit: np.ndarray) -> Polished:
    """Certificates over the coordinates whose two levels lie well apart for their tolerance `limit` `[n, d]`."""
    near = _levels(rows, targets)
    telling = np.abs(targets) > 3 * limit
    spare = telling.sum(-1) - basis.shape[1]
    wrong = (telling & (np.abs(rows - near) >= limit)).sum(-1)
    certificate = np.where(spare >= min(SPARE, len(basis) // 8), 1 - wrong / np.maximum(spare, 1), 0.0)
    return Polished(rows, certificate, np.abs(rows - targets) <= np.abs(rows))


def _delete(targets: np.ndarray, basis: np.ndarray, start: np.ndarray, noise: np.ndarray, most: int = 40) -> np.ndarray:
    """Refit after dropping, one at a time, the coordinate with the largest studentised residual.

    The hat matrix of the used coordinates is downdated by rank one, so a deletion costs d^2 and no factorisation.
    """
    size = np.abs(targets).mean(-1, keepdims=True)
    near = _levels(start, targets)
    use = (np.abs(start - near) < np.maximum(0.08 * size, noise)) & (
        np.abs(targets) > np.maximum(0.125 * size, 2.5 * noise)
    )
    active = np.flatnonzero(use.sum(-1) >= basis.shape[1] + 8)
    rows = start.copy()
    if not len(active):
        return rows
    use, near, limit = use[active], near[active], np.maximum(2e-4 * size, noise)[active]
    hat = basis @ np.linalg.inv(_normal(basis, use)) @ basis.T
    residual = near - np.einsum("nij,nj->ni", hat, use * near)
    each = np.arange(len(active))
    for _ in range(most):
        slack = np.maximum(1 - np.diagonal(hat, axis1=1, axis2=2), 1e-6)
        wrong = np.where(use, np.abs(residual), 0)
        go = (wrong >= limit).any(-1) & (use.sum(-1) > basis.shape[1] + 8)
        if not go.any():
            break
        worst = (wrong / np.sqrt(slack)).argmax(-1)
        use[each[go], worst[go]] = False
        column = hat[each, :, worst] * (go / slack[each, worst])[:, None]
        residual = residual + column * residual[each, worst][:, None]
        hat += column[:, :, None] * hat[each, :, worst][:, None, :]
    rows[active] = _fit(basis, near, use)
    return rows
