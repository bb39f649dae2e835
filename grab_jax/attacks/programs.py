"""The compiled pieces of a gradient-matching attack: starts, descent, tokens, scores; one compilation per shape.

Client batches of one shape are stacked on a leading axis k and attacked together; the weights are shared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grab_jax import distances, masks, matching
from grab_jax.config import AttackConfig
from grab_jax.search import descent, starts, vocabulary
from grab_jax.types import Candidate, Known, Problem

CHUNK = 64
"""Candidates scored at once where the settings do not say."""


class Shared(NamedTuple):
    """The arrays every program reads: the weights, and what differs between client batches, stacked `[k ...]`."""

    trainable: dict[str, Array]
    frozen: dict[str, Array]
    observed: dict[str, Array]
    known: Known


class Programs(NamedTuple):
    """Jitted functions.

    `first(key, j, candidate, shared)` and `again(key, j, candidate, ids, shared)` choose a start for batch j;
    `init(candidates)` begins a descent, `run(state, losses, step, stop, shared)` advances it; `tokens(embeds, shared)`
    are the nearest tokens and their cosines; `score(ids, j, candidate, shared)` rates token batches `[n b t]`.
    """

    first: Callable[..., Candidate]
    again: Callable[..., Candidate]
    init: Callable[..., descent.State]
    run: Callable[..., tuple[descent.State, Array]]
    tokens: Callable[..., tuple[Array, Array]]
    score: Callable[..., Array]


def stack(problems: Sequence[Problem]) -> Shared:
    """Put problems of one shape and the same weights side by side."""
    together = lambda *leaves: jnp.stack(leaves)  # noqa: E731
    return Shared(
        dict(problems[0].trainable),
        dict(problems[0].frozen),
        jax.tree.map(together, *[dict(p.observed) for p in problems]),
        jax.tree.map(together, *[p.known for p in problems]),
    )


def at(tree: Any, j: int | Array) -> Any:
    """Entry j of every leaf's leading axis."""
    return jax.tree.map(lambda leaf: leaf[j], tree)


def word_table(model: Any, trainable: dict[str, Array], frozen: dict[str, Array]) -> Float[Array, "v d"]:
    """The word embeddings, trained or frozen."""
    return {**frozen, **trainable}[model.word_table]


@lru_cache(maxsize=8)
def compiled(model: Any, config: AttackConfig, pad: int) -> Programs:
    """The programs of one model and setting; the same arguments give the same (already compiled) functions."""
    distance = distances.by_name(config.distance, config.l1)
    objective = matching.embedding_objective(model, distance)
    optimizer = descent.adamw(
        config.steps, lr=config.lr, schedule=config.schedule, decay=config.decay,
        decay_every=config.decay_every, weight_decay=config.weight_decay, clip=config.clip,
    )  # fmt: skip
    search = descent.descent(objective, optimizer, lambda *args: project(model, *args))
    first, again = _starts(model, config, objective)
    score = _scores(matching.token_objective(model, distance, pad))

    def tokens(embeds, shared):
        return vocabulary.nearest(embeds, word_table(model, shared.trainable, shared.frozen))

    init = jax.vmap(jax.vmap(search.init))
    return Programs(*map(jax.jit, (first, again, init, _descent(search), tokens, score)))


def _context(shared: Shared, j: Array) -> tuple[dict, dict, dict, Known]:
    return shared.trainable, shared.frozen, at(shared.observed, j), at(shared.known, j)


def _starts(model: Any, config: AttackConfig, objective: matching.Objective):
    sizes = lambda count: {"count": count, "chunk": min(config.chunk or CHUNK, max(count, 1))}  # noqa: E731

    def permuted(key, candidate, context, *, shared):
        score = lambda embeds: objective(candidate._replace(embeds=embeds), *context)  # noqa: E731
        free = context[3].free
        embeds = starts.permuted(key, score, candidate.embeds, free, shared=shared, **sizes(config.permutations))
        return candidate._replace(embeds=embeds)

    def first(key, j, candidate, shared):
        context = _context(shared, j)
        table, known = word_table(model, *context[:2]), context[3]
        draw_key, order_key = jax.random.split(key)
        score = lambda embeds: objective(candidate._replace(embeds=embeds), *context)  # noqa: E731
        norm = jnp.linalg.norm(table, axis=1).mean()
        args = (score, table[known.ids], known.pinned, norm)
        embeds = starts.gaussian(draw_key, *args, **sizes(config.candidates))
        return permuted(order_key, candidate._replace(embeds=embeds), context, shared=True)

    def again(key, j, candidate, ids, shared):
        context = _context(shared, j)
        embeds = word_table(model, *context[:2])[ids]
        return permuted(key, candidate._replace(embeds=embeds), context, shared=False)

    return first, again


def _descent(search: descent.Descent):
    """The continuous phase: one loop over steps, vmapped over client batches and restarts."""

    def run(state, losses, step, stop, shared):
        over_restarts = jax.vmap(search.step, in_axes=(0, None, None, None, None))
        over_batches = jax.vmap(over_restarts, in_axes=(0, None, None, 0, 0))

        def body(carry):
            state, losses, i = carry
            state, loss = over_batches(state, *shared)
            return state, losses.at[:, i].set(jnp.nanmin(loss, axis=1)), i + 1

        return jax.lax.while_loop(lambda carry: carry[2] < stop, body, (state, losses, step))[:2]

    return run


def _scores(objective: matching.Objective):
    def score(ids, j, candidate, shared):
        context = _context(shared, j)
        return jax.vmap(lambda one: objective(one, candidate.masks, candidate.labels, *context))(ids)

    return score


def project(model: Any, candidate: Candidate, trainable, frozen, _observed, known: Known) -> Candidate:
    """Masks and soft labels into [0, 1]; pinned positions hold their tokens' embeddings again."""
    pinned = word_table(model, trainable, frozen)[known.ids]
    return Candidate(
        jnp.where(known.pinned[..., None], pinned, candidate.embeds),
        masks.project(candidate.masks),
        None if candidate.labels is None else jnp.clip(candidate.labels, 0.0, 1.0),
    )
