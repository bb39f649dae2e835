"""Which tokens, at which positions, under which dropout masks, make up the first attention layer's inputs.

Three passes. *Scan*: every token of the vocabulary at every position is tried by the box program, a few iterations for
all and more for the best. *Copies*: one token at one position of several sentences gives several rows that differ in
their masks only; goals orthogonal to all rows found so far leave nothing to gain from these, so the optimum is a new
row. *Gaps*: while dimensions are missing, the whole vocabulary is scanned again with such goals.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from grab_jax.span import box
from grab_jax.span.inputs import FirstAttention, embed, normalise
from grab_jax.span.polish import polish

BLOCK = 512
"""Vocabulary rows in one step of the scan: small enough to stay in a CPU's cache."""
BEST = 64
PROMISING = 0.3


class Row(NamedTuple):
    """One input row: `values` is the layer's input before any later norm, `kept` its dropout mask."""

    position: int
    token: int
    values: Float[np.ndarray, " d"]
    kept: Bool[np.ndarray, " d"]
    certificate: float


class Space(NamedTuple):
    """The subspace as the solver wants it: coordinates scaled to unit size over the vocabulary.

    `basis` `[d, r]` is orthonormal in scaled coordinates, `padded` the same in float32 with columns of zeros up to a
    bucket; `inputs` `[d, r]` spans the layer's inputs themselves.
    """

    scale: Float[np.ndarray, " d"]
    basis: Float[np.ndarray, "d r"]
    padded: Float[Array, "d p"]
    inputs: Float[np.ndarray, "d r"]


def space(first: FirstAttention, basis: Float[np.ndarray, "d r"]) -> Space:
    """Prepare a subspace of layer inputs for the solver.

    Where a norm follows the dropout, `x = scale (h - mean) / deviation + shift`, so h lies in the span of
    `basis / scale`, `shift / scale` and 1: two more basis vectors shared by all rows.
    """
    inputs = basis
    if first.later is not None:
        gain, shift = (np.asarray(part, np.float64) for part in first.later[:2])
        more = [np.ones(len(gain))] + ([shift / gain] if np.linalg.norm(shift) > 1e-6 else [])
        basis = np.concatenate([basis / gain[:, None]] + [(m / np.linalg.norm(m))[:, None] for m in more], axis=1)
        basis = np.linalg.qr(basis)[0]
    scale = _scale(first)
    scaled = np.linalg.qr(basis * scale[:, None])[0]
    width = bucket(scaled.shape[1], 8)
    padded = np.zeros((len(scale), min(width, max(len(scale), scaled.shape[1]))), np.float32)
    padded[:, : scaled.shape[1]] = scaled
    return Space(scale, scaled, jnp.asarray(padded), inputs)


def bucket(size: int, least: int) -> int:
    """The next of 8, 12, 16, 24, 32, 48, ... (from `least`, a power of 2) at or above `size`: few shapes."""
    width = least
    while width < size:
        width = width * 3 // 2 if width & (width - 1) == 0 else width * 4 // 3
    return width


def _scale(first: FirstAttention) -> Float[np.ndarray, " d"]:
    """One over the root mean square of each coordinate, over the vocabulary at a few positions."""
    sizes = [np.asarray(_mean_square(first, p)) for p in range(min(4, len(first.places)))]
    return 1 / np.sqrt(np.maximum(np.mean(sizes, axis=0), 1e-12)).astype(np.float64)


@jax.jit
def _mean_square(first: FirstAttention, position) -> Float[Array, " d"]:
    return (embed(first, None, position) ** 2).mean(0)


@partial(jax.jit, static_argnames=("iterations", "best"))
def scan(
    first: FirstAttention,
    scale: Float[Array, " d"],
    basis: Float[Array, "d r"],
    positions: Int[Array, " p"],
    direction: Float[Array, " d"] | None,
    *,
    iterations: int,
    best: int,
) -> tuple[Float[Array, "p n"], Int[Array, "p n"]]:
    """The best tokens at each position by a few iterations of the box program, over the whole vocabulary.

    `direction` replaces the goal (sum of kept sizes) for rows that stick out of what is known already.
    """

    def value(rows):
        goal = jnp.sign(rows) if direction is None else jnp.broadcast_to(direction, rows.shape)
        x, iterate = box.solve(rows, basis, goal, box.start(rows, basis), iterations)
        if direction is None:
            return box.kept(x, iterate.z, rows)
        size = jnp.abs(rows).sum(-1)
        gain = x @ direction - jnp.abs(x - iterate.z).sum(-1) * jnp.abs(direction).mean()
        return jnp.where(size > 0, gain / jnp.where(size > 0, size, 1), -jnp.inf)

    def at(position):
        rows = embed(first, None, position) * scale[None]
        rest = -len(rows) % BLOCK
        blocks = jnp.pad(rows, ((0, rest), (0, 0))).reshape(-1, BLOCK, rows.shape[1])
        values, tokens = jax.lax.top_k(jax.lax.map(value, blocks).reshape(-1), min(best, len(rows)))
        return values, tokens

    return jax.lax.map(at, positions)


