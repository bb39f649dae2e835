"""What experiment scripts share: clients of any model on any sentences, what feeds them, lines of Markdown tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from grab_jax import data, models, simulate, tuning
from grab_jax.config import ClientConfig, Config, DataConfig
from grab_jax.models import first_attention
from grab_jax.span.inputs import FirstAttention, embed, normalise
from grab_jax.types import Params, Problem


class Setting(NamedTuple):
    """Whose updates: `dropout` is the rate of the clients that train with dropout."""

    model: str
    data: str
    shuffle: int | None
    dropout: float
    seed: int


@dataclass(frozen=True, eq=False)
class Clients:
    """Simulated clients of one model: they all share its compiled programs."""

    setting: Setting
    loaded: models.Loaded
    tokenizer: Any
    sentences: Sequence[data.Sentence]

    def simulate(
        self, number: int, start: int, size: int, dropout: bool = True, params: Params | None = None
    ) -> simulate.Simulated:
        """The client with the `size` sentences from `start` on (the first follow the last); `number` draws its masks.

        `params` replace the model's.
        """
        model, count = self.loaded.model, len(self.sentences)
        group = [self.sentences[(start + i) % count] for i in range(size)]
        batch = data.encode(group, self.tokenizer, number, model.max_length, model.num_labels)
        trained = tuning.split(params or self.loaded.params, tuning.freezes(model, "embeddings"))
        key = jax.random.fold_in(jax.random.key(self.setting.seed), number)
        config = Config(client=ClientConfig(dropout=self.setting.dropout * dropout))
        return simulate.simulate(key, model, *trained, batch, data.vocabulary(self.tokenizer), config)


def load(setting: Setting) -> Clients:
    """Load model, tokenizer and sentences."""
    loaded = models.load(setting.model, dropout=setting.dropout)
    sentences = data.sentences(DataConfig(name=setting.data, shuffle=setting.shuffle))
    loaded = dataclasses.replace(loaded, params=jax.device_put(loaded.params))
    return Clients(setting, loaded, data.load_tokenizer(loaded.folder), sentences)


class Fed(NamedTuple):
    """Every real token of a batch: what the first attention layer is fed, and the embedding mask (all True without)."""

    positions: Int[np.ndarray, " n"]
    tokens: Int[np.ndarray, " n"]
    inputs: Float[np.ndarray, "n d"]
    kept: Bool[np.ndarray, "n d"]

    @property
    def pairs(self) -> set[tuple[int, int]]:
        """The (position, token) pairs that are there."""
        return set(zip(self.positions.tolist(), self.tokens.tolist(), strict=True))


def fed(truth: simulate.Simulated) -> Fed:
    """What a client feeds its first attention layer."""
    ids, attention, _ = truth.batch.batch
    rows, positions = np.nonzero(np.asarray(attention))
    tokens, first = np.asarray(ids)[rows, positions], described(truth.problem)
    kept = np.ones((len(rows), truth.problem.model.width), bool)
    if truth.masks is not None:
        kept = np.asarray(truth.masks["embeddings"])[rows, positions] > 0
    inputs = layer_inputs(first, tokens, positions, kept)
    return Fed(positions, tokens, inputs, kept)


def described(problem: Problem) -> FirstAttention:
    """The first attention layer, with the rate that the attacker assumes."""
    first = first_attention.describe(problem.model, {**problem.frozen, **problem.trainable})
    return first if problem.dropout else first._replace(rate=0.0)


def layer_inputs(first: FirstAttention, tokens, positions, kept: Bool[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Rows under their dropout masks, after any later norm."""
    rows = np.asarray(embed(first, jnp.asarray(tokens), jnp.asarray(positions)), np.float64) * kept
    return rows if first.later is None else normalise(first.later, rows)


def header(*names: str) -> str:
    """The first two lines of a Markdown table."""
    return line(*names) + "\n" + "|---" * len(names) + "|"


def line(*parts: object) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(map(str, parts)) + " |"
