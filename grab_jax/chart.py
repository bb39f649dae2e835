"""How the loss fell: the loss chart of the page in SVG units, and `curves.npz` for a chart of one's own.

A trace entry is `round, phase, step, loss`. Along the chart lie the rounds, each a wide band for its continuous phase
and a narrow one for its discrete phase, whose line starts at the loss of the `tokens` that the continuous phase left.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from grab_jax.metrics import known

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 840, 280, 60, 26, 24
MAX_LINES, MAX_POINTS = 100, 240  # thin lines of the chart, points of each
LOG_FROM = 30  # ratio of the greatest to the least loss that calls for a logarithmic scale
SHARE = {"continuous": 2.5, "discrete": 1.0}  # of a round's width
BEFORE = -1  # the step of a discrete phase at which nothing has been exchanged yet
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class Point(NamedTuple):
    """One loss of a trace."""

    round: int
    phase: str
    step: int
    loss: float

    @property
    def band(self) -> tuple[int, str]:
        """The part of the chart it lies in."""
        return self.round, self.phase


class Band(NamedTuple):
    """Where the steps `first` to `last` of a phase lie along the chart, and what to write above it."""

    x: float
    width: float
    first: int
    last: int
    phase: str
    label: str


class Scale(NamedTuple):
    """From losses to heights, linear or logarithmic."""

    low: float
    high: float
    log: bool

    def height(self, loss: float) -> float:
        """The y coordinate of a loss."""
        low, high, loss = (math.log(v) if self.log else v for v in (self.low, self.high, loss))
        share = (loss - low) / (high - low) if high > low else 0.5
        return HEIGHT - BOTTOM - 6 - (HEIGHT - BOTTOM - TOP - 12) * share


def trajectory(records: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The loss chart: bands, ticks, one thin line per record and their mean; None without a trace."""
    traces = [trace for record in records if (trace := _trace(record))]
    if not traces:
        return None
    bands, losses = _bands(traces), [point.loss for trace in traces for point in trace]
    low, high = min(losses), max(losses)
    scale = Scale(low, high, low > 0 and high / low > LOG_FROM)

    def place(point: Point) -> tuple[float, float]:
        band = bands[point.band]
        across = (point.step - band.first) / (band.last - band.first) if band.last > band.first else 0.5
        pad = min(3.0, 0.1 * band.width)
        return band.x + pad + (band.width - 2 * pad) * across, scale.height(point.loss)

    lines = [_path(trace, place) for trace in traces[:MAX_LINES]]
    return {
        "bands": [band._asdict() for band in bands.values()],
        "ticks": [(scale.height(tick), label) for tick, label in ticks(scale)],
        "lines": {p: [line[p] for line in lines if p in line] for p in dict.fromkeys(p for _, p in bands)},
        "mean": _path(_mean_trace(traces, list(bands), scale.log), place),
        "log": scale.log,
        "n": len(traces),
        "size": (WIDTH, HEIGHT, LEFT, TOP, HEIGHT - BOTTOM),
    }


def ticks(scale: Scale) -> list[tuple[float, str]]:
    """Round numbers on the scale and their labels."""
    low, high = scale.low, scale.high
    if high <= low:
        return [(low, _label(low))]
    if scale.log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for factors in ((1,), (1, 3), (1, 2, 5)):
            kept = [factor * 10.0**power for power in decades for factor in factors]
            kept = [value for value in kept if low <= value <= high]
            if len(kept) >= 3:
                break
        return [(value, _label(value)) for value in kept[:: math.ceil(len(kept) / 8) or 1]]
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= raw)
    counts = range(math.ceil(low / step), math.floor(high / step) + 1)
    return [(k * step, _label(k * step, step)) for k in counts]


