"""The chart of singular values."""

import re

import pytest
from fake_run import barred, proofs, record, span

from grab_jax import spectrum
from grab_jax.chart import BOTTOM, HEIGHT, LEFT, TOP, WIDTH


def points(d):
    return [tuple(float(v) for v in pair) for pair in re.findall(r"[ML]([\d.]+) ([\d.]+)", d)]


def test_nothing_without_a_spectrum():
    assert spectrum.chart([]) is None
    assert spectrum.chart([record()]) is None
    assert spectrum.chart([span(evidence=proofs(spectrum=[0.0] * 8, floor=0.0, rank=0))]) is None


def test_a_cliff_at_the_rank():
    drawn = spectrum.chart([span(evidence=proofs(rank=12, width=64))])
    (line,) = drawn["lines"]
    levels = [y for _, y in points(line)]
    assert levels == sorted(levels)  # SVG counts downwards: the values fall
    assert len(set(levels)) == 2
    (mark,) = drawn["ranks"]
    assert points(line)[11] == pytest.approx(mark, abs=0.06)
    assert points(line)[12][1] > drawn["floors"][0] > mark[1]
    assert (drawn["least"], drawn["most"], drawn["n"]) == (12, 12, 1)


def test_equal_decades_are_equally_high():
    found = proofs(rank=3, width=4, spectrum=[1.0, 1e-2, 1e-4, 1e-7])
    heights = [y for _, y in points(spectrum.chart([span(evidence=found)])["lines"][0])]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.2)


@pytest.mark.parametrize("rank", [1, 500, 501, 1024])
def test_a_wide_model_keeps_the_place_of_its_rank(rank):
    drawn = spectrum.chart([span(evidence=proofs(rank=rank, width=1024))])
    line = points(drawn["lines"][0])
    assert len(line) < 300
    assert drawn["ranks"][0] == pytest.approx(min(line, key=lambda p: abs(p[0] - drawn["ranks"][0][0])), abs=0.06)
    assert all(LEFT <= x <= WIDTH and TOP <= y <= HEIGHT - BOTTOM for x, y in line)


def test_numerical_zeros_are_left_out():
    found = proofs(rank=3, width=6, spectrum=[1.0, 0.5, 0.2, 1e-7, 1e-30, 0.0])
    assert len(points(spectrum.chart([span(evidence=found)])["lines"][0])) == 4


def test_lines_of_several_batches():
    drawn = spectrum.chart([span(), span(1, evidence=proofs(rank=30)), barred(2)])
    assert len(drawn["lines"]) == len(drawn["ranks"]) == 3
    assert len(drawn["floors"]) == 1  # the same for all: drawn once
    assert (drawn["least"], drawn["most"]) == (12, 384)


@pytest.mark.parametrize(
    ("width", "found"),
    [(384, [100, 200, 300, 384]), (768, [200, 400, 600, 768]), (256, [100, 200, 256]), (16, [5, 10, 16]), (1, [1])],
)
def test_places(width, found):
    assert spectrum.places(width) == found
