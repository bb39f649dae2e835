"""Which tokens, at which positions, under which dropout masks, make up the first attention layer's inputs.

Three passes. *Scan*: every token of the vocabulary at every position is tried by the box program, a few iterations for
all and more for the best. *Copies*: one token at one position of several sentences gives several rows that differ in
their masks only; goals orthogonal to all rows found so far leave nothing to gain from these, so the optimum is a new
row. *Gaps*: while dimensions are missing, the whole vocabulary is scanned again with such goals.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from grab_jax.span import box
from grab_jax.span.inputs import FirstAttention, embed
from grab_jax.span.rows import Row, Rows
from grab_jax.span.scaling import bucket, scaled_space

BLOCK = 512
"""Vocabulary rows in one step of the scan: small enough to stay in a CPU's cache."""
BEST = 64
PROMISING = 0.3
ACCEPT = 0.98
"""Certificate above which a row counts as proven."""


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


def decode(
    first: FirstAttention,
    basis: Float[np.ndarray, "d r"],
    *,
    seed: int = 0,
    accept: float = ACCEPT,
    tolerance: float = 2e-3,
    blur: Float[np.ndarray, "d r"] | None = None,
    notify: Callable[[int, int], None] = lambda found, rank: None,
) -> list[Row]:
    """All input rows that the subspace `basis` holds, dropout on.

    Args:
      seed: of the random goals.
      accept: certificate above which a row counts as proven.
      tolerance: see `polish`.
      blur: standard deviations of the basis's entries; None is 0.
      notify: called with (rows found, rank) after every step.
    """
    search = Rows(first, scaled_space(first, basis, blur), accept=accept, tolerance=tolerance)
    generator = np.random.default_rng(seed)
    _scan(search, notify)
    while search.missing and (search.rows or search.suspects):
        if not _copies(search, generator, notify) and not _gaps(search, generator, notify):
            break
    return search.rows


CHUNK, EMPTY = 4, 3


def _scan(search: Rows, notify) -> None:
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


def solve_pairs(search: Rows, tokens, positions, iterations: int):
    """The box program of many (token, position) pairs, all kept sizes as the goal."""
    scale = jnp.asarray(search.space.scale, jnp.float32)[None]
    rows = _embed(search.first, tokens, positions) * scale
    z, share = _refine(rows, search.space.padded, iterations=iterations)
    return np.asarray(z, np.float64), np.asarray(share)


def _copies(search: Rows, generator: np.random.Generator, notify, patience: int = 4) -> int:
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


def _commit(search: Rows, tokens: np.ndarray, positions: np.ndarray, generator: np.random.Generator) -> int:
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


def _gaps(search: Rows, generator: np.random.Generator, notify, draws: int = 2, trials: int = 8) -> int:
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
