"""Restarts and candidates over many devices, and over little memory, give the result of one large device."""

import json
import os
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
from grab_jax.attacks import grab, programs
loaded = test_grab.one_layer("bert", num_hidden_layers=1)
truths = [test_grab.made(loaded, (words,), dropout=0.1) for words in ((10, 20, 30), (33, 22, 11), (15, 25, 9))]
sizes = {"chunk": int(sys.argv[2]), "together": int(sys.argv[3])}
config = replace(test_grab.FAST, rounds=1, steps=12, restarts=4, candidates=6, permutations=6, sweeps=1, **sizes)
found = grab.attack(test_grab.keys(7, 8, 9), [t.problem for t in truths], config)
meshes = [list(programs.mesh_for(*sizes).shape.values()) for sizes in ((2, 4), (1, 4), (1, 6), (9, 1))]
print(json.dumps([meshes, [(np.asarray(r.ids).tolist(), [p["loss"] for p in r.trace]) for r in found]]))
"""


def attacked(devices, chunk, together):
    """Meshes, and the results of three client batches with four restarts, in a process of its own."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent)])
    command = [sys.executable, "-c", RUN, str(devices), str(chunk), str(together)]
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
    for (ids, losses), (other_ids, other_losses) in zip(results, alone[1], strict=True):
        np.testing.assert_array_equal(ids, other_ids)
        np.testing.assert_allclose(losses, other_losses, rtol=1e-3)
