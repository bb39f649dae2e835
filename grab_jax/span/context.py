"""Whole sentences by the second attention layer, without dropout: its inputs depend on all of a sentence.

The first layer's inputs are tokens at positions, so its gradient does not tell which of them share a sentence (and
some in its span are no members at all). The second layer's inputs of the right sentence, computed with the weights
the client was sent, lie in the span of its gradient to rounding, 7e-7 of their size (MiniLM, CoLA); with one token
replaced by any of its 16 nearest neighbours in the embedding table, or two swapped, one of them is away by 0.14 or
more. A search over tokens, one position at a time, with that distance as the score, finds sentences; the same
distance proves them. Equal tokens of different sentences are different rows there: the gradient's rank is the number
of tokens of the batch's distinct sentences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from grab_jax.span.members import ROOM
from grab_jax.span.scaling import bucket, filled

MOST = 1024
"""Tokens of the sentences tried at once: few shapes, and small enough for a CPU's cache."""
BUDGET = 20_000_000
"""Tokens of all sentences tried for one client batch."""
FLOOR = 1e-6
"""Residuals below this are rounding: they all count alike."""
OUTSIDE = 0.06
"""Residual of a token from which it is outside however large the noise: MiniLM's wrong sentences have 0.12 or more."""
CLEARLY = 2.0
"""How many times its limit some token of every other sentence must be away, for noise to leave a sentence proven."""

Choices = Mapping[int, Sequence[int]]
"""Tokens that may stand at a position."""


