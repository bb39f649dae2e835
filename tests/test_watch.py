"""An attack under watch: a signal stops it at its next progress, with its newest state kept."""

from types import SimpleNamespace

import numpy as np
import pytest

from grab_jax import watch
from grab_jax.attacks.state import Progress
from grab_jax.config import Config
from grab_jax.progress import Display

PROGRESS = Progress(0, "continuous", 1, 2, np.zeros(1), None)


def test_rows_and_rounds_share_a_bar(tmp_path):
    """Rows of span decoding first, then the steps of a search, out of all its rounds' steps."""
    display = Display("bar", tmp_path / "log.txt")
    display.begin("a group", 40)
    display.show(Progress(0, "rows", 3, 9, np.full(1, np.nan), None), 2, str)
    assert (display._bar.n, display._bar.total, display._bar.unit) == (3, 9, "row")
    display.show(Progress(1, "continuous", 5, 20, np.zeros(1), None), 2, str)
    assert (display._bar.n, display._bar.total, display._bar.unit) == (25, 40, "step")
    display.close()


def test_lines_say_what_is_new(tmp_path):
    display = Display("lines", tmp_path / "log.txt")
    for found in (8, 9, 9, 9):
        display.show(Progress(0, "rows", found, 9, np.full(1, np.nan), None), 1, str)
    display.close()
    said = (tmp_path / "log.txt").read_text().splitlines()
    assert said == ["  8 of 9 input rows found", "  9 of 9 input rows found"]


def test_the_state_that_comes_with_the_progress_is_kept(tmp_path, monkeypatch):
    watched = watch.Watch(Config(), tmp_path / "ckpt", Display("off", None), str)
    watched(None, PROGRESS)

    def stop():
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.interrupts, "check", stop)
    state = SimpleNamespace(round=np.int32(0))
    with pytest.raises(KeyboardInterrupt):
        watched(state, PROGRESS)
    assert watched._latest is state
