"""The discrete phase of Grab: beam search, on the host, over the tokens that continuous phases have produced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from grab_jax.attacks import programs
from grab_jax.attacks.state import Job, State, progress, round_keys, tokens_of
from grab_jax.search import beam, moves, scoring
from grab_jax.types import Candidate, Problem


def improve(job: Job, state: State, j: int) -> State:
    """Choose the best restart of batch j, add its tokens to the pools, and search them by beam."""
    r, config, problem = int(state.round), job.config, job.problems[j]
    candidates = programs.at(jax.device_get(state.descent.chosen), j)
    known = problem.known
    tokens = np.where(known.pinned, known.ids, tokens_of(job, candidates.embeds))
    scores = [_scorer(job, j, programs.at(candidates, n))(tokens[n : n + 1])[0] for n in range(config.restarts)]
    n = int(np.argmin(scores))
    solution, continuous = programs.at(candidates, n), tokens[n]
    free = np.asarray(known.free)
    pools = np.array(state.pools)
    for row in range(len(free)):
        pools[j, row, tokens[:, row][:, free[row]]] = True
    now = progress(job, state, j, state.scores[:, 1], None)
    tick = lambda count: job.notify(None, now._replace(scored=count))  # noqa: E731
    score = _scorer(job, j, solution, tick)
    previous = state.discrete[j]
    found, value = continuous, float(scores[n])
    if config.sweeps:
        begin = _discrete_starts(job, j, r, continuous, previous, free)
        allowed = [_allowed(problem, pools[j, row]) for row in range(len(free))]
        found, value = beam.search(score, begin, free, allowed, width=config.beam, sweeps=config.sweeps)
    update = lambda array, new: _with(array, j, new)  # noqa: E731
    stages = np.array(state.stages)
    stages[j, r] = scores[n], value
    return state._replace(
        solution=jax.tree.map(lambda old, new: old.at[j].set(new), jax.tree.map(jnp.asarray, state.solution), solution),
        pools=pools,
        continuous=update(state.continuous, continuous),
        discrete=update(state.discrete, found),
        scores=update(state.scores, (scores[n], value)),
        done=update(state.done, bool(config.sweeps) and _unmoved(found, continuous, previous)),
        stages=stages,
    )


def _unmoved(found: np.ndarray, continuous: np.ndarray, previous: np.ndarray) -> bool:
    """Early stop: the beam changed nothing, or brought back the last round's solution."""
    return np.array_equal(found, continuous) or np.array_equal(found, previous)


def _with(array: np.ndarray, j: int, value: Any) -> np.ndarray:
    changed = np.array(array)
    changed[j] = value
    return changed


def _scorer(job: Job, j: int, candidate: Candidate, tick: Callable[[int], None] | None = None) -> scoring.Score:
    if job.config.score_masks == "off":
        candidate = candidate._replace(masks=None)
    context = programs.context(j, job.programs.mesh, job.shared)
    score = lambda ids: job.programs.score(ids, candidate, context)  # noqa: E731
    devices = job.programs.mesh.size
    chunk = job.config.chunk or programs.CHUNK
    sparing = job.programs.mesh.devices.flat[0].platform == "cpu"
    return scoring.chunked(score, max(1, chunk // devices) * devices, tick, multiple=devices, sparing=sparing)


def _discrete_starts(job: Job, j: int, r: int, continuous, previous, free) -> Int[np.ndarray, "n b t"]:
    """The continuous solution, also with tokens to start from; the previous discrete one; permutations, row by row."""
    key, ids = round_keys(job, r)[j, 1], np.asarray(job.problems[j].known.ids)
    rows = [continuous[None]] + ([previous[None]] if r > 0 else []) + [np.where(ids < 0, continuous, ids)[None]]
    if job.config.permutations:
        draw = jax.vmap(lambda key: moves.permutation(key, jnp.asarray(free), shared=False))
        sources = np.asarray(draw(jax.random.split(key, job.config.permutations)))
        rows.append(np.take_along_axis(np.broadcast_to(continuous[None], sources.shape), sources, axis=2))
    return np.ascontiguousarray(np.concatenate(rows), dtype=np.int32)


def _allowed(problem: Problem, pool: Bool[np.ndarray, " v"]) -> Int[np.ndarray, " p"]:
    """Tokens of a pool that may be placed: no special ones where lengths are known, else [PAD] and [SEP] always."""
    pool = np.array(pool)
    pool[[i for i in problem.vocabulary.special if i < len(pool)]] = False
    return np.flatnonzero(pool if problem.lengths else programs.ending(problem, pool)).astype(np.int32)