class Second(NamedTuple):
    """The second attention layer: its inputs of given sentences, and the span of its gradient's columns.

    `bounds` are how far noise moves each vector of its basis.
    """

    inputs: Callable[[Int[np.ndarray, "n t"], Bool[np.ndarray, "n t"]], Float[Array, "n t d"]]
    basis: Float[np.ndarray, "d r"]
    bounds: Float[np.ndarray, " r"] | None = None

    def residuals(
        self, ids: Int[np.ndarray, "n t"], tick: Callable[[], None] = lambda: None
    ) -> Float[np.ndarray, "n t"]:
        """Part of each token's input outside the span, relative to its size, of sentences of one length.

        `tick` is called after every block of sentences.
        """
        return self.measured(ids, tick)[0]

    def measured(
        self, ids: Int[np.ndarray, "n t"], tick: Callable[[], None] = lambda: None
    ) -> Float[np.ndarray, "2 n t"]:
        """`residuals`, and what noise of size `bounds` makes of a token that is in the span."""
        count, length = ids.shape
        width = bucket(length, 8)
        basis, known = jnp.asarray(filled(self.basis)), () if self.bounds is None else self.bounds
        bounds = np.zeros(basis.shape[1], np.float32)
        bounds[: len(known)] = known
        parts, block = [np.zeros((2, 0, length), np.float32)], max(8, MOST // width)
        for start in range(0, count, block):
            some = ids[start : start + block]
            # Few shapes: the last sentence and the last token fill up, unseen by the others.
            full = next(size for size in (8, 32, block) if len(some) <= size)
            some = np.pad(some, ((0, full - len(some)), (0, 0)), mode="edge")
            some = np.pad(some, ((0, 0), (0, width - length)), mode="edge")
            real = np.broadcast_to(np.arange(width) < length, some.shape)
            measured = np.asarray(_outside(self.inputs(some, real), basis, bounds))
            parts.append(measured[:, : min(block, count - start), :length])
            tick()
        return np.concatenate(parts, axis=1).astype(np.float64)


@jax.jit
def _outside(x: Float[Array, "n t d"], basis: Float[Array, "d r"], bounds: Float[Array, " r"]) -> Float[Array, "2 n t"]:
    inside = x @ basis
    parts = (x - inside @ basis.T, inside * bounds[None, None])
    return jnp.stack([jnp.linalg.norm(part, axis=-1) for part in parts]) / jnp.linalg.norm(x, axis=-1)[None]


class Judged(NamedTuple):
    """The largest residual of a sentence, and the limit up to which it proves the sentence.

    Where that is noise's, other sentences may be within theirs: see `Search.distinct`.
    """

    residual: float
    limit: float


class Search:
    """Sentences whose inputs all lie in the span of the second layer's gradient.

    `cls` and `sep` are sought at the ends only. At most `budget` tokens of sentences are tried in all.

    Args:
      cls: first token of a sentence.
      sep: last token of a sentence; its positions are the lengths tried.
      whole: residual below which a sentence is found, where noise does not move its inputs further.
      notify: called with (tokens found, tokens of the batch).
    """

    def __init__(
        self,
        second: Second,
        *,
        cls: int,
        sep: int,
        whole: float,
        seed: int = 0,
        budget: int = BUDGET,
        notify: Callable[[int, int], None] = lambda found, total: None,
    ):
        self.found: dict[tuple[int, ...], Judged] = {}
        self._second, self._cls, self._sep, self._whole, self._notify = second, cls, sep, whole, notify
        self._generator = np.random.default_rng(seed)
        self.reached: dict[int, Int[np.ndarray, "n t"]] = {}
        self._left = budget

    @property
    def complete(self) -> bool:
        """All tokens of the batch belong to sentences found."""
        return self._tokens() >= self._second.basis.shape[1]

    @property
    def spent(self) -> bool:
        """The budget is used up."""
        return self._left <= 0

    def _tokens(self) -> int:
        return sum(map(len, self.found))

    def _tick(self) -> None:
        self._notify(self._tokens(), self._second.basis.shape[1])

    def check(self, sentence: tuple[int, ...]) -> float:
        """Add a sentence if it is one; returns its largest residual."""
        away, noise = self._second.measured(np.array([sentence], np.int32))[:, 0]
        limits = self._limits(noise)
        if (away < limits).all():
            self.found[sentence] = Judged(float(away.max()), float(limits.max()))
        return float(away.max())

    def distinct(self, sentence: tuple[int, ...], choices: Choices) -> bool:
        """Whether all sentences with one other token, or two neighbours swapped, are clearly outside the span.

        Where noise widens limits a wrong sentence may be within them, too: in a model whose tokens mix little it is
        away by 0.001 to 0.01 only. Then some of the sentences between it and the right one are as near.
        """
        others = []
        for p in range(1, len(sentence) - 1):
            others += [(*sentence[:p], t, *sentence[p + 1 :]) for t in choices.get(p, ()) if t != sentence[p]]
            if p < len(sentence) - 2 and sentence[p] != sentence[p + 1]:
                others.append((*sentence[:p], sentence[p + 1], sentence[p], *sentence[p + 2 :]))
        if not others:
            return True
        away, noise = self._second.measured(np.array(others, np.int32), self._tick)
        return bool((away > CLEARLY * self._limits(noise)).any(-1).all())

    def _limits(self, noise: Float[np.ndarray, "*n t"]) -> Float[np.ndarray, "*n t"]:
        """Residuals below which tokens belong to a sentence, by what noise makes of each."""
        return np.maximum(self._whole, np.minimum(ROOM * noise, OUTSIDE))

    def draw(self, choices: Choices, starts: int = 32) -> int:
        """Climb from random sentences of every length; returns how many new ones were found."""
        return self._each(choices, lambda table, _: self._drawn(table, starts))

    def widen(self, choices: Choices, kept: int = 8, tries: int = 4096) -> int:
        """Climb with other choices, from the best that earlier climbs reached; returns how many were found.

        Random sentences are added where there are so few choices that a sweep stays below `tries` sentences.
        """

        def begin(table, length):
            more = max(0, tries // sum(map(len, table)) - kept)
            drawn = self._drawn(table, min(more, 10 * kept) or 1)
            return np.concatenate([self.reached.get(length, drawn)[:kept], drawn])

        return self._each(choices, begin)

    def _each(self, choices: Choices, begin: Callable[..., Int[np.ndarray, "n t"]]) -> int:
        before = len(self.found)
        for length in (position + 1 for position in sorted(choices) if position and self._sep in choices[position]):
            table = self._table(choices, length)
            if not self.complete and not self.spent and all(len(tokens) for tokens in table):
                self.reached[length] = self._climb(begin(table, length), table)
        return len(self.found) - before

    def _table(self, choices: Choices, length: int) -> list[np.ndarray]:
        """The tokens tried at each position of a sentence of this length."""
        ends = (self._cls, self._sep)
        first = [t for t in choices.get(0, ()) if t == self._cls]
        inner = [[t for t in choices.get(p, ()) if t not in ends] for p in range(1, length - 1)]
        return [np.array(tokens, np.int32) for tokens in (first, *inner, [self._sep])]

    def _drawn(self, table: Sequence[np.ndarray], count: int) -> Int[np.ndarray, "n t"]:
        """Random sentences, half of them of tokens that at their places no sentence found has, where there are such."""
        used = {pair for ids in self.found for pair in enumerate(ids)}
        fresh = [[t for t in tokens.tolist() if (p, t) not in used] for p, tokens in enumerate(table)]
        halves = (count - count // 2, [new or old for new, old in zip(fresh, table, strict=True)]), (count // 2, table)
        drawn = [[self._generator.choice(tokens, many) for tokens in choices] for many, choices in halves]
        return np.concatenate([np.stack(columns, axis=1) for columns in drawn]).astype(np.int32)

    def _climb(self, sentences: Int[np.ndarray, "n t"], table: Sequence[np.ndarray], sweeps: int = 8):
        """Better tokens, one position at a time, until nothing changes; the sentences reached, the best first."""
        sentences = np.unique(sentences, axis=0)
        sentences, scores = self._improve(sentences, 0, table[0])  # where there is no choice, this is all
        for _ in range(sweeps):
            before = sentences
            for position in self._generator.permutation(len(table)):
                if len(table[position]) > 1 and not self.complete and not self.spent:
                    sentences, scores = self._improve(sentences, int(position), table[position])
            sentences, first = np.unique(sentences, axis=0, return_index=True)
            scores = scores[first]
            if len(sentences) == len(before) and (sentences == np.unique(before, axis=0)).all():
                break
        return sentences[np.argsort(scores)]

    def _improve(self, sentences, position: int, tokens: np.ndarray):
        """The best token at one position of every sentence, and its score: the mean logarithm of the residuals."""
        n, length = sentences.shape
        tries = np.repeat(sentences[:, None], len(tokens), axis=1)
        tries[:, :, position] = tokens
        self._left -= tries.size
        measured = self._second.measured(tries.reshape(-1, length), self._tick)
        residuals, noise = measured.reshape(2, n, len(tokens), length)
        score = np.log(np.maximum(residuals, np.maximum(FLOOR, noise))).mean(-1)
        for hit in tries[(residuals < self._limits(noise)).all(-1)]:
            self.check(tuple(hit.tolist()))
        for done in (np.array(s) for s in self.found if len(s) == length):
            score[(tries == done).all(-1)] = 0.0
        best = score.argmin(1)
        rows = np.arange(n)
        return tries[rows, best], score[rows, best]
