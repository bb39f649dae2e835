"""A grid of runs: `--sweep_client_dropout=0,0.1 --sweep_batch_size=1,2` runs the four combinations.

A cell is an ordinary run in a folder of its own, `<run_dir>/<id>`, whose id is a hash of the settings that decide its
result. So the same command goes on where it was killed, and a sweep that gained a value runs the new cells only.
Several processes may work on one folder: each takes cells that no other one holds. Those that a launcher numbers
(`sharding`) begin with a share each, and then help the others with cells that nobody has begun. A cell in which a
process died is left to the next start of the command: it may be the one that kills.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from grab_jax import dry_run, run, sharding, sweep_page, sweep_table, utility
from grab_jax import folder as folders
from grab_jax import session as sessions
from grab_jax.config import Config, identity
from grab_jax.progress import CompileClock
from grab_jax.types import InputError

Configure = Callable[[Mapping[str, Any]], Config]
"""The settings with some flags changed; raises InputError where they do not fit together."""

TRIES = 2
"""How often a cell that fails is tried by one command."""


class Cell(NamedTuple):
    """One run of the grid: its id, the swept values by flag, its settings."""

    id: str
    values: dict[str, Any]
    config: Config


class Ready(NamedTuple):
    """A cell whose model and data are known to fit.

    `ids` are those of its results; cells of equal `programs`, the model, the attack's settings and the form of
    an update, share what is compiled for a shape; `shapes` are those of the groups of client batches `(k, b, t)`.
    """

    cell: Cell
    ids: list[str]
    programs: tuple[Any, ...]
    shapes: frozenset[tuple[int, ...]]


def start(swept: Mapping[str, Sequence[Any]], configure: Configure) -> int:
    """Run, plan, show or rebuild a sweep, as `mode` and `dry_run` say; 0, or 1 where a cell failed."""
    found = cells(swept, configure)
    first, base = found[0].config, folder(found)
    world = sharding.initialize(first.run.distributed)
    if world.process and (first.dry_run or first.mode != "simulate"):
        return 0  # said once, by the first process
    if first.mode in ("status", "report"):
        print(sweep_table.status(base) if first.mode == "status" else rebuild(base))
        return 0
    if first.dry_run:
        print(describe(found))
        return 0
    return run_all(swept, found, base, world)


def cells(swept: Mapping[str, Sequence[Any]], configure: Configure) -> list[Cell]:
    """The product of the swept values, each different setting once.

    Raises:
      InputError: a combination that is not allowed; the sentence names it.
    """
    found: dict[str, Cell] = {}
    for combination in itertools.product(*swept.values()):
        values = dict(zip(swept, combination, strict=True))
        try:
            config = configure(values)
        except InputError as error:
            raise InputError(f"cell {sweep_table.words(values)} of the sweep: {error}") from error
        digest = hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()[:10]
        found.setdefault(digest, Cell(digest, values, config))
    return list(found.values())


def folder(found: Sequence[Cell]) -> Path:
    """The folder of the whole sweep: `--run_dir`, or one named after what is swept."""
    if found[0].config.run.dir:
        return Path(found[0].config.run.dir)
    digest = hashlib.sha256(" ".join(cell.id for cell in found).encode()).hexdigest()[:8]
    return Path("runs") / f"sweep-{'-'.join(found[0].values)}-{digest}"


def prepared(found: Sequence[Cell]) -> list[Ready]:
    """Every cell with its model and data loaded once, so that a bad one is refused before the first of these runs.

    Cells that share compiled programs come one after another.
    """
    ready = []
    for cell in found:
        try:
            session = sessions.prepare(cell.config)
        except InputError as error:
            raise InputError(f"cell {sweep_table.words(cell.values)} of the sweep: {error}") from error
        shapes = frozenset((len(group.members), *group.shape) for group in session.plan.groups)
        programs = session.loaded.model, cell.config.attack, sessions.form(cell.config, session.trainable)
        ready.append(Ready(cell, session.ids, programs, shapes))
    first = [one.programs for one in ready]
    return sorted(ready, key=lambda one: first.index(one.programs))


def run_all(
    swept: Mapping[str, Sequence[Any]], found: Sequence[Cell], base: Path, world: sharding.World = sharding.ALONE
) -> int:
    """Run every cell that is not done; one that fails is recorded, and tried again after the others.

    Raises:
      InputError: a bad cell, or the folder holds something else, or a sweep of other settings.
    """
    os.umask(0o077)
    ready, clock = prepared(world.share(found)), CompileClock()
    folders.begin_several(base, sweep_table.LISTED)
    with _table(base):
        sweep_table.enlist(base, swept, {cell.id: cell.values for cell in found})
    # One in which a process died may kill the next one too: the others first.
    ready.sort(key=lambda one: sweep_table.noted(base, one.cell.id).get("state") == sweep_table.BEGUN)
    failed, refused = _attempts(ready, base), False
    if world.several:
        helped, refused = _help(found, base, {one.cell.id for one in ready})
        ready += helped
        failed += [one for one in helped if sweep_table.noted(base, one.cell.id).get("state") == "failed"]
    shapes = len({(one.programs, shape) for one in ready for shape in one.shapes})
    with _table(base):  # the last process to come here has seen every cell
        rows, page = sweep_table.write(base), sweep_page.render(base)
    print(sweep_table.text(rows))
    print(
        f"compiled now: {clock.count} programs for {shapes} shape(s) [batches, sentences, tokens] of "
        f"{len({one.programs for one in ready})} model(s) and attack(s); {clock.hits} read from the cache"
    )
    print(f"sweep: {page}")
    return 1 if failed or refused else 0


def _attempts(ready: Sequence[Ready], base: Path) -> list[Ready]:
    """Run cells, the failed ones again after the others; those that failed to the last."""
    failed = list(ready)
    for turn in range(TRIES):
        failed = [one for n, one in enumerate(failed) if not _attempt(one, base, f"{n + 1} of {len(failed)}", turn)]
    return failed


def _help(found: Sequence[Cell], base: Path, own: set[str]) -> tuple[list[Ready], bool]:
    """Run cells of other processes that nobody has begun, from the end, where their owners come last.

    Returns: these cells, and whether there was a bad one, which is said and left out: its owner refused it.
    """
    helped, refused = [], False
    for cell in reversed(found):
        if cell.id not in own and not sweep_table.noted(base, cell.id):
            try:
                helped += (ready := prepared([cell]))
            except InputError as error:
                refused = True
                print(f"not run: {error}")
                continue
            _attempt(ready[0], base, "of another process", 0, own=False)
    return helped, refused


def _table(base: Path) -> contextlib.AbstractContextManager[bool]:
    """The table and the page are made by one process at a time."""
    return folders.alone(base / "table.lock", float("inf"))


def _attempt(ready: Ready, base: Path, which: str, turn: int, *, own: bool = True) -> bool:
    """Run one cell, unless it is done or another process has it; whether nothing failed.

    Only this process's `own` cells are taken up where an earlier start left them.
    """
    cell, place = ready.cell, base / ready.cell.id
    said = f"cell {which} ({sweep_table.words(cell.values)})"
    # Who asks for the states of all cells holds each lock for a moment.
    with folders.alone(sweep_table.lock(base, cell.id), patience=0.5) as mine:
        before = sweep_table.noted(base, cell.id)
        if not mine or (before and not own):
            print(f"{said}: another process runs it")
            return True
        if before.get("state") == "done" and run.finished(ready.ids, place) and not utility.due(cell.config, place):
            print(f"{said}: already done")
            return True
        print(f"{said}{' once more' if turn else ''}: {place}", flush=True)
        sweep_table.note(base, cell.id, {**before, "state": sweep_table.BEGUN})
        note = _run(cell, place, before)
        sweep_table.note(base, cell.id, note)
    with _table(base):
        sweep_table.write(base)
    return note["state"] == "done"


def _run(cell: Cell, place: Path, before: Mapping[str, Any]) -> dict[str, Any]:
    """What is noted of a cell after running it; an interruption passes."""
    clock, begin, error = CompileClock(), time.monotonic(), None
    try:
        run.run(dataclasses.replace(cell.config, run=dataclasses.replace(cell.config.run, dir=str(place))))
    except Exception as caught:  # one cell must not end the others, whatever it died of
        error = str(caught) if isinstance(caught, InputError) else f"{type(caught).__name__}: {caught}"
        error = " ".join(error.split())[:500]
        print(f"failed: {error}")
        if place.is_dir():
            with (place / "log.txt").open("a", encoding="utf-8") as log:
                log.write(traceback.format_exc())
    total = lambda name, value: before.get(name, 0) + value  # noqa: E731
    return {
        "state": "failed" if error else "done",
        "error": error,
        "tries": total("tries", 1),
        "seconds": round(total("seconds", time.monotonic() - begin), 3),
        "compiled": total("compiled", clock.count),
        "from_cache": total("from_cache", clock.hits),
    }


def is_folder(config: Config) -> bool:
    """Whether `--run_dir` is the folder of a sweep."""
    return config.run.dir is not None and (Path(config.run.dir) / sweep_table.LISTED).is_file()


def rebuild(base: Path) -> Path:
    """`--mode=report` for the folder of a sweep: the pages of its cells, the table, and the page of all."""
    for row in sweep_table.collect(base):
        place = base / row["id"]
        if folders.finished(place):
            run.rebuild(Config(mode="report", run=dataclasses.replace(Config().run, dir=str(place))))
    with _table(base):
        sweep_table.write(base)
        return sweep_page.render(base)


def describe(found: Sequence[Cell]) -> str:
    """The plan: every cell with its work and time, and the sum; one score of each kind is timed."""
    lines, total, unknown = [], 0.0, 0
    timed: dict[Any, float] = {}
    for cell in found:
        try:
            session = sessions.prepare(cell.config)
        except InputError as error:
            raise InputError(f"cell {sweep_table.words(cell.values)} of the sweep: {error}") from error
        seconds, work = dry_run.estimate(session, timed)
        total, unknown = total + (seconds or 0.0), unknown + (seconds is None)
        lines.append(f"cell {cell.id} ({sweep_table.words(cell.values)}): {work}")
    said = f"{len(found)} cells in {folder(found)}; about {dry_run.clock(total)} without compilation"
    return "\n".join([*lines, said + (f", and {unknown} cells whose time is not estimated" if unknown else "")])