def save_curves(run_dir: str | os.PathLike[str], records: Sequence[Mapping[str, Any]]) -> Path:
    """Write `curves.npz`, one row per trace entry and one `cosine` row per record, and return its path.

    `batch`, `round`, `phase` ("continuous", "tokens" or "discrete"), `step` and `loss` describe the trace;
    `cosine[i, j]` belongs to record `cosine_batch[i]` and tensor `cosine_name[j]`. Unknown values are NaN. Control
    records are left out.
    """
    attacked = [record for record in records if not record.get("control")]
    rows = [(record.get("index", i), entry) for i, record in enumerate(attacked) for entry in record.get("trace") or []]
    names = sorted({name for record in attacked for name in record.get("cosine") or {}})
    cosine = [[known((record.get("cosine") or {}).get(name)) for name in names] for record in attacked]
    path = Path(run_dir) / "curves.npz"
    np.savez_compressed(
        path,
        batch=np.array([index for index, _ in rows], np.int64),
        round=np.array([entry.get("round", 0) for _, entry in rows], np.int64),
        phase=np.array([str(entry.get("phase", "")) for _, entry in rows], "U16"),
        step=np.array([entry.get("step", 0) for _, entry in rows], np.int64),
        loss=np.array([known(entry.get("loss")) for _, entry in rows], np.float64),
        cosine_batch=np.array([record.get("index", i) for i, record in enumerate(attacked)], np.int64),
        cosine_name=np.array(names, "U256"),
        cosine=np.array(cosine, np.float64).reshape(len(attacked), len(names)),
    )
    return path


def _trace(record: Mapping[str, Any]) -> list[Point]:
    """The finite entries of a trace, `tokens` as the start of the discrete phase."""
    out = []
    for entry in record.get("trace") or []:
        loss = known(entry.get("loss")) if isinstance(entry, Mapping) else None
        if loss is not None:
            phase, step = str(entry.get("phase", "")), entry.get("step", 0)
            phase, step = ("discrete", BEFORE) if phase == "tokens" else (phase, step)
            out.append(Point(entry.get("round", 0), phase, step, loss))
    return out


def _bands(traces: list[list[Point]]) -> dict[tuple[int, str], Band]:
    """The band of each round and phase, in order of time."""
    steps: dict[tuple[int, str], list[int]] = {}
    for point in (point for trace in traces for point in trace):
        steps.setdefault(point.band, []).append(point.step)
    order = sorted(steps, key=lambda band: (band[0], band[1] == "discrete", band[1]))
    shares = [SHARE.get(phase, SHARE["continuous"]) for _, phase in order]
    unit, x, out = (WIDTH - LEFT - 8) / sum(shares), float(LEFT), {}
    every = max(1, math.ceil(len({round_ for round_, _ in order}) / 10))
    for (round_, phase), share in zip(order, shares, strict=True):
        new = all(seen != round_ for seen, _ in out)
        label = f"round {round_ + 1}" if new and round_ % every == 0 else ""
        inside = steps[round_, phase]
        out[round_, phase] = Band(x, unit * share, min(inside), max(inside), phase, label)
        x += unit * share
    return out


def _mean_trace(traces: list[list[Point]], order: list[tuple[int, str]], log: bool) -> list[Point]:
    """Mean over records (of logarithms if `log`); a record that stopped early keeps its last loss."""
    rank = {band: i for i, band in enumerate(order)}
    events = sorted((rank[p.band], p.step, i, p.loss) for i, trace in enumerate(traces) for p in trace)
    last: dict[int, float] = {}
    out: dict[tuple[int, int], Point] = {}
    for band, step, i, loss in events:
        last[i] = math.log(loss) if log else loss
        mean = sum(last.values()) / len(last)
        out[band, step] = Point(*order[band], step, math.exp(mean) if log else mean)
    return list(out.values())


def _path(trace: list[Point], place: Callable[[Point], tuple[float, float]]) -> dict[str, str]:
    """SVG path data per phase, broken between bands."""
    groups: dict[tuple[int, str], list[Point]] = {}
    for point in trace:
        groups.setdefault(point.band, []).append(point)
    out: dict[str, str] = {}
    for (_, phase), points in groups.items():
        stride = max(1, math.ceil(len(points) * len(groups) / MAX_POINTS))
        kept = points[:-1][::stride] + points[-1:]
        moves = [f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(map(place, kept))]
        out[phase] = out.get(phase, "") + "".join(moves) + ("h0" if len(kept) == 1 else "")
    return out


def _label(value: float, step: float | None = None) -> str:
    """A tick's label: enough digits to tell `step`, powers of ten where a plain number would be long."""
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e5:
        power = math.floor(math.log10(abs(value)) + 1e-9)
        factor = f"{value / 10.0**power:.3g}"
        return ("" if factor == "1" else f"{factor}·") + "10" + str(power).translate(SUPERSCRIPT)
    return f"{value:.3g}" if step is None else f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"
