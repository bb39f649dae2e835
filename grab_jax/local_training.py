"""Local training: a client takes several steps and sends the change of its weights, not one gradient (FedAvg).

    for each epoch, for each mini-batch B:  w <- optimizer(w, grad loss(w, B));  send w_after - w_before

(McMahan et al. 2017, arXiv 1602.05629, ClientUpdate.) The attacker repeats the same steps and differentiates through
them, where it was told enough; else it takes the change for one gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from grab_jax import client, masks
from grab_jax.types import Defended, Masks, Problem, Update

Optimizer = Literal["sgd", "adamw"]

SMOOTH = 1e-16
"""Added to AdamW's second moments by an attacker: their root has no derivative at 0. The square of AdamW's epsilon."""


@dataclass(frozen=True)
class Local:
    """How a client trains; for an attacker None stands for what it was not told.

    `batch` sentences a step, 0 for all of the client's; in an epoch mini-batches follow each other in the order of the
    data. `lr` is the learning rate, `momentum` that of SGD, `weight_decay` that of AdamW. The change is the mean of
    those of `clients` clients, each of which trains alone, on an equal share of the sentences (secure aggregation).
    """

    epochs: int | None = 1
    batch: int | None = 0
    optimizer: Optimizer | None = "sgd"
    lr: float | None = 0.01
    momentum: float | None = 0.0
    weight_decay: float | None = 0.0
    clients: int = 1

    @property
    def told(self) -> bool:
        """Whether nothing is missing."""
        return None not in (self.epochs, self.batch, self.optimizer, self.lr, self.momentum, self.weight_decay)

    def steps(self, sentences: int) -> int | None:
        """Local steps of every client where all have so many sentences; None where they were not told."""
        if self.epochs is None or self.batch is None:
            return None
        own = max(sentences // self.clients, 1)
        return self.epochs * (own // (self.batch or own))

    def one_gradient(self, sentences: int) -> bool:
        """Whether the change is known to be one gradient times `-lr` (the first step of SGD has no momentum yet)."""
        return self.told and self.optimizer == "sgd" and self.steps(sentences) == 1

    def signs_alone(self, sentences: int) -> bool:
        """Whether the change is known to be one step of AdamW, which leaves little of a gradient but its signs."""
        return self.told and self.optimizer == "adamw" and self.steps(sentences) == 1


def fedavg(model: Any, local: Local, *, exact: bool = False) -> client.Simulate:
    """Local training; the update is the change of each trainable weight.

    Args:
      model: a `models.Model`.
      local: of which nothing is None, with mini-batches that divide each client's sentences.
      exact: add up the steps themselves. Otherwise the difference of the weights after and before, which carries their
        rounding, as a client sends it.

    Returns:
      `simulate(trainable, frozen, inputs, attention, labels, masks) -> Update` as `client.fedsgd` has it, but masks
      have an epoch axis after the sentence axis, `[b e ...]`: a sentence is seen once an epoch, each time under a mask
      of its own. Embeddings given as `inputs` do not move with the weights.
    """
    if local.clients > 1:
        return _mean_of(fedavg(model, dataclasses.replace(local, clients=1), exact=exact), local.clients)
    gradient_of, optimizer = client.fedsgd(model), _optimizer(local, exact)

    def simulate(
        trainable: Mapping[str, Array],
        frozen: Mapping[str, Array],
        inputs: Int[Array, "b t"] | Float[Array, "b t d"],
        attention: Bool[Array, "b t"],
        labels: Float[Array, "b c"],
        masks: Masks | None = None,
    ) -> Update:
        before, size = dict(trainable), local.batch or len(attention)
        each = len(attention) // size

        def step(carry, i):
            weights, moved, state = carry
            epoch, rows = i // each, i % each * size
            mine = lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, rows, size)  # noqa: E731
            dropped = masks and {name: mine(mask[:, epoch]) for name, mask in masks.items()}
            gradient = gradient_of(weights, frozen, mine(inputs), mine(attention), mine(labels), dropped)
            change, state = optimizer.update(gradient, state, weights)
            carry = optax.apply_updates(weights, change), jax.tree.map(jnp.add, moved, change), state
            return carry, None

        start = before, jax.tree.map(jnp.zeros_like, before), optimizer.init(before)
        (after, moved, _), _ = jax.lax.scan(step, start, jnp.arange(local.steps(len(attention))))
        return moved if exact else {path: after[path] - before[path] for path in before}

    return simulate


def _mean_of(step: client.Simulate, clients: int) -> client.Simulate:
    """The mean update of clients that share the sentences equally, in order."""

    def simulate(trainable, frozen, *given) -> Update:
        shares = jax.tree.map(lambda leaf: leaf.reshape(clients, -1, *leaf.shape[1:]), given)
        each = jax.vmap(partial(step, trainable, frozen))(*shares)
        return {path: change.mean(0) for path, change in each.items()}

    return simulate


def _optimizer(local: Local, smooth: bool) -> optax.GradientTransformation:
    if local.optimizer == "adamw":
        return optax.adamw(local.lr, eps_root=SMOOTH if smooth else 0.0, weight_decay=local.weight_decay)
    return optax.sgd(local.lr, momentum=local.momentum or None)


def draw(keys: Sequence[Key[Array, " b"]], sites: Mapping[str, object], length: int) -> Masks:
    """Dropout masks `[b e ...]`, from one key an epoch and sentence; as `masks.sample`."""
    drawn = [masks.sample(one, sites, length) for one in keys]
    return {name: jnp.stack([epoch[name] for epoch in drawn], axis=1) for name in drawn[0]}


# --- the attacker's side ----------------------------------------------------------------------------------


def as_gradient(update: Update, local: Local, sentences: int) -> Update:
    """The change of the weights over `-lr * steps`: the gradient, if it was one step of SGD; else about the mean one.

    What was not told counts as 1, which leaves the direction.
    """
    factor = -1.0 / ((local.lr or 1.0) * (local.steps(sentences) or 1))
    return {path: factor * value for path, value in update.items()}


def repeated(problem: Problem) -> Local | None:
    """The local training that the attacker repeats; None where it takes the update for one gradient.

    Also of one step of AdamW: that is almost `-lr` times the gradient's signs, which do not change with a candidate but
    by jumps, so that nothing could be learned through them. The gradient itself is compared with them (`left`).
    """
    local = problem.local
    return local if local is not None and local.told and several(problem) else None


def several(problem: Problem) -> bool:
    """Whether the update may be of several steps, between which the weights moved."""
    return local_steps(problem) != 1


def local_steps(problem: Problem) -> int | None:
    """Steps between the weights sent and the update; 1 if it is a gradient, None where they were not told."""
    return 1 if problem.local is None else problem.local.steps(len(problem.known.ids))


def matched(problem: Problem) -> Update:
    """The observed update in the size of a gradient: what an attacker's own is compared with.

    Tensors that the client divided by their norms have lost that size: they keep theirs, in a gradient's direction.
    """
    if problem.local is None:
        return problem.observed
    if problem.defended.normalised:
        return {path: -value for path, value in problem.observed.items()}
    return as_gradient(problem.observed, problem.local, len(problem.known.ids))


def mean_weights(problem: Problem) -> Update:
    """The trainable weights averaged over the local steps, as if these were alike; those sent, if more is not told.

    A layer's inputs move with the weights before it. Of steps over the same sentences the change of a layer's weights
    spans the inputs under the mean weights, but for what varies to second order.
    """
    share = middle(problem)
    return weights_after(problem, share) if share else problem.trainable


def middle(problem: Problem) -> float | None:
    """The share of the change after which local training has its mean weights; None where too little is told of it.

    0 for one step: its gradient is that of the weights sent.
    """
    local, steps = problem.local, local_steps(problem)
    if steps == 1:
        return 0.0
    if not steps or local.momentum is None or local.optimizer != "sgd" or problem.defended.normalised:
        return None
    reached = np.cumsum(np.cumsum(local.momentum ** np.arange(steps)))
    return float(reached[:-1].sum() / (steps * reached[-1]))


def weights_after(problem: Problem, share: float) -> Update:
    """The trainable weights after a share of the observed change."""
    return {path: value + share * problem.observed.get(path, 0) for path, value in problem.trainable.items()}


def left(problem: Problem) -> Defended:
    """What the client's defense and its training left of a gradient, as far as the attacker is told."""
    stepped = problem.local is not None and problem.local.signs_alone(len(problem.known.ids))
    return problem.defended._replace(signs=problem.defended.signs or stepped)


