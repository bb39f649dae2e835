"""Benchmark: one continuous Grab step, many client batches in one compiled program against one at a time.

    python experiments/bench_batching.py --model=builtin:bert-mini --together=8

Prints, from one run and the same inputs, milliseconds per sentence and step for one batch at a time and for all
together, their ratio, and the cost of one first-order candidate score. Random token ids of the model's vocabulary, real
weights, dropout 0.1, embeddings frozen, L2+L1 distance with learned masks. Median of `--repeats` loops of `--steps`.
"""

from __future__ import annotations

import os
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from grab_jax import data, models, simulate, tuning
from grab_jax.attack_config import AttackConfig
from grab_jax.attacks import grab, programs
from grab_jax.config import Config, ModelConfig
from grab_jax.types import Batch

MODEL = flags.DEFINE_string("model", "builtin:bert-mini", "model to attack")
TOGETHER = flags.DEFINE_integer("together", 8, "client batches in one program")
LENGTH = flags.DEFINE_integer("length", 12, "tokens per sentence")
STEPS = flags.DEFINE_integer("steps", 10, "continuous steps per timed loop")
REPEATS = flags.DEFINE_integer("repeats", 5, "timed loops; the median counts")


def problems(config: Config, count: int) -> list:
    """`count` one-sentence client batches of random tokens."""
    loaded = models.load(config.model.name, dropout=config.client.dropout)
    trainable, frozen = tuning.split(loaded.params, tuning.freezes(loaded.model, config.client.frozen))
    vocabulary = data.vocabulary(data.load_tokenizer(loaded.folder))
    rng = np.random.default_rng(0)
    found = []
    for i in range(count):
        ids = rng.integers(200, loaded.model.config.vocab_size, (1, LENGTH.value)).astype(np.int32)
        batch = Batch(jnp.asarray(ids), jnp.ones(ids.shape, bool), jnp.asarray([i % 2]))
        client = data.ClientBatch(i, (data.Sentence("", i % 2, i),), ((),), (False,), batch)
        key = jax.random.key(0)
        found.append(simulate.simulate(key, loaded.model, trainable, frozen, client, vocabulary, config).problem)
    return found


def per_step(many: list, attack: AttackConfig) -> float:
    """Milliseconds of one continuous step per sentence, `many` batches together."""
    keys = jax.random.split(jax.random.key(1), len(many))
    mesh = programs.mesh_for(len(many))
    shared, state = programs.stack(many, attack, mesh), grab.start(keys, many, attack)
    compiled = programs.compiled(many[0].model, attack, many[0].vocabulary, mesh, None)
    draws = jax.random.normal(jax.random.key(2), state.descent.candidate.embeds.shape)
    candidate = state.descent.candidate._replace(embeds=draws)
    begin, losses = compiled.init(candidate), jnp.zeros((len(many), attack.steps))
    loop = lambda: jax.block_until_ready(compiled.run(begin, losses, 0, STEPS.value, shared))  # noqa: E731
    return 1e3 * _median(loop) / (STEPS.value * len(many))


def per_score(problem, attack: AttackConfig) -> float:
    """Milliseconds of scoring one candidate, a chunk at a time."""
    mesh = programs.mesh_for(TOGETHER.value)
    context = programs.context(0, mesh, programs.stack([problem], attack, mesh))
    compiled = programs.compiled(problem.model, attack, problem.vocabulary, mesh, None)
    candidate = programs.at(grab.start(jax.random.split(jax.random.key(1), 1), [problem], attack).solution, 0)
    ids = jnp.tile(problem.known.ids.clip(0), (programs.CHUNK, 1, 1))
    return 1e3 * _median(lambda: jax.block_until_ready(compiled.score(ids, candidate, context))) / programs.CHUNK


def _median(loop) -> float:
    loop()
    times = []
    for _ in range(REPEATS.value):
        begin = time.perf_counter()
        loop()
        times.append(time.perf_counter() - begin)
    return float(np.median(times))


def main(_argv: list[str]) -> None:
    """Measure and print."""
    jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
    jax.config.update("jax_default_matmul_precision", "highest")
    config = Config(model=ModelConfig(name=MODEL.value))
    attack = AttackConfig(steps=STEPS.value)
    many = problems(config, TOGETHER.value)
    alone, together = per_step(many[:1], attack), per_step(many, attack)
    where = f"{jax.local_device_count()} x {jax.devices()[0].device_kind}"
    print(f"model {MODEL.value}, length {LENGTH.value}, {where}, median of {REPEATS.value}")
    print(f"one batch at a time   {alone:8.2f} ms per sentence and step")
    print(f"{TOGETHER.value} batches together    {together:8.2f} ms per sentence and step")
    print(f"ratio                 {alone / together:8.2f} x faster together")
    score = per_score(many[0], attack)
    print(f"one candidate score   {score:8.2f} ms (first order, chunks of {programs.CHUNK})")
    print(f"step over score       {together / score:8.2f}")


if __name__ == "__main__":
    app.run(main)
