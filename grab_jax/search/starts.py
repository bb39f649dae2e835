"""Where a continuous search begins: the best of many random candidates, by their objective."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from grab_jax.search import moves, scoring

Score = Callable[[Float[Array, "b t d"]], Float[Array, ""]]


def gaussian(
    key: Key[Array, ""],
    score: Score,
    anchors: Float[Array, "b t d"],
    anchored: Bool[Array, "b t"],
    norm: Float[Array, ""],
    *,
    count: int,
    chunk: int,
) -> Float[Array, "b t d"]:
    """The best of `1 + count` draws of N(0, 1) embeddings (Grab, section 4.2).

    Positions in `anchored` hold `anchors`; then every vector is rescaled to `norm`, the mean norm of the vocabulary.
    """

    def draw(key):
        embeds = jnp.where(anchored[..., None], anchors, jax.random.normal(key, anchors.shape))
        return embeds * norm / jnp.linalg.norm(embeds, axis=-1, keepdims=True)

    one_key, many_key = jax.random.split(key)
    return scoring.best_of(many_key, draw, score, count, chunk, start=draw(one_key))[0]


def permuted(
    key: Key[Array, ""],
    score: Score,
    embeds: Float[Array, "b t d"],
    free: Bool[Array, "b t"],
    *,
    shared: bool,
    count: int,
    chunk: int,
) -> Float[Array, "b t d"]:
    """The best of `embeds` and `count` rearrangements of its free positions, one order for all rows if `shared`."""
    propose = lambda key: moves.rearrange(embeds, moves.permutation(key, free, shared=shared))  # noqa: E731
    return scoring.best_of(key, propose, score, count, chunk, start=embeds)[0]
