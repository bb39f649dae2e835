"""Views: what an attacker sees, or chooses to look at, of the observed update, in the form that is cheapest to match.

A view turns an update into leaves (`leaves.Seen`); distances compare a candidate with what is seen and leave out the
tensors that are not there, so that a view acts on both sides.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from grab_jax.leaves import LowRank, Pruned, Seen, Signs, Unit, has_direction, thin, unit
from grab_jax.types import Defended, InputError, Update

Name = Literal["auto", "all", "normalised", "unpruned", "signs"]

NOTHING = Defended()

LEFT_OUT = 2.0**-20
"""Size of a remainder, relative to the matrix, that counts as rounding: 16 units in the last place of float32."""

_SPARE = 8


def seen(
    updates: Sequence[Update], rows: int, name: Name = "all", layers: str = "", defended: Defended = NOTHING
) -> list[dict[str, Seen]]:
    """Observed updates of one model by the name of a view and a pattern of tensors; `rows` as in `factored`.

    `auto` follows `defended`; see `through`.
    """
    chosen, defense = [only(update, layers) for update in updates], through(name, defended)
    if defense.normalised or defense.pruned or defense.signs:
        return [_part(update, defense, sized=not defended.normalised) for update in chosen]
    return factored(chosen, rows)


def through(name: Name, defended: Defended) -> Defended:
    """The defense that a view follows: the client's own (`auto`), none (`all`), or the one that it is named after.

    Signs say nothing of a tensor's size, which `auto` takes from the candidate as well: the hinge of a gradient that is
    zero would be the lowest.
    """
    if name == "auto":
        return defended._replace(normalised=defended.normalised or defended.signs)
    return Defended(normalised=name == "normalised", pruned=name == "unpruned", signs=name == "signs")


def _part(update: Update, defense: Defended, *, sized: bool) -> dict[str, Seen]:
    """What the defense left of an update; rounding that was brought to a norm of 1 is left out.

    `sized`: the client itself did not normalise, so both sides are brought to a norm of 1 here.
    """
    if defense.normalised and sized:
        update = unit(update)
    part = signs(update) if defense.signs else unpruned(update) if defense.pruned else update
    if not defense.normalised:
        return dict(part)
    return {path: Unit(leaf) for path, leaf in part.items() if has_direction(path)}


def only(observed: Update, pattern: str) -> dict[str, Array]:
    """The tensors whose path contains a match of a regular expression.

    Raises:
      InputError: no tensor does, or the expression is not one.
    """
    try:
        found = {path: value for path, value in observed.items() if re.search(pattern, path)}
    except re.error as error:
        raise InputError(f"--attack_layers={pattern}: not a regular expression ({error})") from error
    if not found:
        raise InputError(f"--attack_layers={pattern}: no shared tensor matches; one of them is {next(iter(observed))}")
    return found


def unpruned(observed: Update) -> dict[str, Pruned]:
    """A pruned update: entries that are zero were not sent, and are compared with nothing."""
    return {path: Pruned(value) for path, value in observed.items()}


def signs(observed: Update) -> dict[str, Signs]:
    """A sign-compressed update."""
    return {path: Signs(jnp.sign(value)) for path, value in observed.items()}


def factored(updates: Sequence[Update], rows: int) -> list[dict[str, Seen]]:
    """Updates with their kernels as `LowRank` leaves where that is exact and pays, in all of them alike.

    Args:
      updates: of one model.
      rows: token rows of a client batch, the most rank that a kernel's gradient can have.
    """
    found: list[dict[str, Seen]] = [{} for _ in updates]
    for path in updates[0]:
        arrays = [update[path] for update in updates]
        factors = [low_rank(np.asarray(array), rows) if path.endswith("kernel") else None for array in arrays]
        for seen, array, pair in zip(found, arrays, factors, strict=True):
            seen[path] = array if None in factors else pair
    return found


def low_rank(matrix: Float[np.ndarray, "i o"], rows: int) -> LowRank | None:
    """The factors of a matrix of rank `rows` or less; None where it has more, or where factors are no cheaper.

    In float64: a random sketch of a few columns more than `rows` holds the whole column space if the rank is that
    small (Halko et al. 2011, arXiv 0909.4061), and what the `rows` largest directions in it leave out is then rounding.
    The rank itself is not needed: directions without weight cost little and keep all shapes of a run alike.
    """
    i, o = matrix.shape
    if not thin(rows, i, o) or not np.isfinite(matrix).all():
        return None
    exact = matrix.astype(np.float64)
    sketch = np.random.default_rng(0).normal(size=(o, min(rows + _SPARE, i, o)))
    basis = np.linalg.qr(exact @ sketch)[0]
    left, values, right = np.linalg.svd(basis.T @ exact, full_matrices=False)
    u, v = (basis @ left[:, :rows]).T, values[:rows, None] * right[:rows]
    whole = np.vdot(exact, exact)
    if whole - np.vdot(v, v) > LEFT_OUT**2 * whole:
        return None
    return LowRank(jnp.asarray(u, matrix.dtype), jnp.asarray(v, matrix.dtype))
