"""An attack under watch: an interrupt that somebody swallowed still stops it, with its newest state kept."""

from types import SimpleNamespace

import numpy as np
import pytest

from grab_jax import main, watch
from grab_jax.attacks.grab import Progress
from grab_jax.config import Config
from grab_jax.progress import Display

PROGRESS = Progress(0, "continuous", 1, 2, np.zeros(1), None)


@pytest.fixture
def watched(tmp_path):
    watch.ASKED.clear()
    yield watch.Watch(Config(), tmp_path / "ckpt", Display("off", None), str)
    watch.ASKED.clear()


def test_a_swallowed_interrupt_is_raised_at_the_next_progress(watched):
    watched(None, PROGRESS)
    with pytest.raises(KeyboardInterrupt):
        main._interrupt(None, None)
    with pytest.raises(KeyboardInterrupt):
        watched(None, PROGRESS)


def test_the_state_that_came_with_it_is_kept(watched):
    state = SimpleNamespace(round=np.int32(0))
    watch.ASKED.set()
    with pytest.raises(KeyboardInterrupt):
        watched(state, PROGRESS)
    assert watched._latest is state
