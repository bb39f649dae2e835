"""The Grab attack (Feng et al., CCS 2024, arXiv 2507.21198): hybrid optimisation with learned dropout masks.

A round is a continuous phase (AdamW over word embeddings, relaxed dropout masks and, if unknown, soft labels), then a
discrete one (beam search over the tokens any continuous phase so far has produced). The next round starts from the
discrete solution; masks persist. Several client batches of one shape are attacked together: the continuous phase is
one compiled loop, vmapped over batches (k) and restarts (n). With `init="span"` span decoding goes first, and only what
it leaves open is searched (`attacks.handover`).

Differences from the released code, on purpose: its similarity term, which has no gradient, is left out; the
token-type gradient is matched in both phases; pinned positions hold their tokens from the first step on.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from grab_jax import local_training, masks, views
from grab_jax.attack_config import AttackConfig
from grab_jax.attacks import discrete, handover, lamp, prior, programs
from grab_jax.attacks.state import CONTINUOUS, DISCRETE, SELECT, Job, OnSegment, State, progress, round_keys, tokens_of
from grab_jax.search import descent
from grab_jax.types import Candidate, Masks, Problem, Result

OWN_MASKS = 2**32 - 1
"""Folded into a batch's key for the masks of an attacker in training mode; rounds count from 0."""
SEGMENT = 50
"""Continuous steps between two visits of the host (progress, checkpoint)."""


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
      state: resume from here (same keys, problems and config); its structure is that of `start`. Span decoding, where
        it goes first, runs again: it takes seconds, and finds the same.
      on_segment: called with the resumable state after every segment, and with None where there is only progress.

    Returns:
      One result per problem, in order.
    """
    if config.init == "none":
        return _search(_job(keys, problems, config, on_segment), state)
    handed = handover.begin(keys, problems, config, on_segment)
    job = _job(keys, [batch.problem for batch in handed], config, on_segment)
    results = _search(job, handover.enter(_blank(job) if state is None else state, handed))
    return [handover.conclude(*pair) for pair in zip(handed, results, strict=True)]


def _search(job: Job, state: State | None) -> list[Result]:
    state = _blank(job) if state is None else state
    advance = {SELECT: _select, CONTINUOUS: _descend, DISCRETE: _substitute}
    while state.round < job.config.rounds and not state.done.all():
        state = advance[int(state.phase)](job, state)
    return [_result(job, state, j) for j in range(len(job.problems))]


def start(keys: Key[Array, " k"], problems: Sequence[Problem], config: AttackConfig) -> State:
    """The state before the first round: also the template for restoring a saved one."""
    return _blank(_job(keys, problems, config, None))


def _job(keys, problems: Sequence[Problem], config: AttackConfig, on_segment: OnSegment | None) -> Job:
    mesh, model = programs.mesh_for(len(problems), config.restarts), problems[0].model
    if config.masks == "random":
        problems = [
            _with_own_masks(key, problem) for key, problem in zip(jax.random.clone(keys), problems, strict=True)
        ]
    judge = prior.load(config.prior, model.config.vocab_size, problems[0].known.ids.shape[1])
    local, clip = local_training.repeated(problems[0]), views.through(config.view, problems[0].defended).clip
    compiled = programs.compiled(model, config, problems[0].vocabulary, mesh, judge and judge.model, local, clip)
    notify = on_segment or (lambda _state, _progress: None)
    return Job(keys, problems, config, programs.stack(problems, config, mesh, judge), compiled, notify)


def _with_own_masks(key: Key[Array, ""], problem: Problem) -> Problem:
    """The attacker's model in training mode: masks of its own, the same throughout; what is told of masks stays."""
    if not problem.dropout:
        return problem
    drawn = _drawn(jax.random.fold_in(key, OWN_MASKS), problem.model, problem.known.ids.shape, _epochs(problem))
    own = masks.hold(drawn, problem.known.masks)
    return problem._replace(known=problem.known._replace(masks=own))


def _epochs(problem: Problem) -> int | None:
    """Epochs of the local training that is repeated; None where none is."""
    local = local_training.repeated(problem)
    return local and local.epochs


def _drawn(key: Key[Array, ""], model: Any, shape: tuple[int, int], epochs: int | None) -> Masks:
    """Masks `[b ...]` of every site for a batch `[b t]`, or `[b e ...]` where several epochs are repeated."""
    batch, length = shape
    if epochs is None:
        return masks.sample(jax.random.split(key, batch), model.sites, length)
    return local_training.draw(list(jax.random.split(key, (epochs, batch))), model.sites, length)


def _blank(job: Job) -> State:
    k, (b, t) = len(job.problems), job.problems[0].known.ids.shape
    table = programs.word_table(job.problems[0].model, job.shared.trainable, job.shared.frozen)
    one = lambda: jax.tree.map(lambda leaf: leaf[0, 0], _unknowns(jax.random.key(0)[None, None], job))  # noqa: E731
    unknowns = jax.eval_shape(one)  # shapes only
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


def _unknowns(keys: Key[Array, "k n"], job: Job):
    """First draws of masks and soft labels `[k n ...]`; None where they are not searched."""
    problem, config = job.problems[0], job.config
    start = config.mask_start if config.masks == "learn" and problem.dropout else None
    soft = problem.known.labels is None
    return _draw(problem.model, problem.known.ids.shape, _epochs(problem), start, soft)(keys)


