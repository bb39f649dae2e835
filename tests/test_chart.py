"""The loss chart and `curves.npz`."""

import re

import numpy as np
import pytest
from fake_run import record

from grab_jax import chart


def test_save_curves(tmp_path):
    records = [record(4, cosine={"a": 0.5}), record(5, cosine={"b": 0.25}), record(6, control=True)]
    with np.load(chart.save_curves(tmp_path, records)) as curves:
        assert curves["loss"].shape == curves["step"].shape == (32,)
        assert set(curves["batch"]) == {4, 5}
        assert set(curves["phase"]) == {"continuous", "discrete"}
        assert curves["loss"][0] == 1.0
        assert list(curves["cosine_name"]) == ["a", "b"]
        np.testing.assert_array_equal(curves["cosine"], [[0.5, np.nan], [np.nan, 0.25]])


def test_save_curves_of_nothing(tmp_path):
    with np.load(chart.save_curves(tmp_path, [record(trace=None, cosine=None)])) as curves:
        assert curves["loss"].shape == (0,)
        assert curves["cosine"].shape == (1, 0)


def test_trajectory_mean_is_geometric_and_carries_on():
    def trace(*losses):
        return [{"round": 0, "phase": "continuous", "step": i, "loss": v} for i, v in enumerate(losses)]

    a, b = trace(1.0, 0.01), trace(1.0)
    drawn = chart.trajectory([record(trace=a), record(1, trace=b)])
    assert drawn["log"]
    *_, y = re.findall(r"L\S+ ([\d.]+)", drawn["mean"]["continuous"])
    top, bottom = (float(v) for v in re.findall(r" ([\d.]+)", drawn["lines"]["continuous"][0]))
    assert float(y) == pytest.approx((top + bottom) / 2, abs=0.2)  # the mean of 0.01 and 1 is 0.1: half way


def test_trajectory_of_nothing_and_of_constants():
    assert chart.trajectory([record(trace=[])]) is None
    flat = [{"round": 0, "phase": "discrete", "step": 0, "loss": 0.0}]
    drawn = chart.trajectory([record(trace=flat)])
    assert not drawn["log"]
    assert drawn["lines"]["discrete"][0].endswith("h0")
    assert drawn["mean"] == drawn["lines"] | {"discrete": drawn["lines"]["discrete"][0]}


def path_points(d):
    return [tuple(float(v) for v in pair) for pair in re.findall(r"[ML]([\d.]+) ([\d.]+)", d)]


def test_discrete_phase_starts_at_the_loss_of_the_tokens():
    # as grab writes it: one entry before the search, one after, both at the last continuous step
    losses = (("continuous", 1, 8.0), ("continuous", 600, 2.0), ("tokens", 600, 6.0), ("discrete", 600, 4.0))
    trace = [{"round": r, "phase": p, "step": s, "loss": v} for r in range(2) for p, s, v in losses]
    drawn = chart.trajectory([record(trace=trace)])
    assert list(drawn["lines"]) == ["continuous", "discrete"]
    assert [(b["phase"], b["label"]) for b in drawn["bands"]] == [
        ("continuous", "round 1"), ("discrete", ""), ("continuous", "round 2"), ("discrete", ""),
    ]  # fmt: skip
    (x0, y0), (x1, y1), *_ = path_points(drawn["lines"]["discrete"][0])
    band = drawn["bands"][1]
    assert band["x"] < x0 < x1 < band["x"] + band["width"]
    assert y0 < y1  # SVG counts downwards: the loss falls


def test_many_rounds_stay_inside_the_chart():
    trace = [
        {"round": r, "phase": p, "step": s, "loss": 1.0 + s}
        for r in range(80) for p in ("continuous", "discrete") for s in (0, 1)
    ]  # fmt: skip
    drawn = chart.trajectory([record(trace=trace)])
    xs = [x for d in drawn["mean"].values() for x, _ in path_points(d)]
    assert chart.LEFT <= min(xs) <= max(xs) <= chart.WIDTH
    assert sum(bool(band["label"]) for band in drawn["bands"]) == 10


@pytest.mark.parametrize(
    ("low", "high", "log", "labels"),
    [
        (1.2, 36.0, True, ["3", "10", "30"]),
        (0.9, 55.0, True, ["1", "3", "10", "30"]),
        (2e-8, 3e-5, True, ["10⁻⁷", "10⁻⁶", "10⁻⁵"]),
        (0.0, 1.0, False, ["0", "0.5", "1.0"]),
        (0.99991, 0.99994, False, ["0.99991", "0.99992", "0.99993", "0.99994"]),
        (0.0, 2e-6, False, ["0", "5·10⁻⁷", "10⁻⁶", "1.5·10⁻⁶", "2·10⁻⁶"]),
        (7.0, 7.0, False, ["7"]),
    ],
)
def test_ticks_are_round_and_told_apart(low, high, log, labels):
    assert [label for _, label in chart.ticks(chart.Scale(low, high, log))] == labels
