"""BERT and RoBERTa with explicit dropout masks (Devlin 2018, arXiv 1810.04805; Liu 2019, arXiv 1907.11692).

Module and parameter names follow Hugging Face one to one (`layer.0` becomes `layer_0`), so that a checkpoint converts
by renaming. `masks=None` is evaluation mode.
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
    """Dropout sites in call order: `1 + 3L`, then one (BERT) or two (RoBERTa) in a classification head."""
    width, heads = config.hidden_size, config.num_attention_heads
    hidden = Site("td", (0, width), config.hidden_dropout_prob)
    attention = Site("htt", (heads, 0, 0), config.attention_probs_dropout_prob)
    found = {"embeddings": hidden}
    for i in range(config.num_hidden_layers):
        found[f"layer_{i}.attention"] = attention
        found[f"layer_{i}.attention_output"] = hidden
        found[f"layer_{i}.ffn_output"] = hidden
    if task == "classification":
        rate = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        head = ("classifier",) if config.model_type == "bert" else ("classifier_in", "classifier_out")
        found |= {name: Site("d", (width,), rate) for name in head}
    return found


class Embeddings(nn.Module):
    """Word + position + token-type embeddings, layer norm, dropout."""

    config: Any
    sites: Sites

    def setup(self):
        """Create the three tables and the norm."""
        c = self.config
        self.word_embeddings = Embedding(c.vocab_size, c.hidden_size)
        self.position_embeddings = Embedding(c.max_position_embeddings, c.hidden_size)
        self.token_type_embeddings = Embedding(c.type_vocab_size, c.hidden_size)
        self.LayerNorm = LayerNorm(c.layer_norm_eps)

    def __call__(self, inputs: Inputs, attention: Bool[Array, "b t"], masks: Masks | None) -> Float[Array, "b t d"]:
        """All tokens are of type 0; RoBERTa counts positions from its padding index + 1, padding stays on it."""
        if self.config.model_type == "roberta":
            real = attention.astype(jnp.int32)
            positions = jnp.cumsum(real, axis=1) * real + self.config.pad_token_id
        else:
            positions = jnp.broadcast_to(jnp.arange(attention.shape[1])[None], attention.shape)
        types = jnp.zeros(attention.shape, jnp.int32)
        x = embed_words(self.word_embeddings, inputs)
        x = x + self.token_type_embeddings(types) + self.position_embeddings(positions)
        return drop(self.LayerNorm(x), masks, "embeddings", self.sites)


class SelfAttention(nn.Module):
    """Query, key and value projections and the attention itself (no output projection)."""

    config: Any
    sites: Sites
    index: int

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], visible: Bool[Array, "b 1 q t"], masks: Masks | None):
        """Returns the context `[b t d]`."""
        query, key, value = (Dense(x.shape[-1], name=name)(x) for name in ("query", "key", "value"))
        heads = self.config.num_attention_heads
        return attend(
            query, key, value, visible, heads,
            lambda p: drop(p, masks, f"layer_{self.index}.attention", self.sites),
            scale=(x.shape[-1] // heads) ** -0.5,
        )  # fmt: skip


class Output(nn.Module):
    """`LayerNorm(residual + dropout(dense(x)))`: closes both halves of a layer."""

    config: Any
    sites: Sites
    site: str

    @nn.compact
    def __call__(self, x: Float[Array, "b t i"], residual: Float[Array, "b t d"], masks: Masks | None):
        """Returns `[b t d]`."""
        x = drop(Dense(residual.shape[-1], name="dense")(x), masks, self.site, self.sites)
        return LayerNorm(self.config.layer_norm_eps, name="LayerNorm")(x + residual)


class Attention(nn.Module):
    """Self-attention and its output block."""

    config: Any
    sites: Sites
    index: int

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], visible: Bool[Array, "b 1 q t"], masks: Masks | None):
        """Returns `[b t d]`."""
        context = SelfAttention(self.config, self.sites, self.index, name="self")(x, visible, masks)
        site = f"layer_{self.index}.attention_output"
        return Output(self.config, self.sites, site, name="output")(context, x, masks)


class Intermediate(nn.Module):
    """First half of the feed-forward block."""

    config: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t f"]:
        """Dense and activation."""
        return ACTIVATIONS[self.config.hidden_act](Dense(self.config.intermediate_size, name="dense")(x))


class Layer(nn.Module):
    """One encoder layer."""

    config: Any
    sites: Sites
    index: int

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], visible: Bool[Array, "b 1 q t"], masks: Masks | None):
        """Returns `[b t d]`."""
        x = Attention(self.config, self.sites, self.index, name="attention")(x, visible, masks)
        hidden = Intermediate(self.config, name="intermediate")(x)
        return Output(self.config, self.sites, f"layer_{self.index}.ffn_output", name="output")(hidden, x, masks)


class Encoder(nn.Module):
    """The stack of layers, unrolled: names map one to one to the checkpoint's."""

    config: Any
    sites: Sites

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], visible: Bool[Array, "b 1 q t"], masks: Masks | None):
        """Returns `[b t d]`."""
        for i in range(self.config.num_hidden_layers):
            x = Layer(self.config, self.sites, i, name=f"layer_{i}")(x, visible, masks)
        return x


