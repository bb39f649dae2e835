"""Random rearrangements of the free positions of a batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key


def permutation(key: Key[Array, ""], free: Bool[Array, "b t"], *, shared: bool | Bool[Array, ""]) -> Int[Array, "b t"]:
    """Source position of every position under a random permutation of each row's free positions.

    `rows[j, source[j]]` is the permuted row j. Positions that are not free map to themselves. With `shared=True`
    all rows follow one random order (rows with the same free positions get the same permutation), otherwise each row
    draws its own.
    """
    batch, length = free.shape
    draws = jax.random.uniform(key, (batch, length))
    order = jnp.argsort(jnp.where(free, jnp.where(shared, draws[:1], draws), 2.0), axis=1)
    rank = jnp.cumsum(free, axis=1) - 1
    return jnp.where(free, jnp.take_along_axis(order, rank, axis=1), jnp.arange(length)[None])


def rearrange(rows: Array, source: Int[Array, "b t"]) -> Array:
    """Gather along axis 1 of `rows` (`[b t]` tokens or `[b t d]` embeddings)."""
    index = source if rows.ndim == 2 else source[..., None]
    return jnp.take_along_axis(rows, index, axis=1)
