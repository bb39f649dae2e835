"""LAMP's discrete step (Balunovic et al., NeurIPS 2022, arXiv 2202.08827, section 4.2): words moved between steps.

Descent finds words sooner than their order. Every `moves_every` steps, once `moves_after` of them are done, each
sentence is rearranged in `moves` random ways, and the one of lowest

    matching loss + prior_weight * loss of a language model on the nearest tokens

goes on, if it beats the sentence as it is. Optimiser and masks stay at their positions. The rest of LAMP is descent
from the best of many starts, as in `attacks.grab`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grab_jax import matching, models
from grab_jax.attack_config import AttackConfig
from grab_jax.attacks import prior
from grab_jax.search import descent, moves, scoring, vocabulary
from grab_jax.types import Candidate, Vocabulary


def due(config: AttackConfig, step: int) -> bool:
    """Whether words are moved after that many continuous steps of a round."""
    inside = config.moves_after * config.steps <= step < config.steps
    return bool(config.moves and inside and step and step % config.moves_every == 0)


def following(config: AttackConfig, step: int) -> int:
    """The first step after `step` at which words may be moved; the end of the round where they never are."""
    return (step // config.moves_every + 1) * config.moves_every if config.moves else config.steps


Rate = Callable[[Candidate, Int[Array, "b t"], Any, tuple], Float[Array, ""]]


def rating(objective: matching.Objective, config: AttackConfig, judge: models.Model | None, words: Vocabulary) -> Rate:
    """LAMP's objective of a rearrangement: `(candidate, tokens, the prior's parameters, context) -> scalar`."""

    def rate(candidate: Candidate, ids: Int[Array, "b t"], params: Any, context: tuple) -> Float[Array, ""]:
        value = objective(candidate, *context)
        if judge is None:
            return value
        return value + config.prior_weight * prior.loss(judge, params, ids, words)

    return rate


def mover(rate: Rate, config: AttackConfig, chunk: int) -> Callable[..., descent.State]:
    """A discrete step of one descent: `move(key, state, table, allowed, params, context) -> state`.

    Sentences are rearranged one after another, so that the second is judged beside the first as it has become.
    """

    def move(key, state: descent.State, table, allowed, params, context) -> descent.State:
        known = context[-1]
        ids = jnp.where(known.pinned, known.ids, vocabulary.nearest(state.candidate.embeds, table, allowed)[0])

        def improve(carry, row_key):
            source, row = carry
            free = known.free & (jnp.arange(len(known.free)) == row)[:, None]

            def propose(key):
                keys = jax.random.split(key, len(free))
                return moves.rearrange(source, jax.vmap(moves.reorder)(keys, free))

            def score(source):
                embeds = moves.rearrange(state.candidate.embeds, source)
                tokens = moves.rearrange(ids, source)
                return rate(state.candidate._replace(embeds=embeds), tokens, params, context)

            best, _ = scoring.best_of(row_key, propose, score, config.moves, chunk, start=source)
            return (best, row + 1), None

        stay = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
        (source, _), _ = jax.lax.scan(improve, (stay, 0), jax.random.split(key, len(ids)))
        embeds = moves.rearrange(state.candidate.embeds, source)
        return state._replace(candidate=state.candidate._replace(embeds=embeds))

    return move
