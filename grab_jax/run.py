"""A whole run without absl: simulate clients, attack them, append results, write the report. Resumes after a kill.

Several processes (`sharding`) attack a share of the client batches each; the one that finds every result there writes
the report.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Key

from grab_jax import (
    about,
    chart,
    data,
    highlight,
    interrupts,
    local_training,
    models,
    plan,
    privacy,
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
from grab_jax.attacks import ATTACKS, NEEDS, prior
from grab_jax.attacks.state import Progress
from grab_jax.config import Config, identity
from grab_jax.models import lora, peft
from grab_jax.progress import CompileClock, Display
from grab_jax.types import InputError, Result
from grab_jax.watch import Watch

CLIENT, ATTACK, HEAD = 0, 1, 2
"""Purposes of the keys split from `--seed`."""


class Session(NamedTuple):
    """What a run works on; `batches` ends with the control batch where one is needed."""

    config: Config
    loaded: models.Loaded
    trainable: dict[str, Array]
    frozen: dict[str, Array]
    tokenizer: Any
    batches: list[data.ClientBatch]
    controls: frozenset[int]
    ids: list[str]
    notes: list[str]
    plan: plan.Plan
    privacy: dict[str, Any] | None = None


def run(config: Config, world: sharding.World = sharding.ALONE) -> Path:
    """Do everything `config` says, or this process's share of it, and return the run folder.

    Raises:
      InputError: bad input, in one sentence, or another process runs this; results already written stay.
    """
    os.umask(0o077)
    clock = CompileClock()
    for other in config.report.others:
        report.read(Path(other), "--report_beside")  # better refused now than after the attack
    session = prepare(config, world)
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
    found = utility.known(session.config, folder)
    if found is None:
        display.say("training under the same client and defence")
        found = utility.measure(session.config, session.loaded, session.trainable, session.frozen, session.tokenizer)
    folders.write_json(folder / utility.FILE, found)
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


def prepare(config: Config, world: sharding.World = sharding.ALONE) -> Session:
    """Load model and data, form batches and the plan; matrix products are exact float32 from here on, on any device.

    Args:
      world: who shares the client batches; the plan has the groups of this process.
    """
    trackers.check(config)
    jax.config.update("jax_default_matmul_precision", "highest")
    keys = _keys(config)
    head = keys[HEAD]
    notes: list[str] = []
    loaded = models.load(
        config.model.name,
        task=config.model.task,
        revision=config.model.revision,
        dropout=config.client.dropout or None,
        num_labels=config.model.num_labels,
        key=jax.random.clone(head),
    )
    if config.client.lora:
        loaded = _with_adapters(config, loaded, jax.random.fold_in(head, 1))
    tokenizer = data.load_tokenizer(loaded.folder)
    batches, controls, said = _batches(config, loaded.model, tokenizer)
    params = jax.device_put(loaded.params)
    frozen_ = lora.is_frozen if config.client.lora else tuning.freezes(loaded.model, config.client.frozen)
    trainable, frozen = tuning.split(params, frozen_)
    work = plan.make(config, loaded.model, trainable, batches, world)
    notes += [*loaded.notes, *said]
    if config.attack.searches:
        notes += local_training.notes(config.told_local)
    if config.client.dropout == 0 and config.attack.masks == "learn" and config.attack.searches:
        notes.append("the client uses no dropout, so there are no masks to learn")
    notes += _prior(config, loaded.model, tokenizer, batches)
    if config.attack.masks == "true" or config.attack.tokens == "true":
        notes.append("control run: the attacker is given a truth it would not have; this is not an attack")
    ids = [_identifier(config, batch) for batch in batches]
    session = Session(config, loaded, trainable, frozen, tokenizer, batches, controls, ids, notes, work)
    accounted = _accounted(session)
    return session._replace(privacy=accounted, notes=[*notes, *privacy.notes(accounted)])


def form(config: Config, trainable: Mapping[str, Array]) -> tuple[Any, ...]:
    """What an attack's compiled programs know of the client: how it trains, its defense, the tensors it sends."""
    dense = bool(config.defense.noise or config.defense.noise_multiplier)
    tensors = tuple((path, value.shape) for path, value in trainable.items())
    return config.told_local, simulate.defended(config), dense, config.defense.quantise, config.client.wire, tensors


def _accounted(session: Session) -> dict[str, Any] | None:
    """Epsilon as declared and as measured on the clients to attack."""
    weights = session.loaded.model, session.trainable, session.frozen
    attacked = [batch for i, batch in enumerate(session.batches) if i not in session.controls]
    clients = [simulate.measure(_keys(session.config)[CLIENT], *weights, b, session.config) for b in attacked]
    found = privacy.together([one for one in clients if one is not None])
    return privacy.account(session.config.defense, session.config.batch_size, found, session.config.client.count)


