"""The Grab attack (Feng et al., CCS 2024, arXiv 2507.21198): hybrid optimisation with learned dropout masks.

A round is a continuous phase (AdamW over word embeddings, relaxed dropout masks and, if unknown, soft labels), then a
discrete one (beam search over the tokens any continuous phase so far has produced). The next round starts from the
discrete solution; masks persist. Several client batches of one shape are attacked together: the continuous phase is
one compiled loop, vmapped over batches (k) and restarts (n).

Differences from the released code, on purpose: its similarity term, which has no gradient, is left out; the
token-type gradient is matched in both phases; pinned positions hold their tokens from the first step on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from grab_jax import masks
from grab_jax.attacks import programs
from grab_jax.config import AttackConfig
from grab_jax.search import beam, descent, moves, scoring
from grab_jax.types import Candidate, Problem, Result

SELECT, CONTINUOUS, DISCRETE = 0, 1, 2
PHASES = ("select", "continuous", "discrete")
SEGMENT = 50
"""Continuous steps between two visits of the host (progress, checkpoint)."""


class State(NamedTuple):
    """Everything needed to go on: a pytree of arrays.

    `step` counts continuous steps, or client batches whose discrete phase is finished; `descent` holds the candidates
    `[k n ...]` and their optimiser; `solution` the chosen candidate of each batch `[k ...]`; `pools` the tokens seen;
    `continuous` and `discrete` the last token solutions, with their scores `[k 2]`; `done` marks batches that stopped
    early; `losses` the continuous losses (best restart) and `stages` the token scores after both phases of a round.
    """

    round: Int[np.ndarray, ""]
    phase: Int[np.ndarray, ""]
    step: Int[np.ndarray, ""]
    descent: descent.State
    solution: Candidate
    pools: Bool[np.ndarray, "k b v"]
    continuous: Int[np.ndarray, "k b t"]
    discrete: Int[np.ndarray, "k b t"]
    scores: Float[np.ndarray, "k 2"]
    done: Bool[np.ndarray, " k"]
    losses: Float[np.ndarray, "k r s"]
    stages: Float[np.ndarray, "k r 2"]


class Progress(NamedTuple):
    """What a person wants to see.

    `loss` and `ids` belong to the latest solution of each client batch; `scored` counts the candidates tried so far
    in the running beam search.
    """

    round: int
    phase: str
    step: int
    steps: int
    loss: Float[np.ndarray, " k"]
    ids: Int[np.ndarray, "k b t"] | None
    scored: int = 0


OnSegment = Callable[[State | None, Progress], None]


class Job(NamedTuple):
    """One call of `attack`: what it was given, and its compiled programs."""

    keys: Key[Array, " k"]
    problems: Sequence[Problem]
    config: AttackConfig
    shared: programs.Shared
    programs: programs.Programs
    notify: OnSegment


def attack(
    keys: Key[Array, " k"],
    problems: Sequence[Problem],
    config: AttackConfig,
    *,
    state: State | None = None,
    on_segment: OnSegment | None = None,
) -> list[Result]:
    """Reconstruct client batches from their updates.

    Args:
      keys: one typed key per client batch.
      problems: client batches of one shape `[b t]`, of one model and the same weights.
      config: settings; `config.chunk=None` scores 64 candidates at once.
      state: resume from here (same keys, problems and config); its structure is that of `start`.
      on_segment: called with the resumable state after every segment, and with None where there is only progress.

    Returns:
      One result per problem, in order.
    """
    job = _job(keys, problems, config, on_segment)
    state = _blank(job) if state is None else state
    advance = {SELECT: _select, CONTINUOUS: _descend, DISCRETE: _substitute}
    while state.round < config.rounds and not state.done.all():
        state = advance[int(state.phase)](job, state)
    return [_result(job, state, j) for j in range(len(problems))]


def start(keys: Key[Array, " k"], problems: Sequence[Problem], config: AttackConfig) -> State:
    """The state before the first round: also the template for restoring a saved one."""
    return _blank(_job(keys, problems, config, None))


def _job(keys, problems: Sequence[Problem], config: AttackConfig, on_segment: OnSegment | None) -> Job:
    mesh = programs.mesh_for(len(problems))
    compiled = programs.compiled(problems[0].model, config, problems[0].vocabulary.pad, mesh)
    notify = on_segment or (lambda _state, _progress: None)
    return Job(keys, problems, config, programs.stack(problems, mesh), compiled, notify)


def _blank(job: Job) -> State:
    k, (b, t) = len(job.problems), job.problems[0].known.ids.shape
    table = programs.word_table(job.problems[0].model, job.shared.trainable, job.shared.frozen)
    unknowns = jax.eval_shape(lambda: _unknowns(jax.random.key(0), job))  # shapes only
    zero = Candidate(jnp.zeros((b, t, table.shape[1]), table.dtype), *unknowns)
    repeated = lambda *axes: jax.tree.map(lambda leaf: jnp.zeros((*axes, *leaf.shape), leaf.dtype), zero)  # noqa: E731
    return State(
        *(np.zeros((), np.int32),) * 3,
        descent=job.programs.init(repeated(k, job.config.restarts)),
        solution=repeated(k),
        pools=np.zeros((k, b, table.shape[0]), bool),
        continuous=np.full((k, b, t), -1, np.int32),
        discrete=np.full((k, b, t), -1, np.int32),
        scores=np.full((k, 2), np.inf),
        done=np.zeros(k, bool),
        losses=np.full((k, job.config.rounds, job.config.steps), np.nan, np.float32),
        stages=np.full((k, job.config.rounds, 2), np.nan),
    )


def _unknowns(key: Key[Array, ""], job: Job):
    """First draws of masks and soft labels; None where they are not searched."""
    problem, config = job.problems[0], job.config
    batch, length = problem.known.ids.shape
    mask_key, label_key = jax.random.split(key)
    drawn = labels = None
    if config.masks == "learn" and problem.dropout:
        drawn = masks.sample(jax.random.split(mask_key, batch), problem.model.sites, length)
        drawn = masks.relax(drawn, problem.model.sites, config.mask_start)
    if problem.known.labels is None:
        labels = jax.random.normal(label_key, (batch, problem.model.num_labels))
    return drawn, labels


def _select(job: Job, state: State) -> State:
    """A start for every client batch and restart; optimiser and schedule begin anew."""
    k, mesh = len(job.problems), job.programs.mesh
    split = lambda key: jax.random.split(key, (job.config.restarts, 2))  # noqa: E731
    keys = jax.vmap(split)(_round_keys(job, int(state.round))[:, 0])
    candidates = _before_start(job, state, keys[..., 0])
    choose = job.programs.again if state.round else job.programs.first
    ids = (jnp.asarray(state.discrete),) if state.round else ()
    keys, candidates, *ids = programs.fill((keys[..., 1], candidates, *ids), mesh)
    chosen = []
    for i in range(len(keys) // mesh.size):
        mine = jax.random.clone(keys)  # each call uses other entries of the same array
        chosen.append(choose(mine, candidates, *ids, i, job.shared))
        job.notify(None, _progress(job, state, min(k, (i + 1) * mesh.size), state.scores[:, 1], None))
    # The i-th result holds the i-th batch of every device: interleave them back into the order of the batches.
    together = jax.tree.map(lambda *leaves: _interleave(leaves, k), *chosen)
    return state._replace(descent=job.programs.init(together), phase=np.int32(CONTINUOUS), step=np.int32(0))


def _round_keys(job: Job, r: int) -> Key[Array, "k 2"]:
    """One key for the continuous and one for the discrete phase of round r, for every client batch."""
    return jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, r)))(jax.random.clone(job.keys))


def _interleave(leaves: Sequence[Array], k: int) -> Array:
    stacked = np.stack([np.asarray(leaf) for leaf in leaves], axis=1)
    return jnp.asarray(stacked.reshape(-1, *stacked.shape[2:])[:k])


def _before_start(job: Job, state: State, keys: Key[Array, "k n"]) -> Candidate:
    """Candidates `[k n ...]` with first draws of the unknowns, or with those of the last solution."""
    n = job.config.restarts
    repeated = jax.tree.map(lambda leaf: jnp.repeat(jnp.asarray(leaf)[:, None], n, axis=1), state.solution)
    if state.round:
        return repeated
    draw = jax.vmap(jax.vmap(lambda key: _unknowns(key, job)))
    masks_drawn, labels = draw(keys)
    return Candidate(repeated.embeds, masks_drawn, labels)


def _descend(job: Job, state: State) -> State:
    """One segment of the continuous phase."""
    k, r = len(job.problems), int(state.round)
    stop = min(int(state.step) + SEGMENT, job.config.steps)
    begin = programs.fill((state.descent, jnp.asarray(state.losses[:, r])), job.programs.mesh)
    found, losses = programs.at(job.programs.run(*begin, state.step, stop, job.shared), slice(k))
    kept = np.array(state.losses)
    kept[:, r] = losses
    phase = DISCRETE if stop == job.config.steps else CONTINUOUS
    step = 0 if phase == DISCRETE else stop
    state = state._replace(descent=found, losses=kept, phase=np.int32(phase), step=np.int32(step))
    ids = _tokens(job, found.candidate.embeds[:, 0])
    job.notify(state, _progress(job, state, stop, kept[:, r, stop - 1], ids, phase="continuous"))
    return state


def _tokens(job: Job, embeds: Float[Array | np.ndarray, "... t d"]) -> Int[np.ndarray, "... t"]:
    table = programs.word_table(job.problems[0].model, job.shared.trainable, job.shared.frozen)
    return np.asarray(job.programs.tokens(np.asarray(embeds), table)[0])


def _substitute(job: Job, state: State) -> State:
    """The discrete phase of one client batch; the round ends with the last one."""
    j = int(state.step)
    if not state.done[j]:
        state = _improve(job, state, j)
    if j + 1 < len(job.problems):
        state = state._replace(step=np.int32(j + 1))
        job.notify(state, _progress(job, state, j + 1, state.scores[:, 1], state.discrete))
        return state
    state = state._replace(round=state.round + np.int32(1), phase=np.int32(SELECT), step=np.int32(0))
    job.notify(state, _progress(job, state, j + 1, state.scores[:, 1], state.discrete, phase="discrete"))
    return state


def _improve(job: Job, state: State, j: int) -> State:
    """Choose the best restart of batch j, add its tokens to the pools, and search them by beam."""
    r, config, problem = int(state.round), job.config, job.problems[j]
    candidates = jax.device_get(programs.at(state.descent.candidate, j))
    tokens = _tokens(job, candidates.embeds)
    scores = [_scorer(job, j, programs.at(candidates, n))(tokens[n : n + 1])[0] for n in range(config.restarts)]
    n = int(np.argmin(scores))
    solution, continuous = programs.at(candidates, n), tokens[n]
    free = np.asarray(problem.known.free)
    pools = np.array(state.pools)
    for row in range(len(free)):
        pools[j, row, tokens[:, row][:, free[row]]] = True
    now = _progress(job, state, j, state.scores[:, 1], None)
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
    context = programs.context(job.problems[j], job.programs.mesh, job.shared)
    score = lambda ids: job.programs.score(ids, candidate, context)  # noqa: E731
    devices = job.programs.mesh.size
    chunk = job.config.chunk or programs.CHUNK
    return scoring.chunked(score, max(1, chunk // devices) * devices, tick, multiple=devices)


def _discrete_starts(job: Job, j: int, r: int, continuous, previous, free) -> Int[np.ndarray, "n b t"]:
    """The continuous solution, the previous discrete one, and permutations of the former, each row its own."""
    key = _round_keys(job, r)[j, 1]
    rows = [continuous[None]] + ([previous[None]] if r > 0 else [])
    if job.config.permutations:
        draw = jax.vmap(lambda key: moves.permutation(key, jnp.asarray(free), shared=False))
        sources = np.asarray(draw(jax.random.split(key, job.config.permutations)))
        rows.append(np.take_along_axis(np.broadcast_to(continuous[None], sources.shape), sources, axis=2))
    return np.ascontiguousarray(np.concatenate(rows), dtype=np.int32)


def _allowed(problem: Problem, pool: Bool[np.ndarray, " v"]) -> Int[np.ndarray, " p"]:
    """Tokens of a pool that may be placed: no special ones where lengths are known, else [PAD] and [SEP] always."""
    vocabulary = problem.vocabulary
    pool = np.array(pool)
    pool[[i for i in vocabulary.special if i < len(pool)]] = False
    if not problem.lengths:
        pool[[i for i in (vocabulary.pad, vocabulary.sep) if i is not None]] = True
    return np.flatnonzero(pool).astype(np.int32)


def _progress(job: Job, state: State, step: int, loss, ids, phase: str | None = None) -> Progress:
    name = phase or PHASES[int(state.phase)]
    steps = job.config.steps if name == "continuous" else len(job.problems)
    ended = name == "discrete" and int(state.phase) == SELECT
    return Progress(int(state.round) - int(ended), name, step, steps, np.asarray(loss), ids)


def _result(job: Job, state: State, j: int) -> Result:
    """The better of the last two token solutions under the final masks."""
    problem, solution = job.problems[j], programs.at(state.solution, j)
    discrete = state.scores[j, 1] <= state.scores[j, 0]
    ids = (state.discrete if discrete else state.continuous)[j]
    table = programs.word_table(problem.model, job.shared.trainable, job.shared.frozen)
    chosen = table[ids]
    cosines = (solution.embeds * chosen).sum(-1) / jnp.maximum(
        jnp.linalg.norm(solution.embeds, axis=-1) * jnp.linalg.norm(chosen, axis=-1), 1e-12
    )
    return Result(
        ids=ids,
        confidence=np.nan_to_num(np.clip(np.asarray(cosines), 0, 1)),
        loss=float(state.scores[j].min()),
        masks=solution.masks,
        labels=None if solution.labels is None else np.asarray(solution.labels.argmax(-1)),
        trace=_trace(state, j, job.config),
        notes=["stopped early: a round no longer changed the tokens"] if state.done[j] else [],
    )


def _trace(state: State, j: int, config: AttackConfig) -> list[dict[str, Any]]:
    """Continuous losses at up to 40 points a round, then the token scores after both phases."""
    trace = []
    for r in range(config.rounds):
        if np.isnan(state.stages[j, r, 1]):
            break
        for i in sorted({*range(0, config.steps, max(1, config.steps // 40)), config.steps - 1}):
            trace.append(_point(r, "continuous", i + 1, state.losses[j, r, i]))
        trace.append(_point(r, "tokens", config.steps, state.stages[j, r, 0]))
        trace.append(_point(r, "discrete", config.steps, state.stages[j, r, 1]))
    return trace


def _point(r: int, phase: str, step: int, loss: float | np.floating) -> dict[str, Any]:
    return {"round": r, "phase": phase, "step": step, "loss": float(loss)}
