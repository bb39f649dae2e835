"""Leaves of an update: a plain array, or `Outer(x, dy)`, a linear layer's gradient `x.T @ dy` that is not formed.

A transformer's gradient is its layers' inputs and output cotangents: `n (i + o)` numbers instead of `i * o` for a
kernel `[i, o]` seen by n token rows. `inner`, `square_norm` and `residual_norms` are all a distance needs.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float


class Outer(NamedTuple):
    """The matrix `x.T @ dy`, of shape `[i, o]`."""

    x: Float[Array, "n i"]
    dy: Float[Array, "n o"]


Leaf = Array | Outer


def dense(leaf: Leaf) -> Float[Array, ...]:
    """The leaf as an array."""
    return leaf.x.T @ leaf.dy if isinstance(leaf, Outer) else leaf


def scale(leaf: Leaf, factor: Float[Array, ""]) -> Leaf:
    """The leaf times a scalar."""
    return Outer(leaf.x * factor, leaf.dy) if isinstance(leaf, Outer) else leaf * factor


def inner(leaf: Leaf, array: Float[Array, ...]) -> Float[Array, ""]:
    """Sum of the products of all entries of a leaf and an array of its shape."""
    if isinstance(leaf, Outer):
        return jnp.vdot(leaf.x @ array, leaf.dy)
    return jnp.vdot(leaf, array)


def square_norm(leaf: Leaf) -> Float[Array, ""]:
    """Sum of squares of all entries; through n x n Gram matrices where that is cheaper than the matrix itself."""
    if not isinstance(leaf, Outer):
        return jnp.vdot(leaf, leaf)
    (rows, i), o = leaf.x.shape, leaf.dy.shape[1]
    if rows * (i + o) < i * o:
        return jnp.vdot(leaf.x @ leaf.x.T, leaf.dy @ leaf.dy.T)
    full = dense(leaf)
    return jnp.vdot(full, full)


def residual_norms(leaf: Leaf, array: Float[Array, ...]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`(sum of squares, sum of absolute values)` of `leaf - array`.

    Differentiable in the leaf only. For an `Outer` leaf the residual matrix lives only inside one step of a
    sequential loop over the batched axis (restarts, candidates, victims), so that it stays in cache, and the
    derivative forms it again instead of keeping it.
    """
    if isinstance(leaf, Outer):
        return _outer_residual(leaf.x, leaf.dy, jax.lax.stop_gradient(array))
    difference = leaf - jax.lax.stop_gradient(array)
    return jnp.vdot(difference, difference), jnp.abs(difference).sum()


def _norms(x, dy, array):
    residual = x.T @ dy - array
    return jnp.vdot(residual, residual), jnp.abs(residual).sum()


def _cotangents(x, dy, array, by_square, by_absolute):
    residual = x.T @ dy - array
    weight = 2 * by_square * residual + by_absolute * jnp.sign(residual)
    return dy @ weight.T, x @ weight


def _in_cache(function):
    """On a CPU, vmap becomes a loop: one residual in cache beats a batched product several times over."""
    looped = sequential_vmap(function)
    return lambda *args: looped(*args) if jax.default_backend() == "cpu" else function(*args)


@jax.custom_vjp
def _outer_residual(x, dy, array):
    return _in_cache(_norms)(x, dy, array)


def _forward(x, dy, array):
    return _in_cache(_norms)(x, dy, array), (x, dy, array)


def _backward(saved, cotangents):
    x, dy, array = saved
    return *_in_cache(_cotangents)(x, dy, array, *cotangents), None


_outer_residual.defvjp(_forward, _backward)
