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


def reorder(key: Key[Array, ""], free: Bool[Array, " t"]) -> Int[Array, " t"]:
    """Source position of every position of one row after a random one of LAMP's moves (arXiv 2202.08827, section 4.2).

    Swap two tokens, move one, move a span, or rotate a prefix to the end, each a quarter of the time, among the free
    positions; the others map to themselves. A row of fewer than two free positions stays as it is.
    """
    positions, count = jnp.arange(len(free)), free.sum()
    kind_key, token_key, gap_key, turn_key = jax.random.split(key, 4)
    one, other = _different(token_key, 2, len(free), count)
    low, high = jnp.minimum(one, other), jnp.maximum(one, other)
    gaps = jnp.sort(_different(gap_key, 3, len(free) + 1, count + 1))
    turn = jax.random.randint(turn_key, (), 1, jnp.maximum(count, 2))
    ways = [
        jnp.where(positions == one, other, jnp.where(positions == other, one, positions)),
        _exchange(positions, low, jnp.where(one < other, low + 1, high), high + 1),
        _exchange(positions, *gaps),
        _exchange(positions, 0, turn, count),
    ]
    source = jnp.stack(ways)[jax.random.randint(kind_key, (), 0, len(ways))]
    places = jnp.argsort(~free, stable=True)  # the free positions first, in order
    moved = positions.at[places].set(places[source])
    return jnp.where(free & (count > 1), moved, positions)


def _different(key: Key[Array, ""], number: int, size: int, below: Int[Array, ""]) -> Int[Array, " m"]:
    """`number` different numbers in `[0, below)`, `below` being at most `size`; fewer where there are not as many."""
    draws = jax.random.uniform(key, (size,))
    order = jnp.argsort(jnp.where(jnp.arange(size) < below, draws, 2.0))
    return jnp.minimum(order[:number], jnp.maximum(below - 1, 0))


def _exchange(positions: Int[Array, " t"], low, middle, high) -> Int[Array, " t"]:
    """The blocks `[low, middle)` and `[middle, high)` in each other's place."""
    inside = (positions >= low) & (positions < high)
    turned = low + (positions - low + middle - low) % jnp.maximum(high - low, 1)
    return jnp.where(inside, turned, positions)
