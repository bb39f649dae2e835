"""The singular values of the attacked gradients as a chart in SVG units: how many inputs stand above the rounding."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from grab_jax import evidence
from grab_jax.chart import BOTTOM, HEIGHT, LEFT, MAX_LINES, MAX_POINTS, TOP, WIDTH, Scale, ticks
from grab_jax.metrics import known

BELOW = 1e-2  # of the noise floor: smaller values are numerically zero and would stretch the scale
MARKS = 5  # places named along the chart


class Values(NamedTuple):
    """Singular values of one batch that a logarithmic scale can show, the noise floor and the rank chosen by it."""

    values: list[float]
    floor: float
    rank: int


def chart(records: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """One line per record, its rank as a point, the noise floors and the ticks; None without a spectrum."""
    found = [values for record in records if (values := _values(evidence.of(record)))]
    if not found:
        return None
    shown = found[:MAX_LINES]
    levels = [level for one in shown for level in (*one.values, one.floor) if level > 0]
    width = max(len(one.values) for one in shown)
    scale = Scale(min(levels), max(levels), log=True)

    def place(index: int, value: float) -> tuple[float, float]:
        return _across(index, width), scale.height(value)

    return {
        "lines": [_path([place(i, one.values[i]) for i in _kept(len(one.values), one.rank)]) for one in shown],
        "ranks": [place(one.rank - 1, one.values[one.rank - 1]) for one in shown if 0 < one.rank <= len(one.values)],
        "floors": sorted({round(scale.height(one.floor), 1) for one in shown if one.floor > 0}),
        "ticks": [(scale.height(tick), label) for tick, label in ticks(scale)],
        "places": [(_across(count - 1, width), count) for count in places(width)],
        "least": min(one.rank for one in found),
        "most": max(one.rank for one in found),
        "n": len(found),
        "size": (WIDTH, HEIGHT, LEFT, TOP, HEIGHT - BOTTOM),
    }


def places(width: int) -> list[int]:
    """Round counts along the chart, then the width itself."""
    raw = width / MARKS
    power = 10 ** math.floor(math.log10(max(raw, 1)))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    return [count for count in range(step, width, step) if width - count > step / 2] + [width]


def _values(found: Mapping[str, Any]) -> Values | None:
    """What a record's evidence holds of a spectrum, cut where it is numerically zero."""
    raw, floor = found.get("spectrum"), known(found.get("floor")) or 0.0
    values = []
    for value in raw if isinstance(raw, Sequence) else []:
        if known(value) is None or value <= floor * BELOW:
            break
        values.append(float(value))
    return Values(values, floor, int(found.get("rank") or 0)) if values else None


def _kept(count: int, rank: int) -> list[int]:
    """Indices to draw: evenly spread, and the two values between which the rank was chosen."""
    stride = max(1, math.ceil(count / MAX_POINTS))
    return sorted({*range(0, count, stride), count - 1, *(i for i in (rank - 1, rank) if 0 <= i < count)})


def _across(index: int, width: int) -> float:
    """The x coordinate of the singular value with this index."""
    return LEFT + 3 + (WIDTH - LEFT - 14) * (index / (width - 1) if width > 1 else 0.5)


def _path(points: Sequence[tuple[float, float]]) -> str:
    moves = [f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(points)]
    return "".join(moves) + ("h0" if len(moves) == 1 else "")
