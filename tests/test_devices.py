"""Restarts and candidates over many devices, and over little memory, give the result of one large device."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

RUN = """
import json, sys
import jax
import numpy as np
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
from dataclasses import replace
import test_grab
import test_lamp
from grab_jax.attacks import ATTACKS, programs
loaded = test_grab.one_layer("bert", num_hidden_layers=1)
truths = [test_grab.made(loaded, (words,), dropout=0.1) for words in ((10, 20, 30), (33, 22, 11), (15, 25, 9))]
sizes = {"chunk": int(sys.argv[2]), "together": int(sys.argv[3])}
recipe = {"grab": replace(test_grab.FAST, sweeps=1), "lamp": replace(test_lamp.LAMP, moves=12, moves_every=4)}
config = replace(recipe[sys.argv[4]], rounds=1, steps=12, restarts=4, candidates=6, permutations=6, **sizes)
found = ATTACKS[config.name].attack(test_grab.keys(7, 8, 9), [t.problem for t in truths], config)
meshes = [list(programs.mesh_for(*sizes).shape.values()) for sizes in ((2, 4), (1, 4), (1, 6), (9, 1))]
print(json.dumps([meshes, [(np.asarray(r.ids).tolist(), [p["loss"] for p in r.trace]) for r in found]]))
"""

SPAN = """
import json, sys
import jax
import numpy as np
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
import test_span_attack
from span_client import client
from grab_jax.attack_config import AttackConfig
from grab_jax.attacks import span
truths = [client("bert", test_span_attack.drawn("bert", (3, 4), seed), seed=seed) for seed in (0, 1)]
keys = jax.vmap(jax.random.key)(np.arange(2))
found = span.attack(keys, [t.problem for t in truths], AttackConfig(name="span"))
shown = lambda r: [np.asarray(r.ids).tolist(), np.asarray(r.masks["embeddings"]).tolist(), r.evidence["sentences"]]
print(json.dumps([len(jax.local_devices()), [shown(r) for r in found]]))
"""

COMPILED = """
import json
import jax
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_num_cpu_devices", 4)
from dataclasses import replace
import test_grab
from grab_jax.attacks import grab, programs
NAMES = ("choose", "init", "run", "move", "tokens", "score")
texts, compiled = {}, programs.compiled
def watch(name, function):
    def call(*args):
        if name not in texts:
            texts[name] = function.lower(*args).compile().as_text()
        return function(*args)
    return call
def watching(*args):
    found = compiled(*args)
    return found._replace(**{name: watch(name, getattr(found, name)) for name in NAMES})
programs.compiled = watching
loaded = test_grab.one_layer("bert", num_hidden_layers=1)
truths = [test_grab.made(loaded, (words,), dropout=0.1) for words in ((10, 20, 30), (33, 22, 11))]
sizes = {"steps": 12, "restarts": 4, "candidates": 6, "permutations": 6, "moves": 4, "moves_every": 6}
config = replace(test_grab.FAST, rounds=1, sweeps=1, **sizes)
grab.attack(test_grab.keys(7, 8), [t.problem for t in truths], config)
print(json.dumps(texts))
"""
COLLECTIVE = re.compile(
    r"= (\S+) (all-reduce|all-gather|all-to-all|collective-\w+|reduce-scatter|ragged-\S+|send|recv)(?:-start)?\("
)


def attacked(devices, chunk, together, attack="grab"):
    """Meshes, and the results of three client batches with four restarts, in a process of its own."""
    return answer(RUN, str(devices), str(chunk), str(together), attack)


def answer(program, *args):
    """What a program of its own prints."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent)])
    command = [sys.executable, "-c", program, *args]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def alone():
    return attacked(1, 16, 4)


@pytest.mark.parametrize(
    ("devices", "chunk", "together", "meshes"),
    [
        (4, 16, 4, [[2, 2], [1, 4], [1, 3], [4, 1]]),
        (2, 16, 4, [[2, 1], [1, 2], [1, 2], [2, 1]]),
        (1, 3, 1, [[1, 1]] * 4),
    ],
    ids=["4 devices", "2 devices, which 3 batches do not fill", "little memory"],
)
def test_the_result_is_that_of_one_large_device(alone, devices, chunk, together, meshes):
    """The grid for 2 batches x 4 restarts, 1 x 4, 1 x 6 and 9 x 1, and what 3 x 4 finds."""
    found, results = attacked(devices, chunk, together)
    assert found == meshes
    assert_alike(results, alone[1])


def assert_alike(results, others):
    for (ids, losses), (other_ids, other_losses) in zip(results, others, strict=True):
        np.testing.assert_array_equal(ids, other_ids)
        np.testing.assert_allclose(losses, other_losses, rtol=1e-3)


def test_lamp_moves_words_as_on_one_device():
    """Each of four restarts moves its words twice, as a prior judges."""
    found, results = attacked(4, 16, 4, "lamp")
    assert found[0] == [2, 2]
    assert_alike(results, attacked(1, 16, 4, "lamp")[1])


def test_span_decoding_finds_on_four_devices_what_it_finds_on_one():
    """The same tokens and masks, every sentence certified."""
    (devices, found), (_, alone) = answer(SPAN, "4"), answer(SPAN, "1")
    assert devices == 4
    for (ids, masks, told), (other_ids, other_masks, _) in zip(found, alone, strict=True):
        assert (ids, masks) == (other_ids, other_masks)
        assert [one["certified"] for one in told] == [True, True]


def test_devices_exchange_the_best_loss_and_nothing_else():
    """Two batches with four restarts on a grid of 2 x 2: of six programs the descent alone communicates, once."""
    texts = answer(COMPILED)
    found = {name: COLLECTIVE.findall(text) for name, text in texts.items()}
    (shape, kind) = found.pop("run")[0]
    assert kind == "all-reduce"
    assert shape.startswith("f32[1,12]")  # of one batch a device, the best loss of each of 12 steps
    assert len(COLLECTIVE.findall(texts["run"])) == 1
    (reduced,) = re.findall(r"all-reduce\(.*to_apply=%?([\w.-]+)", texts["run"])
    (body,) = re.findall(rf"^%?{re.escape(reduced)} .*?^}}", texts["run"], re.M | re.S)
    assert "minimum(" in body
    assert "replica_groups={{0,1},{2,3}}" in texts["run"] or "replica_groups=[2,2]" in texts["run"]
    assert found == {name: [] for name in ("choose", "init", "move", "tokens", "score")}
