"""Projected gradient descent as a pair of pure functions, blackjax style."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float


class Best(NamedTuple):
    """The candidate of lowest loss so far, and its loss."""

    candidate: Any
    loss: Float[Array, ""]


class State(NamedTuple):
    """What the next step needs; `best` is None where the last candidate is what counts."""

    candidate: Any
    optimizer: Any
    best: Best | None = None

    @property
    def chosen(self) -> Any:
        """The best candidate where it is kept, else the last."""
        return self.candidate if self.best is None else self.best.candidate


class Descent(NamedTuple):
    """`init(candidate) -> State`; `step(state, *context) -> (State, loss)`."""

    init: Callable[[Any], State]
    step: Callable[..., tuple[State, Float[Array, ""]]]


def descent(
    objective: Callable[..., Float[Array, ""]],
    optimizer: optax.GradientTransformation,
    project: Callable[..., Any],
    keep: str = "last",
) -> Descent:
    """Minimise `objective(candidate, *context)`; after each update `project(candidate, *context)` restores constraints.

    The loss returned is that of the candidate before the step. Nothing raises: a diverged run carries NaN. With
    `keep="best"` the state also holds the candidate of lowest loss, of those that a step began with.
    """

    def init(candidate: Any) -> State:
        best = Best(jax.tree.map(jnp.copy, candidate), jnp.inf * jnp.ones(())) if keep == "best" else None
        return State(candidate, optimizer.init(candidate), best)

    def step(state: State, *context: Any) -> tuple[State, Float[Array, ""]]:
        loss, gradient = jax.value_and_grad(objective)(state.candidate, *context)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.candidate)
        candidate = project(optax.apply_updates(state.candidate, updates), *context)
        return State(candidate, optimizer_state, _better(state, loss)), loss

    return Descent(init, step)


def _better(state: State, loss: Float[Array, ""]) -> Best | None:
    if state.best is None:
        return None
    wins = loss < state.best.loss
    return jax.tree.map(lambda new, old: jnp.where(wins, new, old), Best(state.candidate, loss), state.best)


def adamw(
    steps: int,
    *,
    lr: float,
    schedule: str,
    decay: float,
    decay_every: int,
    weight_decay: float,
    clip: float | None,
) -> optax.GradientTransformation:
    """Grab's optimiser over a `Candidate`: AdamW with torch's defaults.

    Args:
      steps: length of the schedule.
      lr: initial learning rate.
      schedule: `step` multiplies by `decay` every `decay_every` steps; `linear` falls to 0 over `steps`.
      decay: factor of the step schedule.
      decay_every: steps between two decays.
      weight_decay: decoupled weight decay, on every variable (masks included, as Grab).
      clip: rescale the gradient of the embeddings only when its global norm exceeds this; None never.
    """
    rates = {
        "step": optax.exponential_decay(lr, decay_every, decay, staircase=True),
        "linear": optax.linear_schedule(lr, 0.0, steps),
    }
    rule = optax.adamw(rates[schedule], weight_decay=weight_decay)
    return rule if clip is None else optax.chain(_clip_embeds(clip), rule)


def _clip_embeds(limit: float) -> optax.GradientTransformation:
    def clip(gradient, _params=None):
        norm = optax.safe_norm(gradient.embeds, 0.0)
        return gradient._replace(embeds=gradient.embeds * jnp.minimum(1.0, limit / (norm + 1e-6)))

    return optax.stateless(clip)