class Pooler(nn.Module):
    """Dense and tanh on the first token."""

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b d"]:
        """Returns `[b d]`."""
        return jnp.tanh(Dense(x.shape[-1], name="dense")(x[:, 0]))


class Body(nn.Module):
    """Embeddings, encoder and, for BERT classification, the pooler."""

    config: Any
    sites: Sites
    pooled: bool

    def setup(self):
        """Name the parts as Hugging Face does."""
        self.embeddings = Embeddings(self.config, self.sites)
        self.encoder = Encoder(self.config, self.sites)
        if self.pooled:
            self.pooler = Pooler()

    def __call__(self, inputs: Inputs, attention: Bool[Array, "b t"], masks: Masks | None):
        """Hidden states `[b t d]`, or the pooled first token `[b d]`."""
        x = self.encoder(self.embeddings(inputs, attention, masks), attention[:, None, None, :], masks)
        return self.pooler(x) if self.pooled else x


class BertClassifier(nn.Module):
    """BERT for sequence classification: logits `[b c]`."""

    config: Any
    sites: Sites

    @nn.compact
    def __call__(self, inputs: Inputs, attention: Bool[Array, "b t"], masks: Masks | None = None):
        """Class logits."""
        pooled = Body(self.config, self.sites, pooled=True, name="bert")(inputs, attention, masks)
        return Dense(self.config.num_labels, name="classifier")(drop(pooled, masks, "classifier", self.sites))


class RobertaHead(nn.Module):
    """RoBERTa's two-layer head, with a dropout before each dense layer."""

    config: Any
    sites: Sites

    @nn.compact
    def __call__(self, x: Float[Array, "b d"], masks: Masks | None) -> Float[Array, "b c"]:
        """Class logits from the first token."""
        x = jnp.tanh(Dense(x.shape[-1], name="dense")(drop(x, masks, "classifier_in", self.sites)))
        return Dense(self.config.num_labels, name="out_proj")(drop(x, masks, "classifier_out", self.sites))


class RobertaClassifier(nn.Module):
    """RoBERTa for sequence classification: logits `[b c]`."""

    config: Any
    sites: Sites

    @nn.compact
    def __call__(self, inputs: Inputs, attention: Bool[Array, "b t"], masks: Masks | None = None):
        """Class logits."""
        x = Body(self.config, self.sites, pooled=False, name="roberta")(inputs, attention, masks)
        return RobertaHead(self.config, self.sites, name="classifier")(x[:, 0], masks)


class Transform(nn.Module):
    """Dense, activation and norm before the masked-LM decoder."""

    config: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Returns `[b t d]`."""
        x = ACTIVATIONS[self.config.hidden_act](Dense(x.shape[-1], name="dense")(x))
        return LayerNorm(self.config.layer_norm_eps, name="LayerNorm")(x)


class Predictions(nn.Module):
    """Masked-LM head up to its bias; the decoder is the word embedding table."""

    config: Any

    def setup(self):
        """Transform and bias."""
        self.transform = Transform(self.config)
        self.bias = self.param("bias", nn.initializers.zeros, (self.config.vocab_size,))

    def __call__(self, x: Float[Array, "b t d"], words: Embedding) -> Float[Array, "b t v"]:
        """Token logits."""
        return self.perturb("dy", words.attend(self.transform(x)) + self.bias[None, None])


class MaskedLMHead(nn.Module):
    """Holds `predictions`, as the checkpoint does."""

    config: Any

    def setup(self):
        """The only part."""
        self.predictions = Predictions(self.config)

    def __call__(self, x: Float[Array, "b t d"], words: Embedding) -> Float[Array, "b t v"]:
        """Token logits."""
        return self.predictions(x, words)


class BertMaskedLM(nn.Module):
    """BERT with its masked-language-model head: logits `[b t v]`."""

    config: Any
    sites: Sites

    def setup(self):
        """Name the parts as Hugging Face does."""
        self.bert = Body(self.config, self.sites, pooled=False)
        self.cls = MaskedLMHead(self.config)

    def __call__(self, inputs: Inputs, attention: Bool[Array, "b t"], masks: Masks | None = None):
        """Token logits."""
        return self.cls(self.bert(inputs, attention, masks), self.bert.embeddings.word_embeddings)