def _with_adapters(config: Config, loaded: models.Loaded, key: Key[Array, ""]) -> models.Loaded:
    """The model with LoRA adapters: new ones, or those of a PEFT folder."""
    said = config.client
    targets = tuple(filter(None, said.lora_targets.split(",")))
    chosen = lora.Lora(said.lora_rank, said.lora_alpha, targets, said.lora_dropout)
    if said.lora_from:
        chosen = peft.read_config(said.lora_from)
    model, params = lora.add(key, loaded.model, loaded.params, chosen)
    if said.lora_from:
        params = peft.read(said.lora_from, model, params)
    return dataclasses.replace(loaded, model=model, params=params)


def _prior(config: Config, model: Any, tokenizer: Any, batches: Sequence[data.ClientBatch]) -> list[str]:
    """A note on the language model that judges moves; one of another vocabulary is refused now, not in the attack."""
    attack, longest = config.attack, max(batch.batch.ids.shape[1] for batch in batches)
    if not (attack.searches and attack.moves):
        return []
    judge = prior.load(attack.prior, model.config.vocab_size, longest)
    if judge is None:
        return ["no language model judges the moves of words (--attack_prior), only the matching loss"]
    theirs, ours = data.load_tokenizer(judge.folder).get_vocab(), tokenizer.get_vocab()
    other = next((token for token, number in ours.items() if theirs.get(token) != number), None)
    if other is not None:
        raise InputError(
            f"--attack_prior={attack.prior} has another vocabulary than the model: {other!r} is token {ours[other]} "
            f"here, {theirs.get(other)} there; train one for it with python -m grab_jax.train_prior"
        )
    return []


def _keys(config: Config) -> Key[Array, " 3"]:
    return jax.random.split(jax.random.key(config.seed), 3)


def _batches(config: Config, model: Any, tokenizer: Any) -> tuple[list[data.ClientBatch], frozenset[int], list[str]]:
    """The batches to attack, and one control batch of unrelated text where a single batch leaves no baseline."""
    found = data.sentences(config.data)
    longest = min(config.data.max_length, model.max_length)
    shape = {"batch_size": config.batch_size, "longest": longest, "num_labels": model.num_labels}
    batches = data.batches(found, tokenizer, count=config.num_batches, **shape)
    highest = max(int(batch.batch.ids.max()) for batch in batches)
    if highest >= model.config.vocab_size:
        raise InputError(
            f"the tokenizer gives token id {highest}, but the model {config.model.name} has {model.config.vocab_size} "
            "word embeddings; give the folder its own tokenizer"
        )
    notes = []
    cut = sum(sum(batch.truncated) for batch in batches)
    if cut:
        notes.append(f"warning: {cut} sentence(s) longer than {longest} tokens were cut")
    if any(s.label is None for batch in batches for s in batch.sentences):
        notes.append("the data has no labels: every unlabelled sentence was given label 0")
    if config.num_batches > 1:
        return batches, frozenset(), notes
    other = _unrelated(found, config, len(batches[0].batch.ids[0]), tokenizer)
    control = data.encode(other, tokenizer, 1, longest, model.num_labels)
    return [*batches, control], frozenset({1}), notes


def _unrelated(found: Sequence[data.Sentence], config: Config, width: int, tokenizer: Any) -> list[data.Sentence]:
    """Bundled sentences that are not attacked, of the batch's bucket where possible."""
    attacked = {sentence.text for sentence in found[: config.batch_size]}
    bundled = data.sentences(dataclasses.replace(config.data, name="builtin", start=0))
    others = [s._replace(row=-1 - s.row) for s in reversed(bundled) if s.text not in attacked]
    fits = lambda s: data.bucket(len(tokenizer(s.text)["input_ids"])) == width  # noqa: E731
    most = min(config.batch_size, len(others)) // config.client.count * config.client.count
    return sorted(others, key=lambda s: not fits(s))[:most]


def _identifier(config: Config, batch: data.ClientBatch) -> str:
    rows = [(s.text, s.label, s.row) for s in batch.sentences]
    text = json.dumps([identity(config), about.code_version(), batch.index, rows], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def simulated(session: Session, index: int) -> simulate.Simulated:
    """Run the client of one batch."""
    return simulate.simulate(
        _keys(session.config)[CLIENT], session.loaded.model, session.trainable, session.frozen,
        session.batches[index], data.vocabulary(session.tokenizer), session.config,
    )  # fmt: skip


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
    clients = [simulated(session, i) for i in members]
    base = _keys(config)[ATTACK]
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
