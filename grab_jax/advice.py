"""What to try next: changes of the client worth measuring, each as the command that repeats the run with it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple

MORE_DROPOUT, MORE_SENTENCES = 0.3, 8


class Change(NamedTuple):
    """One flag to change, as a question, with the reason to ask it."""

    title: str
    why: str
    flag: str
    value: Any


def advice(run: Mapping[str, Any], run_dir: str | os.PathLike[str]) -> list[dict[str, str]]:
    """Title, reason and command of each change that is not already in force."""
    return [
        {"title": change.title, "why": change.why, "command": _changed(run, run_dir, change)}
        for change in (_dropout(settings(run)), _batch_size(settings(run)), _frozen(settings(run)))
        if change is not None
    ]


def command(run: Mapping[str, Any], run_dir: str | os.PathLike[str], suffix: str, *flags: str) -> str:
    """The command that repeats the run into a new folder with some flags changed, one flag a line."""
    folder = str(run_dir).rstrip("/")
    flagfile = f"{folder}/{run.get('flags_file') or 'flags.txt'}"
    parts = [f"--flagfile={flagfile}", f"--run_dir={folder}-{suffix}", *flags]
    return " \\\n  ".join(["python -m grab_jax.main", *map(shlex.quote, parts)])


def settings(run: Mapping[str, Any]) -> dict[str, Any]:
    """The run's settings by flag name: the nested keys joined with `_`."""

    def walk(tree: Mapping[str, Any], path: str) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in tree.items():
            out |= walk(value, f"{path}{key}_") if isinstance(value, Mapping) else {f"{path}{key}": value}
        return out

    config = run.get("config")
    return walk(config, "") if isinstance(config, Mapping) else {}


def _changed(run: Mapping[str, Any], run_dir: str | os.PathLike[str], change: Change) -> str:
    suffix = f"{change.flag.rsplit('_', 1)[-1]}{change.value}"
    return command(run, run_dir, suffix, f"--{change.flag}={change.value}")


def _dropout(flags: Mapping[str, Any]) -> Change | None:
    rate = flags.get("client_dropout")
    if isinstance(rate, int | float) and rate >= MORE_DROPOUT:
        return None
    why = "The attacker then has to find the dropout masks as well as the text."
    return Change("Does more dropout in the client's training leak less?", why, "client_dropout", MORE_DROPOUT)


def _batch_size(flags: Mapping[str, Any]) -> Change:
    size = flags.get("batch_size")
    size = size if isinstance(size, int) and size > 0 else 1
    larger = MORE_SENTENCES if size < MORE_SENTENCES else 2 * size
    plural = "" if size == 1 else "s"
    why = f"An update averaged over {larger} sentences instead of {size} sentence{plural} says less about each."
    return Change("Do larger client batches leak less?", why, "batch_size", larger)


def _frozen(flags: Mapping[str, Any]) -> Change | None:
    if "embeddings" in str(flags.get("client_frozen")):
        return None
    why = "The gradient of a word embedding tells which words were in the batch; frozen, it is never sent."
    return Change("Does it help to keep the embeddings frozen?", why, "client_frozen", "embeddings")
