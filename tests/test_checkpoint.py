"""Checkpoints: what is saved comes back bit for bit, and a damaged newest state gives way to the one before."""

import os
import shutil
import threading
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from grab_jax.checkpoint import Checkpoints

# What orbax leaves behind after a failed read.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Inner(NamedTuple):
    """Like a candidate: parts may be None."""

    embeds: Any
    masks: Any
    labels: Any


class State(NamedTuple):
    """Like an attack's state."""

    round: Any
    inner: Inner
    optimizer: tuple
    scores: Any


def state(n):
    rng = np.random.default_rng(n)
    inner = Inner(jnp.asarray(rng.normal(size=(2, 3)), jnp.float32), {"site_0": rng.random((1, 4)) < 0.5}, None)
    odd = np.array([np.nan, np.inf, -0.0, 5e-324, n], np.float64)
    optimizer = (np.arange(3, dtype=np.int8), (), rng.normal(size=2).astype(ml_dtypes.bfloat16))
    return State(np.int32(n), inner, optimizer, odd)


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()


@pytest.fixture
def saved(tmp_path):
    """A folder with states 1, 2 and 3 saved in turn."""
    checkpoints = Checkpoints(tmp_path / "ckpt")
    for n in (1, 2, 3):
        checkpoints.save(state(n))
    checkpoints.close()
    return tmp_path / "ckpt"


def restored(folder):
    checkpoints = Checkpoints(folder)
    found = checkpoints.restore(state(0))
    checkpoints.close()
    return found


def test_nothing_saved(tmp_path):
    assert restored(tmp_path / "new" / "folder") is None


def test_newest_bit_for_bit(saved):
    assert_same(restored(saved), state(3))


def test_two_are_kept_and_counting_goes_on(saved):
    assert sorted(path.name for path in saved.iterdir()) == ["2", "3"]
    checkpoints = Checkpoints(saved)
    checkpoints.save(state(9))
    assert_same(checkpoints.restore(state(0)), state(9))
    checkpoints.close()
    assert sorted(path.name for path in saved.iterdir()) == ["3", "4"]


def test_arrays_may_change_while_they_are_written(tmp_path):
    """What is written is what was given, though the attack goes on with the same memory."""
    checkpoints, moving = Checkpoints(tmp_path / "ckpt"), state(3)
    checkpoints.save(moving)
    for leaf in jax.tree.leaves(moving):
        if isinstance(leaf, np.ndarray):
            leaf.fill(0)
    assert_same(checkpoints.restore(state(0)), state(3))
    checkpoints.close()


def test_saving_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    """A disk that takes its time holds up the next state, not the attack."""
    slow, replace = threading.Event(), os.rename

    def rename(*args):
        slow.wait(30)
        replace(*args)

    checkpoints = Checkpoints(tmp_path / "ckpt")
    monkeypatch.setattr(os, "rename", rename)
    checkpoints.save(state(1))
    assert not list((tmp_path / "ckpt").glob("[0-9]"))
    slow.set()
    assert_same(checkpoints.restore(state(0)), state(1))
    checkpoints.close()


def cut_data(newest):
    for path in newest.rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "data cut": cut_data,
    "no manifest": lambda newest: (newest / "default" / "manifest.ocdbt").unlink(),
    "no metadata": lambda newest: (newest / "default" / "_METADATA").unlink(),
    "no data": lambda newest: shutil.rmtree(newest / "default"),
    "empty folder": lambda newest: (shutil.rmtree(newest), newest.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_newest(saved, damage):
    """The one before is used, and saving goes on after it."""
    damage(saved / "3")
    assert_same(restored(saved), state(2))
    checkpoints = Checkpoints(saved)
    checkpoints.save(state(7))
    checkpoints.close()
    assert_same(restored(saved), state(7))


def test_killed_while_writing(saved):
    """What orbax leaves behind before its final rename is ignored."""
    shutil.copytree(saved / "3", saved / "4.orbax-checkpoint-tmp-17")
    assert_same(restored(saved), state(3))


def test_all_damaged(saved):
    """The attack starts anew rather than from a wreck."""
    for folder in saved.iterdir():
        cut_data(folder)
    assert restored(saved) is None
