"""Training losses of a client: mean cross entropy over a batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def classification(logits: Float[Array, "b c"], labels: Float[Array, "b c"]) -> Float[Array, ""]:
    """Mean cross entropy against class probabilities.

    `labels` is one-hot for a client; an attacker's soft labels enter as they are, without normalisation (Grab).
    """
    return -(labels * jax.nn.log_softmax(logits)).sum(-1).mean()


def next_token(
    logits: Float[Array, "b t v"], ids: Int[Array, "b t"], attention: Bool[Array, "b t"]
) -> Float[Array, ""]:
    """Mean cross entropy of each token given those before it, over all real targets of the batch."""
    log_probabilities = jax.nn.log_softmax(logits[:, :-1])
    picked = jnp.take_along_axis(log_probabilities, ids[:, 1:, None], axis=-1)[..., 0]
    real = attention[:, 1:]
    return -jnp.where(real, picked, 0.0).sum() / real.sum()
