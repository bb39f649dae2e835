"""Leaves of an update, and the products of two leaves that distances are made of.

A candidate's kernel is `Outer(x, dy)`, the gradient `x.T @ dy` of a linear layer that is not formed: a transformer's
gradient is its layers' inputs and output cotangents, `n (i + o)` numbers instead of `i * o` for a kernel `[i, o]` seen
by n token rows. Its embedding table is `Rows`, zero but in the rows looked up. The observed kernel is `LowRank(u, v)`
where that is exact (`views.py`): it has no more rank than the client's batch has tokens. Views of part of an update are
`Pruned` and `Signs`. All other leaves are plain arrays.

Costs are in multiply-adds per restart; `thin` is the one rule that chooses between factors and entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grab_jax.kernels import residual_norms as kernel
from grab_jax.types import Update


class Outer(NamedTuple):
    """The matrix `x.T @ dy`, of shape `[i, o]`."""

    x: Float[Array, "n i"]
    dy: Float[Array, "n o"]


@partial(jax.tree_util.register_dataclass, data_fields=["ids", "dy"], meta_fields=["size"])
@dataclass(frozen=True)
class Rows:
    """The matrix `[size, d]` whose row i is the sum of `dy` where `ids` is i: the gradient of a lookup."""

    ids: Any  # Int[Array, " n"]; trees of leaves hold other things in its place
    dy: Any  # Float[Array, "n d"]
    size: int


class LowRank(NamedTuple):
    """The matrix `u.T @ v`, of shape `[i, o]`; the rows of `u` are orthonormal, or zero."""

    u: Float[Array, "r i"]
    v: Float[Array, "r o"]


class Pruned(NamedTuple):
    """An update of which only the entries that are not zero were sent: nothing is known of the others."""

    array: Float[Array, ...]


class Signs(NamedTuple):
    """The signs of an update, in -1, 0, 1: a candidate's entry is wrong by its size where its sign is."""

    array: Float[Array, ...]


class Unit(NamedTuple):
    """Seen of a tensor that the client divided by its norm first (and then, say, added noise): `through` follows it."""

    seen: Array | LowRank | Pruned | Signs


Leaf = Array | Outer | Rows
Part = Array | LowRank | Pruned | Signs
Seen = Part | Unit


def has_direction(path: str) -> bool:
    """Whether a tensor's gradient is more than rounding: that of an attention key bias is exactly zero in theory."""
    return not path.endswith("/key/bias")


def through(leaf: Leaf, seen: Seen) -> tuple[Leaf, Part]:
    """A candidate's leaf as the client would have treated it before what is seen, and the latter."""
    if not isinstance(seen, Unit):
        return leaf, seen
    return scale(leaf, 1 / (root(square_norm(leaf)) + 1e-12)), seen.seen


def unit(update: Update) -> Update:
    """Each tensor divided by its norm, if that is not zero."""
    norms = {path: jnp.linalg.norm(value) for path, value in update.items()}
    return {path: value / jnp.where(norms[path] > 0, norms[path], 1) for path, value in update.items()}


def root(square: Float[Array, ""]) -> Float[Array, ""]:
    """Square root with gradient 0 at 0."""
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def thin(rows: int, i: int, o: int) -> bool:
    """Whether a product of factors costs less than the matrix `[i, o]`: `rows * (i + o) < i * o`."""
    return rows * (i + o) < i * o


def dense(leaf: Leaf | Part) -> Float[Array, ...]:
    """The leaf as an array."""
    if isinstance(leaf, Rows):
        return jnp.zeros((leaf.size, leaf.dy.shape[1]), leaf.dy.dtype).at[leaf.ids].add(leaf.dy)
    if isinstance(leaf, Outer | LowRank):
        return leaf[0].T @ leaf[1]
    return leaf.array if isinstance(leaf, Pruned | Signs) else leaf


def scale(leaf: Leaf | Part, factor: Float[Array, ""]) -> Leaf | Part:
    """The leaf times a positive scalar; signs stay signs."""
    match leaf:
        case Outer():
            return Outer(leaf.x * factor, leaf.dy)
        case Rows():
            return Rows(leaf.ids, leaf.dy * factor, leaf.size)
        case LowRank():
            return LowRank(leaf.u, leaf.v * factor)
        case Pruned():
            return Pruned(leaf.array * factor)
        case Signs():
            return leaf
    return leaf * factor


def average(leaf: Leaf) -> Leaf:
    """The mean over a leading axis that every array of the leaf has: factored leaves stay so, with all their rows."""
    match leaf:
        case Outer():
            return Outer(_joined(leaf.x), _joined(leaf.dy) / len(leaf.dy))
        case Rows():
            return Rows(leaf.ids.reshape(-1), _joined(leaf.dy) / len(leaf.dy), leaf.size)
    return leaf.mean(0)


def _joined(rows: Float[Array, "k n d"]) -> Float[Array, "kn d"]:
    return rows.reshape(-1, rows.shape[-1])


def inner(leaf: Leaf, seen: Part) -> Float[Array, ""]:
    """Sum of the products of all entries: `n r (i + o)` for two factored leaves, else `n i o`."""
    match leaf, seen:
        case Outer(), LowRank():
            return jnp.vdot(leaf.x @ seen.u.T, leaf.dy @ seen.v.T)
        case Outer(), _:
            return jnp.vdot(leaf.x @ dense(seen), leaf.dy)
        case Rows(), _:
            return jnp.vdot(dense(seen)[leaf.ids], leaf.dy)
    return jnp.vdot(leaf, dense(seen))


