"""From embeddings to tokens."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def nearest(
    embeds: Float[Array, "... d"], table: Float[Array, "v d"], allowed: Bool[Array, " v"] | None = None
) -> tuple[Int[Array, ...], Float[Array, ...]]:
    """The token whose embedding has the largest cosine with each vector, and that cosine in [-1, 1].

    `allowed=None` searches the whole vocabulary, special tokens included, as Grab does.
    """
    unit = lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)  # noqa: E731
    cosines = unit(embeds).reshape(-1, embeds.shape[-1]) @ unit(table).T
    if allowed is not None:
        cosines = jnp.where(allowed[None], cosines, -jnp.inf)
    shape = embeds.shape[:-1]
    return cosines.argmax(-1).astype(jnp.int32).reshape(shape), cosines.max(-1).reshape(shape)