@partial(jax.jit, static_argnames=("iterations",))
def _refine(rows, basis, *, iterations: int):
    x, iterate = box.solve(rows, basis, jnp.sign(rows), box.start(rows, basis), iterations)
    return iterate.z, box.kept(x, iterate.z, rows)


_embed = jax.jit(embed)


class Search:
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
        self._least = (1 - rate) - 6 * np.sqrt(rate * (1 - rate) / d) - 1e-9 if rate else 0.99

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
        found = polish(targets[go], self.space.basis, z[go], tolerance=self.tolerance, accept=self.accept)
        good = (found.certificate > self.accept) & (found.kept.mean(-1) > self._least)
        before = len(self.rows)
        for i in sorted(np.flatnonzero(good), key=lambda i: -found.certificate[i]):
            values = found.rows[i] / self.space.scale
            row = Row(int(positions[go[i]]), int(tokens[go[i]]), values, found.kept[i], float(found.certificate[i]))
            self._accept(row)
        return len(self.rows) - before

    def _nearly_binary(self, targets, z) -> Int[np.ndarray, " m"]:
        size = np.abs(targets).mean(-1, keepdims=True)
        distance = np.minimum(np.abs(z - targets), np.abs(z)) / size
        kept = (np.abs(z - targets) <= np.abs(z)).mean(-1)
        new = self.outside(z) > 0.02 if self.rows else np.ones(len(z), bool)
        return np.flatnonzero(((distance < 0.08).mean(-1) >= 0.72) & (kept > self._least - 0.15) & new)

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
        inputs = _new_part(values @ self.space.inputs, self._inputs)
        scaled = _new_part((row.values * self.space.scale) @ self.space.basis, self._scaled)
        if inputs is None or scaled is None:
            return
        self._inputs = np.concatenate([self._inputs, inputs[:, None]], axis=1)
        self._scaled = np.concatenate([self._scaled, scaled[:, None]], axis=1)
        self.rows.append(row)


def _new_part(x: np.ndarray, known: np.ndarray, tolerance: float = 1e-4) -> np.ndarray | None:
    """The unit vector along what `x` adds to the orthonormal columns `known`, None if that is nothing."""
    x = x / np.linalg.norm(x)
    for _ in range(2):
        x = x - known @ (known.T @ x)
    size = np.linalg.norm(x)
    return x / size if size > tolerance else None


def decode(
    first: FirstAttention,
    basis: Float[np.ndarray, "d r"],
    *,
    seed: int = 0,
    accept: float = 0.98,
    tolerance: float = 2e-3,
    notify: Callable[[int, int], None] = lambda found, rank: None,
) -> list[Row]:
    """All input rows that the subspace `basis` holds, dropout on.

    Args:
      seed: of the random goals.
      accept: certificate above which a row counts as proven.
      tolerance: see `polish`.
      notify: called with (rows found, rank) after every step.
    """
    search = Search(first, space(first, basis), accept=accept, tolerance=tolerance)
    generator = np.random.default_rng(seed)
    _scan(search, notify)
    while search.missing and (search.rows or search.suspects):
        if not _copies(search, generator, notify) and not _gaps(search, generator, notify):
            break
    return search.rows


CHUNK, EMPTY = 4, 3


def _scan(search: Search, notify) -> None:
    """First pass: one row for every (position, token), until the rows fill the space or positions stay empty."""
    scale, longest = jnp.asarray(search.space.scale, jnp.float32), len(search.first.places)
    for start in range(0, longest, CHUNK):
        positions = np.minimum(np.arange(start, start + CHUNK), longest - 1)
        _, tokens = scan(search.first, scale, search.space.padded, positions, None, iterations=5, best=BEST)
        positions = np.repeat(positions, tokens.shape[1])
        tokens = np.asarray(tokens).reshape(-1)
        z, share = solve_pairs(search, tokens, positions, 150)
        go = share > PROMISING
        search.suspects |= set(zip(positions[go].tolist(), tokens[go].tolist(), strict=True))
        search.take(tokens[go], positions[go], z[go])
        notify(len(search.rows), search.space.inputs.shape[1])
        held = {row.position for row in search.rows}
        empty = min(start + CHUNK, longest) - 1 - max(held, default=-1)
        if not search.missing or empty >= EMPTY:
            return


