"""What a client trains, and therefore shares: a split of the parameters into trainable and frozen ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from jaxtyping import Array

from grab_jax.types import Params

Frozen = Literal["embeddings", "none"]
Flat = dict[str, Array]


def flatten(tree: Params, prefix: str = "") -> Flat:
    """Nested dict -> flat dict with `"/"`-joined paths."""
    flat: Flat = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        flat |= flatten(value, path + "/") if isinstance(value, Mapping) else {path: value}
    return flat


def unflatten(flat: Mapping[str, Array]) -> Params:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def freezes(model: Any, frozen: Frozen) -> Callable[[str], bool]:
    """Predicate on parameter paths.

    `embeddings` freezes the word and position tables; token-type embeddings and the embedding norm stay trainable, so
    their gradients are still shared (the "practical" setting of Grab).
    """
    tables = (model.word_table, model.position_table) if frozen == "embeddings" else ()
    return lambda path: path in tables


def split(params: Params, is_frozen: Callable[[str], bool]) -> tuple[Flat, Flat]:
    """Flat `(trainable, frozen)` parts of the parameters."""
    flat = flatten(params)
    trainable = {path: value for path, value in flat.items() if not is_frozen(path)}
    return trainable, {path: value for path, value in flat.items() if is_frozen(path)}


def merge(trainable: Mapping[str, Array], frozen: Mapping[str, Array]) -> Params:
    """The parameters again, nested as the model wants them."""
    return unflatten({**frozen, **trainable})
