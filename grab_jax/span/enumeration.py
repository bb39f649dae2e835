"""Sentences put together from tokens at positions, judged by the second attention layer (DAGER, arXiv 2405.15586).

A causal layer's inputs depend on what stands before only: sentences grow from the left, one token at a time, and a
prefix that leaves the span is dropped (section 4.2 there). In an encoder they depend on the whole sentence: all
combinations are tried, of every length at which an end may stand (section 4.3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from grab_jax.span.context import Second

BLOCK = 4096
"""Sentences formed at once."""

Choices = Mapping[int, Sequence[int]]
"""Tokens that may stand at a position, the likeliest first."""


class Judge(NamedTuple):
    """The second layer, and how far outside its span a token may be: `least`, and what `second.bounds` allow."""

    second: Second
    least: float
    tick: Callable[[], None] = lambda: None

    def __call__(self, ids: Int[np.ndarray, "n t"]) -> tuple[Bool[np.ndarray, " n"], Float[np.ndarray, "n t"]]:
        """Whether all tokens of a sentence are in the span, and how far outside each one is."""
        away, allowed = self.second.measured(ids, self.tick)
        return (away <= self.least + allowed).all(-1), away


class Enumerated(NamedTuple):
    """Sentences in the span and the best of the others, each with its tokens' residuals.

    `tokens` counts the layer's distinct inputs that the former explain, `cut` says that not everything was tried.
    """

    found: dict[tuple[int, ...], Float[np.ndarray, " t"]]
    best: dict[tuple[int, ...], Float[np.ndarray, " t"]]
    tokens: int
    cut: bool


def grow(judge: Judge, choices: Choices, total: int, *, kept: int, budget: int) -> Enumerated:
    """Sentences of a causal model: prefixes in the span, as long as one more token keeps them there.

    A sentence that begins another one of the batch is not told apart from it: all its inputs are the other's too.

    Args:
      choices: at every position from 0 on, until there are none.
      total: distinct inputs of the layer (its gradient's rank); with as many explained nothing more is sought.
      kept: best prefixes outside the span that grow where none is inside.
      budget: prefixes tried at one position.
    """
    found: dict = {}
    alive, inside, tokens, cut = {(): np.zeros(0)}, True, 0, False
    for position in range(len(choices)):
        tries = [(*prefix, token) for prefix in alive for token in choices[position]]
        cut |= len(tries) > budget
        tries = np.array(tries[:budget], np.int32)
        passed, away = judge(tries)
        if inside and passed.any():
            grown = tries[passed]
            found |= _ended(alive, {tuple(prefix[:-1]) for prefix in grown.tolist()})
            alive, tokens = _named(grown, away[passed]), tokens + len(grown)
        elif tokens >= total:
            break
        else:
            found |= alive if inside else {}
            nearest = away.mean(-1).argsort(kind="stable")[:kept]
            alive, inside = _named(tries[nearest], away[nearest]), False
    found = {ids: away for ids, away in (found | alive if inside else found).items() if ids}
    return Enumerated(found, {} if inside else alive, tokens, cut)


def _ended(alive: dict, grown: set) -> dict:
    """The prefixes that do not go on."""
    return {prefix: away for prefix, away in alive.items() if prefix not in grown}


def _named(ids: Int[np.ndarray, "n t"], away: Float[np.ndarray, "n t"]) -> dict:
    return dict(zip(map(tuple, ids.tolist()), away, strict=True))


def combine(judge: Judge, choices: Choices, total: int, *, ends: tuple[int, int], kept: int, budget: int) -> Enumerated:
    """Sentences of an encoder: of all combinations of tokens those in the span, and the best one of every length.

    Where there are more than `budget` combinations, tokens of sentences found are left out, then all but the `kept`
    likeliest of a position, then as many more as it takes. What remains of the budget goes to combinations with tokens
    of sentences found, as few of them a position as it takes: sentences may share some.

    Args:
      choices: at every position from 0 on, until there are none.
      total: inputs of the layer (its gradient's rank); with as many explained nothing more is sought.
      ends: first and last token of a sentence, which stand nowhere else.
      budget: combinations tried of one length.
    """
    found, best, cut = {}, {}, False
    for length in (position + 1 for position in sorted(choices) if position and ends[1] in choices[position]):
        table = _table(choices, length, ends)
        if _done(found, total) or not all(table):
            continue
        tables, nearest = [table], None
        if _count(table) > budget:
            tables, cut = _fewer(table, found, kept, budget), True
        for tries in chain.from_iterable(map(_combinations, tables)):
            passed, away = judge(tries)
            found |= _named(tries[passed], away[passed])
            least = away.mean(-1).argmin()
            if nearest is None or away[least].mean() < nearest[1].mean():
                nearest = tuple(tries[least].tolist()), away[least]
            if _done(found, total):
                break
        best |= {nearest[0]: nearest[1]} if nearest[0] not in found else {}
    best = dict(sorted(best.items(), key=lambda item: item[1].mean()))
    return Enumerated(found, best, sum(map(len, found)), cut and not _done(found, total))


def _done(found: Mapping, total: int) -> bool:
    return sum(map(len, found)) >= total


def _table(choices: Choices, length: int, ends: tuple[int, int]) -> list[list[int]]:
    """The tokens tried at each position of a sentence of this length."""
    inner = [[token for token in choices[p] if token not in ends] for p in range(1, length - 1)]
    return [[token for token in choices[0] if token == ends[0]], *inner, [ends[1]]]


def _count(table: Sequence[Sequence[int]]) -> int:
    return int(np.prod([len(tokens) for tokens in table], dtype=object))


def _fewer(table: list[list[int]], found: Mapping, kept: int, budget: int) -> list[list[list[int]]]:
    """At most `budget` combinations: without tokens of sentences found, then with them behind the others."""
    used = {pair for ids in found for pair in enumerate(ids)}
    new = [[t for t in tokens if (p, t) not in used] for p, tokens in enumerate(table)]
    old = [[t for t in tokens if (p, t) in used] for p, tokens in enumerate(table)]
    first = _within([some or others for some, others in zip(new, old, strict=True)], kept, budget)
    left = budget - _count(first)
    return [first, _within([some + others for some, others in zip(new, old, strict=True)], kept, left)][
        : 1 + (left > 0)
    ]


def _within(table: list[list[int]], kept: int, budget: int) -> list[list[int]]:
    while _count(table) > max(1, budget):
        table, kept = [tokens[:kept] for tokens in table], kept - 1
    return table


def _combinations(table: Sequence[Sequence[int]]) -> Iterator[Int[np.ndarray, "n t"]]:
    """Blocks of sentences."""
    columns, shape = [np.array(tokens, np.int32) for tokens in table], [len(tokens) for tokens in table]
    for start in range(0, _count(table), BLOCK):
        places = np.unravel_index(np.arange(start, min(start + BLOCK, _count(table))), shape)
        yield np.stack([column[place] for column, place in zip(columns, places, strict=True)], axis=1)
