"""Hand-over from span decoding to Grab (`--attack_init=span`): what the one proves, the other need not search.

Per client batch, as span decoding may find only part of it, or nothing:

1. A certified sentence is held whole: its tokens, its length, and its dropout masks at the embeddings.
2. Where that leaves one sentence open, every other certified row (a token at a position) is part of it and is held
   there; rows that contradict each other or what is told are not.
3. Otherwise such a row tells a token, not whose it is: it joins the token pools of the beam search. A sentence put
   together without a certificate is where the search of its row begins, and is held nowhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from grab_jax import distances, masks, matching, views
from grab_jax.attack_config import AttackConfig
from grab_jax.attacks import programs, span
from grab_jax.attacks.seating import Seats, seat
from grab_jax.attacks.span_evaluation import SPARE, Found
from grab_jax.attacks.state import OnSegment, State
from grab_jax.span.decode import ACCEPT
from grab_jax.span.rows import Row
from grab_jax.types import Known, Masks, Problem, Result

SITE = "embeddings"
"""The dropout site before the first attention layer, whose masks span decoding finds."""


class Handed(NamedTuple):
    """A client batch after span decoding.

    `problem` is the one Grab attacks, with what is held in `known`; `pool` marks the tokens that may be of any open
    sentence; `decoded` is span decoding's own result, `seats` its sentence for each row, `note` what a person reads.
    """

    problem: Problem
    pool: Bool[np.ndarray, " v"]
    decoded: Result
    seats: Seats
    note: str

    @property
    def settled(self) -> bool:
        """Whether nothing is left to search."""
        return not np.asarray(self.problem.known.free).any()


def begin(
    keys: Key[Array, " k"], problems: Sequence[Problem], config: AttackConfig, on_segment: OnSegment | None
) -> list[Handed]:
    """Decode client batches one by one, as `--attack=span` with the same keys does."""
    notify, keys = span.shown(on_segment), jax.random.clone(keys)
    return [hand(p, span.seed_of(key), config, notify) for key, p in zip(keys, problems, strict=True)]


def hand(problem: Problem, seed: int, config: AttackConfig, notify: span.Notify = lambda *_: None) -> Handed:
    """Decode one client batch and add what is proven to what is known."""
    spectrum, found = span.decoded(problem, seed, notify)
    decoded = span.result(problem, spectrum, found)
    sure = [span.certified(sentence, found.rows, problem) for sentence in found.sentences]
    seats = _seats(problem, found, sure, config)
    known, proven = held(problem, found, sure, seats), [s is not None and sure[s] for s in seats]
    inside = {i for s, ok in zip(seats, proven, strict=True) if ok for i in found.sentences[s].rows}
    loose = [row for i, row in enumerate(found.rows) if i not in inside and row.certificate > ACCEPT]
    rest = loose
    # With few coordinates to spare a row may pass by chance: good enough to try, not to hold.
    if proven.count(False) == 1 and spectrum.rank + SPARE <= problem.model.width:
        known, rest = _place(known, loose, proven.index(False))
    pool = np.isin(np.arange(len(_words(problem))), [row.token for row in rest])
    note = _note(decoded, sum(proven), len(proven), len(loose) - len(rest), int(known.free.sum()))
    return Handed(problem._replace(known=jax.tree.map(jnp.asarray, known)), pool, decoded, seats, note)


def _words(problem: Problem) -> Float[Array, "v d"]:
    return {**problem.frozen, **problem.trainable}[problem.model.word_table]


# --- sentences --------------------------------------------------------------------------------------------


def _seats(problem: Problem, found: Found, sure: Sequence[bool], config: AttackConfig) -> Seats:
    known = problem.known
    return seat(
        [max(found.rows[i].position for i in sentence.rows) + 1 for sentence in found.sentences],
        sure,
        np.asarray(known.attention).sum(1).tolist(),
        told=problem.lengths,
        labels=None if known.labels is None else np.asarray(known.labels).argmax(1).tolist(),
        score=_explains(problem, found, sure, config),
    )


def _explains(problem: Problem, found: Found, sure: Sequence[bool], config: AttackConfig) -> Callable[[Seats], float]:
    """The distance of the update that the sentences have in some order, open positions empty."""
    clip = views.through(config.view, problem.defended).clip
    objective = _objective(problem.model, config.distance, config.l1, problem.vocabulary.pad, clip)
    (seen,) = programs.observed([problem], config, problem.known.ids.size)

    def score(seats: Seats) -> float:
        known = held(problem, found, sure, seats)
        ids = np.where(known.ids < 0, problem.vocabulary.pad, known.ids)
        return float(objective(ids, None, None, problem.trainable, problem.frozen, seen, known))

    return score


@lru_cache(maxsize=8)
def _objective(
    model: Any, distance: distances.Name, l1: float, pad: int, clip: float | None = None
) -> matching.Objective:
    return jax.jit(matching.token_objective(model, distances.by_name(distance, l1), pad, clip=clip))


def held(problem: Problem, found: Found, sure: Sequence[bool], seats: Seats) -> Known:
    """What is known once certified sentences are held in their seats and the others begin there; arrays of NumPy."""
    known = problem.known
    ids, pinned, attention = (np.array(leaf) for leaf in (known.ids, known.pinned, known.attention))
    kept = np.full((*ids.shape, problem.model.width), np.nan, np.float32)
    for r, s in enumerate(seats):
        rows = [] if s is None else [found.rows[i] for i in found.sentences[s].rows]
        if s is not None and sure[s]:
            pinned[r], ids[r] = True, problem.vocabulary.pad
            attention[r] = np.arange(ids.shape[1]) < len(rows)
            for row in rows:
                ids[r, row.position], kept[r, row.position] = row.token, row.kept
        for row in rows:
            if row.position < ids.shape[1] and not pinned[r, row.position]:
                ids[r, row.position] = row.token
    told = {SITE: kept} if problem.dropout and found.own_masks else None
    return known._replace(ids=ids, pinned=pinned, attention=attention, free=attention & ~pinned, masks=told)


# --- rows without a sentence ------------------------------------------------------------------------------


def _place(known: Known, rows: Sequence[Row], r: int) -> tuple[Known, list[Row]]:
    """Hold rows in sentence r where they are alone at a visible position and agree with what is told; and the rest."""
    at = Counter(row.position for row in rows)
    fits = [at[row.position] == 1 and _agrees(known, row, r) for row in rows]
    ids, pinned, told = known.ids.copy(), known.pinned.copy(), jax.tree.map(np.copy, known.masks)
    for row in (row for row, ok in zip(rows, fits, strict=True) if ok):
        ids[r, row.position], pinned[r, row.position] = row.token, True
        if told is not None:
            told[SITE][r, row.position] = row.kept
    rest = [row for row, ok in zip(rows, fits, strict=True) if not ok]
    return known._replace(ids=ids, pinned=pinned, free=known.attention & ~pinned, masks=told), rest


def _agrees(known: Known, row: Row, r: int) -> bool:
    """Whether sentence r has such a position, and nothing else is known of it."""
    here = (r, row.position)
    if row.position >= known.ids.shape[1] or not known.attention[here]:
        return False
    return not known.pinned[here] or int(known.ids[here]) == row.token


# --- Grab, before and after -------------------------------------------------------------------------------


def enter(state: State, handed: Sequence[Handed]) -> State:
    """Grab's state, first or restored, with the tokens of the pools, and batches without open positions finished."""
    settled = np.array([batch.settled for batch in handed])
    ids = np.stack([np.asarray(batch.problem.known.ids) for batch in handed])
    solved = lambda tokens: np.where(settled[:, None, None], ids, tokens)  # noqa: E731
    return state._replace(
        pools=np.asarray(state.pools) | np.stack([batch.pool for batch in handed])[:, None],
        continuous=solved(state.continuous),
        discrete=solved(state.discrete),
        done=np.asarray(state.done) | settled,
    )


