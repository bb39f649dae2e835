"""Curves of a run for TensorBoard and Weights & Biases: the loss while an attack runs, the leakage batch by batch.

`--run_tensorboard` writes to `<run folder>/tensorboard`; `--run_wandb=PROJECT` sends to that project, or with
`WANDB_MODE=offline` keeps in `<run folder>/wandb`. Numbers and settings only: no sentence, no output of the program, of
the machine neither its name nor its parts, packages or folders. Where both are off, nothing is imported.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grab_jax import summary
from grab_jax.attacks.state import Progress
from grab_jax.config import Config, identity
from grab_jax.types import InputError

LIBRARIES = {"run_tensorboard": "tensorboardX", "run_wandb": "wandb"}

Write = Callable[[str, Mapping[str, float], int], None]
"""Takes the axis ("step" of an attack or "batch" of the run), values by name, and the place on the axis."""


def check(config: Config) -> None:
    """Refuse a tracker that is not installed.

    Raises:
      InputError: it is not.
    """
    for flag, library in LIBRARIES.items():
        if getattr(config.run, flag.removeprefix("run_")) and importlib.util.find_spec(library) is None:
            raise InputError(f"--{flag} needs {library}, which is not installed; pip install 'grab-jax[trackers]'")


class Trackers:
    """The trackers of one run, none where `process`, the number of this process, is not 0.

    Raises:
      InputError: a tracker does not start.
    """

    def __init__(self, config: Config, folder: Path, process: int = 0):
        self._steps = config.attack.steps
        self._writers: list[Write] = []
        self._closers: list[Callable[[], Any]] = []
        opened = (config.run.tensorboard, _tensorboard), (config.run.wandb, _wandb)
        for write, close in [start(config, folder) for wanted, start in opened if wanted and process == 0]:
            self._writers.append(write)
            self._closers.append(close)

    def progress(self, batches: Sequence[int], progress: Progress) -> None:
        """The losses of the client batches that are attacked together, over the continuous steps of all rounds."""
        if progress.phase == "continuous":
            losses = {f"loss/{batch}": float(loss) for batch, loss in zip(batches, progress.loss, strict=True)}
            self._write("step", losses, progress.round * self._steps + progress.step)

    def finished(self, record: Mapping[str, Any]) -> None:
        """The leakage of an attacked batch: scores in percent, means over its sentences."""
        rows = summary.score_batch(record)
        means = {name: sum(row[name] for row in rows) / len(rows) for name in ("rougeL", "token_accuracy", "exact")}
        means["exact_match"] = 100.0 * means.pop("exact")
        means = {f"leakage/{name}": value for name, value in means.items()}
        self._write("batch", means, record["index"])

    def _write(self, axis: str, values: Mapping[str, float], place: int) -> None:
        known = {name: value for name, value in values.items() if math.isfinite(value)}
        for write in self._writers if known else ():
            write(axis, known, place)

    def close(self) -> None:
        """Write what is left."""
        for close in self._closers:
            close()


def _tensorboard(_config: Config, folder: Path) -> tuple[Write, Callable[[], Any]]:
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(logdir=str(folder / "tensorboard"))

    def write(_axis: str, values: Mapping[str, float], place: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, place)

    return write, writer.close


def _without_folders(value: Any) -> Any:
    """Settings with the last part of a path in place of it: of a file or folder that is here, or where one would be."""
    if isinstance(value, dict):
        return {name: _without_folders(part) for name, part in value.items()}
    local = isinstance(value, str) and (value.startswith(("/", "~", ".")) or (os.sep in value and Path(value).exists()))
    return Path(value).name if local else value


def _wandb(config: Config, folder: Path) -> tuple[Write, Callable[[], Any]]:
    import wandb

    # The console shows reconstructed sentences, the machine's description its user: neither is sent.
    private = wandb.Settings(
        console="off", disable_code=True, disable_git=True, x_disable_meta=True, x_disable_machine_info=True,
        x_disable_stats=True, x_save_requirements=False, host="",
    )  # fmt: skip
    settings = identity(config)
    number = hashlib.sha256(json.dumps([str(folder.absolute()), settings], sort_keys=True).encode()).hexdigest()[:16]
    told = _without_folders(settings)
    place = {"project": config.run.wandb, "dir": str(folder), "name": folder.name}
    try:
        run = wandb.init(**place, id=number, resume="allow", config=told, settings=private)
    except wandb.errors.Error as error:
        said = " ".join(str(error).split())
        raise InputError(
            f"--run_wandb={config.run.wandb}: {said}; log in with `wandb login`, or set WANDB_MODE=offline"
        ) from error
    run.define_metric("loss/*", step_metric="step")
    run.define_metric("leakage/*", step_metric="batch")

    def write(axis: str, values: Mapping[str, float], place: int) -> None:
        run.log({axis: place, **values})

    return write, run.finish
