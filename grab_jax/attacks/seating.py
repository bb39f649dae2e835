"""Which decoded sentence belongs to which row of a client batch: by length, and among equal lengths by label.

Span decoding finds sentences in no order; a row of Grab's batch has a length and a label where these are told. A
*seat* is a row's place; it holds the index of a sentence, or None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
from scipy.optimize import linear_sum_assignment

Seats = tuple[int | None, ...]


def seat(
    sentences: Sequence[int],
    sure: Sequence[bool],
    rows: Sequence[int],
    *,
    told: bool,
    labels: Sequence[int] | None,
    score: Callable[[Seats], float],
) -> Seats:
    """Give every sentence a row, the proven ones first, as far as there are rows for them.

    Args:
      sentences: their lengths.
      sure: which of them are proven: these need a row of their very length.
      rows: lengths of the batch's rows.
      told: whether these are the true lengths; if not, they are the longest possible ones.
      labels: classes of the rows, None where they are not told.
      score: how badly an order explains the update; asked only where labels differ between rows that could swap.
    """
    seats = by_length(sentences, sure, rows, told=told)
    if labels is None:
        return seats
    alike = lambda i, j: not told or rows[i] == rows[j]  # noqa: E731
    pairs = [(i, j) for i, j in combinations(range(len(rows)), 2) if alike(i, j) and labels[i] != labels[j]]
    return by_score(seats, pairs, score)


def by_length(sentences: Sequence[int], sure: Sequence[bool], rows: Sequence[int], *, told: bool) -> Seats:
    """The assignment of least total difference between lengths, of proven sentences, then of the others."""
    seats: list[int | None] = [None] * len(rows)
    for proven in (True, False):
        mine = [s for s, is_sure in enumerate(sure) if is_sure == proven]
        empty = [r for r, s in enumerate(seats) if s is None]
        away = np.array([[abs(sentences[s] - rows[r]) for r in empty] for s in mine]).reshape(len(mine), len(empty))
        for i, j in zip(*linear_sum_assignment(away), strict=True):
            fits = away[i, j] == 0 if told else sentences[mine[i]] <= rows[empty[j]]
            if fits or not proven:
                seats[empty[j]] = mine[i]
    return tuple(seats)


def by_score(seats: Seats, pairs: Sequence[tuple[int, int]], score: Callable[[Seats], float]) -> Seats:
    """Swap the sentences of a pair of rows, the best swap first, as long as the score falls."""
    useful = lambda seats: [(i, j) for i, j in pairs if seats[i] != seats[j]]  # noqa: E731
    value = score(seats) if useful(seats) else 0.0
    while options := [_swapped(seats, i, j) for i, j in useful(seats)]:
        scores = [score(option) for option in options]
        best = int(np.argmin(scores))
        if not scores[best] < value:
            break
        seats, value = options[best], scores[best]
    return seats


def _swapped(seats: Seats, i: int, j: int) -> Seats:
    changed = list(seats)
    changed[i], changed[j] = seats[j], seats[i]
    return tuple(changed)
