"""What a client may do to its update before it is sent: noise, pruning, a coarser precision; pure functions.

Each is `(key, update) -> update`; `chain` composes them. A deterministic one ignores its key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from grab_jax.types import Update

Defense = Callable[[Key[Array, ""], Update], Update]
Wire = Literal["float32", "bfloat16", "float16"]


def noise(deviation: float, *, normalised: bool = True) -> Defense:
    """Gaussian noise on every entry.

    Args:
      deviation: standard deviation.
      normalised: divide each tensor by its norm first, as Grab's evaluation does (arXiv 2507.21198, section 5.6); the
        update is sent so. Otherwise the deviation is that of the gradient's own entries.
    """

    def unit(value: Array) -> Array:
        norm = jnp.linalg.norm(value)
        return value / jnp.where(norm > 0, norm, 1)

    def apply(key: Key[Array, ""], update: Update) -> Update:
        sent = {path: unit(value) for path, value in update.items()} if normalised else update
        keys = dict(zip(sent, jax.random.split(key, len(sent)), strict=True))
        return {path: value + deviation * jax.random.normal(keys[path], value.shape) for path, value in sent.items()}

    return apply


def prune(share: float, by: Literal["random", "magnitude"] = "random") -> Defense:
    """Set this share of each tensor's entries to zero: random ones, or those of the smallest magnitude."""

    def apply(key: Key[Array, ""], update: Update) -> Update:
        keys = dict(zip(update, jax.random.split(key, len(update)), strict=True))
        return {path: _without(keys[path], value, share, by) for path, value in update.items()}

    return apply


def _without(key: Key[Array, ""], value: Array, share: float, by: str) -> Array:
    """The tensor without `floor(share * size)` entries."""
    order = jax.random.uniform(key, value.shape) if by == "random" else jnp.abs(value)
    first = jnp.argsort(order, axis=None)[: int(share * value.size)]
    return value.reshape(-1).at[first].set(0).reshape(value.shape)


def wire(kind: Wire) -> Defense:
    """Round to a precision; the result is float32 again."""
    return lambda _key, update: {path: value.astype(kind).astype(jnp.float32) for path, value in update.items()}


def chain(*defenses: Defense) -> Defense:
    """One after the other, each with a key of its own."""

    def apply(key: Key[Array, ""], update: Mapping[str, Array]) -> Update:
        for i, defense in enumerate(defenses):
            update = defense(jax.random.fold_in(key, i), update)
        return update

    return apply