def conclude(handed: Handed, result: Result) -> Result:
    """Grab's result with span decoding's evidence, by row, and a note; where nothing was open, span decoding's own.

    Only what span decoding certified is certified: a sentence that Grab completed is not.
    """
    decoded, known = handed.decoded, handed.problem.known
    proofs = decoded.evidence["sentences"]
    none = {"certified": False, "residual": None}
    evidence = decoded.evidence
    if "not_testable" not in evidence:
        evidence = evidence | {"sentences": [none if s is None else proofs[s] for s in handed.seats]}
    notes = [handed.note, *(note for note in decoded.notes if note != evidence.get("not_testable"))]
    if handed.settled:
        result = result._replace(loss=decoded.loss, masks=None, labels=None, notes=[])
    found = _found_masks(known.masks, handed.problem) if result.masks is None else result.masks
    return result._replace(masks=found, notes=[*notes, *result.notes], evidence=evidence)


def _found_masks(told: Masks | None, problem: Problem) -> Masks | None:
    """The masks span decoding found, with the keep rate where it found none; None where it found none at all."""
    if told is None or all(np.isnan(mask).all() for mask in told.values()):
        return None
    whole = masks.complete(told, problem.model.sites, *problem.known.ids.shape)
    return {name: whole[name] for name in told}


def _note(decoded: Result, proven: int, sentences: int, rows: int, open_: int) -> str:
    """What was handed over, and what that left to Grab."""
    reason = decoded.evidence.get("not_testable")
    if reason or not decoded.evidence["rows"]:
        none = f"span decoding found none of the {decoded.evidence['rank']} input rows"
        return f"{reason or none}; Grab searched everything"
    what = f"span decoding proved {proven} of {_count(sentences, 'sentence')}"
    what += f" and {_count(rows, 'row')} of the other one" * bool(rows)
    if not open_:
        return f"{what}; nothing was left to search"
    return f"{what}; Grab searched {'the other ' if proven or rows else ''}{_count(open_, 'position')}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
