"""Members of the gradient's row space without dropout: a projection per token, at every position.

Identical (position, token) pairs are one row here. Some rows are in the span and not in the batch: word and position
embeddings add up before the norm, so with (v, p), (w, p) and (v, q) in the batch, (w, q) is nearly in the span, and
exactly so once two such cycles exist (the norm's shift is then in the span as well). `pursuit` tells them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from grab_jax.span import pursuit
from grab_jax.span.inputs import FirstAttention, embed, normalise
from grab_jax.span.scaling import filled

KEEP = 1024
"""Tokens per position whose residual is computed again in float64; more could not be members of a batch."""
FAR = 1e-4
"""Relative residual no member reaches: two positions in a row without any below it end the scan."""
NEAR = 1e-5
"""Relative residual below which a row may be a member whatever its rank: measured 1e-7 for true rows."""
MOVED = 0.1
"""How far away, relative to its size, a row is sought that local training moved."""
ROOM = 5.0
"""How many times the noise's root mean square a member may be away: measured 1.1, after several local steps 3.3."""


class Member(NamedTuple):
    """A layer input in or near the span: `values` after any later norm, `away` its relative residual.

    `share` is the part of `pursuit`'s solutions that use it, `size` its part of the gradient in the first of them;
    `sure` says that the other members cannot replace it, so the gradient's span proves it. `noise` is how far the
    noise of the span moves it (root mean square), `moved` how far local training does at most, relative to its size.
    """

    position: int
    token: int
    values: Float[np.ndarray, " d"]
    away: float
    share: float = 0.0
    size: float = 0.0
    sure: bool = False
    noise: float = 0.0
    moved: float = 0.0

    def within(self, least: float, times: float = 1.0) -> bool:
        """Whether it is away by less than `least`, or than noise explains, or so many times as much, where it moved."""
        return self.away < times * max(least, ROOM * self.noise) + self.moved


def members(
    first: FirstAttention,
    basis: Float[np.ndarray, "d r"],
    gradients: Sequence[Float[np.ndarray, "d o"]],
    *,
    bounds: Float[np.ndarray, " r"] | None = None,
    sent: FirstAttention | None = None,
    seed: int = 0,
    notify: Callable[[int, int], None] = lambda found, rank: None,
) -> list[Member]:
    """All rows near the span of `basis`, the likeliest first.

    Args:
      gradients: kernels' gradients whose columns span `basis`.
      bounds: how far noise moves each vector of `basis` (root mean square); where it is visible, no row is `sure`.
      sent: the layer with other weights of the local training than `first`: a member may be away by what lies between.
      seed: of the random starts of `pursuit`.
      notify: called with (positions' rows found so far, rank).
    """
    noises = np.zeros(basis.shape[1]) if bounds is None else bounds
    widest = 10 * max(FAR, ROOM * float(noises.max(initial=0.0))) + (MOVED if sent else 0.0)
    near: list[Member] = []
    for position in range(len(first.places)):
        here = _blurred(at_position(first, basis, position, widest), basis, noises, sent)
        near += [m for m in here if m.within(FAR, 10.0)]
        notify(min(basis.shape[1], sum(m.within(NEAR) for m in near)), basis.shape[1])
        if position > 2 and not any(m.position >= position - 1 and m.within(FAR) for m in near):
            break
    tick = lambda: notify(min(basis.shape[1], len(near)), basis.shape[1])  # noqa: E731
    inside = [m for m in near if m.within(NEAR)]
    outside = sorted((m for m in near if not m.within(NEAR)), key=lambda m: m.away)
    if inside:
        rows = np.stack([m.values for m in inside]) @ basis
        shares, sizes = pursuit.solutions(rows, [basis.T @ g for g in gradients], seed=seed, tick=tick)
        exact = sent is None and ROOM * noises.max(initial=0.0) < NEAR
        sure = irreplaceable(rows) if exact else np.zeros(len(rows), bool)
        told = zip(inside, shares, sizes, sure, strict=True)
        inside = [m._replace(share=float(s), size=float(z), sure=bool(c)) for m, s, z, c in told]
    return sorted(inside, key=lambda m: -m.size) + outside


