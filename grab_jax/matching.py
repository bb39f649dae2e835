"""Gradient matching: how well a candidate batch explains the observed update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from grab_jax import client, distances, local_training
from grab_jax.local_training import Local
from grab_jax.masks import complete
from grab_jax.types import Candidate, Known, Masks

Objective = Callable[..., Float[Array, ""]]
Precision = Literal["float32", "bfloat16"]

_PRODUCTS = {"float32": "highest", "bfloat16": "BF16_BF16_F32"}


def simulation(
    model: Any,
    precision: Precision = "float32",
    local: Local | None = None,
    clip: float | None = None,
    *,
    words: bool = True,
) -> client.Simulate:
    """The client step as the attacker repeats it, factored; with `local`, its local training, not factored.

    With a `clip` norm each example of a step is clipped as in `client.clipped`; clients that train locally do not clip.

    `bfloat16` rounds what enters the model's matrix products, and those of their derivatives, and adds up in float32; a
    CPU computes in float32 all the same. Distances are in float32 always.

    `words=False` is for embeddings as input, which leave the trained word table out: its gradient has the norm of the
    position table's, both being those of the same sums, unless a token is there twice.
    """
    if local is not None and clip is not None:
        raise ValueError("local training is repeated without a clip norm")
    step = client.fedsgd(model, factored=True) if local is None else local_training.repeat(model, local)
    if clip is not None:
        step = client.clipped(step, clip, twice=None if words else model.position_table)

    def simulate(*args):
        with jax.default_matmul_precision(_PRODUCTS[precision]):
            return step(*args)

    return simulate


def embedding_objective(
    model: Any,
    distance: distances.Distance,
    precision: Precision = "float32",
    local: Local | None = None,
    clip: float | None = None,
) -> Objective:
    """Distance of a continuous candidate.

    Returns `objective(candidate, trainable, frozen, observed, known)`; a candidate without masks uses those told, and
    no dropout where none are. Every shared tensor is matched except the word table, which embeddings used as input do
    not touch. With `local` the client's local training is repeated, masks have an epoch axis (`[b e ...]`). With a
    `clip` norm examples are clipped as the client does it.
    """

    def objective(
        candidate: Candidate, trainable, frozen, observed: distances.Observed, known: Known
    ) -> Float[Array, ""]:
        fixed = {**frozen, **{path: value for path, value in trainable.items() if path == model.word_table}}
        matched = {path: value for path, value in trainable.items() if path != model.word_table}
        labels = known.labels if candidate.labels is None else candidate.labels
        masks = _told(model, known, local) if candidate.masks is None else candidate.masks
        simulate = simulation(model, precision, local, clip, words=len(matched) == len(trainable))
        update = simulate(matched, fixed, candidate.embeds, known.attention, labels, masks)
        return distance(update, observed)

    return objective


def with_norm_penalty(model: Any, objective: Objective, weight: float) -> Objective:
    """An embedding objective plus `weight * (mean |e_i| - mean |v_j|)^2` (LAMP, eq. 6).

    e_i are the candidate's embeddings at visible positions, v_j those of the vocabulary; without weight the objective
    itself.
    """
    if not weight:
        return objective

    def penalised(candidate: Candidate, trainable, frozen, observed, known: Known) -> Float[Array, ""]:
        table = {**frozen, **trainable}[model.word_table]
        norms = jnp.where(known.attention, optax.safe_norm(candidate.embeds, 1e-12, axis=-1), 0.0)
        gap = norms.sum() / known.attention.sum() - jnp.linalg.norm(table, axis=-1).mean()
        return objective(candidate, trainable, frozen, observed, known) + weight * gap**2

    return penalised


def token_objective(
    model: Any,
    distance: distances.Distance,
    pad: int,
    precision: Precision = "float32",
    local: Local | None = None,
    clip: float | None = None,
) -> Objective:
    """Distance of a token candidate, every shared tensor matched.

    Returns `score(ids, masks, labels, trainable, frozen, observed, known)`; masks and labels that are None are taken
    from `known` (no dropout where it holds no masks). A padding token is attended to nowhere, as in the client.
    `clip` is as in `embedding_objective`.
    """
    simulate = simulation(model, precision, local, clip)

    def score(
        ids: Int[Array, "b t"],
        masks: Masks | None,
        labels: Float[Array, "b c"] | None,
        trainable,
        frozen,
        observed,
        known,
    ) -> Float[Array, ""]:
        attention = known.attention & (ids != pad)
        # A row without any visible token would attend to nothing; its first token always stays visible.
        attention = attention.at[:, 0].set(True)
        labels = known.labels if labels is None else labels
        masks = _told(model, known, local) if masks is None else masks
        value = distance(simulate(trainable, frozen, ids, attention, labels, masks), observed)
        return jnp.where(jnp.isnan(value), jnp.inf, value)

    return score


def _told(model: Any, known: Known, local: Local | None) -> Masks | None:
    epochs = () if local is None else (local.epochs,)
    return complete(known.masks, model.sites, *known.ids.shape, epochs)
