"""A whole run without absl: simulate clients, attack them, append results, write the report. Resumes after a kill.

Several processes (`sharding`) attack a share of the client batches each; the one that finds every result there writes
the report.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from grab_jax import (
    about,
    chart,
    data,
    highlight,
    interrupts,
    plan,
    record,
    report,
    sharding,
    simulate,
    summary,
    trackers,
    tuning,
    utility,
)
from grab_jax import folder as folders
from grab_jax import session as sessions
from grab_jax.attacks import ATTACKS, NEEDS
from grab_jax.attacks.state import Progress
from grab_jax.config import Config
from grab_jax.models import peft
from grab_jax.progress import CompileClock, Display
from grab_jax.session import Session
from grab_jax.types import InputError, Result
from grab_jax.watch import Watch

ADAPTER = "adapter"
"""The folder of the adapter that `--utility` trained, as PEFT saves it; in the run folder."""


def run(config: Config, world: sharding.World = sharding.ALONE) -> Path:
    """Do everything `config` says, or this process's share of it, and return the run folder.

    Raises:
      InputError: bad input, in one sentence, or another process runs this; results already written stay.
    """
    os.umask(0o077)
    clock = CompileClock()
    for other in config.report.others:
        report.read(Path(other), "--report_beside")  # better refused now than after the attack
    session = sessions.prepare(config, world)
    size = sum(int(v.size) for v in [*session.trainable.values(), *session.frozen.values()])
    describe_run = lambda: about.about(config, session.loaded.model, size, session.notes, session.ids, session.privacy)  # noqa: E731
    folder = folders.open_folder(config, describe_run)
    folders.finished(folder)  # damaged results are refused before anything is said
    # A process that was just stopped may still be ending.
    with folders.alone(folder / f"run{world.suffix}.own.lock", patience=1.0) as mine:
        if not mine:
            raise InputError(
                f"--run_dir={folder} is being run by another process{_numbered(world)}; wait for it, or stop it, or "
                "give processes that share the work numbers (JAX_PROCESS_ID and JAX_NUM_PROCESSES, srun)"
            )
        return _run(session, folder, clock, world)


def _numbered(world: sharding.World) -> str:
    return f" with the number {world.process}" if world.several else ""


def _run(session: Session, folder: Path, clock: CompileClock, world: sharding.World) -> Path:
    config = session.config
    tracked = trackers.Trackers(config, folder, world.process)
    display = Display(config.run.progress, folder / f"log{world.suffix}.txt")
    try:
        display.say(f"{config.attack.name} must be told: {NEEDS[config.attack.name].sentence()}")
        for note in session.notes:
            display.say(f"note: {note}")
        for group in session.plan.groups:
            with interrupts.deferred():
                _attack_group(session, group, folder, display, tracked, clock, world)
        if world.process == 0:
            _utility(session, folder, display)
        page = finish(folder, session, world)
    finally:
        display.close()
        tracked.close()
    if page is None:
        print(f"process {world.process} of {world.count} is done; the last one to be done writes the report")
        return folder
    found = json.loads((folder / "summary.json").read_text())
    print(f"{found['outcome']}: {found['reason']}")
    print(f"report: {page}")
    return folder


def _utility(session: Session, folder: Path, display: Display) -> None:
    """With `--utility`, the accuracy under these settings, unless it is known."""
    if not session.config.utility.on:
        return
    if known := utility.known(session.config, folder):
        found, where = known
        if where != folder and (where / ADAPTER).is_dir():
            shutil.copytree(where / ADAPTER, folder / ADAPTER, dirs_exist_ok=True)
    else:
        display.say("training under the same client and defence")
        weights = session.trainable, session.frozen
        found, trained = utility.measure(session.config, session.loaded, *weights, session.tokenizer)
        if session.config.client.lora:
            params, settings = tuning.merge(trained, session.frozen), sessions.adapters(session.config.client)
            peft.write(str(folder / ADAPTER), session.loaded.model, params, settings, session.config.model.name)
    folders.write_json(folder / utility.FILE, found)
    if (folder / ADAPTER).is_dir():
        display.say(f"trained adapter: {folder / ADAPTER} (--client_lora_from takes it)")
    display.say(f"held-out accuracy {found['accuracy']:.1f} % (commonest label {found['majority']:.1f} %)")


def rebuild(config: Config) -> Path:
    """`--mode=report`: summary and report again from a run folder's results."""
    if config.run.dir is None:
        raise InputError("--mode=report needs --run_dir, the folder of a finished or unfinished run")
    os.umask(0o077)
    folder = Path(config.run.dir)
    with _together(folder, sharding.ALONE):
        if folders.shards(folder):
            folders.merge(folder, folders.read_json(folder / "run.json")["ids"])
        described, records = report.read(folder)
        folders.write_json(folder / "summary.json", summary.summarise(records, described))
        return report.render(folder, config.report.others)


