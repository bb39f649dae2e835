"""What a row's certificate is worth: the share of true rows among candidates of equal certificate, as table and figure.

    python experiments/span_reliability.py --batches=4 --sizes=1,4 --figure=runs/reliability.png

Clients train with dropout. Candidates are the best tokens that the decoder's first pass finds at each position in use,
polished whether or not it would have gone on with them; those that keep too few coordinates for the dropout rate are
counted apart, since the decoder accepts none of them (zero explains every token with all coordinates dropped). True
means: the token is at that position of the batch, and a copy of it there has the same mask in 99 % of all coordinates.
`--noise` is a standard deviation, added to each of the three kernels' gradients divided by its Frobenius norm.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import common
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jaxtyping import Bool, Float, Int
from matplotlib.figure import Figure

from grab_jax import metrics
from grab_jax.models import first_attention
from grab_jax.span import decode, polish, subspace
from grab_jax.span.inputs import FirstAttention, embed
from grab_jax.span.rows import Rows
from grab_jax.span.scaling import scaled_space

MODEL = flags.DEFINE_string("model", "builtin:bert-mini", "model, as for grab_jax.main")
DATA = flags.DEFINE_string("data", "builtin", "sentences, as for grab_jax.main")
BATCHES = flags.DEFINE_integer("batches", 4, "client batches of each size", lower_bound=1)
SIZES = flags.DEFINE_list("sizes", ["1", "4"], "sentences per client batch")
DROPOUT = flags.DEFINE_float("dropout", 0.1, "dropout rate", lower_bound=0.01, upper_bound=0.9)
NOISE = flags.DEFINE_list("noise", ["0"], "standard deviations of noise")
SHUFFLE = flags.DEFINE_integer("shuffle", 0, "seed that draws the sentences")
SEED = flags.DEFINE_integer("seed", 0, "seed of dropout and noise")
FIGURE = flags.DEFINE_string("figure", "runs/reliability.png", "where the figure goes")
COLUMNS = ("noise", "certificate", "candidates", "true", "share true", "95 % Wilson")
EDGES = np.array([-np.inf, 0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, decode.ACCEPT, 1.0])
SAME = 0.9
"""Share of coordinates in which the masks of a true candidate agree; under noise the smallest ones tell nothing."""


class Candidates(NamedTuple):
    """Polished candidates; `enough` says that the decoder would not refuse them for the share of coordinates kept."""

    positions: Int[np.ndarray, " n"]
    tokens: Int[np.ndarray, " n"]
    certificates: Float[np.ndarray, " n"]
    kept: Bool[np.ndarray, "n d"]
    enough: Bool[np.ndarray, " n"]


class Judged(NamedTuple):
    """Of every candidate: its certificate, whether it keeps enough coordinates, and whether it is true."""

    certificates: Float[np.ndarray, " n"]
    enough: Bool[np.ndarray, " n"]
    true: Bool[np.ndarray, " n"]


def candidates(
    first: FirstAttention, gradients: Sequence[Float[np.ndarray, "d o"]], length: int
) -> Iterator[Candidates]:
    """Position by position, what the decoder's first pass would look at: the only function that knows its steps."""
    found = subspace.spectrum(gradients)
    search = Rows(first, scaled_space(first, found.basis, found.blur), accept=decode.ACCEPT, tolerance=2e-3)
    space, scale = search.space, jnp.asarray(search.space.scale, jnp.float32)
    for position in range(length):
        where = jnp.array([position])
        (tokens,) = decode.scan(first, scale, space.padded, where, None, iterations=5, best=decode.BEST)[1]
        positions = jnp.full_like(tokens, position)
        z, _ = decode.solve_pairs(search, tokens, positions, 150)
        targets = np.asarray(embed(first, tokens, positions), np.float64) * space.scale
        settings = {"tolerance": search.tolerance, "accept": search.accept, "deviation": space.deviation}
        found = polish.polish(targets, space.basis, z, **settings)
        enough = (found.kept.mean(-1) > search.least) & (found.kept.mean(-1) <= search.most)
        yield Candidates(np.asarray(positions), np.asarray(tokens), found.certificate, found.kept, enough)


def judged(found: Candidates, truth: common.Fed) -> Judged:
    """Which candidates are there."""
    same = (found.positions[:, None] == truth.positions) & (found.tokens[:, None] == truth.tokens)
    alike = np.stack([(truth.kept == kept).mean(-1) >= SAME for kept in found.kept])
    return Judged(found.certificates, found.enough, (same & alike).any(-1))


def noisy(
    gradients: Sequence[Float[np.ndarray, "d o"]], sigma: float, generator: np.random.Generator
) -> list[Float[np.ndarray, "d o"]]:
    """Gradients of norm 1 with noise."""
    return [g / np.linalg.norm(g) + sigma * generator.standard_normal(g.shape) for g in gradients]


