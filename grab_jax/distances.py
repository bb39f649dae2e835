"""Distances between two updates: what gradient matching minimises.

Each takes a candidate's update, whose leaves may be factored (`leaves.Outer`), and the observed one, and returns a
scalar; tensors the candidate does not have are ignored. Norms are safe: the gradient of `||x||` at 0 is 0 here (it is
NaN by plain autodiff), and 0 is the optimum. The gradient of an attention key bias is exactly zero in theory, so its
direction is rounding noise: distances that normalise leave it out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from grab_jax.leaves import Leaf, inner, residual_norms, scale, square_norm
from grab_jax.types import Update

Distance = Callable[[Mapping[str, Leaf], Update], Float[Array, ""]]
Name = Literal["l2+l1", "l2", "normalised", "cosine"]


def root(square: Float[Array, ""]) -> Float[Array, ""]:
    """Square root with gradient 0 at 0."""
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def l2_l1(candidate: Mapping[str, Leaf], observed: Update, weight: float = 0.01) -> Float[Array, ""]:
    """Sum over tensors of `||a - b||_2 + weight * ||a - b||_1`, the L2 part not squared (Grab, eq. 1)."""
    norms = [residual_norms(leaf, observed[path]) for path, leaf in candidate.items()]
    return sum(root(square) + weight * absolute for square, absolute in norms)


def l2(candidate: Mapping[str, Leaf], observed: Update, squared: bool = False) -> Float[Array, ""]:
    """Sum over tensors of `||a - b||_2`, or of its square (DLG)."""
    squares = [residual_norms(leaf, observed[path])[0] for path, leaf in candidate.items()]
    return sum(square if squared else root(square) for square in squares)


def cosine(candidate: Mapping[str, Leaf], observed: Update) -> Float[Array, ""]:
    """Mean over tensors of `1 - cos(a, b)` (LAMP), without key biases."""
    paths = [path for path in candidate if _has_direction(path)]
    return sum(1 - similarity(candidate[path], observed[path]) for path in paths) / len(paths)


def normalised(candidate: Mapping[str, Leaf], observed: Update, weight: float = 0.01) -> Float[Array, ""]:
    """`l2_l1` after each tensor of both sides is divided by its own norm (Grab's adaptive loss), no key biases."""
    paths = [path for path in candidate if _has_direction(path)]
    unit = lambda leaf: scale(leaf, 1 / (root(square_norm(leaf)) + 1e-12))  # noqa: E731
    return l2_l1({p: unit(candidate[p]) for p in paths}, {p: unit(observed[p]) for p in paths}, weight)


def similarity(a: Leaf, b: Float[Array, ...]) -> Float[Array, ""]:
    """Cosine of the angle between two tensors; 0 where one of them is zero."""
    return inner(a, b) / _length(a) / _length(b)


def _length(leaf: Leaf) -> Float[Array, ""]:
    """The norm, or 1 for a zero tensor, so that dividing by it keeps value and gradient finite."""
    norm = root(square_norm(leaf))
    return jnp.where(norm > 0, norm, 1.0)


def _has_direction(path: str) -> bool:
    return not path.endswith("/key/bias")


def by_name(name: Name, weight: float = 0.01) -> Distance:
    """The distance of a setting; `weight` is that of the L1 term where there is one."""
    return {
        "l2+l1": lambda a, b: l2_l1(a, b, weight),
        "l2": l2,
        "cosine": cosine,
        "normalised": lambda a, b: normalised(a, b, weight),
    }[name]
