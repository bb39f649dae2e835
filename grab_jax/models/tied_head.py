"""What a causal language model's tied head sees, and what it sends back: for the targets of a client's update."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grab_jax.types import Masks, Params


class Passes(NamedTuple):
    """One forward and backward pass.

    `hidden` enters the head; `log_probabilities` of the next token, at every position but the last; `words` is the
    gradient with respect to the word embeddings of the summed cross entropy.
    """

    hidden: Float[Array, "b t d"]
    log_probabilities: Float[Array, "b u v"]
    words: Float[Array, "b t d"]


@partial(jax.jit, static_argnames=("model",))
def passes(
    model: Any,
    params: Params,
    ids: Int[Array, "b t"],
    attention: Bool[Array, "b t"],
    counted: Bool[Array, "b u"],
    masks: Masks | None,
) -> Passes:
    """Run a causal language model; `counted` (u = t - 1) marks the positions whose next token the loss counts."""
    zeros = model.zero_perturbations(params, ids, attention)

    def loss(perturbations):
        logits, taps = model.apply_tapped(params, perturbations, ids, attention, masks)
        found = jax.nn.log_softmax(logits[:, :-1])
        picked = jnp.take_along_axis(found, ids[:, 1:, None], axis=-1)[..., 0]
        return -jnp.where(counted, picked, 0.0).sum(), (found, taps)

    cotangents, (found, taps) = jax.grad(loss, has_aux=True)(zeros)
    table = lambda tree: tree["transformer"]["wte"]  # noqa: E731
    return Passes(table(taps)["head_x"], found, table(cotangents)["dy"])


def final_norm(flat: Mapping[str, Array]) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
    """Scale and shift of the norm before the head, from flat parameters (`tuning.flatten`)."""
    return flat["transformer/ln_f/scale"], flat["transformer/ln_f/bias"]
