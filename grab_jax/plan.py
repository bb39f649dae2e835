"""What a run will do before it does it: groups, chunk sizes from a memory estimate, compilations, time."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from grab_jax.attacks import lamp
from grab_jax.config import Config
from grab_jax.data import ClientBatch
from grab_jax.sharding import ALONE, World

MOST_CHUNK = 64
STEP_OVER_SCORE = 2.1
"""Cost of one continuous step over one first-order score, as measured on a CPU (experiments/bench_batching.py)."""


class Group(NamedTuple):
    """Client batches of one shape `[b t]`, attacked together."""

    shape: tuple[int, int]
    members: tuple[int, ...]


class Plan(NamedTuple):
    """`groups` are those of this process; `chunk` candidates are scored and `together` restarts descended at once.

    `bytes` is the estimated peak, `memory` what the device has.
    """

    groups: tuple[Group, ...]
    chunk: int
    together: int
    bytes: int
    memory: int
    compilations: int
    scores: int
    steps: int


def device_memory(config: Config) -> int:
    """Bytes to plan for: `--run_memory_gb`, what the accelerator reports, or the host's memory."""
    if config.run.memory_gb is not None:
        return int(config.run.memory_gb * 2**30)
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def make(
    config: Config, model: Any, trainable: dict[str, Any], batches: Sequence[ClientBatch], world: World = ALONE
) -> Plan:
    """Group this process's share of the batches by shape; the estimate stays under 60 % of memory.

    Which batches are whose does not depend on memory: hosts with more and with less of it share a run.
    """
    memory = device_memory(config)
    shared = 4 * sum(int(np.prod(value.shape)) for value in trainable.values())
    by_shape: dict[tuple[int, int], list[int]] = {}
    for batch in batches:
        by_shape.setdefault(tuple(batch.batch.ids.shape), []).append(batch.index)
    largest = max(by_shape, key=lambda shape: shape[0] * shape[1])
    # Repeated local steps are all in memory, each with its own change of the weights, and derivatives of it; a score
    # needs one at a time.
    steps = _repeated(config)
    moved = config.client.count * shared if steps > 1 else 0
    one_step = 6 * steps * _activations(model, *largest) + 4 * steps * moved
    budget = 0.6 * memory - 2 * shared
    most = min(config.run.group, -(-len(batches) // world.count))
    if not config.attack.searches:
        most = 1  # seconds each: every batch is written as soon as it is decoded
    size = int(max(1, min(most, budget // (shared + config.attack.restarts * one_step))))
    fit = int(max(1, min(config.attack.restarts, (budget - size * shared) // (size * one_step))))
    together = config.attack.together or fit
    one_score = 2 * _activations(model, *largest) + 3 * moved  # measured: weights, their change, and the gradient
    one_score += _looked_up(model, trainable) + _judged(config, model, *largest)
    chunk = config.attack.chunk or int(max(1, min(MOST_CHUNK, (budget - size * shared) // one_score)))
    groups = [
        Group(shape, members) for shape, own in _share(by_shape, most, world).items() for members in _cut(own, size)
    ]
    peak = 2 * shared + size * shared + max(size * together * one_step, chunk * one_score)
    shapes = len({(group.shape, len(group.members)) for group in groups})
    scores, steps = _work(config, batches)
    return Plan(tuple(groups), chunk, together, int(peak), memory, 8 * shapes, scores, steps)


def _share(by_shape: Mapping[tuple[int, int], list[int]], most: int, world: World) -> dict[tuple[int, int], list[int]]:
    """The batches of this process by shape: all are dealt out in blocks of `most`, which make a group where it fits."""
    own: dict[tuple[int, int], list[int]] = {}
    for shape, block in world.share([(s, block) for s in sorted(by_shape) for block in _cut(by_shape[s], most)]):
        own.setdefault(shape, []).extend(block)
    return own


def _cut(members: Sequence[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(members[i : i + size]) for i in range(0, len(members), size)]


def _repeated(config: Config) -> int:
    """Local steps of the client that an attack by gradient matching repeats."""
    local = config.told_local
    if local is None or not config.attack.searches or not local.told:
        return 1
    return local.steps(config.batch_size)


def _activations(model: Any, batch: int, length: int) -> int:
    """Bytes of one candidate's taps: about 16 widths per token and layer, and the attention probabilities."""
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    return 4 * batch * length * layers * (16 * model.width + 3 * heads * length)


def _looked_up(model: Any, trainable: dict[str, Any]) -> int:
    """Bytes per candidate that say which rows of the word table it uses, where the table is trained."""
    return 4 * len(trainable[model.word_table]) if model.word_table in trainable else 0


def _judged(config: Config, model: Any, batch: int, length: int) -> int:
    """Bytes per candidate of a language model that judges it: its logits, and their logarithms of probabilities."""
    return 0 if config.attack.prior == "none" else 2 * 4 * batch * length * model.config.vocab_size


def _work(config: Config, batches: Sequence[ClientBatch]) -> tuple[int, int]:
    """Upper bounds of first-order scores and continuous steps; repeated beam proposals are scored once."""
    attack, scores = config.attack, 0
    for batch in batches:
        free = np.asarray(batch.batch.attention).sum(1) - 2
        pool = np.minimum(free.clip(1), 60)
        beam = int((free * pool).sum()) * attack.beam * attack.beam
        # The second and later sweeps mostly repeat the first; half of one is what they add in practice.
        sweeps = min(attack.sweeps, 1) + 0.5 * max(0, min(attack.sweeps, 3) - 1)
        moved = len(free) * attack.moves * sum(lamp.due(attack, step) for step in range(attack.steps))
        scores += int(attack.candidates + attack.rounds * (2 * attack.permutations + moved + beam * sweeps))
    return scores, len(batches) * attack.rounds * attack.steps * attack.restarts


def once(score_one: Any) -> float:
    """Seconds of one candidate score, `score_one()`, compiled."""
    score_one()
    begin = time.perf_counter()
    for _ in range(3):
        score_one()
    return (time.perf_counter() - begin) / 3


def seconds(plan: Plan, each: float) -> float:
    """Time estimate: a score takes `each` seconds, and a step costs `STEP_OVER_SCORE` of it."""
    return each * (plan.scores + STEP_OVER_SCORE * plan.steps)


def resolved(config: Config, plan: Plan) -> Config:
    """The config with the planned sizes filled in."""
    attack = dataclasses.replace(config.attack, chunk=plan.chunk, together=plan.together)
    return dataclasses.replace(config, attack=attack)
