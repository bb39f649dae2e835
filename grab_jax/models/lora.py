"""LoRA (Hu et al. 2021, arXiv 2106.09685): the client trains low-rank factors beside frozen kernels.

    y = x W + bias + (alpha / rank) * dropout(x) A B,    A [in, rank], B [rank, out] = 0 at the start

A linear layer with adapter holds `lora_a`, `lora_b` and the fixed `lora_scale` beside its kernel (`layers.Dense`). The
classification head is trained whole, as PEFT does for sequence classification (`modules_to_save`).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from grab_jax import tuning
from grab_jax.models.layers import ADAPTER, Site
from grab_jax.types import InputError, Params

TARGETS = {"bert": ("query", "value"), "roberta": ("query", "value"), "gpt2": ("c_attn",)}
"""Layers that get an adapter where none are named, as PEFT has them."""


@dataclass(frozen=True)
class Lora:
    """Rank and alpha of the adapters, names of the layers that have one (empty: `TARGETS`), dropout of their inputs.

    `rank_stabilised` scales by alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732).
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = ()
    dropout: float = 0.0
    rank_stabilised: bool = False

    @property
    def scale(self) -> float:
        """The factor of `x A B`."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


def add(key: Key[Array, ""], model: Any, params: Params, lora: Lora) -> tuple[Any, Params]:
    """The model with dropout sites for the adapters' inputs, and its parameters with new adapters.

    A is uniform in +-1 / sqrt(in), as PEFT draws it; B is 0, so that nothing changes yet.

    Raises:
      InputError: a target is no linear layer of the model.
    """
    flat = tuning.flatten(params)
    layers = adapted(model, list(flat), lora.targets)
    for layer, one in zip(layers, jax.random.split(key, len(layers)), strict=True):
        fan_in, fan_out = flat[f"{layer}/kernel"].shape
        bound = 1 / math.sqrt(fan_in)
        flat[f"{layer}/lora_a"] = jax.random.uniform(one, (fan_in, lora.rank), minval=-bound, maxval=bound)
        flat[f"{layer}/lora_b"] = jnp.zeros((lora.rank, fan_out))
        flat[f"{layer}/lora_scale"] = jnp.asarray(lora.scale, jnp.float32)
    widths = tuple((layer, flat[f"{layer}/kernel"].shape[0]) for layer in layers)
    return _with_sites(model, widths, lora.dropout) if lora.dropout else model, tuning.unflatten(flat)


@lru_cache(maxsize=8)
def _with_sites(model: Any, widths: tuple[tuple[str, int], ...], dropout: float) -> Any:
    """The model with dropout sites for the inputs of adapters; the same arguments give the same model."""
    sites = dict(model.sites)
    for layer, width in widths:
        once = "/pooler/" in f"{layer}/"  # the pooler reads one token
        axes, sizes = ("d", (width,)) if once else ("td", (0, width))
        sites[f"{layer}/{ADAPTER}"] = Site(axes, sizes, dropout)
    return dataclasses.replace(model, sites=sites)


def adapted(model: Any, paths: Sequence[str], targets: Sequence[str] = ()) -> list[str]:
    """Paths of the linear layers that get an adapter: those named like a target, but for the head, trained whole."""
    layers = [path.removesuffix("/kernel") for path in paths if path.endswith("/kernel") and not is_head(path)]
    found = []
    for target in targets or TARGETS[model.family]:
        named = [layer for layer in layers if hf_layer(layer).endswith(f".{target}")]
        if not named:
            known = ", ".join(sorted({layer.split("/")[-1] for layer in layers}))
            raise InputError(f"--client_lora_targets={target}: no linear layer of that name; this model has {known}")
        found += [layer for layer in named if layer not in found]
    return found


def is_head(path: str) -> bool:
    """Whether a parameter belongs to the classification head, whatever the family."""
    return path.startswith(("classifier/", "score/"))


def is_frozen(path: str) -> bool:
    """Predicate for `tuning.split`: adapters and the head are trained."""
    return not (path.endswith(("/lora_a", "/lora_b")) or is_head(path))


def hf_layer(layer: str) -> str:
    """The Hugging Face name of a layer: `bert/encoder/layer_0/output` -> `bert.encoder.layer.0.output`."""
    return ".".join(re.sub(r"^(layer|h)_(\d+)$", r"\1.\2", part) for part in layer.split("/"))
