"""Benchmark: one gradient-matching step without the gradient, against one that forms it, and against the bare model.

    python experiments/bench_matching.py --sizes=minilm --lengths=12 --restarts=1,8
    python experiments/bench_matching.py --sizes=bert-base --lengths=12,32 --restarts=1,8,32

Random weights of the size, one sentence, embeddings frozen, no dropout. `bare` is the client's forward and backward
pass to its input; a step is the value and the candidate's gradient of a distance; `score` is the first-order value of
a token candidate. `materialised` forms every tensor's gradient; `factored` (cosine) and `blocked` (L2+L1) do not;
`torch` is a plain PyTorch double backward with the cosine distance, one candidate at a time in a process of its own,
and `torch score` its first-order value, which our scores are compared with. Programs take turns, and run twice in each;
milliseconds are medians of the second runs over `--repeats` turns, memory is the compiled program's temporary one.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import plain_torch
from absl import app, flags
from transformers import BertConfig

from grab_jax import client, distances, losses, matching, models, plan, tuning, views
from grab_jax.config import Config
from grab_jax.types import Candidate, Known

SIZES = flags.DEFINE_list("sizes", ["minilm", "bert-base"], "minilm, bert-base, tiny")
LENGTHS = flags.DEFINE_list("lengths", ["12", "32"], "tokens of the sentence")
RESTARTS = flags.DEFINE_list("restarts", ["1", "8", "32"], "candidates in one program")
ROWS = flags.DEFINE_list("rows", [], "programs to measure; default: all; bare is always one of them")
REPEATS = flags.DEFINE_integer("repeats", 7, "turns; the median counts")

SHAPES = {
    "tiny": {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64, "num_attention_heads": 4},
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536, "num_attention_heads": 12},
    "bert-base": {},
}


class Setup(NamedTuple):
    """A client of one size and length: its model, what it sent, and the same factored."""

    model: Any
    trainable: dict
    frozen: dict
    observed: dict
    factored: dict
    known: Known
    ids: jax.Array


class Row(NamedTuple):
    """One program: a call that ends when its result is there, and its temporary bytes (None where unknown)."""

    name: str
    run: Callable[[], Any]
    bytes: int | None


def setup(size: str, length: int) -> Setup:
    """Random weights and one random sentence."""
    config = BertConfig(**SHAPES[size], num_labels=2)
    model = models.build(config, dropout=0.0)
    trainable, frozen = tuning.split(model.init(jax.random.key(0)), tuning.freezes(model, "embeddings"))
    ids = jax.random.randint(jax.random.key(1), (1, length), 200, config.vocab_size)
    seen, labels = jnp.ones(ids.shape, bool), jnp.eye(2)[:1]
    observed = jax.jit(client.fedsgd(model))(trainable, frozen, ids, seen, labels, None)
    (factored,) = views.factored([observed], length)
    return Setup(model, trainable, frozen, observed, factored, Known(seen, ids, ~seen, seen, labels, None), ids)


def programs(made: Setup, restarts: int) -> dict[str, tuple[Callable, tuple]]:
    """Functions of a candidate and their other arguments, by name."""
    model, cosine, l2_l1 = made.model, distances.by_name("cosine"), distances.by_name("l2+l1")
    noise = jax.random.normal(jax.random.key(2), (restarts, *made.ids.shape, model.width))
    embeds = made.frozen[model.word_table][made.ids] + 0.01 * noise
    ids = jax.random.randint(jax.random.key(3), (restarts, *made.ids.shape), 200, model.config.vocab_size)
    dense, factored = ((made.trainable, made.frozen, seen, made.known) for seen in (made.observed, made.factored))

    def loss(embeds, trainable, frozen, _, known):
        return losses.classification(
            model.apply(tuning.merge(trainable, frozen), embeds, known.attention), known.labels
        )

    def formed(distance):
        simulate = client.fedsgd(model)
        return lambda embeds, trainable, frozen, observed, known: distance(
            simulate(trainable, frozen, embeds, known.attention, known.labels, None), observed
        )

    def step(distance):
        objective = matching.embedding_objective(model, distance)
        return lambda embeds, *context: objective(Candidate(embeds, None, None), *context)

    def score(distance):
        objective = matching.token_objective(model, distance, pad=0)
        return lambda ids, *context: objective(ids, None, None, *context)

    slope = jax.value_and_grad
    return {
        "bare": (slope(loss), (embeds, *dense)),
        "materialised": (slope(formed(cosine)), (embeds, *dense)),
        "factored": (slope(step(cosine)), (embeds, *factored)),
        "materialised l2+l1": (slope(formed(l2_l1)), (embeds, *dense)),
        "blocked l2+l1": (slope(step(l2_l1)), (embeds, *factored)),
        "materialised score": (formed(cosine), (embeds, *dense)),
        "score": (score(cosine), (ids, *factored)),
        "score l2+l1": (score(l2_l1), (ids, *factored)),
    }


def compiled(name: str, function: Callable, args: tuple) -> Row:
    """The program of all restarts; one that would not fit in memory is compiled only."""
    batched = jax.jit(jax.vmap(function, in_axes=(0, None, None, None, None)))
    program = batched.lower(*args).compile()
    size = program.memory_analysis().temp_size_in_bytes
    fits = size < 0.5 * plan.device_memory(Config())
    return Row(name, (lambda: jax.block_until_ready(program(*args))) if fits else None, size)


def torch_rows(made: Setup, restarts: int) -> list[Row]:
    """The same steps and scores in plain PyTorch, one after another, in a process of their own."""
    rival = plain_torch.started(made.model.config, np.array(made.ids))
    return [
        Row("torch", lambda: [rival.step() for _ in range(restarts)], None),
        Row("torch score", lambda: [rival.score() for _ in range(restarts)], None),
    ]


def turns(rows: list[Row]) -> dict[str, float]:
    """Median milliseconds of each program, in turn; each runs twice a turn, as the first run finds cold memory."""
    times: dict[str, list[float]] = {row.name: [] for row in rows if row.run}
    for _ in range(REPEATS.value):
        for row in rows:
            if row.run:
                row.run()
                begin = time.perf_counter()
                row.run()
                times[row.name].append(1e3 * (time.perf_counter() - begin))
    return {name: float(np.median(found)) for name, found in times.items()}


def table(size: str, length: int, restarts: int) -> None:
    """Measure and print one block."""
    made = setup(size, length)
    wanted = {"bare", *ROWS.value}
    all_programs = programs(made, restarts)
    rows = [compiled(n, *p) for n, p in all_programs.items() if not ROWS.value or n in wanted]
    if importlib.util.find_spec("torch") and (not ROWS.value or wanted & {"torch", "torch score"}):
        rows += [row for row in torch_rows(made, restarts) if not ROWS.value or row.name in wanted]
    found = turns(rows)
    parameters = 4 * sum(value.size for value in made.trainable.values())
    print(f"\n{size}, length {length}, restarts {restarts}; shared parameters {parameters / 1e6:.0f} MB", flush=True)
    print(f"{'':20s} {'ms':>9s} {'ms each':>9s} {'x bare':>7s} {'x mat.':>7s} {'x torch':>7s} {'temp MB':>9s}")
    for row in rows:
        _line(row, found, restarts)


def _line(row: Row, found: dict[str, float], restarts: int) -> None:
    memory = "" if row.bytes is None else f"{row.bytes / 1e6:9.1f}"
    if row.name not in found:
        print(f"{row.name:20s} {'not run: memory':>45s} {memory}")
        return
    ms = found[row.name]
    rival = "materialised" + " l2+l1" * row.name.endswith("l2+l1") * ("score" not in row.name)
    rival = "materialised score" if row.name == "score" else rival
    theirs = "torch score" if "score" in row.name else "torch"
    ratios = [f"{ms / found[other]:7.2f}" if other in found else 7 * " " for other in ("bare", rival, theirs)]
    print(f"{row.name:20s} {ms:9.1f} {ms / restarts:9.2f} {' '.join(ratios)} {memory}", flush=True)


def main(_argv: list[str]) -> None:
    """All combinations asked for."""
    jax.config.update("jax_default_matmul_precision", "highest")
    print(f"{jax.local_device_count()} x {jax.devices()[0].device_kind}, median of {REPEATS.value}")
    for size in SIZES.value:
        for length in map(int, LENGTHS.value):
            for restarts in map(int, RESTARTS.value):
                table(size, length, restarts)


if __name__ == "__main__":
    app.run(main)