def repeat(model: Any, local: Local) -> client.Simulate:
    """`fedavg` without the rounding of weights, in the size of a gradient as `matched`; differentiable."""
    simulate = fedavg(model, local, exact=True)
    return lambda *args: as_gradient(simulate(*args), local, len(args[3]))


def weight_rounding(problem: Problem, paths: Sequence[str]) -> Float[np.ndarray, "d m"] | None:
    """Standard deviations of the rounding that weights leave in their change, tensors side by side, or None.

    A step rounds a weight by half its spacing at most, independently of other steps and clients, over which it is
    averaged: spacing * sqrt(steps / 12 / clients). Where the number of steps was not told it counts as 1.
    """
    if problem.local is None:
        return None
    weights = np.concatenate([np.asarray(problem.trainable[path], np.float32) for path in paths], axis=1)
    steps = problem.local.steps(len(problem.known.ids)) or 1
    return np.abs(np.spacing(weights)).astype(np.float64) * np.sqrt(steps / 12 / problem.local.clients)


def notes(local: Local | None) -> list[str]:
    """What a person should know of what the attacker makes of the change of the weights."""
    if local is None:
        return []
    names = {"lr": local.lr, "steps": local.epochs, "optimizer": local.optimizer}
    missing = [f"--noknown_{name}" for name, value in names.items() if value is None]
    return [f"the attacker takes the change of the weights for one gradient ({', '.join(missing)})"] if missing else []
