"""Clients of tiny random models for the tests of span decoding, and what really feeds their first attention layer."""

from functools import lru_cache, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from goldens import golden as goldens

from grab_jax import models, simulate, tuning
from grab_jax.config import ClientConfig, Config, DefenseConfig, KnownConfig
from grab_jax.data import ClientBatch, Sentence
from grab_jax.models import lora
from grab_jax.types import Batch, Vocabulary

WIDTH, HEADS, TOKENS, POSITIONS, LENGTH = 64, 4, 200, 12, 8
VOCABULARY = {
    "bert": Vocabulary(0, 2, 3, frozenset(range(5))),
    "roberta": Vocabulary(1, 0, 2, frozenset(range(4))),
    "gpt2": Vocabulary(TOKENS - 1, None, None, frozenset({TOKENS - 1})),
}
FAMILIES = tuple(VOCABULARY)


@lru_cache
def random_model(family, rate=0.1, seed=0, layers=2, task="classification"):
    """A model and its parameters; of two layers or more, because one leaves most tokens too little gradient."""
    if family == "gpt2":
        last = {name: TOKENS - 1 for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        size = {"n_embd": WIDTH, "n_head": HEADS, "n_positions": POSITIONS, "n_layer": layers, **last}
    else:
        size = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": layers}
        size["max_position_embeddings"] = POSITIONS + 2 * (family == "roberta")
    model = models.build(goldens.config(family, vocab_size=TOKENS, **size), task, dropout=rate)
    return model, random_params(model, seed)


def random_params(model, seed=0):
    """Parameters large enough for attention to differ between tokens, and nothing trivial."""
    deviation = {"kernel": 0.06, "embedding": 0.02, "scale": 0.1, "bias": 0.1}
    rng = np.random.default_rng(seed)

    def drawn(path, shape):
        leaf = path[-1].key
        return jnp.asarray((leaf == "scale") + deviation[leaf] * rng.standard_normal(shape.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(drawn, jax.eval_shape(model.init, jax.random.key(0)))


def sentence(family, rng, words):
    """`words` random words, between the special tokens that the family has."""
    vocabulary = VOCABULARY[family]
    inner = tuple(rng.integers(5, TOKENS - 1, words).tolist())
    return inner if vocabulary.cls is None else (vocabulary.cls, *inner, vocabulary.sep)


def client(
    family, sentences, *, rate=0.1, dropout=True, seed=0, layers=2, task="classification", frozen="embeddings",
    defense=None, adapters=None, trained=False, training=None, **known,
):  # fmt: skip
    """The simulated client of sentences of token ids, padded to the same 8 positions each time.

    `adapters` are those of a LoRA client, whose B is zero unless they were `trained` before; `training` are further
    settings of `ClientConfig`; `known` is what `KnownConfig` takes.
    """
    defense = defense or DefenseConfig()
    model, params = random_model(family, rate, layers=layers, task=task)
    freezes = tuning.freezes(model, frozen)
    if adapters is not None:
        (model, params), freezes = lora.add(jax.random.key(9), model, params, adapters), lora.is_frozen
        params = moved(params) if trained else params
    vocabulary, lengths = VOCABULARY[family], np.array([len(s) for s in sentences])
    ids = np.full((len(sentences), LENGTH), vocabulary.pad, np.int32)
    for row, tokens in zip(ids, sentences, strict=True):
        row[: len(tokens)] = tokens
    attention = np.arange(LENGTH)[None] < lengths[:, None]
    batch = Batch(jnp.asarray(ids), jnp.asarray(attention), jnp.arange(len(sentences)) % 3)
    texts = tuple(Sentence("", 0, row) for row in range(len(sentences)))
    return simulate.simulate(
        jax.random.key(seed), model, *tuning.split(params, freezes),
        ClientBatch(0, texts, (), (), batch), vocabulary,
        Config(
            client=ClientConfig(dropout=rate * dropout, **(training or {})), known=KnownConfig(**known), defense=defense
        ),
    )  # fmt: skip


def moved(params, seed=5):
    """Parameters whose adapters' B is no longer zero."""
    rng = np.random.default_rng(seed)
    return tuning.unflatten({
        path: jnp.asarray(0.05 * rng.standard_normal(leaf.shape), jnp.float32) if path.endswith("/lora_b") else leaf
        for path, leaf in tuning.flatten(params).items()
    })  # fmt: skip


class Fed(NamedTuple):
    """Every real token of a batch: the layer's input, position, token, sentence and embedding mask (or None)."""

    inputs: np.ndarray
    positions: np.ndarray
    tokens: np.ndarray
    sentences: np.ndarray
    masks: np.ndarray | None

    def take(self, rows):
        """Some of the rows."""
        return Fed(*(None if part is None else part[rows] for part in self))

    def distinct(self):
        """One row for each (position, token)."""
        return self.take(np.unique(np.stack([self.positions, self.tokens]), axis=1, return_index=True)[1])


def fed(truth):
    """What the model itself feeds its first attention layer, read off its taps."""
    problem, (ids, attention, _) = truth.problem, truth.batch.batch
    real = np.asarray(attention)
    rows, positions = np.nonzero(real)
    params = tuning.merge(problem.trainable, problem.frozen)
    inputs = np.asarray(_tapped(problem.model)(params, ids, attention, truth.masks), np.float64)[real]
    masks = None if truth.masks is None else np.asarray(truth.masks["embeddings"])[real]
    return Fed(inputs, positions, np.asarray(ids)[real], rows, masks)


@lru_cache
def _tapped(model):
    path = ("transformer", "h_0", "attn", "c_attn")
    if model.family != "gpt2":
        path = (model.family, "encoder", "layer_0", "attention", "self", "query")

    def tapped(params, ids, attention, masks):
        zeros = model.zero_perturbations(params, ids, attention)
        _, taps = model.apply_tapped(params, zeros, ids, attention, masks)
        return reduce(lambda node, name: node[name], path, taps)["x"]

    return jax.jit(tapped)
