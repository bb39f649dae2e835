"""A parameter gradient in factored form, read off the taps of the layers (`layers.py`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int

from grab_jax.leaves import Leaf, Outer, Rows, dense
from grab_jax.types import Masks, Params


def factored_gradient(
    model: Any,
    loss: Callable[[Float[Array, ...]], Float[Array, ""]],
    params: Params,
    wanted: Mapping[str, Array],
    inputs: Int[Array, "b t"] | Float[Array, "b t d"],
    attention: Bool[Array, "b t"],
    masks: Masks | None,
) -> dict[str, Leaf]:
    """Gradient of `loss(logits)` for the parameter paths in `wanted`, kernels as `Outer` leaves, tables as `Rows`.

    Differentiable in `inputs` and `masks`, so second order goes through it as usual.
    """
    zeros = model.zero_perturbations(params, inputs, attention)

    def tapped(perturbations):
        logits, taps = model.apply_tapped(params, perturbations, inputs, attention, masks)
        return loss(logits), taps

    cotangents, taps = jax.grad(tapped, has_aux=True)(zeros)
    return {path: _leaf(path, wanted[path], params, taps, cotangents) for path in wanted}


def _leaf(path: str, param: Array, params: Params, taps: Params, cotangents: Params) -> Leaf:
    *parents, leaf = path.split("/")
    tap, cotangent = (reduce(lambda node, name: node[name], parents, tree) for tree in (taps, cotangents))
    rows = lambda x: x.reshape(-1, x.shape[-1])  # noqa: E731
    if leaf == "kernel":
        return Outer(rows(tap["x"]), rows(cotangent["dy"]))
    if leaf in ("lora_a", "lora_b"):
        layer = reduce(lambda node, name: node[name], parents, params)
        return _adapter(leaf, layer, rows(tap["lora_x"]), rows(cotangent["dy"]))
    if leaf == "scale":
        return (rows(tap["xhat"]) * rows(cotangent["dy"])).sum(0)
    if leaf == "embedding":
        return _table(param, tap, cotangent)
    return rows(cotangent["dy"]).sum(0)


def _adapter(leaf: str, layer: Params, x: Float[Array, "n i"], dy: Float[Array, "n o"]) -> Outer:
    """Gradient of one factor of `scale * x @ a @ b`."""
    if leaf == "lora_a":
        return Outer(x * layer["lora_scale"], dy @ layer["lora_b"].T)
    return Outer(x @ layer["lora_a"] * layer["lora_scale"], dy)


def _table(param: Array, tap: Params, cotangent: Params) -> Leaf:
    """Gradient of an embedding table: looked-up rows; formed where a tied head reaches all the others."""
    rows = lambda x: x.reshape(-1, x.shape[-1])  # noqa: E731
    found = [Rows(tap["ids"].reshape(-1), rows(cotangent["dy"]), len(param))] if "ids" in tap else []
    if "head_x" not in tap:
        return found[0]
    return rows(cotangent["head_dy"]).T @ rows(tap["head_x"]) + sum(dense(leaf) for leaf in found)
