"""Benchmark: an attack's continuous steps, many client batches in one compiled program against one at a time.

    python experiments/bench_batching.py --model=builtin:bert-mini --together=8
    python experiments/bench_batching.py --model=builtin:bert-mini --attack=lamp

Prints, from one run and the same inputs, milliseconds per sentence and step for one batch at a time and for all
together, their ratio, and the cost of one first-order candidate score. Random token ids of the model's vocabulary, real
weights, embeddings frozen; grab: dropout 0.1, L2+L1 distance with learned masks; lamp: no dropout, cosine. Median of
`--repeats` loops of `--steps`. For lamp also the seconds of a whole attack per sentence, put together from its parts
(starts, steps, moves of words, no language model), beside a plain PyTorch attack of a model of that size where torch
is installed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import plain_torch
from absl import app, flags

from grab_jax import data, models, simulate, tuning
from grab_jax.attack_config import AttackConfig
from grab_jax.attacks import grab, lamp, programs
from grab_jax.config import ClientConfig, Config, ModelConfig
from grab_jax.types import Batch

MODEL = flags.DEFINE_string("model", "builtin:bert-mini", "model to attack")
ATTACK = flags.DEFINE_enum("attack", "grab", ["grab", "lamp"], "whose step; lamp: the whole attack is projected too")
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


class Bench:
    """Some client batches with their programs and a random candidate each."""

    def __init__(self, many: list, attack: AttackConfig):
        mesh = programs.mesh_for(len(many))
        keys = jax.random.split(jax.random.key(1), len(many))
        self.many, self.attack, self.mesh = many, attack, mesh
        self.shared, self.state = programs.stack(many, attack, mesh), grab.start(keys, many, attack)
        self.keys = programs.fill(keys[:, None], mesh, programs.EACH)
        self.compiled = programs.compiled(many[0].model, attack, many[0].vocabulary, mesh, None)
        draws = jax.random.normal(jax.random.key(2), self.state.descent.candidate.embeds.shape)
        candidate = self.state.descent.candidate._replace(embeds=draws)
        self.candidate = programs.fill(candidate, mesh, programs.EACH)
        self.begin = self.compiled.init(self.candidate)

    def step(self) -> float:
        """Seconds of one continuous step per sentence."""
        losses = jnp.zeros((len(self.keys), self.attack.steps))
        run = lambda: self.compiled.run(self.begin, losses, 0, STEPS.value, self.shared)  # noqa: E731
        return _median(run) / (STEPS.value * len(self.many))

    def start(self) -> float:
        """Seconds per candidate of scoring random starts and their permutations."""
        arguments = programs.fill(self.state.discrete, self.mesh), True
        each = len(self.keys) // self.mesh.shape["k"]

        def run():
            keys = [jax.random.clone(self.keys) for _ in range(each)]
            return [self.compiled.choose(key, self.candidate, *arguments, i, self.shared) for i, key in enumerate(keys)]

        return _median(run) / (len(self.many) * (self.attack.candidates + self.attack.permutations))

    def move(self) -> float:
        """Seconds per rearrangement in LAMP's discrete step."""
        move = lambda: self.compiled.move(jax.random.clone(self.keys), self.begin, self.shared)  # noqa: E731
        return _median(move) / (len(self.many) * self.attack.moves)

    def score(self) -> float:
        """Seconds of scoring one candidate of tokens, a chunk at a time."""
        context = programs.context(0, self.mesh, self.shared)
        candidate = programs.at(self.state.solution, 0)
        ids = jnp.tile(self.many[0].known.ids.clip(0), (programs.CHUNK, 1, 1))
        return _median(lambda: self.compiled.score(ids, candidate, context)) / programs.CHUNK


def _median(run: Callable[[], Any]) -> float:
    jax.block_until_ready(run())
    times = []
    for _ in range(REPEATS.value):
        begin = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - begin)
    return float(np.median(times))


def project(many: list, step: float, attack: AttackConfig) -> None:
    """Seconds of a whole LAMP attack per sentence, ours and plain PyTorch's, from the cost of its parts."""
    starts = attack.candidates + attack.permutations
    moves = attack.moves * sum(lamp.due(attack, i) for i in range(attack.steps))
    few = Bench(many, dataclasses.replace(attack, candidates=64, permutations=64, moves=128))
    start, move = few.start(), few.move()
    ours = starts * start + attack.steps * step + moves * move
    print(f"\nLAMP: {starts} starts scored, {attack.steps} steps, {moves} moves scored; per sentence")
    print(f"{len(many)} sentences together {ours:8.1f} s ({1e3 * start:.1f} ms a start, {1e3 * move:.1f} ms a move)")
    if importlib.util.find_spec("torch") is None:
        print("PyTorch               not installed: no comparison")
        return
    problem = many[0]
    rival = plain_torch.started(problem.model.config, np.array(problem.known.ids.clip(0)))
    step, score = _median(rival.step), _median(rival.score)
    theirs = attack.steps * step + (starts + moves) * score
    print(f"plain PyTorch         {theirs:8.1f} s ({1e3 * step:.1f} ms a step, {1e3 * score:.1f} ms a score)")
    print(f"ratio                 {theirs / ours:8.2f} x faster")


def main(_argv: list[str]) -> None:
    """Measure and print."""
    jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
    jax.config.update("jax_default_matmul_precision", "highest")
    attack = AttackConfig(name=ATTACK.value)
    dropout = 0.0 if ATTACK.value == "lamp" else 0.1
    many = problems(Config(model=ModelConfig(name=MODEL.value), client=ClientConfig(dropout=dropout)), TOGETHER.value)
    one, all_of_them = Bench(many[:1], attack), Bench(many, attack)
    alone, together = one.step(), all_of_them.step()
    where = f"{jax.local_device_count()} x {jax.devices()[0].device_kind}"
    print(f"{ATTACK.value}, model {MODEL.value}, length {LENGTH.value}, {where}, median of {REPEATS.value}")
    print(f"one batch at a time   {1e3 * alone:8.2f} ms per sentence and step")
    print(f"{TOGETHER.value} batches together    {1e3 * together:8.2f} ms per sentence and step")
    print(f"ratio                 {alone / together:8.2f} x faster together")
    score = all_of_them.score()
    print(f"one candidate score   {1e3 * score:8.2f} ms (first order, chunks of {programs.CHUNK})")
    print(f"step over score       {together / score:8.2f}")
    if attack.moves:
        project(many, together, attack)


if __name__ == "__main__":
    app.run(main)
