"""The plan: groups, sizes that fit the memory, and amounts of work, all against hand-made sums."""

import dataclasses
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grab_jax import plan
from grab_jax.attack_config import AttackConfig
from grab_jax.config import ClientConfig, Config, RunConfig
from grab_jax.data import ClientBatch
from grab_jax.sharding import World
from grab_jax.types import Batch

MODEL = SimpleNamespace(
    config=SimpleNamespace(num_hidden_layers=2, num_attention_heads=1), width=4, word_table="embeddings"
)  # fmt: skip
TRAINABLE = {"kernel": np.zeros((10, 100))}
SHARED = 4 * 1000
ACTIVATIONS = 4 * 1 * 8 * 2 * (16 * 4 + 3 * 1 * 8)
"""float32, one sentence, 8 tokens, 2 layers, 16 widths and 3 attention maps per token: 5632 bytes."""


def batch(index, length, sentences=1, real=None):
    attention = np.zeros((sentences, length), bool)
    attention[:, : real or length] = True
    ids = jnp.zeros((sentences, length), jnp.int32)
    return ClientBatch(index, (), (), (), Batch(ids, jnp.asarray(attention), jnp.zeros(sentences, jnp.int32)))


def config(memory_bytes=None, group=8, **attack):
    memory = None if memory_bytes is None else memory_bytes / 2**30
    return Config(run=RunConfig(group=group, memory_gb=memory), attack=AttackConfig(**attack))


def make(config, lengths, trainable=TRAINABLE):
    return plan.make(config, MODEL, trainable, [batch(i, length) for i, length in enumerate(lengths)])


@settings(deadline=None)
@given(st.lists(st.sampled_from([8, 12, 16]), min_size=1, max_size=20), st.integers(1, 9))
def test_groups_partition_the_batches(lengths, group):
    """Every batch once, of one shape per group, in order, no group too large, no more groups than needed."""
    groups = make(config(group=group), lengths).groups
    assert sorted(i for g in groups for i in g.members) == list(range(len(lengths)))
    for g in groups:
        assert {(1, lengths[i]) for i in g.members} == {g.shape}
        assert list(g.members) == sorted(g.members)
        assert 1 <= len(g.members) <= group
    assert len(groups) == sum(-(-lengths.count(length) // group) for length in set(lengths))


def test_scores_of_repeated_local_steps_hold_the_weights_that_moved():
    """Three copies of the shared tensors a candidate: 10 candidates fit no more where there are two epochs."""
    one, two = (
        dataclasses.replace(config(230_000.5), client=ClientConfig(algorithm="fedavg", epochs=epochs))
        for epochs in (1, 2)
    )
    assert make(one, [8]).chunk == (138_000 - 3 * SHARED) // (2 * ACTIVATIONS)
    assert make(two, [8]).chunk == (138_000 - 3 * SHARED) // (2 * ACTIVATIONS + 3 * SHARED)


def test_sizes_by_hand():
    """230 kB: 60 % less two copies of the shared tensors leave 130 kB; 3 batches of 37.8 kB, then 10 candidates."""
    found = make(config(230_000.5), [8] * 8)
    assert [g.members for g in found.groups] == [(0, 1, 2), (3, 4, 5), (6, 7)]
    assert found.chunk == (130_000 - 3 * SHARED) // (2 * ACTIVATIONS) == 10
    assert found.bytes == 5 * SHARED + 10 * 2 * ACTIVATIONS == 132_640
    assert found.memory == 230_000
    assert found.compilations == 2 * 8


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.sampled_from([8, 12, 16]), min_size=1, max_size=20),
    st.integers(1, 9),
    st.lists(st.sampled_from([1000, 230_000, 10**9]), min_size=1, max_size=5),
    st.sampled_from(["grab", "span"]),
)
def test_hosts_with_more_and_less_memory_share_every_batch_once(lengths, group, memories, attack):
    batches = [batch(i, length) for i, length in enumerate(lengths)]
    plans = [
        plan.make(config(memory, group, name=attack), MODEL, TRAINABLE, batches, World(process, len(memories)))
        for process, memory in enumerate(memories)
    ]
    shared = [i for found in plans for one in found.groups for i in one.members]
    assert sorted(shared) == list(range(len(lengths)))
    for found in plans:
        for one in found.groups:
            assert {(1, lengths[i]) for i in one.members} == {one.shape}
            assert len(one.members) <= group
    if attack == "span":
        sizes = [sum(len(one.members) for one in found.groups) for found in plans]
        assert max(sizes) - min(sizes) <= 1


