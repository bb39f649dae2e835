"""An attack under watch: its progress shown, its state saved now and then, its seconds counted across interruptions."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from grab_jax import interrupts
from grab_jax.attacks.state import Progress
from grab_jax.checkpoint import Checkpoints
from grab_jax.config import Config
from grab_jax.progress import CompileClock, Display


class Watch:
    """What a recipe calls as `on_segment`; see `grab.attack`.

    Args:
      saved: folder of the saved states of this very attack.
      text: token ids of the first sentence -> what a person reads.
    """

    def __init__(self, config: Config, saved: Path, display: Display, text: Callable[[Any], str]):
        self._config, self._display, self._text, self._folder = config, display, text, saved
        self._clock, self._begin = CompileClock(), time.monotonic()
        self._spent, self._latest, self._round, self._saved = np.zeros(2), None, -1, self._begin
        self._checkpoints: Checkpoints | None = None

    def restore(self, blank: Any) -> Any | None:
        """The newest saved state with the structure of `blank`, or None; from now on states are saved."""
        self._checkpoints = Checkpoints(self._folder)
        restored = self._checkpoints.restore({"state": blank, "seconds": self._spent})
        if restored is None:
            return None
        self._spent = restored["seconds"]
        self._display.say(f"  continuing from round {int(restored['state'].round) + 1}")
        return restored["state"]

    def __call__(self, state: Any | None, progress: Progress) -> None:
        """Show, and save at the end of a round or when it is due; `state=None` is progress only.

        Raises:
          KeyboardInterrupt: a signal asked to stop.
        """
        self._display.show(progress, self._config.attack.rounds, lambda: self._text(progress.ids[0, 0]))
        if state is not None:
            self._keep(state)
        interrupts.check()

    def _keep(self, state: Any) -> None:
        self._latest = state
        due = time.monotonic() - self._saved > 60 * self._config.run.checkpoint_minutes
        if due or int(state.round) != self._round >= 0:
            self.save()
        self._round = int(state.round)

    def save(self) -> None:
        """Write the latest state, if there is one."""
        if self._latest is not None and self._checkpoints is not None:
            self._checkpoints.save({"state": self._latest, "seconds": self.elapsed()})
            self._saved = time.monotonic()

    def elapsed(self) -> Float[np.ndarray, " 2"]:
        """Seconds of compiling and of everything else, earlier parts of a resumed attack included."""
        compiling = self._clock.seconds
        return self._spent + np.array([compiling, time.monotonic() - self._begin - compiling])

    def close(self) -> None:
        """Release the files."""
        if self._checkpoints is not None:
            self._checkpoints.close()
