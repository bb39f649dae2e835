"""The federated client, simulated: what leaves it is a pure function of weights, batch and dropout masks.

The attacker differentiates these same functions, with word embeddings in place of token ids and relaxed masks in
place of 0/1 ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int

from grab_jax import losses, tuning
from grab_jax.leaves import Leaf
from grab_jax.types import Masks

Simulate = Callable[..., Mapping[str, Leaf]]


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
