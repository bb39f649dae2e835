"""Span decoding of a client in training mode: dropout masks keep equal (position, token) pairs apart, no row is merged.

Which rows: `span.decode`. Which sentences: the first layer's equations. Rows are found at any dropout rate assumed, and
a rate that was not told is read off them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from jaxtyping import Float

from grab_jax.attacks.span_evaluation import Found
from grab_jax.span import assemble, rate, subspace
from grab_jax.span.assemble import Assembly
from grab_jax.span.decode import decode
from grab_jax.span.inputs import FirstAttention, normalise
from grab_jax.span.rows import Row
from grab_jax.types import Problem


def solve(
    problem: Problem,
    first: FirstAttention,
    space: subspace.Spectrum,
    assembled: Callable[[list[Row]], Assembly],
    *,
    seed: int,
    notify: Callable[[int, int], None],
) -> Found:
    """Decode a batch.

    Args:
      space: span of the gradients that hold the inputs.
      assembled: rows -> sentences, and the singular values of their equations (none: there are no equations).
    """
    search = partial(decode, basis=space.basis, blur=space.blur, seed=seed, notify=notify)
    if problem.rate:
        rows = search(first)
        return Found(rows, assembled(rows).sentences if rows else [])
    first = first._replace(rate=rate.WIDEST)
    rows = search(first)
    if not rows:
        return Found([], [])
    rescaled = lambda p: [row._replace(values=row.values * (1 - rate.WIDEST) / (1 - p)) for row in rows]  # noqa: E731
    kept, starts = np.stack([row.kept for row in rows]), sum(row.position == 0 for row in rows)
    if first.later is None and len(assembled(rows).singular):
        read = rate.fit(kept, lambda p: assembled(rescaled(p)).singular, starts)
    else:  # the norm after dropout undoes the scale, or there are no equations that it enters
        read = rate.dropped_share(kept)[0]
    notes = (f"the dropout rate was not told; read off the update it is {read:.4f}",)
    return Found(rescaled(read), assembled(rescaled(read)).sentences, notes=notes)


def inputs_of(first: FirstAttention, rows: list[Row]) -> Float[np.ndarray, "n d"]:
    """The attention layer's inputs, after any norm behind the dropout."""
    values = np.stack([row.values for row in rows])
    return values if first.later is None else normalise(first.later, values)


def assembled(
    problem: Problem,
    first: FirstAttention,
    gradients: list[Float[np.ndarray, "d o"]],
    space: subspace.Spectrum,
    rows: list[Row],
) -> Assembly:
    """Sentences by the equations of the kernels' gradients (query, key, ...), with the residuals that prove them."""
    inputs = inputs_of(first, rows)
    heads, noise = problem.model.config.num_attention_heads, np.split(space.deviations, 3)[:2]
    projected = assemble.projections(inputs, gradients, first.query, first.key, heads)
    if space.sigma:  # tensors to which noise was added may have been brought to one size before
        scale = assemble.key_scale(projected)
        projected = projected._replace(key_cotangent=scale * projected.key_cotangent)
        noise = noise[0], scale * noise[1]
    matrix = assemble.equations(projected).reshape(len(rows), -1)
    found = assemble.assemble(matrix, np.array([row.position for row in rows]))
    bounded = [assemble.bounded(s, matrix, projected, inputs, tuple(noise)) for s in found.sentences]
    return found._replace(sentences=bounded)
