"""From a client batch to the attacker's problem: run the client, then keep only what the attacker is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from grab_jax import client, defenses, leaves, local_training, masks, privacy
from grab_jax.config import Config
from grab_jax.data import ClientBatch
from grab_jax.local_training import Local
from grab_jax.types import Batch, Defended, Known, Masks, Problem, Update, Vocabulary

DEFENSE = 2**32 - 1
"""Folded into the client's key for what is random in the update as a whole; rows of the data stay below it."""


class Simulated(NamedTuple):
    """A problem and the truth behind it: the batch and the client's dropout masks (None in evaluation mode).

    Under several local steps masks have an epoch axis, `[b e ...]`.
    """

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
    """One client's update and what the attacker knows about it.

    Each sentence's dropout key is `key` folded with its row in the data, so a sentence keeps its masks in any batch;
    later epochs of local training have keys of their own.
    """
    local, count = config.client.local, len(batch.batch.ids)
    labels, dropped = jax.nn.one_hot(batch.batch.labels, model.num_labels), _masks(key, model, batch, config)
    own = local and dataclasses.replace(local, clients=1)
    step = _clipped(model, config.defense.clip) if config.defense.clip is not None else compiled(model, own)
    update_of = lambda share: step(trainable, frozen, *share)  # noqa: E731
    clients = _shares((*batch.batch[:2], labels, dropped), config.client.count)
    observed = _mean_sent(defense(config, count), _defense_key(key, batch), update_of, clients)
    if dropped is not None and local is not None and local.steps(count) == 1:
        dropped = _first_epoch(dropped)
    # An attacker that takes several steps for one gradient has room for one epoch's masks.
    several = dropped is not None and local is not None and local.steps(count) > 1
    given = _first_epoch(dropped) if several and not config.told_local.told else dropped
    known = told(batch.batch, labels, given, vocabulary, config)
    problem = Problem(
        model, trainable, frozen, observed, known, vocabulary,
        dropout=config.client.dropout > 0, lengths=config.known.lengths and config.known.size, rate=config.known.rate,
        local=config.told_local, defended=defended(config),
        clients=config.client.count, averaged_wire=config.client.wire if config.client.count > 1 else "float32",
    )  # fmt: skip
    return Simulated(batch, problem, dropped)


def _masks(key: Key[Array, ""], model: Any, batch: ClientBatch, config: Config) -> Masks | None:
    """The client's dropout masks `[b ...]`, or under local training `[b e ...]`; None in evaluation mode."""
    if config.client.dropout == 0:
        return None
    rows, local = np.array([s.row % DEFENSE for s in batch.sentences], np.uint32), config.client.local
    return _dropped(model, batch.batch.ids.shape[1], local and local.epochs)(key, rows)  # control rows are negative


def _first_epoch(dropped: Masks) -> Masks:
    return {name: mask[:, 0] for name, mask in dropped.items()}


def _defense_key(key: Key[Array, ""], batch: ClientBatch) -> Key[Array, ""]:
    return jax.random.fold_in(jax.random.fold_in(key, DEFENSE), batch.index)


def measure(
    key: Key[Array, ""],
    model: Any,
    trainable: dict[str, Array],
    frozen: dict[str, Array],
    batch: ClientBatch,
    config: Config,
) -> privacy.Measured | None:
    """Clip and noise of the update that `simulate` gives for the same arguments, before anything that follows noise.

    None where neither clip nor noise is set, where the noise is on tensors that several examples normalise together,
    and of local training: no share of such an update is one example's.
    """
    said, count = config.defense, len(batch.batch.ids)
    noises, normalised = _noises(config, count), said.noise > 0 and said.noise_on == "normalised"
    if normalised and said.noise_multiplier:
        noises, normalised = noises[:1], False  # what is private already stays so
    if (said.clip is None and not noises) or (normalised and count > 1) or config.client.local is not None:
        return None
    labels, dropped = jax.nn.one_hot(batch.batch.labels, model.num_labels), _masks(key, model, batch, config)
    clip = float("inf") if said.clip is None else said.clip
    each = _examples(model, clip)(trainable, frozen, *batch.batch[:2], labels, dropped)
    shares = {path: share / count for path, share in each.items()}
    if normalised:  # of one sentence, which is all there is of the update
        shares = {path: share[None] for path, share in leaves.unit({p: s[0] for p, s in shares.items()}).items()}
    mean_of = lambda share: {path: leaf.mean(0) for path, leaf in share.items()}  # noqa: E731
    sent = _mean_sent(defenses.chain(*noises), _defense_key(key, batch), mean_of, _shares(each, config.client.count))
    return privacy.measured(shares, sent)


def _shares(leaves_: Any, clients: int) -> list[Any]:
    """Every client's part of arrays `[b ...]`: equal parts, in order."""
    split = jax.tree.map(lambda leaf: leaf.reshape(clients, -1, *leaf.shape[1:]), leaves_)
    return [jax.tree.map(lambda leaf, i=i: leaf[i], split) for i in range(clients)]


