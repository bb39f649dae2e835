"""Where a continuous search begins: the best of many random candidates, by their objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from grab_jax.search import moves, scoring

Score = Callable[[Float[Array, "b t d"]], Float[Array, ""]]


class Known(NamedTuple):
    """What every start respects: `anchors` at the `anchored` positions, only `free` ones move.

    All have the norm `norm`; None leaves draws and anchors as they are.
    """

    anchors: Float[Array, "b t d"]
    anchored: Bool[Array, "b t"]
    free: Bool[Array, "b t"]
    norm: Float[Array, ""] | None


def choose(
    key: Key[Array, ""],
    score: Score,
    known: Known,
    embeds: Float[Array, "b t d"],
    *,
    fresh: Bool[Array, ""] | bool,
    candidates: int,
    permutations: int,
    chunk: int,
) -> Float[Array, "b t d"]:
    """The embeddings a search begins with (Grab, section 4.2), in one loop whatever `fresh` is.

    If `fresh`, the best of `1 + candidates` draws of N(0, 1), rescaled to `known.norm`, and then of it and
    `permutations` rearrangements of its free positions, one order for all rows. Otherwise the best of `embeds`
    and `permutations` rearrangements of it, an order for each row.
    """
    fresh = jnp.asarray(fresh)
    draw_key, order_key = jax.random.split(key)
    one_key, many_key = jax.random.split(draw_key)
    many, order, same = (jax.random.key_data(k) for k in (many_key, order_key, key))
    stage_keys = jax.random.wrap_key_data(
        jnp.stack([many, jnp.where(fresh, order, same)]), impl=jax.random.key_impl(key)
    )
    counts = jnp.stack([jnp.where(fresh, candidates, scoring.NOTHING), permutations])

    def stage(embeds, now):
        key, count, drawing = now

        def propose(key):
            return jax.lax.cond(drawing, _drawn, _permuted, key, known, embeds, fresh)

        return scoring.best_of(key, propose, score, count, chunk, start=embeds)[0], None

    begin = jnp.where(fresh, _drawn(one_key, known), embeds)
    return jax.lax.scan(stage, begin, (stage_keys, counts, jnp.array([True, False])))[0]


def _drawn(key, known: Known, *_):
    embeds = jnp.where(known.anchored[..., None], known.anchors, jax.random.normal(key, known.anchors.shape))
    if known.norm is None:
        return embeds
    return embeds * known.norm / jnp.linalg.norm(embeds, axis=-1, keepdims=True)


def _permuted(key, known: Known, embeds, shared):
    return moves.rearrange(embeds, moves.permutation(key, known.free, shared=shared))
