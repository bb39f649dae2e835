"""Layers shared by the ports: explicit dropout masks, and taps that expose a layer's input and output cotangent.

`Dense` and `LayerNorm` sow their (normalised) input under the collection `taps` and perturb their output under
`perturbations`. With both collections absent this costs nothing. With them present,
`x.T @ grad(loss)(zero perturbation)` is the gradient of a kernel: the whole parameter gradient in factored form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grab_jax.types import Masks


class Site(NamedTuple):
    """One dropout site: axis letters of its mask for one sentence (of `t`, `d`, `h`), their sizes (0 for `t`), rate."""

    axes: str
    sizes: tuple[int, ...]
    rate: float

    def shape(self, length: int) -> tuple[int, ...]:
        """Mask shape for one sentence of `length` tokens."""
        return tuple(length if axis == "t" else size for axis, size in zip(self.axes, self.sizes, strict=True))


Sites = Mapping[str, Site]  # Flax freezes the dict


def drop(x: Float[Array, ...], masks: Masks | None, site: str, sites: Sites) -> Float[Array, ...]:
    """Inverted dropout with a given mask: `x * mask / (1 - rate)`; the identity where `masks` is None."""
    if masks is None:
        return x
    return x * masks[site] / (1 - sites[site].rate)


ADAPTER = "lora_dropout"
"""Last part of a dropout site at an adapter's input; before it stands the layer's path."""


def adapter_masks(masks: Masks | None, sites: Sites) -> dict[str, dict]:
    """The masks of adapters' inputs as a Flax collection, nested like the layers, divided by the keep rate."""
    tree: dict[str, dict] = {}
    for site, mask in (masks or {}).items():
        *layer, last = site.split("/")
        if last == ADAPTER:
            node = tree
            for part in layer:
                node = node.setdefault(part, {})
            node["mask"] = mask / (1 - sites[site].rate)
    return tree


def _along_last(vector: Float[Array, " d"], like: Float[Array, "... d"]) -> Float[Array, "... d"]:
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


class Dense(nn.Module):
    """`y = x @ kernel + bias`, tapped; kernel `[in, out]`.

    Where the parameters hold a LoRA adapter (`lora.py`), plus `lora_scale * (x * mask) @ lora_a @ lora_b`.
    """

    features: int
    bias: bool = True
    scale: float = 0.02

    @nn.compact
    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        """Apply to the last axis."""
        kernel = self.param("kernel", nn.initializers.normal(self.scale), (x.shape[-1], self.features))
        _sow(self, "x", x)
        y = x @ kernel
        if self.bias:
            y = y + _along_last(self.param("bias", nn.initializers.zeros, (self.features,)), y)
        if self.has_variable("params", "lora_a"):
            y = y + self._adapted(x)
        return self.perturb("dy", y)

    def _adapted(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        if self.has_variable("adapters", "mask"):
            x = x * self.get_variable("adapters", "mask")
        _sow(self, "lora_x", x)
        a, b, scale = (self.get_variable("params", f"lora_{name}") for name in ("a", "b", "scale"))
        return x @ a @ b * scale


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, tapped at its normalised input."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        """Normalise the last axis, then scale and shift."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        shift = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        centred = x - x.mean(-1, keepdims=True)
        xhat = centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + self.epsilon)
        _sow(self, "xhat", xhat)
        return self.perturb("dy", xhat * _along_last(scale, x) + _along_last(shift, x))


class Embedding(nn.Module):
    """A lookup table `[rows, d]`; its gradient is the one-hot of `ids` times the tapped cotangent."""

    rows: int
    width: int
    scale: float = 0.02

    def setup(self):
        """Create the table."""
        self.embedding = self.param("embedding", nn.initializers.normal(self.scale), (self.rows, self.width))

    def __call__(self, ids: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """Rows `ids` of the table."""
        _sow(self, "ids", ids)
        return self.perturb("dy", self.embedding[ids])

    def attend(self, x: Float[Array, "... d"]) -> Float[Array, "... v"]:
        """Tied output head: `x @ table.T`."""
        _sow(self, "head_x", x)
        return self.perturb("head_dy", x @ self.embedding.T)


def _sow(module: nn.Module, name: str, value: Array) -> None:
    module.sow("taps", name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)


def embed_words(table: Embedding, inputs: Int[Array, "b t"] | Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """Token ids are looked up; floating inputs are taken as word embeddings already."""
    return table(inputs) if jnp.issubdtype(inputs.dtype, jnp.integer) else inputs


def attend(
    query: Float[Array, "b t d"],
    key: Float[Array, "b t d"],
    value: Float[Array, "b t d"],
    visible: Bool[Array, "b 1 q t"],
    heads: int,
    drop_probabilities: Callable[[Float[Array, "b h t t"]], Float[Array, "b h t t"]],
    scale: float,
) -> Float[Array, "b t d"]:
    """Multi-head attention written out, so that the probabilities' dropout mask is reachable.

    `visible` is True where a query (axis `q`, 1 if the same for all) may look.
    """
    split = lambda x: x.reshape(*x.shape[:-1], heads, -1)  # noqa: E731
    scores = jnp.einsum("bqhe,bkhe->bhqk", split(query), split(key)) * scale
    scores = jnp.where(visible, scores, jnp.finfo(scores.dtype).min)
    probabilities = drop_probabilities(jax.nn.softmax(scores, axis=-1))
    return jnp.einsum("bhqk,bkhe->bqhe", probabilities, split(value)).reshape(value.shape)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
}
