"""The box linear program that tells which tokens, under which dropout masks, lie in a subspace.

A token's layer input is `m * e` with a mask m of zeros and ones and a known vector e. With U the row space of the
gradient, the set `{x in U : x_j between 0 and e_j}` is a polytope that holds 0, and every true `m * e` as a vertex;
for a wrong token it is little more than 0. Maximising a linear goal over it therefore recovers mask and membership at
once. Solved by Douglas-Rachford splitting with a fixed number of iterations, many candidates at once.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

STEP, RELAXATION = 0.5, 1.7


class Iterate(NamedTuple):
    """State of the splitting: `z` lies in the subspace, `u` is the scaled dual."""

    z: Float[Array, "n d"]
    u: Float[Array, "n d"]


def start(rows: Float[Array, "n d"], basis: Float[Array, "d r"]) -> Iterate:
    """The rows' projections onto the subspace."""
    return Iterate(_project(rows, basis), jnp.zeros_like(rows))


def solve(
    rows: Float[Array, "n d"],
    basis: Float[Array, "d r"],
    goal: Float[Array, "n d"],
    iterate: Iterate,
    iterations: int,
) -> tuple[Float[Array, "n d"], Iterate]:
    """Maximise `goal . x` over `x` in span(basis) with every `x_j` between 0 and `rows_j`.

    Args:
      rows: box corners, one problem each; a coordinate of 0 forces x to 0 there.
      basis: orthonormal columns; columns of zeros are harmless padding.
      goal: its scale does not matter.
      iterate: `start(rows, basis)`, or where an earlier call ended.
      iterations: fixed count.

    Returns:
      The point inside the box and the new iterate (whose `z` is inside the subspace).
    """
    low, high = jnp.minimum(rows, 0), jnp.maximum(rows, 0)
    push = STEP * goal / jnp.maximum(jnp.abs(goal).mean(-1, keepdims=True), 1e-20)

    def step(_, carry):
        _, (z, u) = carry
        x = jnp.clip(z - u + push, low, high)
        y = RELAXATION * x + (1 - RELAXATION) * z + u
        z = _project(y, basis)
        return x, Iterate(z, y - z)

    return jax.lax.fori_loop(0, iterations, step, (rows, iterate))


def _project(x: Float[Array, "n d"], basis: Float[Array, "d r"]) -> Float[Array, "n d"]:
    return (x @ basis) @ basis.T


def kept(x: Float[Array, "n d"], z: Float[Array, "n d"], rows: Float[Array, "n d"]) -> Float[Array, " n"]:
    """Share of the row explained: once converged about the keep rate for a member, about 0 for any other token.

    The distance between the two iterates is subtracted, which tempers what an unfinished problem claims.
    """
    total = jnp.abs(rows).sum(-1)
    inside = jnp.clip(z * jnp.sign(rows), 0, jnp.abs(rows)).sum(-1) - jnp.abs(x - z).sum(-1)
    return jnp.where(total > 0, inside / jnp.where(total > 0, total, 1), -jnp.inf)


@partial(jax.jit, static_argnames=("first", "second", "rounds"))
def commit(
    rows: Float[Array, "n d"],
    basis: Float[Array, "d r"],
    goal: Float[Array, "n d"],
    box: Float[Array, "n d"],
    *,
    first: int = 150,
    second: int = 60,
    rounds: int = 2,
) -> tuple[Float[Array, "n d"], Float[Array, " n"]]:
    """Solve, then move to a vertex: each further round weighs coordinates by `1 / (1.15 - share kept)`.

    `box` is `rows` with some coordinates set to 0 where those must be dropped. Returns points of the subspace and their
    `kept` share.
    """
    x, iterate = solve(box, basis, goal, start(box, basis), first)
    for _ in range(rounds):
        share = jnp.clip(iterate.z / jnp.where(jnp.abs(rows) < 1e-6, 1e-6, rows), 0, 1)
        x, iterate = solve(box, basis, jnp.sign(rows) / (1.15 - share), iterate, second)
    return iterate.z, kept(x, iterate.z, rows)
