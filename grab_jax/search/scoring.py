"""Scoring many candidates: the best of random proposals, and token batches in fixed-size chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

Tokens = Int[np.ndarray, "n b t"]
Score = Callable[[Tokens], Float[np.ndarray, " n"]]

NOTHING = -1
"""A count of proposals with which `best_of` returns the start unscored."""


def best_of(
    key: Key[Array, ""],
    propose: Callable[[Key[Array, ""]], Any],
    score: Callable[[Any], Float[Array, ""]],
    count: int | Int[Array, ""],
    chunk: int,
    *,
    start: Any,
) -> tuple[Any, Float[Array, ""]]:
    """The lowest-scoring of `start` and `count` random proposals, scored `chunk` at a time (vmapped) under jit.

    Proposal i depends on `key` and i only, so the chunk size changes memory, never the result. NaN scores lose; `count`
    may be traced.
    """

    def one(index, carry):
        numbers = index * chunk + jnp.arange(chunk) - 1  # the start goes along as number -1: one copy of `score`
        drawn = jax.vmap(lambda i: propose(jax.random.fold_in(key, jnp.maximum(i, 0))))(numbers)
        proposals = jax.tree.map(lambda new, old: new.at[0].set(jnp.where(index == 0, old, new[0])), drawn, start)
        scores = jax.vmap(score)(proposals)
        scores = jnp.where(jnp.isnan(scores) | (numbers >= count), jnp.inf, scores)
        winner = jnp.argmin(scores)
        better = scores[winner] < carry[1]
        pick = jax.tree.map(lambda new, old: jnp.where(better, new[winner], old), proposals, carry[0])
        return pick, jnp.minimum(scores[winner], carry[1])

    chunks = (count + 1 + chunk - 1) // chunk
    return jax.lax.fori_loop(0, chunks, one, (start, jnp.inf))


def chunked(
    score: Callable[[Array], Array],
    chunk: int,
    on_progress: Callable[[int], None] | None = None,
    *,
    multiple: int = 1,
    sparing: bool = False,
) -> Score:
    """A host function over any number of token batches from a jitted one over exactly `chunk` of them.

    Scores are remembered: a beam proposes the same batch many times. Small calls run in a quarter chunk (rounded up to
    `multiple`), so two shapes are compiled. With `sparing` several quarters are taken rather than a chunk of which a
    quarter or more would be empty, which pays where empty places cost as much as candidates (a CPU). `on_progress` gets
    the number of different candidates evaluated so far.
    """
    known: dict[bytes, float] = {}
    quarter = min(chunk, -(-max(1, chunk // 4) // multiple) * multiple)
    small = max(quarter, chunk - quarter) if sparing else quarter

    def run(candidates: Tokens) -> Float[np.ndarray, " n"]:
        keys = [row.tobytes() for row in np.ascontiguousarray(candidates)]
        fresh = {key: i for i, key in enumerate(keys) if key not in known}
        order = list(fresh.values())
        while order:
            size = chunk if len(order) > small else quarter
            now, order = order[:size], order[size:]
            block = candidates[now + [now[-1]] * (size - len(now))]
            for i, value in zip(now, np.asarray(score(jnp.asarray(block))), strict=False):
                known[keys[i]] = float(value)
            if on_progress:
                on_progress(len(known))
        return np.array([known[key] for key in keys])

    return run