def measure(clients: common.Clients, batches: int, sizes: Sequence[int], sigma: float) -> Judged:
    """Candidates of all batches."""
    parts, start = [], 0
    for number, size in enumerate(np.repeat(sizes, batches).tolist()):
        truth = clients.simulate(number, start, size)
        start, real = start + size, common.fed(truth)
        generator = np.random.default_rng([clients.setting.seed, number])
        observed = first_attention.gradients(truth.problem.model, truth.problem.observed)
        length = int(real.positions.max()) + 1
        found = candidates(common.described(truth.problem), noisy(observed, sigma, generator), length)
        parts += [judged(some, real) for some in found]
        print(f"\rnoise {sigma:g}: batch {number + 1} of {batches * len(sizes)}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return Judged(*map(np.concatenate, zip(*parts, strict=True)))


# --- table and figure ---------------------------------------------------------------------------------------------


class Bin(NamedTuple):
    """Candidates whose certificate is above `low` and at most `high`; `interval` of the share in percent."""

    low: float
    high: float
    mean: float
    count: int
    true: int
    interval: tuple[float, float]


def bins(found: Judged) -> list[Bin]:
    """Of the candidates that keep enough coordinates; empty ones are left out."""
    certificates, true = found.certificates[found.enough], found.true[found.enough]
    number = np.searchsorted(EDGES, certificates) - 1
    out = []
    for i in np.unique(number):
        inside = number == i
        count, hits = int(inside.sum()), int(true[inside].sum())
        interval = metrics.share_interval(hits, count)
        out.append(Bin(EDGES[i], EDGES[i + 1], certificates[inside].mean(), count, hits, interval))
    return out


def lines(sigma: float, found: Judged) -> list[str]:
    """The table's lines of one level of noise."""
    few = found.true[~found.enough]
    out = [common.line(f"{sigma:g}", "too few kept", len(few), few.sum(), "", "")]
    for one in bins(found):
        low = "at most " if np.isinf(one.low) else f"{one.low:g} to "
        share, interval = f"{100 * one.true / one.count:.1f} %", "{:.1f} to {:.1f} %".format(*one.interval)
        out.append(common.line(f"{sigma:g}", f"{low}{one.high:g}", one.count, one.true, share, interval))
    return out


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's, told apart by the colour-blind; markers differ as well."""
MARKERS = "osD^vP"


def figure(levels: Mapping[float, Judged]) -> Figure:
    """Share true against certificate, and below how many candidates there are."""
    out = Figure(figsize=(7, 5.6), layout="constrained")
    above, below = out.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for number, item in enumerate(levels.items()):
        _shares(above, number, *item)
    _counts(below, levels)
    for axes in (above, below):
        axes.axvline(decode.ACCEPT, color="0.3", linestyle="--", linewidth=1)
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=6, borderaxespad=0.2)
    level = f"accepted above {decode.ACCEPT:g}"
    above.annotate(level, (decode.ACCEPT, 0), (-6, 0), textcoords="offset points", ha="right")
    above.set(ylabel="true candidates, %", ylim=(-4, 104))
    return out


def _shares(axes, number: int, sigma: float, found: Judged) -> None:
    """Points of one level of noise, beside those of the others; those of a negative certificate are at 0."""
    points = bins(found)
    share = np.array([100 * one.true / one.count for one in points])
    away = np.abs(np.array([one.interval for one in points]).reshape(-1, 2) - share[:, None]).T
    x = np.array([max(one.mean, 0) for one in points]) + 0.008 * (number - 1)
    style = {"color": COLOURS[number % 6], "marker": MARKERS[number % 6], "linestyle": "none", "capsize": 2}
    axes.errorbar(x, share, away, label=f"noise {sigma:g}" if sigma else "no noise", **style)


def _counts(axes, levels: Mapping[float, Judged]) -> None:
    """The histogram of all levels together."""
    every = [(found.certificates[found.enough].clip(0), found.true[found.enough]) for found in levels.values()]
    certificates, true = map(np.concatenate, zip(*every, strict=True))
    for some, name, style in ((~true, "false", {"color": "0.75"}), (true, "true", {"color": "0.2", "fill": False})):
        axes.hist(certificates[some], np.linspace(0, 1, 51), histtype="stepfilled", label=name, **style)
    axes.set(xlabel="certificate of the row", ylabel="candidates", yscale="log", xlim=(-0.02, 1.02))
    axes.set_ylim(bottom=0.7)


def main(_argv: list[str]) -> None:
    """Measure, print the table, save the figure."""
    jax.config.update("jax_default_matmul_precision", "highest")
    clients = common.load(common.Setting(MODEL.value, DATA.value, SHUFFLE.value, DROPOUT.value, SEED.value))
    sizes, sigmas = list(map(int, SIZES.value)), list(map(float, NOISE.value))
    print(common.header(*COLUMNS))
    levels = {}
    for sigma in sigmas:
        levels[sigma] = measure(clients, BATCHES.value, sizes, sigma)
        print("\n".join(lines(sigma, levels[sigma])), flush=True)
    path = Path(FIGURE.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure(levels).savefig(path, dpi=150)


if __name__ == "__main__":
    app.run(main)
