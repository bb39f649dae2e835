"""An attack in progress: what it was given, where it is, and what a person wants to see of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from grab_jax.attack_config import AttackConfig
from grab_jax.attacks import programs
from grab_jax.search import descent
from grab_jax.types import Candidate, Problem

SELECT, CONTINUOUS, DISCRETE = 0, 1, 2
PHASES = ("select", "continuous", "discrete")


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


def round_keys(job: Job, r: int) -> Key[Array, "k 2"]:
    """One key for the continuous and one for the discrete phase of round r, for every client batch."""
    return jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, r)))(jax.random.clone(job.keys))


def tokens_of(job: Job, embeds: Float[Array | np.ndarray, "... t d"]) -> Int[np.ndarray, "... t"]:
    """The nearest tokens of word embeddings, among those allowed."""
    table = programs.word_table(job.problems[0].model, job.shared.trainable, job.shared.frozen)
    return np.asarray(job.programs.tokens(np.asarray(embeds), table, job.shared.allowed)[0])


def progress(job: Job, state: State, step: int, loss, ids, phase: str | None = None) -> Progress:
    """Progress of the running phase, or of one that has just ended and is named."""
    name = phase or PHASES[int(state.phase)]
    steps = job.config.steps if name == "continuous" else len(job.problems)
    ended = name == "discrete" and int(state.phase) == SELECT
    return Progress(int(state.round) - int(ended), name, step, steps, np.asarray(loss), ids)
