"""A whole run without absl: simulate clients, attack them, append results, write the report. Resumes after a kill."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
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
    models,
    plan,
    record,
    report,
    simulate,
    summary,
    tuning,
)
from grab_jax import folder as folders
from grab_jax.attacks import ATTACKS, NEEDS, prior
from grab_jax.config import Config, identity
from grab_jax.progress import Display
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


def run(config: Config) -> Path:
    """Do everything `config` says and return the run folder.

    Raises:
      InputError: bad input, in one sentence; results already written stay.
    """
    os.umask(0o077)
    for other in config.report.others:
        report.read(Path(other), "--report_beside")  # better refused now than after the attack
    session = prepare(config)
    size = sum(int(v.size) for v in [*session.trainable.values(), *session.frozen.values()])
    describe_run = lambda: about.about(config, session.loaded.model, size, session.notes, session.ids)  # noqa: E731
    folder = folders.open_folder(config, describe_run)
    folders.finished(folder)  # damaged results are refused before anything is said
    display = Display(config.run.progress, folder / "log.txt")
    try:
        display.say(f"{config.attack.name} must be told: {NEEDS[config.attack.name].sentence()}")
        for note in session.notes:
            display.say(f"note: {note}")
        for group in session.plan.groups:
            with interrupts.deferred():
                _attack_group(session, group, folder, display)
        page = finish(folder, session)
    finally:
        display.close()
    found = json.loads((folder / "summary.json").read_text())
    print(f"{found['outcome']}: {found['reason']}")
    print(f"report: {page}")
    return folder


def rebuild(config: Config) -> Path:
    """`--mode=report`: summary and report again from a run folder's results."""
    if config.run.dir is None:
        raise InputError("--mode=report needs --run_dir, the folder of a finished or unfinished run")
    os.umask(0o077)
    folder = Path(config.run.dir)
    described, records = report.read(folder)
    folders.write_json(folder / "summary.json", summary.summarise(records, described))
    return report.render(folder, config.report.others)


def prepare(config: Config) -> Session:
    """Load model and data, form batches and the plan; matrix products are exact float32 from here on, on any device."""
    jax.config.update("jax_default_matmul_precision", "highest")
    keys = _keys(config)
    notes: list[str] = []
    loaded = models.load(
        config.model.name,
        task=config.model.task,
        revision=config.model.revision,
        dropout=config.client.dropout or None,
        num_labels=config.model.num_labels,
        key=keys[HEAD],
    )
    tokenizer = data.load_tokenizer(loaded.folder)
    batches, controls, said = _batches(config, loaded.model, tokenizer)
    params = jax.device_put(loaded.params)
    trainable, frozen = tuning.split(params, tuning.freezes(loaded.model, config.client.frozen))
    work = plan.make(config, loaded.model, trainable, batches)
    notes += [*loaded.notes, *said]
    if config.client.dropout == 0 and config.attack.masks == "learn" and config.attack.searches:
        notes.append("the client uses no dropout, so there are no masks to learn")
    notes += _prior(config, loaded.model, tokenizer, batches)
    if config.attack.masks == "true" or config.attack.tokens == "true":
        notes.append("control run: the attacker is given a truth it would not have; this is not an attack")
    ids = [_identifier(config, batch) for batch in batches]
    return Session(config, loaded, trainable, frozen, tokenizer, batches, controls, ids, notes, work)


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
    return sorted(others, key=lambda s: not fits(s))[: config.batch_size]


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


def _attack_group(session: Session, group: plan.Group, folder: Path, display: Display) -> None:
    """Attack the client batches of a group together, unless all are finished."""
    done = folders.finished(folder)
    if all(session.ids[i] in done for i in group.members):
        display.say(f"batches {_span(group)}: already done")
        return
    config = plan.resolved(session.config, session.plan)
    clients = [simulated(session, i) for i in group.members]
    base = _keys(config)[ATTACK]
    keys = jax.vmap(lambda i: jax.random.fold_in(base, i))(np.asarray(group.members))
    saved = folder / "ckpt" / _group_id(session, group)
    total = config.attack.rounds * config.attack.steps
    display.begin(f"batches {_span(group)}: {len(group.members)} x {list(group.shape)} [sentences, tokens]", total)
    try:
        results, seconds = _attack(session, config, keys, clients, saved, display)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise InputError(
                "the device is out of memory; lower --run_group, --attack_chunk or --attack_restarts"
            ) from error
        raise
    finally:
        display.end()
    for i, truth, result in zip(group.members, clients, results, strict=True):
        if session.ids[i] in done:
            continue
        control = i in session.controls
        line = record.record(session.ids[i], truth, result, session.tokenizer, control=control, seconds=seconds)
        folders.append(folder, summary.finite(line))
        if not control:
            display.say(highlight.terminal(line, colour=sys.stderr.isatty(), redact=config.report.redact))
    shutil.rmtree(saved, ignore_errors=True)


def _group_id(session: Session, group: plan.Group) -> str:
    """A saved state fits the very batches it was made with: another `--run_group` forms other groups."""
    return hashlib.sha256(" ".join(session.ids[i] for i in group.members).encode()).hexdigest()[:16]


def _span(group: plan.Group) -> str:
    return ", ".join(map(str, group.members))


def _attack(
    session: Session, config: Config, keys, clients: list[simulate.Simulated], saved: Path, display: Display
) -> tuple[list[Result], dict[str, float]]:
    """Run or resume the attack, saving its state now and then; returns the results and seconds per client batch."""
    recipe, problems = ATTACKS[config.attack.name], [c.problem for c in clients]
    watch = Watch(config, saved, display, lambda ids: data.decode(session.tokenizer, ids)[0])
    try:
        state = None
        if hasattr(recipe, "start"):
            state = watch.restore(recipe.start(jax.random.clone(keys), problems, config.attack))
        results = recipe.attack(keys, problems, config.attack, state=state, on_segment=watch)
    except KeyboardInterrupt:
        watch.save()
        raise
    finally:
        watch.close()
    compiled, attacked = watch.elapsed() / len(problems)
    return results, {"compile": float(compiled), "attack": float(attacked)}


def finish(folder: Path, session: Session) -> Path:
    """Summary and report from the results of this configuration."""
    done = folders.finished(folder)
    records = [done[i] for i in session.ids if i in done]
    described = json.loads((folder / "run.json").read_text())
    folders.write_json(folder / "summary.json", summary.summarise(records, described))
    chart.save_curves(folder, records)
    return report.render(folder, session.config.report.others)