def finished(ids: Sequence[str], folder: Path) -> bool:
    """Whether every client batch is attacked, and the summary and the page are written."""
    done = folders.finished(folder)
    return all(i in done for i in ids) and all((folder / n).is_file() for n in ("summary.json", "report.html"))


def _attack_group(
    session: Session,
    group: plan.Group,
    folder: Path,
    display: Display,
    tracked: trackers.Trackers,
    clock: CompileClock,
    world: sharding.World,
) -> None:
    """Attack the client batches of a group together, those that are not finished."""
    done = folders.finished(folder)
    members = _pending(session, group, done, folder)
    if not members:
        display.say(f"batches {_span(group.members)}: already done")
        return
    config = plan.resolved(session.config, session.plan)
    clients = [sessions.simulated(session, i) for i in members]
    base = sessions.keys(config)[sessions.ATTACK]
    keys = jax.vmap(lambda i: jax.random.fold_in(base, i))(np.asarray(members))
    saved = _saved(session, members, folder)
    total = config.attack.rounds * config.attack.steps
    display.begin(f"batches {_span(members)}: {len(members)} x {list(group.shape)} [sentences, tokens]", total)
    try:
        results, seconds = _attack(session, config, keys, clients, saved, display, tracked)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise InputError(
                "the device is out of memory; lower --run_group, --attack_chunk or --attack_restarts"
            ) from error
        raise
    finally:
        display.end()
    for i, truth, result in zip(members, clients, results, strict=True):
        if session.ids[i] in done:
            continue
        control = i in session.controls
        line = record.record(session.ids[i], truth, result, session.tokenizer, control=control, seconds=seconds)
        folders.append(folder, summary.finite(line), world.suffix)
        if not control:
            tracked.finished(line)
            display.say(highlight.terminal(line, colour=sys.stderr.isatty(), redact=config.report.redact))
    with _together(folder, world):
        folders.count(folder, clock.take())
    shutil.rmtree(saved, ignore_errors=True)


def _pending(session: Session, group: plan.Group, done: Mapping[str, Any], folder: Path) -> tuple[int, ...]:
    """The members of a group without a result; all of them where a state of all is saved, which fits no other."""
    missing = tuple(i for i in group.members if session.ids[i] not in done)
    begun = any(_saved(session, group.members, folder).glob("[0-9]*"))
    return group.members if missing and begun else missing


def _saved(session: Session, members: Sequence[int], folder: Path) -> Path:
    """Where the state is kept: it fits the very batches it was made with, another `--run_group` forms other groups."""
    return folder / "ckpt" / hashlib.sha256(" ".join(session.ids[i] for i in members).encode()).hexdigest()[:16]


def _together(folder: Path, world: sharding.World) -> contextlib.AbstractContextManager[Any]:
    """What several processes write, one writes at a time; they may still run where there are files of theirs."""
    several = world.several or folders.shards(folder)
    return folders.alone(folder / "run.lock", float("inf")) if several else contextlib.nullcontext()


def _span(members: Sequence[int]) -> str:
    return ", ".join(map(str, members))


def _attack(
    session: Session,
    config: Config,
    keys,
    clients: list[simulate.Simulated],
    saved: Path,
    display: Display,
    tracked: trackers.Trackers,
) -> tuple[list[Result], dict[str, float]]:
    """Run or resume the attack, saving its state now and then; returns the results and seconds per client batch."""
    recipe, problems = ATTACKS[config.attack.name], [c.problem for c in clients]
    watch = Watch(config, saved, display, lambda ids: data.decode(session.tokenizer, ids)[0])
    numbers = [client.batch.index for client in clients]

    def segment(state: Any | None, progress: Progress) -> None:
        tracked.progress(numbers, progress)
        watch(state, progress)

    try:
        state = None
        if hasattr(recipe, "start"):
            state = watch.restore(recipe.start(jax.random.clone(keys), problems, config.attack))
        results = recipe.attack(keys, problems, config.attack, state=state, on_segment=segment)
    except KeyboardInterrupt:
        watch.save()
        raise
    finally:
        watch.close()
    compiled, attacked = watch.elapsed() / len(problems)
    return results, {"compile": float(compiled), "attack": float(attacked)}


def finish(folder: Path, session: Session, world: sharding.World = sharding.ALONE) -> Path | None:
    """Summary and report from the results of this configuration; None while other processes have some to add."""
    with _together(folder, world):
        if not folders.merge(folder, session.ids):
            return None
        for state in (folder / "ckpt").glob("*"):  # of groups as another number of processes formed them
            shutil.rmtree(state, ignore_errors=True)
        done = folders.finished(folder)
        records = [done[i] for i in session.ids]
        described = json.loads((folder / "run.json").read_text())
        folders.write_json(folder / "summary.json", summary.summarise(records, described))
        chart.save_curves(folder, records)
        return report.render(folder, session.config.report.others)