def _mean_sent(defended: defenses.Defense, key: Key[Array, ""], update_of: Callable, clients: Sequence[Any]) -> Update:
    """What the server sees: the mean of what the clients send, each of its own update and with a key of its own.

    One client after another, so that two updates at a time are in memory.
    """
    keys = [key] if len(clients) == 1 else jax.random.split(key, len(clients))
    sent = (defended(one, update_of(share)) for one, share in zip(keys, clients, strict=True))
    total = reduce(lambda a, b: {path: a[path] + b[path] for path in a}, sent)
    return {path: leaf / len(clients) for path, leaf in total.items()} if len(clients) > 1 else total


def _noises(config: Config, examples: int) -> list[defenses.Defense]:
    said, steps, own = config.defense, [], examples // config.client.count
    if said.noise_multiplier:
        steps.append(defenses.noise(said.noise_multiplier * said.clip / own, normalised=False))
    if said.noise:
        steps.append(defenses.noise(said.noise, normalised=said.noise_on == "normalised"))
    return steps


def defense(config: Config, examples: int = 1) -> defenses.Defense:
    """What a client does to its update: noise, pruning, signs, levels, the precision on the wire.

    The noise of DP-SGD is first: of `noise_multiplier * clip` on the sum, so of that over their number on the mean.

    Args:
      config: the settings.
      examples: of all clients whose updates are averaged, each of which has an equal share.
    """
    said, steps = config.defense, _noises(config, examples)
    if said.prune:
        steps.append(defenses.prune(said.prune, said.prune_by))
    if said.sign:
        steps.append(defenses.sign())
    if said.quantise:
        steps.append(defenses.quantise(said.quantise, said.quantise_by))
    if config.client.wire != "float32":
        steps.append(defenses.wire(config.client.wire))
    return defenses.chain(*steps)


def defended(config: Config) -> Defended:
    """What a server that knows the defense can follow of it."""
    said = config.defense
    unit = said.noise > 0 and said.noise_on == "normalised"
    return Defended(clip=said.clip, normalised=unit, pruned=said.prune > 0, signs=said.sign)


@lru_cache(maxsize=8)
def compiled(model: Any, local: Local | None = None):
    """The jitted client of a model: one gradient, or local training."""
    return jax.jit(client.fedsgd(model) if local is None else local_training.fedavg(model, local))


@lru_cache(maxsize=8)
def _clipped(model: Any, clip: float):
    """The jitted client of a model that clips each of its examples."""
    return jax.jit(client.clipped(client.fedsgd(model), clip))


@lru_cache(maxsize=8)
def _examples(model: Any, clip: float):
    """The jitted client step of a model that keeps its examples apart, each clipped."""
    return jax.jit(client.examples(client.fedsgd(model), clip))


@lru_cache(maxsize=64)
def _dropped(model: Any, length: int, epochs: int | None):
    """The jitted draw of masks for sentences of a padded length, each by its row in the data; `[b e ...]` if `epochs`.

    The first epoch's are FedSGD's.
    """
    keyed = jax.vmap(jax.random.fold_in, in_axes=(None, 0))

    def draw(key, rows):
        if epochs is None:
            return masks.sample(keyed(key, rows), model.sites, length)
        # Twice the number above every row: no other key is made so.
        later = jax.random.fold_in(jax.random.fold_in(key, DEFENSE), DEFENSE)
        keys = [key, *(jax.random.fold_in(later, epoch) for epoch in range(1, epochs))]
        return local_training.draw([keyed(one, rows) for one in keys], model.sites, length)

    return jax.jit(draw)


def told(batch: Batch, labels: Array, dropped: Masks | None, vocabulary: Vocabulary, config: Config) -> Known:
    """The attacker's knowledge under `config.known`, or a control's."""
    ids, attention, _ = batch
    position = jnp.arange(ids.shape[1])[None]
    lengths = attention.sum(1, keepdims=True)
    each_length = config.known.lengths and config.known.size
    if not each_length:
        lengths = jnp.broadcast_to(lengths.max(), lengths.shape)
    visible = position < lengths
    tokens = jnp.full(ids.shape, vocabulary.pad)
    pinned = ~visible
    if vocabulary.cls is not None:
        pinned = pinned | (position == 0)
        tokens = jnp.where(position == 0, vocabulary.cls, tokens)
    if vocabulary.sep is not None and each_length:
        pinned = pinned | (position == lengths - 1)
        tokens = jnp.where(position == lengths - 1, vocabulary.sep, tokens)
    if config.attack.tokens == "true":
        visible, pinned, tokens = attention, jnp.ones_like(pinned), ids
    if not config.known.size:  # one row, as long as the longest sentence: the shape tells nothing more
        visible, pinned, tokens = (jnp.broadcast_to(leaf, ids.shape)[:1] for leaf in (visible, pinned, tokens))
        labels = None
    return Known(
        attention=visible,
        ids=jnp.where(pinned, tokens, -1).astype(jnp.int32),
        pinned=pinned,
        free=visible & ~pinned,
        labels=labels if config.known.labels else None,
        masks=dropped if config.attack.masks == "true" and config.known.size else None,
    )
