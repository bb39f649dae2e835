"""What a client may do to its update before it is sent: noise, pruning, signs, a coarser precision; pure functions.

DP-SGD is `client.clipped`, which needs the examples' own updates, then `noise` that is not normalised. Each defense
here is `(key, update) -> update`; `chain` composes them. A deterministic one ignores its key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from grab_jax.leaves import unit
from grab_jax.types import Update

Defense = Callable[[Key[Array, ""], Update], Update]
Rounding = Literal["stochastic", "nearest"]
Wire = Literal["float32", "bfloat16", "float16", "int8"]

BLOCK = 64
"""Consecutive entries of a tensor that share a scale in int8."""


def noise(deviation: float, *, normalised: bool = True) -> Defense:
    """Gaussian noise on every entry.

    Args:
      deviation: standard deviation.
      normalised: divide each tensor by its norm first, as Grab's evaluation does (arXiv 2507.21198, section 5.6); the
        update is sent so. Otherwise the deviation is that of the gradient's own entries.
    """

    def apply(key: Key[Array, ""], update: Update) -> Update:
        sent = unit(update) if normalised else update
        keys = dict(zip(sent, jax.random.split(key, len(sent)), strict=True))
        return {path: value + deviation * jax.random.normal(keys[path], value.shape) for path, value in sent.items()}

    return apply


def prune(share: float, by: Literal["random", "magnitude"] = "random") -> Defense:
    """Set this share of each tensor's entries to zero: random ones, or those of the smallest magnitude."""

    def apply(key: Key[Array, ""], update: Update) -> Update:
        keys = dict(zip(update, jax.random.split(key, len(update)), strict=True))
        return {path: _without(keys[path], value, share, by) for path, value in update.items()}

    return apply


def _without(key: Key[Array, ""], value: Array, share: float, by: str) -> Array:
    """The tensor without `floor(share * size)` entries."""
    order = jax.random.uniform(key, value.shape) if by == "random" else jnp.abs(value)
    first = jnp.argsort(order, axis=None)[: int(share * value.size)]
    return value.reshape(-1).at[first].set(0).reshape(value.shape)


def sign() -> Defense:
    """The sign of every entry: -1, 0 or 1 (signSGD: Bernstein et al. 2018, arXiv 1802.04434)."""
    return lambda _key, update: {path: jnp.sign(value) for path, value in update.items()}


def quantise(bits: int, by: Rounding = "stochastic") -> Defense:
    """Round every entry to one of `2^bits - 1` levels, evenly spaced between -m and m, m the tensor's largest entry.

    Args:
      bits: of one entry, its sign included; 2 or more.
      by: `nearest`, or `stochastic`: up or down at random so that the mean is the entry itself (QSGD: Alistarh et al.
        2017, arXiv 1610.02132, with the largest entry in place of the norm; TernGrad's levels at 2 bits).
    """
    most = 2 ** (bits - 1) - 1

    def rounded(key: Key[Array, ""], value: Array) -> Array:
        largest = jnp.abs(value).max()
        step = jnp.where(largest > 0, largest, 1) / most
        offset = 0.5 if by == "nearest" else jax.random.uniform(key, value.shape)
        return jnp.clip(jnp.floor(value / step + offset), -most, most) * step

    def apply(key: Key[Array, ""], update: Update) -> Update:
        keys = dict(zip(update, jax.random.split(key, len(update)), strict=True))
        return {path: rounded(keys[path], value) for path, value in update.items()}

    return apply


def wire(kind: Wire) -> Defense:
    """Round to a precision; the result is float32 again.

    `int8` scales each block of 64 entries by its largest absolute value (Dettmers et al. 2022, arXiv 2110.02861).
    """
    if kind == "int8":
        return lambda _key, update: {path: _int8(value) for path, value in update.items()}
    return lambda _key, update: {path: value.astype(kind).astype(jnp.float32) for path, value in update.items()}


def _int8(value: Array) -> Array:
    blocks = jnp.pad(value.reshape(-1), (0, -value.size % BLOCK)).reshape(-1, BLOCK)
    step = jnp.abs(blocks).max(1, keepdims=True) / 127
    sent = jnp.round(blocks / jnp.where(step > 0, step, 1)) * step
    return sent.reshape(-1)[: value.size].reshape(value.shape)


def chain(*defenses: Defense) -> Defense:
    """One after the other, each with a key of its own."""

    def apply(key: Key[Array, ""], update: Mapping[str, Array]) -> Update:
        for i, defense in enumerate(defenses):
            update = defense(jax.random.fold_in(key, i), update)
        return update

    return apply
