"""From a client batch to the attacker's problem: run the client, then keep only what the attacker is told."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from grab_jax import client, defenses, masks
from grab_jax.config import Config
from grab_jax.data import ClientBatch
from grab_jax.types import Batch, Known, Masks, Problem, Vocabulary

DEFENSE = 2**32 - 1
"""Folded into the client's key for what is random in the update as a whole; rows of the data stay below it."""


class Simulated(NamedTuple):
    """A problem and the truth behind it: the batch and the client's dropout masks (None in evaluation mode)."""

    batch: ClientBatch
    problem: Problem
    masks: Masks | None


def simulate(
    key: Key[Array, ""],
    model: Any,
    trainable: dict[str, Array],
    frozen: dict[str, Array],
    batch: ClientBatch,
    vocabulary: Vocabulary,
    config: Config,
) -> Simulated:
    """One client's FedSGD update and what the attacker knows about it.

    Each sentence's dropout key is `key` folded with its row in the data, so a sentence keeps its masks in any batch.
    """
    ids, attention, _ = batch.batch
    dropped = None
    if config.client.dropout > 0:
        rows = np.array([s.row % DEFENSE for s in batch.sentences], np.uint32)  # control rows are negative
        dropped = _dropped(model, ids.shape[1])(key, rows)
    labels = jax.nn.one_hot(batch.batch.labels, model.num_labels)
    update = compiled(model)(trainable, frozen, ids, attention, labels, dropped)
    observed = defense(config)(jax.random.fold_in(jax.random.fold_in(key, DEFENSE), batch.index), update)
    known = told(batch.batch, labels, dropped, vocabulary, config)
    problem = Problem(
        model, trainable, frozen, observed, known, vocabulary,
        dropout=config.client.dropout > 0, lengths=config.known.lengths, rate=config.known.rate,
    )  # fmt: skip
    return Simulated(batch, problem, dropped)


def defense(config: Config) -> defenses.Defense:
    """What the client does to its update: noise, then pruning, then the precision it is sent in."""
    said, steps = config.defense, []
    if said.noise:
        steps.append(defenses.noise(said.noise, normalised=said.noise_on == "normalised"))
    if said.prune:
        steps.append(defenses.prune(said.prune, said.prune_by))
    if config.client.wire != "float32":
        steps.append(defenses.wire(config.client.wire))
    return defenses.chain(*steps)


@lru_cache(maxsize=8)
def compiled(model: Any):
    """The jitted client step of a model."""
    return jax.jit(client.fedsgd(model))


@lru_cache(maxsize=64)
def _dropped(model: Any, length: int):
    """The jitted draw of masks for sentences of a padded length, each by its row in the data."""
    keyed = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    return jax.jit(lambda key, rows: masks.sample(keyed(key, rows), model.sites, length))


def told(batch: Batch, labels: Array, dropped: Masks | None, vocabulary: Vocabulary, config: Config) -> Known:
    """The attacker's knowledge under `config.known`, or a control's."""
    ids, attention, _ = batch
    position = jnp.arange(ids.shape[1])[None]
    lengths = attention.sum(1, keepdims=True)
    if not config.known.lengths:
        lengths = jnp.broadcast_to(lengths.max(), lengths.shape)
    visible = position < lengths
    tokens = jnp.full(ids.shape, vocabulary.pad)
    pinned = ~visible
    if vocabulary.cls is not None:
        pinned = pinned | (position == 0)
        tokens = jnp.where(position == 0, vocabulary.cls, tokens)
    if vocabulary.sep is not None and config.known.lengths:
        pinned = pinned | (position == lengths - 1)
        tokens = jnp.where(position == lengths - 1, vocabulary.sep, tokens)
    if config.attack.tokens == "true":
        visible, pinned, tokens = attention, jnp.ones_like(pinned), ids
    return Known(
        attention=visible,
        ids=jnp.where(pinned, tokens, -1).astype(jnp.int32),
        pinned=pinned,
        free=visible & ~pinned,
        labels=labels if config.known.labels else None,
        masks=dropped if config.attack.masks == "true" else None,
    )
