"""Norms of `x.T @ dy - g` that never hold the matrix: blocks of rows are formed, reduced and forgotten.

The entrywise L1 norm (Grab, eq. 1; TAG) does not factor, so each entry has to be computed; it need not be stored. The
derivative with respect to `x` and `dy` forms each block a second time instead of keeping it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float

BLOCK = 2**18
"""Entries of a block: 1 MB of float32, which stays in the cache of one core."""

Factors = tuple[Float[Array, "r i"], Float[Array, "r o"]]
Gap = Callable[[Array, Array], Array]


def subtract(ours: Array, theirs: Array) -> Array:
    """`ours - theirs`, the plain residual."""
    return ours - theirs


def residual_norms(
    x: Float[Array, "n i"],
    dy: Float[Array, "n o"],
    g: Float[Array, "i o"] | Factors | None = None,
    *,
    gap: Gap = subtract,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`(sum of squares, sum of absolute values)` of the entries of `gap(x.T @ dy, g)`.

    Differentiable in `x` and `dy` only. On a CPU a batched axis (restarts, candidates, victims) becomes a loop, so that
    one block at a time is in cache.

    Args:
      x: first factor.
      dy: second factor.
      g: the matrix compared with: an array, factors `(u, v)` of `u.T @ v`, or None for zero. Factors are only ever
        subtracted: the block comes from `[x; u].T @ [dy; -v]`.
      gap: entrywise, with `gap(0, 0) = 0`.
    """
    return _norms(gap, x, dy, jax.lax.stop_gradient(g))


def _looped(function):
    """On a CPU, vmap becomes a loop: one block in cache beats a batched product several times over."""
    looped = sequential_vmap(function)
    return lambda *args: looped(*args) if jax.default_backend() == "cpu" else function(*args)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norms(gap, x, dy, g):
    return _looped(partial(_sums, gap))(x, dy, g)


def _forward(gap, x, dy, g):
    return _norms(gap, x, dy, g), (x, dy, g)


def _backward(gap, saved, cotangents):
    return *_looped(partial(_slopes, gap))(*saved, *cotangents), None


_norms.defvjp(_forward, _backward)


def _sums(gap, x, dy, g):
    """Column sums in the loop, which is vectorised, and one sum of those at the end."""
    blocks, residual = _blocks(x, dy, g)

    def visit(sums, block):
        entries = gap(*residual(block))
        return (sums[0] + (entries * entries).sum(0), sums[1] + jnp.abs(entries).sum(0)), None

    zero = jnp.zeros(dy.shape[1:], dy.dtype)
    squares, absolutes = jax.lax.scan(visit, (zero, zero), blocks)[0]
    return squares.sum(), absolutes.sum()


def _slopes(gap, x, dy, g, by_square, by_absolute):
    """`(dy @ w.T, x @ w)` for the weights `w` of the residual's entries."""
    blocks, residual = _blocks(x, dy, g)

    def visit(along_dy, block):
        ours, theirs = residual(block)
        entries, pull = jax.vjp(lambda ours: gap(ours, theirs), ours)
        (weight,) = pull(2 * by_square * entries + by_absolute * jnp.sign(entries))
        return along_dy + block[0] @ weight, dy @ weight.T

    along_dy, along_x = jax.lax.scan(visit, jnp.zeros_like(dy), blocks)
    return jnp.moveaxis(along_x, 0, 1).reshape(len(x), -1)[:, : x.shape[1]], along_dy


def _blocks(x, dy, g):
    """Blocks of columns of `x` (and of `u`, or of rows of `g`), and `block -> (ours, theirs)`."""
    split = partial(_split, rows=_rows(x.shape[1], dy.shape[1]))
    across = lambda factor: jnp.moveaxis(split(jnp.moveaxis(factor, 1, 0)), 2, 1)  # noqa: E731
    if g is None:
        return (across(x), None), lambda block: (block[0].T @ dy, jnp.zeros((), dy.dtype))
    if not isinstance(g, tuple):
        return (across(x), split(g)), lambda block: (block[0].T @ dy, block[1])
    stacked = jnp.concatenate([dy, -g[1]])
    both = lambda block: jnp.concatenate(block).T @ stacked  # noqa: E731
    return (across(x), across(g[0])), lambda block: (both(block), jnp.zeros((), dy.dtype))


def _rows(i: int, o: int) -> int:
    """Rows of a block: a power of two, which divides the usual widths."""
    return min(i, 1 << max(0, (BLOCK // o).bit_length() - 1))


def _split(array: Array, rows: int) -> Array:
    """`[i, ...]` -> `[blocks, rows, ...]`, filled with zeros."""
    missing = -len(array) % rows
    filled = jnp.pad(array, ((0, missing), (0, 0))) if missing else array
    return filled.reshape(-1, rows, array.shape[1])
