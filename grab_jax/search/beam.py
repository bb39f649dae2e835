"""Beam search over token substitutions (Grab, section 4.3): beams are always complete batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from grab_jax.search.scoring import Score

Ids = Int[np.ndarray, "b t"]


def best_distinct(
    candidates: Int[np.ndarray, "n b t"], scores: Float[np.ndarray, " n"], width: int
) -> tuple[Int[np.ndarray, "m b t"], Float[np.ndarray, " m"]]:
    """The `width` lowest-scoring different candidates, best first; ties keep the earlier one."""
    order, seen = [], set()
    for i in np.argsort(scores, kind="stable"):
        key = candidates[i].tobytes()
        if key not in seen:
            seen.add(key)
            order.append(i)
        if len(order) == width:
            break
    return candidates[order], scores[order]


def sweep(
    score: Score,
    starts: Int[np.ndarray, "s b t"],
    scores: Float[np.ndarray, " s"],
    free: Bool[np.ndarray, "b t"],
    pools: Sequence[Int[np.ndarray, " _"]],
    width: int = 4,
) -> tuple[Int[np.ndarray, "s b t"], Float[np.ndarray, " s"]]:
    """One pass over all free positions, improving every start independently.

    At each position of each row every current beam tries every token of the row's pool there (a substitution, not a
    swap), and the `width` best become the beams; they carry on across rows. A start is replaced by its best beam only
    if that scores lower. All starts advance together, so that one call of `score` holds the work of all.

    Args:
      score: token batches `[n b t]` -> `[n]`, lower is better.
      starts: the solutions to improve.
      scores: their scores.
      free: positions to walk over.
      pools: allowed tokens of each row.
      width: beams kept per start.
    """
    beams = [start[None] for start in starts]
    kept = [np.array([value]) for value in scores]
    for row, position in np.argwhere(free).tolist():
        if len(pools[row]) == 0:
            continue
        grown = [_substitute(beam, row, position, pools[row]) for beam in beams]
        values = np.split(score(np.concatenate(grown)), np.cumsum([len(g) for g in grown])[:-1])
        pairs = [best_distinct(g, v, width) for g, v in zip(grown, values, strict=True)]
        beams, kept = [p[0] for p in pairs], [p[1] for p in pairs]
    better = [value[0] < old for value, old in zip(kept, scores, strict=True)]
    found = [b[0] if wins else s for b, s, wins in zip(beams, starts, better, strict=True)]
    return np.stack(found), np.array([k[0] if wins else o for k, o, wins in zip(kept, scores, better, strict=True)])


def _substitute(beams: Int[np.ndarray, "w b t"], row: int, position: int, pool: Int[np.ndarray, " p"]):
    grown = np.repeat(beams, len(pool), axis=0)
    grown[:, row, position] = np.tile(pool, len(beams))
    return grown


def search(
    score: Score,
    starts: Int[np.ndarray, "n b t"],
    free: Bool[np.ndarray, "b t"],
    pools: Sequence[Int[np.ndarray, " _"]],
    *,
    width: int = 4,
    sweeps: int = 5,
) -> tuple[Ids, float]:
    """Keep the `width` best starts, improve each by `sweeps` sweeps, return the best batch found and its score.

    Stops early when a sweep changes nothing: the next one would repeat it.
    """
    solutions, scores = best_distinct(starts, score(starts), width)
    for _ in range(sweeps):
        before = solutions.copy()
        solutions, scores = sweep(score, solutions, scores, free, pools, width)
        if np.array_equal(before, solutions):
            break
    winner = int(np.argmin(scores))
    return solutions[winner], float(scores[winner])