def _blurred(near: list[Member], basis, bounds: Float[np.ndarray, " r"], sent: FirstAttention | None) -> list[Member]:
    """The members of a position with how far noise, and local training, move each of them."""
    if not near or not (bounds.any() or sent):
        return near
    rows, sizes = np.stack([m.values for m in near]), np.linalg.norm([m.values for m in near], axis=1)
    noise, moved = np.linalg.norm(rows @ basis * bounds, axis=1) / sizes, np.zeros(len(near))
    if sent is not None:
        before = inputs64(sent, np.array([m.token for m in near]), near[0].position)
        moved = np.linalg.norm(rows - before, axis=1) / sizes
    return [m._replace(noise=float(e), moved=float(d)) for m, e, d in zip(near, noise, moved, strict=True)]


def irreplaceable(rows: Float[np.ndarray, "n r"]) -> Bool[np.ndarray, " n"]:
    """Rows in no linear dependency: without any one of them the others do not span the space.

    None is, if all together do not span it: then rows of the batch are missing, and another might stand in for them.
    """
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    left, values, _ = np.linalg.svd(unit, full_matrices=False)
    if len(rows) < rows.shape[1] or values[-1] < 1e-6 * values[0]:
        return np.zeros(len(rows), bool)
    return (left**2).sum(1) > 1 - 1e-8


def independent(near: Sequence[Member], basis: Float[np.ndarray, "d r"], least: float = 1e-6) -> list[Member]:
    """The first members that are each outside the span of those before by more than `least`, sorted by position, token.

    Noise of the basis needs no larger limit: members that depend on others do so after a projection, too.
    """
    rank, known, chosen = basis.shape[1], np.zeros((basis.shape[1], 0)), []
    for member in near:
        if len(chosen) == rank:
            break
        x = member.values @ basis
        x = x / np.linalg.norm(x)
        for _ in range(2):
            x = x - known @ (known.T @ x)
        if np.linalg.norm(x) > least:
            known = np.concatenate([known, x[:, None] / np.linalg.norm(x)], axis=1)
            chosen.append(member)
    return sorted(chosen, key=lambda m: m[:2])


def inputs64(
    first: FirstAttention, tokens: Int[np.ndarray, " n"], position: int | Int[np.ndarray, " n"]
) -> Float[np.ndarray, "n d"]:
    """Layer inputs of tokens without dropout, in float64, after any later norm."""
    rows = np.asarray(first.words[tokens], np.float64) + np.asarray(first.places[position], np.float64)
    for norm in (first.norm, first.later):
        rows = rows if norm is None else normalise(norm, rows)
    return rows


def at_position(first: FirstAttention, basis: Float[np.ndarray, "d r"], position: int, most: float) -> list[Member]:
    """Tokens whose inputs at a position are outside the span by less than `most`, of the 1024 nearest."""
    tokens = np.asarray(_closest(first, jnp.asarray(filled(basis)), position, best=min(KEEP, len(first.words))))
    rows = inputs64(first, tokens, position)
    away = np.linalg.norm(rows - rows @ basis @ basis.T, axis=1) / np.linalg.norm(rows, axis=1)
    near = np.flatnonzero(away < most)
    return [Member(position, int(tokens[i]), rows[i], float(away[i])) for i in near]


@partial(jax.jit, static_argnames=("best",))
def _closest(first: FirstAttention, basis: Float[Array, "d r"], position, *, best: int) -> Int[Array, " n"]:
    rows = embed(first._replace(rate=0.0), None, position)
    rows = rows if first.later is None else normalise(first.later, rows)
    inside = ((rows @ basis) ** 2).sum(-1) / (rows**2).sum(-1)
    return jax.lax.top_k(inside, best)[1]
