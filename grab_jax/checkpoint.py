"""Saving and restoring an unfinished attack (orbax): the newest complete state survives a kill at any moment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp


class Checkpoints:
    """The saved states of one running attack under `folder`; only the newest two are kept."""

    def __init__(self, folder: Path):
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False, create=True)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, state: Any) -> None:
        """Write a pytree of arrays, atomically."""
        step = (self._manager.latest_step() or 0) + 1
        self._manager.save(step, args=ocp.args.StandardSave(jax.tree.map(np.asarray, state)), force=True)
        self._manager.wait_until_finished()

    def restore(self, template: Any) -> Any | None:
        """The newest saved state with the structure of `template`, or None."""
        step = self._manager.latest_step()
        if step is None:
            return None
        host = jax.tree.map(np.asarray, template)
        return self._manager.restore(step, args=ocp.args.StandardRestore(host))

    def close(self) -> None:
        """Release the files."""
        self._manager.close()
