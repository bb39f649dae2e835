"""The input rows found so far, and what they leave open of the subspace."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from grab_jax.span.inputs import FirstAttention, embed, normalise
from grab_jax.span.polish import DEVIATIONS, polish
from grab_jax.span.rate import WIDEST
from grab_jax.span.scaling import Space


class Row(NamedTuple):
    """One input row: `values` is the layer's input before any later norm, `kept` its dropout mask."""

    position: int
    token: int
    values: Float[np.ndarray, " d"]
    kept: Bool[np.ndarray, " d"]
    certificate: float


_embed = jax.jit(embed)


class Rows:
    """Rows found so far, and what they leave open.

    A row is accepted only if it raises the rank of the set, so there are never more than r of them.
    """

    def __init__(self, first: FirstAttention, space: Space, *, accept: float, tolerance: float):
        self.first, self.space, self.accept, self.tolerance = first, space, accept, tolerance
        self.rows: list[Row] = []
        self.suspects: set[tuple[int, int]] = set()
        self._inputs = np.zeros((space.inputs.shape[1], 0))
        self._scaled = np.zeros((space.basis.shape[1], 0))
        rate, d = float(first.rate), len(space.scale)
        spread = 6 * np.sqrt(rate * (1 - rate) / d)
        self.least = (1 - rate) - spread - 1e-9 if rate else 0.99
        # Rows untouched by dropout are none of a client that uses it; at the widest rate, the true one is unknown.
        self.most = (1 - rate) + spread if rate < WIDEST else 1.0

    @property
    def missing(self) -> int:
        """Dimensions no accepted row accounts for."""
        return self.space.inputs.shape[1] - len(self.rows)

    def direction(self, generator: np.random.Generator, count: int) -> Float[np.ndarray, "n d"]:
        """Random goals, orthogonal (in scaled coordinates) to every accepted row."""
        draw = generator.standard_normal((count, self.space.basis.shape[1]))
        draw -= draw @ self._scaled @ self._scaled.T
        return (draw / np.linalg.norm(draw, axis=1, keepdims=True)) @ self.space.basis.T

    def outside(self, z: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
        """Share of each scaled point that no accepted row explains."""
        inside = z @ self.space.basis
        rest = inside - inside @ self._scaled @ self._scaled.T
        return np.linalg.norm(rest, axis=1) / np.maximum(np.linalg.norm(inside, axis=1), 1e-12)

    def counts(self) -> dict[tuple[int, int], int]:
        """Accepted rows of each (position, token)."""
        return Counter((row.position, row.token) for row in self.rows)

    def never_dropped(self, tokens: np.ndarray, positions: np.ndarray) -> Bool[np.ndarray, "n d"]:
        """Coordinates that every accepted copy of each (position, token) keeps."""
        kept: dict[tuple[int, int], np.ndarray] = {}
        for row in self.rows:
            pair = (row.position, row.token)
            kept[pair] = kept.get(pair, True) & row.kept
        every = np.ones(len(self.space.scale), bool)
        return np.stack([kept.get(pair, every) for pair in zip(positions.tolist(), tokens.tolist(), strict=True)])

    def take(self, tokens: np.ndarray, positions: np.ndarray, z: Float[np.ndarray, "n d"]) -> int:
        """Polish the nearly binary solutions `z` (scaled) and accept what is certified and new; returns how many."""
        targets = np.asarray(_embed(self.first, tokens, positions), np.float64) * self.space.scale
        go = self._nearly_binary(targets, z)
        kept = np.abs(z[go] - targets[go]) <= np.abs(z[go])
        go = go[self._distinct(kept, tokens[go], positions[go])]
        if not len(go):
            return 0
        settings = {"tolerance": self.tolerance, "accept": self.accept, "deviation": self.space.deviation}
        found = polish(targets[go], self.space.basis, z[go], **settings)
        good = (
            (found.certificate > self.accept) & (found.kept.mean(-1) > self.least) & (found.kept.mean(-1) <= self.most)
        )
        before = len(self.rows)
        for i in sorted(np.flatnonzero(good), key=lambda i: -found.certificate[i]):
            values = self._exact(found.rows[i], np.where(found.kept[i], targets[go[i]], 0)) / self.space.scale
            row = Row(int(positions[go[i]]), int(tokens[go[i]]), values, found.kept[i], float(found.certificate[i]))
            self._accept(row)
        return len(self.rows) - before

    def _exact(self, row: Float[np.ndarray, " d"], level: Float[np.ndarray, " d"]) -> Float[np.ndarray, " d"]:
        """A fitted row, at its level where noise moved the fit visibly."""
        noise = DEVIATIONS * self.space.deviation(row[None])[0]
        return np.where(noise > self.tolerance * np.abs(row).mean(), level, row)

    def _nearly_binary(self, targets, z) -> Int[np.ndarray, " m"]:
        size, noise = np.abs(targets).mean(-1, keepdims=True), self.space.deviation(z)
        distance = np.minimum(np.abs(z - targets), np.abs(z))
        binary = (distance < np.maximum(0.08 * size, 2 * noise)).mean(-1) >= 0.72
        kept = (np.abs(z - targets) <= np.abs(z)).mean(-1)
        length = np.maximum(np.linalg.norm(z, axis=1), 1e-12)
        moved = np.maximum(0.02, 2 * np.linalg.norm(noise, axis=1) / length)
        new = self.outside(z) > moved if self.rows else np.ones(len(z), bool)
        return np.flatnonzero(binary & (kept > self.least - 0.15) & new)

    @staticmethod
    def _distinct(kept, tokens, positions) -> list[int]:
        """First of each group of equal masks of one token."""
        chosen: list[int] = []
        for i in range(len(kept)):
            same = (j for j in chosen if tokens[j] == tokens[i] and positions[j] == positions[i])
            if not any((kept[i] != kept[j]).mean() < 0.03 for j in same):
                chosen.append(i)
        return chosen

    def _accept(self, row: Row) -> None:
        if not self.missing:
            return
        values = row.values if self.first.later is None else normalise(self.first.later, row.values[None])[0]
        point = row.values * self.space.scale
        moved = max(1e-4, 2 * np.linalg.norm(self.space.deviation(point[None])) / np.linalg.norm(point))
        inputs = _new_part(values @ self.space.inputs, self._inputs, moved)
        scaled = _new_part(point @ self.space.basis, self._scaled, moved)
        if inputs is None or scaled is None:
            return
        self._inputs = np.concatenate([self._inputs, inputs[:, None]], axis=1)
        self._scaled = np.concatenate([self._scaled, scaled[:, None]], axis=1)
        self.rows.append(row)


def _new_part(x: np.ndarray, known: np.ndarray, tolerance: float) -> np.ndarray | None:
    """The unit vector along what `x` adds to the orthonormal columns `known`, None if that is nothing."""
    x = x / np.linalg.norm(x)
    for _ in range(2):
        x = x - known @ (known.T @ x)
    size = np.linalg.norm(x)
    return x / size if size > tolerance else None