@lru_cache(maxsize=64)
def _draw(model: Any, shape: tuple[int, int], epochs: int | None, mask_start: float | None, labels: bool):
    """The jitted draws for keys `[k n]`: masks of a batch `[b t]` (None without a start), and labels."""

    def draw(key):
        mask_key, label_key = jax.random.split(key)
        drawn = None
        if mask_start is not None:
            drawn = masks.relax(_drawn(mask_key, model, shape, epochs), model.sites, mask_start)
        return drawn, jax.random.normal(label_key, (shape[0], model.num_labels)) if labels else None

    return jax.jit(jax.vmap(jax.vmap(draw)))


def _select(job: Job, state: State) -> State:
    """A start for every client batch and restart; optimiser and schedule begin anew."""
    k, mesh = len(job.problems), job.programs.mesh
    split = lambda key: jax.random.split(key, (job.config.restarts, 2))  # noqa: E731
    keys = jax.vmap(split)(round_keys(job, int(state.round))[:, 0])
    candidates = _before_start(job, state, keys[..., 0])
    keys, candidates = programs.fill((keys[..., 1], candidates), mesh, programs.EACH)
    ids, fresh = programs.fill(jnp.asarray(state.discrete), mesh), state.round == 0
    chosen = []
    for i in range(len(keys) // mesh.shape["k"]):
        mine = jax.random.clone(keys)  # each call uses other entries of the same array
        chosen.append(job.programs.choose(mine, candidates, ids, fresh, i, job.shared))
        job.notify(None, progress(job, state, min(k, (i + 1) * mesh.shape["k"]), state.scores[:, 1], None))
    # The i-th result holds the i-th batch of every device: interleave them back into the order of the batches.
    together = jax.tree.map(lambda *leaves: _interleave(leaves, k), *chosen)
    return state._replace(descent=job.programs.init(together), phase=np.int32(CONTINUOUS), step=np.int32(0))


def _interleave(leaves: Sequence[Array], k: int) -> Array:
    stacked = np.stack([np.asarray(leaf) for leaf in leaves], axis=1)
    return jnp.asarray(stacked.reshape(-1, *stacked.shape[2:])[:k])


def _before_start(job: Job, state: State, keys: Key[Array, "k n"]) -> Candidate:
    """Candidates `[k n ...]` with first draws of the unknowns (told masks held), or with those of the last solution."""
    n = job.config.restarts
    repeated = jax.tree.map(lambda leaf: jnp.repeat(jnp.asarray(leaf)[:, None], n, axis=1), state.solution)
    if state.round:
        return repeated
    masks_drawn, labels = _unknowns(keys, job)
    told = jax.tree.map(lambda *leaves: jnp.stack(leaves)[:, None], *[p.known.masks for p in job.problems])
    return Candidate(repeated.embeds, masks.hold(masks_drawn, told), labels)


def _descend(job: Job, state: State) -> State:
    """One segment of the continuous phase."""
    k, r = len(job.problems), int(state.round)
    stop = min(int(state.step) + SEGMENT, lamp.following(job.config, int(state.step)), job.config.steps)
    mesh = job.programs.mesh
    begin = programs.fill(state.descent, mesh, programs.EACH), programs.fill(jnp.asarray(state.losses[:, r]), mesh)
    found, losses = programs.first(job.programs.run(*begin, state.step, stop, job.shared), k)
    if lamp.due(job.config, stop):
        found = _move(job, found, r, stop)
    kept = np.array(state.losses)
    kept[:, r] = losses
    phase = DISCRETE if stop == job.config.steps else CONTINUOUS
    step = 0 if phase == DISCRETE else stop
    state = state._replace(descent=found, losses=kept, phase=np.int32(phase), step=np.int32(step))
    pinned = np.stack([problem.known.pinned for problem in job.problems])
    told = np.stack([problem.known.ids for problem in job.problems])
    ids = np.where(pinned, told, tokens_of(job, np.asarray(found.candidate.embeds)[:, 0]))
    job.notify(state, progress(job, state, stop, kept[:, r, stop - 1], ids, phase="continuous"))
    return state


def _move(job: Job, found: descent.State, r: int, step: int) -> descent.State:
    """LAMP's discrete step after `step` continuous ones."""
    keys = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, step), job.config.restarts))(
        round_keys(job, r)[:, 0]
    )
    begin = programs.fill((keys, found), job.programs.mesh, programs.EACH)
    return programs.first(job.programs.move(*begin, job.shared), len(job.problems))


def _substitute(job: Job, state: State) -> State:
    """The discrete phase of one client batch; the round ends with the last one."""
    j = int(state.step)
    if not state.done[j]:
        state = discrete.improve(job, state, j)
    if j + 1 < len(job.problems):
        state = state._replace(step=np.int32(j + 1))
        job.notify(state, progress(job, state, j + 1, state.scores[:, 1], state.discrete))
        return state
    state = state._replace(round=state.round + np.int32(1), phase=np.int32(SELECT), step=np.int32(0))
    job.notify(state, progress(job, state, j + 1, state.scores[:, 1], state.discrete, phase="discrete"))
    return state


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
        confidence=np.where(problem.known.pinned, 1.0, np.nan_to_num(np.clip(np.asarray(cosines), 0, 1))),
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
