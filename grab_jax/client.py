"""The federated client, simulated: what leaves it is a pure function of weights, batch and dropout masks.

The attacker differentiates these same functions, with word embeddings in place of token ids and relaxed masks in
place of 0/1 ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grab_jax import losses, tuning
from grab_jax.leaves import Leaf, average, scale, square_norm
from grab_jax.types import Masks

Simulate = Callable[..., Mapping[str, Leaf]]
Norm = float | Float[Array, ""]


def fedsgd(model: Any, *, factored: bool = False) -> Simulate:
    """One FedSGD step: the gradient of the mean loss, of sequence classification or (causal LM) of the next token.

    With `factored=True` kernels come as `leaves.Outer` and tables as `leaves.Rows`, the same matrices, not formed: what
    an attacker compares.
    Returns `simulate(trainable, frozen, inputs, attention, labels, masks) -> Update`, where `inputs` are token ids
    `[b t]` or word embeddings `[b t d]`, `labels` class probabilities `[b c]`, and `masks=None` is evaluation mode.
    A causal LM needs token ids and does not look at `labels`.
    The update has one entry per tensor of `trainable`.
    """

    def simulate(
        trainable: Mapping[str, Array],
        frozen: Mapping[str, Array],
        inputs: Int[Array, "b t"] | Float[Array, "b t d"],
        attention: Bool[Array, "b t"],
        labels: Float[Array, "b c"],
        masks: Masks | None = None,
    ) -> Mapping[str, Leaf]:
        def loss(logits):
            if model.task == "causal_lm":
                return losses.next_token(logits, inputs, attention)
            return losses.classification(logits, labels)

        if factored:
            params = tuning.merge(trainable, frozen)
            return model.factored_gradient(loss, params, trainable, inputs, attention, masks)

        def loss_of(trained):
            return loss(model.apply(tuning.merge(trained, frozen), inputs, attention, masks))

        return jax.grad(loss_of)(dict(trainable))

    return simulate


def examples(step: Simulate, clip: Norm = float("inf"), *, twice: str | None = None) -> Simulate:
    """Every example's own update by a client step, on a leading axis b, rescaled to a norm of at most `clip`.

    The norm is that of all tensors together, and the factor `min(1, clip / norm)` (DP-SGD: Abadi et al. 2016, arXiv
    1607.00133, algorithm 1). Differentiable where `clip` is finite; leaves stay factored.

    Args:
      step: a client step; it is given batches of one example.
      clip: largest norm, in (0, inf].
      twice: a tensor whose square counts twice, for one of the same norm that the update does not hold.
    """

    def simulate(trainable, frozen, inputs, attention, labels, masks=None) -> Mapping[str, Leaf]:
        def one(*example):
            update = step(trainable, frozen, *jax.tree.map(lambda leaf: leaf[None], example))
            squares = {path: square_norm(leaf) for path, leaf in update.items()}
            square = sum(squares.values()) + squares.get(twice, 0.0)
            weight = jnp.minimum(1.0, clip / jnp.sqrt(jnp.maximum(square, jnp.finfo(square.dtype).tiny)))
            return {path: scale(leaf, weight) for path, leaf in update.items()}

        return jax.vmap(one)(inputs, attention, labels, masks)

    return simulate


def clipped(step: Simulate, clip: Norm, *, twice: str | None = None) -> Simulate:
    """DP-SGD before its noise: the sum of the clipped updates of the examples over their number; see `examples`.

    With an infinite clip the update of `step` itself, where that is the mean of the examples' own: under a next-token
    loss each sentence weighs the same here, and each token there.
    """
    each = examples(step, clip, twice=twice)

    def simulate(*args) -> Mapping[str, Leaf]:
        return {path: average(leaf) for path, leaf in each(*args).items()}

    return simulate