def test_shrinks_with_memory():
    plans = [make(config(memory), [8] * 8) for memory in (10**9, 3 * 10**5, 10**5, 1000)]
    chunks, sizes = [p.chunk for p in plans], [len(p.groups[0].members) for p in plans]
    assert chunks == sorted(chunks, reverse=True)
    assert sizes == sorted(sizes, reverse=True)
    assert (chunks[0], sizes[0]) == (64, 8)
    assert (chunks[-1], sizes[-1]) == (1, 1)
    assert plans[0].bytes < 0.6 * 10**9
    assert plans[-1].bytes > plans[-1].memory


def test_what_takes_more_memory():
    """More restarts and a trained word table leave room for less."""
    plain = make(config(230_000), [8] * 8)
    restarts = make(config(230_000, restarts=3), [8] * 8)
    table = make(config(230_000), [8] * 8, {"embeddings": np.zeros((1000, 1))})
    assert len(restarts.groups) == 8
    assert table.chunk == (130_000 - 3 * SHARED) // (2 * ACTIVATIONS + 4 * 1000) < plain.chunk
    long = make(config(230_000), [8] * 8 + [64])
    assert long.chunk < plain.chunk


def test_restarts_take_turns_where_they_do_not_fit_together():
    """230 kB hold 3 steps of 33.8 kB beside a batch's update of 4 kB; 2.3 MB hold all 10."""
    assert make(config(230_000, restarts=10), [8] * 2).together == (130_000 - SHARED) // (6 * ACTIVATIONS) == 3
    assert make(config(2_300_000, restarts=10), [8] * 2).together == 10
    assert make(config(230_000, restarts=10), [8]).bytes < 230_000
    assert make(config(1000, restarts=10), [8]).together == 1
    assert make(config(restarts=10, together=4), [8]).together == 4


def test_a_given_chunk_is_kept():
    found = make(config(1000, chunk=17), [8])
    assert found.chunk == 17
    asked = config(230_000)
    assert plan.resolved(asked, make(asked, [8] * 3)) == dataclasses.replace(
        asked, attack=AttackConfig(chunk=10, together=1)
    )


def test_work():
    """6 free positions, 6 tokens in the pool, 4 beams of 4 solutions: 576 a sweep; the second and third count half."""
    found = plan.make(config(rounds=2, steps=30, restarts=3, candidates=7, permutations=5, sweeps=2), MODEL, TRAINABLE,
                      [batch(0, 12, real=8), batch(1, 12, real=8)])  # fmt: skip
    assert found.steps == 2 * 2 * 30 * 3
    assert found.scores == 2 * (7 + 2 * (2 * 5 + 1.5 * 576))
    none = plan.make(config(rounds=2, candidates=7, permutations=5, sweeps=0), MODEL, TRAINABLE, [batch(0, 12)])
    assert none.scores == 7 + 2 * 2 * 5


def test_work_of_moves():
    """Steps 75, 150, 225 and 300 of 310 move the words of both sentences; the first 31 steps move none."""
    given = config(name="lamp", steps=310, candidates=7, permutations=5, moves=11)
    found = plan.make(given, MODEL, TRAINABLE, [batch(0, 12, sentences=2)])
    assert found.scores == 7 + 2 * 5 + 4 * 2 * 11


def test_a_prior_takes_memory_for_its_logits():
    """8 tokens of 100 words, twice in float32: 6.4 kB beside the 11.3 kB of a score."""
    model = SimpleNamespace(**vars(MODEL) | {"config": SimpleNamespace(**vars(MODEL.config), vocab_size=100)})
    found = plan.make(config(230_000, name="lamp", prior="a folder"), model, TRAINABLE, [batch(i, 8) for i in range(3)])
    assert found.chunk == (130_000 - 3 * SHARED) // (2 * ACTIVATIONS + 6400) == 6


def test_device_memory():
    assert plan.device_memory(config(3 * 2**30)) == 3 * 2**30
    assert plan.device_memory(config()) > 2**28


def test_seconds(monkeypatch):
    """Each score takes 2 s by this clock; a step costs 2.1 scores; the first score, which compiles, is not timed."""
    clock, calls = [0.0], []

    def score():
        calls.append(clock[0])
        clock[0] += 100.0 if len(calls) == 1 else 2.0

    monkeypatch.setattr(plan.time, "perf_counter", lambda: clock[0])
    work = make(config(), [8])._replace(scores=10, steps=100)
    assert plan.seconds(work, plan.once(score)) == pytest.approx(2 * (10 + 2.1 * 100))
