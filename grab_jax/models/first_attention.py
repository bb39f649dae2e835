"""Where each architecture keeps its first attention layers: the bridge from a model to span decoding."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import lru_cache, partial, reduce
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from grab_jax.models import build
from grab_jax.span.inputs import FirstAttention, Norm
from grab_jax.types import Params

Kernels = Literal["query", "all"]
"""The query projection alone, or query, key and value."""

_PREFIX = {
    "bert": "bert/encoder/layer_{}/attention/self/",
    "roberta": "roberta/encoder/layer_{}/attention/self/",
    "gpt2": "transformer/h_{}/attn/",
}


def _prefix(model: Any, layer: int = 0) -> str:
    return _PREFIX[model.family].format(layer)


def describe(model: Any, flat: Mapping[str, Array]) -> FirstAttention:
    """Read a model's first attention layer from its flat parameters (`tuning.flatten`), adapters added to kernels."""
    prefix = _prefix(model)
    words, places = flat[model.word_table], flat[model.position_table]
    if model.family == "gpt2":
        kernels = jnp.split(_kernel(flat, prefix + "c_attn"), 3, axis=1)
        biases = jnp.split(flat[prefix + "c_attn/bias"], 3)
        later = _norm(flat, "transformer/h_0/ln_1", model.config.layer_norm_epsilon)
        norm = None
    else:
        kernels = [_kernel(flat, prefix + name) for name in ("query", "key")]
        biases = [flat[f"{prefix}{name}/bias"] for name in ("query", "key")]
        embeddings = f"{model.family}/embeddings/"
        norm, later = _norm(flat, embeddings + "LayerNorm", model.config.layer_norm_eps), None
        # RoBERTa counts positions from its padding index + 1.
        start = model.config.pad_token_id + 1 if model.family == "roberta" else 0
        places = places[start:] + flat[embeddings + "token_type_embeddings/embedding"][:1]
    rate = model.sites["embeddings"].rate
    return FirstAttention(words, places, norm, rate, later, (kernels[0], biases[0]), (kernels[1], biases[1]))


def _kernel(flat: Mapping[str, Array], layer: str) -> Float[Array, "d o"]:
    kernel = flat[f"{layer}/kernel"]
    if f"{layer}/lora_a" not in flat:
        return kernel
    a, b, scale = (flat[f"{layer}/lora_{name}"] for name in ("a", "b", "scale"))
    return kernel + scale * a @ b


def gradients(
    model: Any, update: Mapping[str, Array], layer: int = 0, kernels: Kernels = "all"
) -> list[Float[np.ndarray, "d o"]]:
    """The query, key and value kernels' part of an update, in float64 on the host."""
    found = [np.asarray(update[path], np.float64) for path in paths(model, layer, kernels)]
    return np.split(found[0], 3, axis=1) if model.family == "gpt2" else found


def paths(model: Any, layer: int = 0, kernels: Kernels = "all") -> list[str]:
    """The tensors `gradients` reads; GPT-2's is one, whatever `kernels` says."""
    names = ("query", "key", "value") if kernels == "all" else ("query",)
    names = ("c_attn",) if model.family == "gpt2" else names
    return [f"{_prefix(model, layer)}{name}/kernel" for name in names]


@lru_cache(maxsize=8)
def _cut(model: Any, layers: int) -> Any:
    """The model with its first layers only: the others would be traced for nothing."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = layers
    return build(config, model.task)


@partial(jax.jit, static_argnames=("model", "layer"))
def inputs(
    model: Any, params: Params, ids: Int[Array, "n t"], attention: Bool[Array, "n t"], *, layer: int
) -> Float[Array, "n t d"]:
    """What an attention layer is fed, without dropout."""
    cut = _cut(model, layer + 1)
    taps = cut.apply_tapped(params, cut.zero_perturbations(params, ids, attention), ids, attention)[1]
    return reduce(lambda node, name: node[name], paths(model, layer)[0].split("/")[:-1], taps)["x"]


def _norm(flat: Mapping[str, Array], path: str, epsilon: float) -> Norm:
    return Norm(flat[path + "/scale"], flat[path + "/bias"], epsilon)
