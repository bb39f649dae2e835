"""Dropout masks as explicit arrays: 0/1 for a client, relaxed to [0, 1] for an attacker that learns them.

Every mask has a leading sentence axis. A mask multiplies its activation and the model divides by `1 - rate`, so both
kinds mean the same thing in the same place.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from grab_jax.types import Masks


def sample(keys: Key[Array, " b"], sites: Mapping[str, object], length: int) -> Masks:
    """Bernoulli(1 - rate) masks, one key per sentence.

    Guarantees: the same sentence key gives the same mask at the same position, whatever the batch, its padding or its
    split over devices, because every (site, position) has a key of its own.

    Args:
      keys: one typed key per sentence.
      sites: `Model.sites`.
      length: padded length t.
    """
    return {
        name: jax.vmap(lambda key, site=site, i=i: _sentence(jax.random.fold_in(key, i), site, length))(keys)
        for i, (name, site) in enumerate(sites.items())
    }


def _sentence(key: Key[Array, ""], site, length: int) -> Array:
    draw = lambda k, shape: jax.random.bernoulli(k, 1 - site.rate, shape).astype(jnp.float32)  # noqa: E731
    positions = jnp.arange(length)
    along = lambda k: jax.vmap(lambda p: jax.random.fold_in(k, p))(positions)  # noqa: E731
    if site.axes == "td":
        return jax.vmap(lambda k: draw(k, (site.sizes[1],)))(along(key))
    if site.axes == "htt":
        rows = jax.vmap(lambda k: jax.vmap(lambda cell: draw(cell, (site.sizes[0],)))(along(k)))(along(key))
        return jnp.moveaxis(rows, -1, 0)
    return draw(key, site.sizes)


def ones(sites: Mapping[str, object], batch: int, length: int, epochs: tuple[int, ...] = ()) -> Masks:
    """Masks that keep everything (this is not evaluation mode: activations are still divided by `1 - rate`).

    With `epochs=(e,)` they have an epoch axis: `[b e ...]`.
    """
    return {name: jnp.ones((batch, *epochs, *site.shape(length)), jnp.float32) for name, site in sites.items()}


def relax(masks: Masks, sites: Mapping[str, object], amount: float = 0.0) -> Masks:
    """A starting point for mask learning between 0/1 draws (`amount` 0, as Grab) and the keep rate (`amount` 1)."""
    return {name: (1 - amount) * mask + amount * (1 - sites[name].rate) for name, mask in masks.items()}


def project(masks: Masks | None) -> Masks | None:
    """Clip to [0, 1]; None stays None."""
    return None if masks is None else {name: jnp.clip(mask, 0.0, 1.0) for name, mask in masks.items()}


def hold(masks: Masks | None, told: Masks | None) -> Masks | None:
    """The masks with those told in their place, entry by entry where these are not NaN; None stays None."""
    if masks is None or told is None:
        return masks
    return {**masks, **{name: jnp.where(jnp.isnan(mask), masks[name], mask) for name, mask in told.items()}}


def complete(
    told: Masks | None, sites: Mapping[str, object], batch: int, length: int, epochs: tuple[int, ...] = ()
) -> Masks | None:
    """Masks of every site: as told, and elsewhere the keep rate, which changes no activation; None stays None."""
    return None if told is None else hold(relax(ones(sites, batch, length, epochs), sites, 1.0), told)