def solve_pairs(search: Search, tokens, positions, iterations: int):
    """The box program of many (token, position) pairs, all kept sizes as the goal."""
    scale = jnp.asarray(search.space.scale, jnp.float32)[None]
    rows = _embed(search.first, tokens, positions) * scale
    z, share = _refine(rows, search.space.padded, iterations=iterations)
    return np.asarray(z, np.float64), np.asarray(share)


def _copies(search: Search, generator: np.random.Generator, notify, patience: int = 4) -> int:
    """Rows of known or suspected (position, token) pairs under other masks; returns how many were found.

    Half of the trials have a goal along what is missing. The other half, which matter when the subspace is wide, force
    one coordinate to be dropped that no known copy drops: fewer copies are then left to mix.
    """
    found, fails, tries = 0, 0, {}
    while search.missing and fails < patience:
        pairs = sorted({(row.position, row.token) for row in search.rows} | search.suspects)
        trials = [tries.get(pair, 4) for pair in pairs]
        positions, tokens = (np.repeat(column, trials) for column in np.array(pairs).T)
        had = search.counts()
        new = _commit(search, tokens, positions, generator)
        now = search.counts()
        for pair, count in zip(pairs, trials, strict=True):
            more = now.get(pair, 0) > had.get(pair, 0)
            tries[pair] = min(64, count * 4) if more else max(2, count // 2)
        found, fails = found + new, 0 if new else fails + 1
        notify(len(search.rows), search.space.inputs.shape[1])
    return found


MOST = 512
"""Problems solved at once."""


def _commit(search: Search, tokens: np.ndarray, positions: np.ndarray, generator: np.random.Generator) -> int:
    """One trial for every entry, in batches; accepts new rows and returns their number."""
    found, scale = 0, jnp.asarray(search.space.scale, jnp.float32)[None]
    for start in range(0, len(tokens), MOST):
        some = slice(start, start + MOST)
        n = len(tokens[some])
        fill = ((0, bucket(n, 16) - n),)
        padded_tokens, padded_positions = (np.pad(part[some], fill, mode="edge") for part in (tokens, positions))
        rows = _embed(search.first, padded_tokens, padded_positions) * scale
        goals = jnp.asarray(search.direction(generator, len(rows)), jnp.float32)
        forced = search.never_dropped(tokens[some], positions[some])
        forced = np.where(forced, generator.random(forced.shape), -1).argmax(-1)
        shut = np.zeros(rows.shape, bool)
        odd = np.arange(1, n, 2)
        shut[odd, forced[odd]] = True
        box_rows = jnp.where(shut, 0, rows)
        z, _ = box.commit(rows, search.space.padded, goals, box_rows)
        found += search.take(tokens[some], positions[some], np.asarray(z, np.float64)[:n])
    return found


def _gaps(search: Search, generator: np.random.Generator, notify, draws: int = 2, trials: int = 8) -> int:
    """Rows the first pass missed: the whole vocabulary at every position in use, with goals along what is missing."""
    scale = jnp.asarray(search.space.scale, jnp.float32)
    last = max(position for position, _ in {*search.counts(), *search.suspects})
    positions = np.arange(min(last + 2, len(search.first.places)))
    positions = np.pad(positions, (0, -len(positions) % CHUNK), mode="edge").reshape(-1, CHUNK)
    found = 0
    for direction in search.direction(generator, draws):
        goal, pairs = jnp.asarray(direction, jnp.float32), []
        for some in positions:
            _, tokens = scan(search.first, scale, search.space.padded, some, goal, iterations=10, best=8)
            pairs += zip(
                np.repeat(some, tokens.shape[1]).tolist(), np.asarray(tokens).reshape(-1).tolist(), strict=True
            )
        where, what = (np.repeat(column, trials) for column in np.array(sorted(set(pairs))).T)
        found += _commit(search, what, where, generator)
        notify(len(search.rows), search.space.inputs.shape[1])
        if not search.missing:
            break
    return found
