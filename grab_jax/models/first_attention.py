"""Where each architecture keeps its first attention layer: the bridge from a model to span decoding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from grab_jax.span.inputs import FirstAttention, Norm

_PREFIX = {
    "bert": "bert/encoder/layer_0/attention/self/",
    "roberta": "roberta/encoder/layer_0/attention/self/",
    "gpt2": "transformer/h_0/attn/",
}


def describe(model: Any, flat: Mapping[str, Array]) -> FirstAttention:
    """Read a model's first attention layer from its flat parameters (`tuning.flatten`)."""
    prefix = _PREFIX[model.family]
    words, places = flat[model.word_table], flat[model.position_table]
    if model.family == "gpt2":
        kernels = jnp.split(flat[prefix + "c_attn/kernel"], 3, axis=1)
        biases = jnp.split(flat[prefix + "c_attn/bias"], 3)
        later = _norm(flat, "transformer/h_0/ln_1", model.config.layer_norm_epsilon)
        norm = None
    else:
        kernels = [flat[f"{prefix}{name}/kernel"] for name in ("query", "key")]
        biases = [flat[f"{prefix}{name}/bias"] for name in ("query", "key")]
        embeddings = f"{model.family}/embeddings/"
        norm, later = _norm(flat, embeddings + "LayerNorm", model.config.layer_norm_eps), None
        # RoBERTa counts positions from its padding index + 1.
        start = model.config.pad_token_id + 1 if model.family == "roberta" else 0
        places = places[start:] + flat[embeddings + "token_type_embeddings/embedding"][:1]
    rate = model.sites["embeddings"].rate
    return FirstAttention(words, places, norm, rate, later, (kernels[0], biases[0]), (kernels[1], biases[1]))


def gradients(model: Any, update: Mapping[str, Array]) -> list[Float[np.ndarray, "d o"]]:
    """The query, key and value kernels' part of an update, in float64 on the host."""
    prefix = _PREFIX[model.family]
    if model.family == "gpt2":
        return np.split(np.asarray(update[prefix + "c_attn/kernel"], np.float64), 3, axis=1)
    return [np.asarray(update[f"{prefix}{name}/kernel"], np.float64) for name in ("query", "key", "value")]


def paths(model: Any) -> list[str]:
    """The tensors `gradients` reads."""
    prefix = _PREFIX[model.family]
    return [f"{prefix}{name}/kernel" for name in (("c_attn",) if model.family == "gpt2" else ("query", "key", "value"))]


def _norm(flat: Mapping[str, Array], path: str, epsilon: float) -> Norm:
    return Norm(flat[path + "/scale"], flat[path + "/bias"], epsilon)
