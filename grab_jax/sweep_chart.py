"""Curves and heat maps of a sweep, in SVG units: a score with its interval against a swept value.

One field lies along the x axis, its values equally spaced whatever they are; every combination of the others is a line.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from grab_jax.metrics import known
from grab_jax.sweep_table import word

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 240, 38, 14, 14, 40
MOST_LINES = 6  # of one chart; above, there is a row of charts per value of a further field
TICKS = (0, 25, 50, 75, 100)
PANELS = {"rougeL": "ROUGE-L", "exact_match": "Recovered word for word, %", "accuracy": "Held-out accuracy, %"}
CHANCE = {"rougeL": "baseline_rougeL", "accuracy": "majority"}
"""What a score would be without the gradient, or without training."""

Row = Mapping[str, Any]


def axes(swept: Mapping[str, Sequence[Any]]) -> list[str]:
    """The swept fields that vary, the one for the x axis first: numbers before names, then by how many values."""
    varied = [name for name, values in swept.items() if len(values) > 1] or list(swept)[:1]
    numbers = lambda name: all(isinstance(v, int | float) and not isinstance(v, bool) for v in swept[name])  # noqa: E731
    return sorted(varied, key=lambda name: (not numbers(name), -len(swept[name])))


def order(values: Sequence[Any]) -> list[Any]:
    """Numbers by size, anything else as given."""
    try:
        return sorted(values)
    except TypeError:
        return list(values)


def charts(swept: Mapping[str, Sequence[Any]], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows of charts `{"title", "panels"}`, one panel per score that any row has."""
    x, *others = axes(swept)
    lines, facets = others, []
    while lines and _product(swept, lines) > MOST_LINES:
        *lines, last = lines
        facets.insert(0, last)
    shown = [score for score in PANELS if any(known(row.get(score)) is not None for row in rows)]
    found = []
    for chosen in itertools.product(*(order(swept[name]) for name in facets)):
        fixed = dict(zip(facets, chosen, strict=True))
        mine = [row for row in rows if _fits(row, fixed)]
        panels = [_panel(score, x, lines, swept, mine) for score in shown]
        found.append({"title": _words(fixed), "panels": panels})
    return found


def _product(swept: Mapping[str, Sequence[Any]], names: Sequence[str]) -> int:
    count = 1
    for name in names:
        count *= len(swept[name])
    return count


def _fits(row: Row, fixed: Mapping[str, Any]) -> bool:
    return all(row["values"][name] == value for name, value in fixed.items())


def _words(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {word(value)}" for name, value in values.items())


def _panel(
    score: str, x: str, lines: Sequence[str], swept: Mapping[str, Sequence[Any]], rows: Sequence[Row]
) -> dict[str, Any]:
    values = order(swept[x])
    place = {value: LEFT + (WIDTH - LEFT - RIGHT) * (i + 0.5) / len(values) for i, value in enumerate(values)}
    combinations = list(itertools.product(*(order(swept[name]) for name in lines)))
    series = []
    for n, chosen in enumerate(combinations):
        fixed = dict(zip(lines, chosen, strict=True))
        shift = 7 * (n - (len(combinations) - 1) / 2)  # so that intervals do not hide each other
        points = [
            _point(row, score, place[value] + shift, x)
            for value in values
            for row in rows
            if _fits(row, {**fixed, x: value}) and known(row.get(score)) is not None
        ]
        series.append({"label": _words(fixed) or PANELS[score], "n": n, "points": points, "d": _path(points)})
    chance = [(place[v], _mean(row.get(CHANCE.get(score, "")) for row in rows if _fits(row, {x: v}))) for v in values]
    return {
        "name": PANELS[score],
        "x": x,
        "size": (WIDTH, HEIGHT, LEFT, TOP, HEIGHT - BOTTOM),
        "ticks": [(_height(tick), tick) for tick in TICKS],
        "places": [(place[value], word(value)) for value in values],
        "series": [one for one in series if one["points"]],
        "chance": _path([{"x": at, "y": _height(value)} for at, value in chance if value is not None]),
    }


def _point(row: Row, score: str, at: float, x: str) -> dict[str, Any]:
    low, high = (known(row.get(f"{score}_{end}")) for end in ("low", "high"))
    ends = None if low is None or high is None else (_height(low), _height(high))
    said = f"{_words(row['values'])}: {row[score]:.1f}"
    said += "" if ends is None else f" (95 % interval {low:.1f} to {high:.1f})"
    return {"x": at, "y": _height(row[score]), "ends": ends, "title": said, "id": row["id"]}


def _height(percent: float | int) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * percent / 100


def _path(points: Sequence[Mapping[str, Any]]) -> str:
    return "".join(f"{'L' if i else 'M'}{p['x']:.1f} {p['y']:.1f}" for i, p in enumerate(points))


def _mean(values: Any) -> float | None:
    kept = [value for value in values if known(value) is not None]
    return sum(kept) / len(kept) if kept else None


def heat(swept: Mapping[str, Sequence[Any]], rows: Sequence[Row], score: str = "rougeL") -> list[dict[str, Any]]:
    """Tables of a score over two fields, one per combination of the others; none where fewer than two vary."""
    across, *others = axes(swept)
    if not others:
        return []
    down, *rest = others
    found = []
    for chosen in itertools.product(*(order(swept[name]) for name in rest)):
        fixed = dict(zip(rest, chosen, strict=True))
        lines = []
        for value in order(swept[down]):
            cells = [_cell({**fixed, down: value, across: other}, rows, score) for other in order(swept[across])]
            lines.append({"label": word(value), "cells": cells})
        columns = [word(value) for value in order(swept[across])]
        found.append({"title": _words(fixed), "across": across, "down": down, "columns": columns, "rows": lines})
    return found


def _cell(fixed: Mapping[str, Any], rows: Sequence[Row], score: str) -> dict[str, Any] | None:
    """The value of one combination; None where the sweep leaves it out, as it equals another."""
    row = next((row for row in rows if _fits(row, fixed)), None)
    return row and {"id": row["id"], "state": row["state"], "value": known(row.get(score))}
