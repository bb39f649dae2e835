"""What feeds a model's first attention layer, as arrays: all that span decoding needs to know of an architecture."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Norm(NamedTuple):
    """A layer norm's parameters."""

    scale: Float[Array, " d"]
    shift: Float[Array, " d"]
    epsilon: Float[Array, ""] | float


class FirstAttention(NamedTuple):
    """The path from a token to the first query, key and value projections.

    A token v at position p enters as `norm(words[v] + places[p])` (`norm` None: no norm), is multiplied by the dropout
    mask over `1 - rate`, then goes through `later` (GPT-2's norm after dropout; None for BERT) into the projections.
    `query` and `key` are their `(kernel [d, d], bias [d])`.
    """

    words: Float[Array, "v d"]
    places: Float[Array, "t d"]
    norm: Norm | None
    rate: Float[Array, ""] | float
    later: Norm | None
    query: tuple[Float[Array, "d d"], Float[Array, " d"]]
    key: tuple[Float[Array, "d d"], Float[Array, " d"]]


def embed(
    first: FirstAttention, tokens: Int[Array, " n"] | None, positions: Int[Array, " n"] | Int[Array, ""]
) -> Float[Array, "n d"]:
    """Rows before the dropout mask, over `1 - rate`; `tokens=None` means the whole vocabulary at one position."""
    words = first.words if tokens is None else first.words[tokens]
    places = first.places[positions]
    x = words + (places[None] if tokens is None else places)
    return (x if first.norm is None else normalise(first.norm, x)) / (1 - first.rate)


def normalise(norm: Norm, x: Float[Array | np.ndarray, "n d"]) -> Float[Array | np.ndarray, "n d"]:
    """Layer norm over the last axis, of NumPy (in its precision) or JAX arrays."""
    centred = x - x.mean(-1, keepdims=True)
    scale, shift, epsilon = (part if isinstance(x, jnp.ndarray) else np.asarray(part, x.dtype) for part in norm)
    deviation = ((centred**2).mean(-1, keepdims=True) + epsilon) ** 0.5
    return centred / deviation * scale[None] + shift[None]