def square_norm(leaf: Leaf, seen: Part | None = None) -> Float[Array, ""]:
    """Sum of squares of the entries that `seen` shows, by default all: `n^2 (i + o)` where thin, else `n i o`."""
    if isinstance(seen, Pruned):
        return _norms(leaf, seen.array, _shown)[0]
    if isinstance(leaf, Rows):
        return jnp.vdot(_same(leaf) @ leaf.dy, leaf.dy)
    if not isinstance(leaf, Outer):
        return jnp.vdot(leaf, leaf)
    if thin(len(leaf.x), leaf.x.shape[1], leaf.dy.shape[1]):
        return _outer_square(*leaf)
    return kernel.residual_norms(*leaf)[0]


@jax.custom_jvp
def _outer_square(x: Float[Array, "n i"], dy: Float[Array, "n o"]) -> Float[Array, ""]:
    """Sum of squares of `x.T @ dy` from the Gram matrices; symmetric, so the rule needs half the products."""
    return jnp.vdot(x @ x.T, dy @ dy.T)


@_outer_square.defjvp
def _outer_square_jvp(primals: tuple, tangents: tuple) -> tuple[Float[Array, ""], Float[Array, ""]]:
    (x, dy), (along_x, along_dy) = primals, tangents
    gram_x, gram_dy = x @ x.T, dy @ dy.T
    return jnp.vdot(gram_x, gram_dy), 2 * (jnp.vdot(gram_dy @ x, along_x) + jnp.vdot(gram_x @ dy, along_dy))


def seen_square_norm(seen: Part) -> Float[Array, ""]:
    """Sum of squares of an observed leaf."""
    array = seen.v if isinstance(seen, LowRank) else dense(seen)
    return jnp.vdot(array, array)


def residual_square(leaf: Leaf, seen: Part) -> Float[Array, ""]:
    """Sum of squares of the residual, exact near zero too; differentiable in `leaf` only.

    Against `LowRank` the residual splits at the column space of `u`: with `p = x @ u.T`, the part inside is
    `p.T @ dy - v`, subtracted entry by entry, and the part outside is `(x - p @ u).T @ dy`, whose Gram matrices are
    sums without a difference. `|a|^2 - 2 <a, b> + |b|^2` would cancel where the two are close.
    """
    if not (isinstance(leaf, Outer) and isinstance(seen, LowRank)):
        return residual_norms(leaf, seen)[0]
    if not thin(len(leaf.x), leaf.x.shape[1], leaf.dy.shape[1]):
        return residual_norms(leaf, seen)[0]
    u, v = jax.lax.stop_gradient(seen)
    along = leaf.x @ u.T
    inside = along.T @ leaf.dy - v
    return jnp.vdot(inside, inside) + square_norm(Outer(leaf.x - along @ u, leaf.dy))


def residual_norms(leaf: Leaf, seen: Part) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`(sum of squares, sum of absolute values)` of the residual; differentiable in `leaf` only.

    The residual of an entry is the difference; 0 where a pruned update does not show it; and where only signs are seen,
    `min(a * sign, 0)` (TAG's hinge).
    """
    match seen:
        case LowRank():
            if isinstance(leaf, Outer):
                return kernel.residual_norms(*leaf, tuple(seen))
            return _norms(leaf, dense(seen), kernel.subtract)
        case Pruned():
            return _norms(leaf, seen.array, _difference_where_shown)
        case Signs():
            return _norms(leaf, seen.array, _hinge)
    return _norms(leaf, seen, kernel.subtract)


def _norms(leaf: Leaf, array: Float[Array, ...], gap: kernel.Gap) -> tuple[Float[Array, ""], Float[Array, ""]]:
    if isinstance(leaf, Outer):
        return kernel.residual_norms(*leaf, array, gap=gap)
    if isinstance(leaf, Rows):
        return _row_norms(leaf, array, gap)
    entries = gap(leaf, jax.lax.stop_gradient(array))
    return jnp.vdot(entries, entries), jnp.abs(entries).sum()


def _row_norms(leaf: Rows, array: Float[Array, "v d"], gap: kernel.Gap) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Rows looked up are compared once each; the others are what the observed table alone says."""
    array = jax.lax.stop_gradient(array)
    same = _same(leaf)
    first = jnp.tril(same, -1).sum(1) == 0
    found = jnp.where(first[:, None], gap(same @ leaf.dy, array[leaf.ids]), 0.0)
    alone = gap(jnp.zeros((), array.dtype), array)
    rest = jnp.ones(leaf.size, array.dtype).at[leaf.ids].set(0.0)
    squares, absolutes = (alone * alone).sum(1), jnp.abs(alone).sum(1)
    return jnp.vdot(found, found) + jnp.vdot(rest, squares), jnp.abs(found).sum() + jnp.vdot(rest, absolutes)


def _same(leaf: Rows) -> Float[Array, "n n"]:
    """1 where two positions looked up the same row."""
    return (leaf.ids[:, None] == leaf.ids[None]).astype(leaf.dy.dtype)


def _shown(ours: Array, theirs: Array) -> Array:
    return jnp.where(theirs != 0, ours, 0.0)


def _difference_where_shown(ours: Array, theirs: Array) -> Array:
    return jnp.where(theirs != 0, ours - theirs, 0.0)


def _hinge(ours: Array, signs: Array) -> Array:
    return jnp.minimum(ours * signs, 0.0)
