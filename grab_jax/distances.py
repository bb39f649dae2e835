"""Distances between two updates: what gradient matching minimises.

Each takes a candidate's update and the observed one, whose leaves may be factored or seen in part (`leaves.py`), and
returns a scalar; tensors that only one side has are ignored. Norms are safe: the gradient of `||x||` at 0 is 0 here (it
is NaN by plain autodiff), and 0 is the optimum. The gradient of an attention key bias is exactly zero in theory, so its
direction is rounding noise: distances that normalise leave it out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from grab_jax.leaves import (
    Leaf,
    Part,
    Seen,
    has_direction,
    inner,
    residual_norms,
    residual_square,
    root,
    scale,
    seen_square_norm,
    square_norm,
    through,
)

Candidate = Mapping[str, Leaf]
Observed = Mapping[str, Seen]
Distance = Callable[[Candidate, Observed], Float[Array, ""]]
Name = Literal["l2+l1", "l2", "normalised", "cosine", "squared", "squared+l1"]


def l2_l1(candidate: Candidate, observed: Observed, weight: float = 0.01, squared: bool = False) -> Float[Array, ""]:
    """Sum over tensors of `||a - b||_2 + weight * ||a - b||_1` (Grab, eq. 1), or with the L2 part squared (TAG)."""
    norms = [residual_norms(a, b) for _, a, b in _pairs(candidate, observed)]
    return sum((square if squared else root(square)) + weight * absolute for square, absolute in norms)


def l2(candidate: Candidate, observed: Observed, squared: bool = False) -> Float[Array, ""]:
    """Sum over tensors of `||a - b||_2`, or of its square (DLG)."""
    squares = [residual_square(a, b) for _, a, b in _pairs(candidate, observed)]
    return sum(square if squared else root(square) for square in squares)


def cosine(candidate: Candidate, observed: Observed) -> Float[Array, ""]:
    """Mean over tensors of `1 - cos(a, b)` (LAMP), without key biases."""
    pairs = [(a, b) for path, a, b in _pairs(candidate, observed) if has_direction(path)]
    return sum(1 - similarity(a, b) for a, b in pairs) / len(pairs)


def normalised(candidate: Candidate, observed: Observed, weight: float = 0.01) -> Float[Array, ""]:
    """`l2_l1` after each tensor of both sides is divided by its own norm (Grab's adaptive loss), no key biases."""
    pairs = {path: (a, b) for path, a, b in _pairs(candidate, observed) if has_direction(path)}
    unit = lambda leaf, square: scale(leaf, 1 / (root(square) + 1e-12))  # noqa: E731
    ours = {path: unit(a, square_norm(a, b)) for path, (a, b) in pairs.items()}
    return l2_l1(ours, {path: unit(b, seen_square_norm(b)) for path, (_, b) in pairs.items()}, weight)


def similarity(a: Leaf, b: Part) -> Float[Array, ""]:
    """Cosine of the angle between two tensors; 0 where one of them is zero."""
    return inner(a, b) / _length(square_norm(a, b)) / _length(seen_square_norm(b))


def _pairs(candidate: Candidate, observed: Observed) -> Iterator[tuple[str, Leaf, Part]]:
    return ((path, *through(leaf, observed[path])) for path, leaf in candidate.items() if path in observed)


def _length(square: Float[Array, ""]) -> Float[Array, ""]:
    """The norm, or 1 for a zero tensor, so that dividing by it keeps value and gradient finite."""
    norm = root(square)
    return jnp.where(norm > 0, norm, 1.0)


def by_name(name: Name, weight: float = 0.01) -> Distance:
    """The distance of a setting; `weight` is that of the L1 term where there is one."""
    return {
        "l2+l1": lambda a, b: l2_l1(a, b, weight),
        "l2": l2,
        "cosine": cosine,
        "normalised": lambda a, b: normalised(a, b, weight),
        "squared": lambda a, b: l2(a, b, squared=True),
        "squared+l1": lambda a, b: l2_l1(a, b, weight, squared=True),
    }[name]
