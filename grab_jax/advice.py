"""What to try next: changes of the client worth measuring, each as the command that repeats the run with it."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from grab_jax import evidence

MORE_DROPOUT, MORE_SENTENCES = 0.3, 8


class Change(NamedTuple):
    """One flag to change, as a question, with the reason to ask it."""

    title: str
    why: str
    flag: str
    value: Any


def advice(
    run: Mapping[str, Any], run_dir: str | os.PathLike[str], attacked: Sequence[Mapping[str, Any]] = ()
) -> list[dict[str, str]]:
    """Title, reason and command of each change that is not already in force and that the attack may feel.

    `attacked` are the run's records; where they hold evidence and no search went on from there, it tells how large a
    batch is large enough.
    """
    flags, searched = settings(run), any(map(evidence.searched, attacked))
    largest = None if searched else evidence.widest(attacked)
    # What span decoding reads does not depend on whether the embeddings are trained.
    others = [_fill(flags, *largest)] if largest else [_batch_size(flags), _frozen(flags)]
    return [
        {"title": change.title, "why": change.why, "command": _changed(run, run_dir, change)}
        for change in (_dropout(flags, bool(largest)), *others)
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


def _dropout(flags: Mapping[str, Any], decoded: bool) -> Change | None:
    rate = flags.get("client_dropout")
    if isinstance(rate, int | float) and rate >= MORE_DROPOUT:
        return None
    if flags.get("attack_name") == "dager":
        why = "DAGER ends at any dropout, other attacks do not: measure --attack=span on the same client."
        return Change("Does dropout in the client's training leak less?", why, "client_dropout", MORE_DROPOUT)
    why = (
        "The fewer coordinates dropout keeps, the fewer tell one token from another; measure whether that is enough."
        if decoded
        else "The attacker then has to find the dropout masks as well as the text."
    )
    return Change("Does more dropout in the client's training leak less?", why, "client_dropout", MORE_DROPOUT)


def _fill(flags: Mapping[str, Any], rank: int, width: int) -> Change | None:
    """A batch of so many tokens that the gradient's row space holds every vector."""
    size = _size(flags)
    if rank >= width:
        return None
    why = (
        f"This attack ends where a batch holds as many tokens as the model is wide: {width}, against at most {rank} "
        "here. Other attacks do not end there."
    )
    return Change("Do larger client batches leak less?", why, "batch_size", _whole(flags, 1.2 * size * width / rank))


def _batch_size(flags: Mapping[str, Any]) -> Change:
    size = _size(flags)
    larger = _whole(flags, MORE_SENTENCES if size < MORE_SENTENCES else 2 * size)
    plural = "" if size == 1 else "s"
    why = f"An update averaged over {larger} sentences instead of {size} sentence{plural} says less about each."
    return Change("Do larger client batches leak less?", why, "batch_size", larger)


def _whole(flags: Mapping[str, Any], sentences: int | float) -> int:
    """At least so many sentences, in equal shares of clients and local steps."""
    share = (flags.get("client_count") or 1) * (flags.get("client_local_batch") or 1)
    return share * math.ceil(sentences / share)


def _size(flags: Mapping[str, Any]) -> int:
    size = flags.get("batch_size")
    return size if isinstance(size, int) and size > 0 else 1


def _frozen(flags: Mapping[str, Any]) -> Change | None:
    if "embeddings" in str(flags.get("client_frozen")):
        return None
    why = "The gradient of a word embedding tells which words were in the batch; frozen, it is never sent."
    return Change("Does it help to keep the embeddings frozen?", why, "client_frozen", "embeddings")
