"""Saving and restoring an unfinished attack (orbax): the newest complete state survives a kill at any moment.

States are written while the attack goes on: only copying them to the host and waiting for the one before holds it up.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp


class Checkpoints:
    """The saved states of one running attack under `folder`; only the newest two are kept."""

    def __init__(self, folder: Path):
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=True, create=True)
        # With the handler named, a damaged newest state cannot mislead orbax about the others.
        handler = ocp.StandardCheckpointHandler()
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=handler)

    def save(self, state: Any) -> None:
        """Begin to write a pytree of arrays, atomically; the arrays may change as soon as this returns.

        Raises:
          OSError: the state before this one could not be written.
        """
        step = (self._manager.latest_step() or 0) + 1
        # Copies: a NumPy view of a CPU device's array is that very memory.
        self._manager.save(step, args=ocp.args.StandardSave(jax.tree.map(np.array, state)), force=True)

    def restore(self, template: Any) -> Any | None:
        """The newest readable state with the structure of `template`, or None; a damaged one gives way to the older."""
        host = jax.tree.map(np.asarray, template)
        self._manager.wait_until_finished()
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return self._manager.restore(step, args=ocp.args.StandardRestore(host))
            except (ValueError, KeyError, OSError):  # what orbax raises for missing and cut files
                continue
        return None

    def close(self) -> None:
        """Finish writing and release the files."""
        self._manager.close()
