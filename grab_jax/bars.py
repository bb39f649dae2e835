"""The two bar charts of the page: how well the update was matched, by layer, and dropout masks, by site."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from grab_jax.metrics import known

PARTS = {"ln_f": "last layer norm", "score": "classifier", "wte": "word embeddings", "wpe": "position embeddings"}
"""GPT-2's names for parts of a model, in words."""
OUTPUT = ("last layer norm", "pooler", "classifier")


def layers(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean cosine per part of the model, from its input to its output, the lowest tensor beside it.

    Key biases are left out: their gradient is zero in theory, so that its direction is noise.
    """
    parts: dict[str, dict[str, float]] = {}
    for name, values in _values(record.get("cosine") for record in records).items():
        if not name.endswith("/key/bias"):
            parts.setdefault(_part(name), {})[name] = float(np.mean(values))
    return [
        {"name": part, "mean": float(np.mean([*group.values()])), "low": min(group.values())}
        | {"lowest": min(group, key=group.__getitem__)}
        for part, group in sorted(parts.items(), key=lambda item: _depth(item[0]))
    ]


def sites(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean area under ROC of the learned masks per dropout site, the worst batch beside it."""
    found = _values((record.get("masks") or {}).get("auc") for record in records)
    return [
        {"name": re.sub(r"[_./]+", " ", name), "mean": float(np.mean(values)), "low": min(values)}
        for name, values in found.items()
    ]


def _values(groups: Iterable[Mapping[str, Any] | None]) -> dict[str, list[float]]:
    """The known values of each name over several dicts."""
    found: dict[str, list[float]] = {}
    for name, value in (item for group in groups for item in (group or {}).items()):
        if known(value) is not None:
            found.setdefault(name, []).append(float(value))
    return found


def _part(path: str) -> str:
    """`bert/encoder/layer_3/output/dense/kernel` -> `layer 3`; outside layers, the part that says most."""
    if match := re.search(r"(?:^|/)(?:layers?|h|blocks?)[_/]?(\d+)(?=/|$)", path):
        return f"layer {match[1]}"
    inner = [step for step in path.split("/")[:-1] if step not in ("bert", "roberta", "transformer", "params")]
    return PARTS.get(inner[0], inner[0]) if inner else path


def _depth(part: str) -> tuple[int, int]:
    """Where a part lies between input and output."""
    if match := re.fullmatch(r"layer (\d+)", part):
        return 1, int(match[1])
    return (0, 0) if "embeddings" in part else (2, OUTPUT.index(part) if part in OUTPUT else len(OUTPUT))
