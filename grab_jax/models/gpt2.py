"""GPT-2 with explicit dropout masks (Radford 2019), causal LM and sequence classification.

Names follow Hugging Face one to one (`h.0` becomes `h_0`); the fused `c_attn` stays one tensor, because the update a
client sends is partitioned that way. `masks=None` is evaluation mode.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grab_jax.models.layers import (
    ACTIVATIONS,
    Dense,
    Embedding,
    LayerNorm,
    Site,
    Sites,
    attend,
    drop,
    embed_words,
)
from grab_jax.types import Masks

Inputs = Int[Array, "b t"] | Float[Array, "b t d"]


def sites(config: Any, task: str) -> Sites:
    """Dropout sites in call order: `1 + 3L`; the classification head has none."""
    del task
    width, heads = config.n_embd, config.n_head
    residual = Site("td", (0, width), config.resid_pdrop)
    found = {"embeddings": Site("td", (0, width), config.embd_pdrop)}
    for i in range(config.n_layer):
        found[f"layer_{i}.attention"] = Site("htt", (heads, 0, 0), config.attn_pdrop)
        found[f"layer_{i}.attention_output"] = residual
        found[f"layer_{i}.ffn_output"] = residual
    return found


class Attention(nn.Module):
    """Causal self-attention with its output projection."""

    config: Any
    sites: Sites
    index: int

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], visible: Bool[Array, "b 1 t t"], masks: Masks | None):
        """Returns `[b t d]`."""
        c, width = self.config, x.shape[-1]
        query, key, value = jnp.split(Dense(3 * width, name="c_attn")(x), 3, axis=-1)
        scale = (width // c.n_head) ** -0.5 if c.scale_attn_weights else 1.0
        if c.scale_attn_by_inverse_layer_idx:
            scale /= self.index + 1
        context = attend(
            query, key, value, visible, c.n_head,
            lambda p: drop(p, masks, f"layer_{self.index}.attention", self.sites), scale=scale,
        )  # fmt: skip
        out = Dense(width, name="c_proj")(context)
        return drop(out, masks, f"layer_{self.index}.attention_output", self.sites)


class MLP(nn.Module):
    """Feed-forward block."""

    config: Any
    sites: Sites
    index: int

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], masks: Masks | None) -> Float[Array, "b t d"]:
        """Returns `[b t d]`."""
        inner = self.config.n_inner or 4 * x.shape[-1]
        hidden = ACTIVATIONS[self.config.activation_function](Dense(inner, name="c_fc")(x))
        out = Dense(x.shape[-1], name="c_proj")(hidden)
        return drop(out, masks, f"layer_{self.index}.ffn_output", self.sites)


class Block(nn.Module):
    """One pre-norm decoder layer."""

    config: Any
    sites: Sites
    index: int

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], visible: Bool[Array, "b 1 t t"], masks: Masks | None):
        """Returns `[b t d]`."""
        eps = self.config.layer_norm_epsilon
        normed = LayerNorm(eps, name="ln_1")(x)
        x = x + Attention(self.config, self.sites, self.index, name="attn")(normed, visible, masks)
        normed = LayerNorm(eps, name="ln_2")(x)
        return x + MLP(self.config, self.sites, self.index, name="mlp")(normed, masks)


class Transformer(nn.Module):
    """Embeddings, blocks and the final norm: hidden states `[b t d]`."""

    config: Any
    sites: Sites

    def setup(self):
        """Name the parts as Hugging Face does."""
        c = self.config
        self.wte = Embedding(c.vocab_size, c.n_embd)
        self.wpe = Embedding(c.n_positions, c.n_embd, scale=0.01)
        self.h = [Block(c, self.sites, i) for i in range(c.n_layer)]
        self.ln_f = LayerNorm(c.layer_norm_epsilon)

    def __call__(self, inputs: Inputs, attention: Bool[Array, "b t"], masks: Masks | None) -> Float[Array, "b t d"]:
        """Positions count from 0; padding stands on the right."""
        length = attention.shape[1]
        positions = jnp.broadcast_to(jnp.arange(length)[None], attention.shape)
        x = embed_words(self.wte, inputs) + self.wpe(positions)
        x = drop(x, masks, "embeddings", self.sites)
        causal = jnp.tril(jnp.ones((length, length), bool))
        visible = causal[None, None] & attention[:, None, None, :]
        for block in self.h:
            x = block(x, visible, masks)
        return self.ln_f(x)


class GPT2Classifier(nn.Module):
    """GPT-2 for sequence classification: logits `[b c]` read at each sentence's last token."""

    config: Any
    sites: Sites

    @nn.compact
    def __call__(self, inputs: Inputs, attention: Bool[Array, "b t"], masks: Masks | None = None):
        """Class logits."""
        x = Transformer(self.config, self.sites, name="transformer")(inputs, attention, masks)
        logits = Dense(self.config.num_labels, bias=False, name="score")(x)
        last = attention.sum(axis=1) - 1
        return jnp.take_along_axis(logits, last[:, None, None], axis=1)[:, 0]


class GPT2LM(nn.Module):
    """GPT-2 with its tied language-model head: logits `[b t v]`."""

    config: Any
    sites: Sites

    def setup(self):
        """Name the parts as Hugging Face does."""
        self.transformer = Transformer(self.config, self.sites)

    def __call__(self, inputs: Inputs, attention: Bool[Array, "b t"], masks: Masks | None = None):
        """Token logits."""
        return self.transformer.wte.attend(self.transformer(inputs, attention, masks))
