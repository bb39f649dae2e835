"""`--dry_run`: what a run would do, with sizes, memory and a time estimate, before it does it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import jax
import numpy as np

from grab_jax import about, distances, local_training, matching, plan, views
from grab_jax import session as sessions
from grab_jax.attack_config import AttackConfig
from grab_jax.attacks import programs, span_lora, span_lora_trained
from grab_jax.config import Config
from grab_jax.session import Session
from grab_jax.span.scaling import bucket
from grab_jax.types import Batch

_EXACT = {
    "span": "span: exact decoding of the first attention layer's gradient",
    "dager": "dager: tokens by the span of the first attention layer's gradient, sentences by the second's",
}
PER_BUCKET, PER_COUNT = 20, 4
"""Programs that span decoding compiles for a bucket of token counts, and without dropout for every count."""


def describe(config: Config) -> str:
    """The plan in words, one topic a line; for a search, one candidate score is timed for the estimate."""
    session = sessions.prepare(config)
    topics = (_search if config.attack.searches else _span)(session)
    notes = [f"note         {note}" for note in session.notes]
    return "\n".join([f"{topic:12s} {text}" for topic, text in topics.items()] + notes)


def estimate(session: Session, timed: dict[Any, float]) -> tuple[float | None, str]:
    """Seconds without compilation, None where they are not known, and the work in words.

    Args:
      timed: seconds of one candidate score by what it depends on: those measured, to which this adds.
    """
    work, attack = session.plan, session.config.attack
    said = f"{len(session.batches)} batches"
    if not attack.searches:
        return None, f"{said}, {attack.name}: seconds to minutes a batch"
    largest = max(session.batches, key=lambda b: b.batch.ids.size).batch.ids.shape
    settings = attack.distance, attack.precision, attack.view, attack.layers
    kind = session.loaded.model, largest, settings, sessions.form(session.config, session.trainable)
    if kind not in timed:
        timed[kind] = plan.once(_score_once(session))
    seconds = plan.seconds(work, timed[kind])
    return seconds, f"{said}, {work.steps} steps and {work.scores} scores at most, about {clock(seconds)}"


def _search(session: Session) -> dict[str, str]:
    work, attack = session.plan, session.config.attack
    seconds = plan.seconds(work, plan.once(_score_once(session)))
    shapes = ", ".join(f"{len(g.members)} x {list(g.shape)}" for g in work.groups)
    said = f"{attack.name}: {attack.rounds} rounds x {attack.steps} steps, {attack.restarts} restart(s), "
    return {
        "attack": f"{said}masks {attack.masks}",
        **({"moves": f"{_moves(attack)}, judged with prior {attack.prior}"} if attack.moves else {}),
        **({"start": f"what span decoding proves; {_fit(session)}"} if attack.init == "span" else {}),
        **_client(session),
        "batches": f"{len(session.batches)} in {len(work.groups)} group(s): {shapes} [sentences, tokens]",
        "memory": f"about {work.bytes / 2**30:.2f} of {work.memory / 2**30:.1f} GiB; "
        f"{work.chunk} candidates scored and {work.together} restart(s) descended at once",
        "compilations": f"about {work.compilations}",
        "work": f"at most {work.steps} continuous steps and about {work.scores} candidate scores",
        "time": f"about {clock(seconds)} without compilation, {about.device()}",
    }


def _moves(attack: AttackConfig) -> str:
    return f"{attack.moves} of each sentence every {attack.moves_every} steps"


def _client(session: Session) -> dict[str, str]:
    """What is attacked, whatever the attack."""
    config, model = session.config, session.loaded.model
    shared = sum(int(v.size) for v in session.trainable.values())
    return {
        "model": f"{config.model.name}: {model.family}, width {model.width}, {model.config.num_hidden_layers} layers, "
        f"{len(model.sites)} dropout sites",
        "update": f"{len(session.trainable)} tensors, {shared / 1e6:.1f} M parameters shared",
    }


# --- span decoding ----------------------------------------------------------------------------------------


def _span(session: Session) -> dict[str, str]:
    dropout, counts = session.config.client.dropout > 0, _counts(session)
    fit = [count for count in counts if count < _room(session)[0]]
    shapes = Counter(tuple(batch.batch.ids.shape) for batch in session.batches)
    listed = ", ".join(f"{count} x {list(shape)}" for shape, count in sorted(shapes.items()))
    return {
        "attack": _EXACT[session.config.attack.name],
        **_client(session),
        "batches": f"{len(counts)}, one after another: {listed} [sentences, tokens]",
        "tokens": _tokens(counts, *_room(session)),
        "memory": f"about {_bytes(session) / 2**30:.2f} of {session.plan.memory / 2**30:.1f} GiB",
        "compilations": _compilations(fit, dropout and session.config.attack.name == "span"),
        "time": f"not estimated: seconds to minutes a batch, more as its tokens near the width; {about.device()}",
    }


def _counts(session: Session) -> list[int]:
    return [rows(b.batch, session.config.client.dropout > 0) for b in session.batches]


def _fit(session: Session) -> str:
    return _tokens(_counts(session), *_room(session))


def _room(session: Session) -> tuple[int, str]:
    """How many tokens the first attention layer's gradients can hold, and what limits it."""
    client, model, trainable = session.config.client, session.loaded.model, session.trainable
    if not client.lora:
        return model.width, f"the width {model.width}"
    layers = span_lora.adapted(model, trainable)
    if not layers:
        return 0, "no adapter in the first attention layer"
    steps = client.local.steps(session.config.batch_size) if client.local else 1
    if client.local and client.local.optimizer == "adamw":
        return 0, "AdamW rescales every entry"
    if room := span_lora_trained.room(model, trainable, layers, dropout=client.dropout > 0, moving=steps > 1):
        return room, f"the {room} ranks of the first attention layer's adapters"
    if client.dropout:
        return 0, "the adapters' B is zero, and the client trains with dropout"
    rank = trainable[f"{layers[0]}/lora_b"].shape[0]
    return rank, f"the adapters' rank {rank}"


def rows(batch: Batch, dropout: bool) -> int:
    """Input rows of a batch: its tokens; without dropout, equal tokens at one position are one row."""
    ids, real = np.asarray(batch.ids), np.asarray(batch.attention)
    if dropout:
        return int(real.sum())
    return len({(place, ids[sentence, place]) for sentence, place in zip(*np.nonzero(real), strict=True)})


def _tokens(counts: list[int], room: int, limit: str) -> str:
    fit = [count for count in counts if count < room]
    if len(fit) == len(counts):
        return f"at most {max(counts)} in a batch, fewer than {limit}: testable"
    rest = f"; at most {max(fit)} in the others" if fit else ""
    why = f"{limit} or more" if room else limit
    return f"{len(counts) - len(fit)} of {len(counts)} batches not testable: {why}{rest}"


def _compilations(counts: list[int], dropout: bool) -> str:
    if not counts:
        return "none: no batch is testable"
    if not dropout:
        return f"about {PER_COUNT * len(set(counts))}, some for each count of tokens"
    buckets = sorted({bucket(count, 8) for count in counts})
    return f"about {PER_BUCKET * len(buckets)}, some for each bucket of tokens (up to {', '.join(map(str, buckets))})"


def _bytes(session: Session) -> int:
    """Weights, two copies of the update, and three of the word table, which the scan of the vocabulary holds."""
    size = lambda values: 4 * sum(int(value.size) for value in values)  # noqa: E731
    everything = {**session.frozen, **session.trainable}
    table = size([everything[session.loaded.model.word_table]])
    return size(everything.values()) + 2 * size(session.trainable.values()) + 3 * table


# --- the search -------------------------------------------------------------------------------------------


def clock(seconds: float) -> str:
    """A time for people, roughly."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _score_once(session: Session):
    """One first-order evaluation at the largest shape, as the attack would do it."""
    batch = max(session.batches, key=lambda b: b.batch.ids.size)
    config = session.config.attack
    problem = sessions.simulated(session, batch.index).problem
    (observed,) = programs.observed([problem], config, batch.batch.ids.size)
    labels = jax.nn.one_hot(batch.batch.labels, session.loaded.model.num_labels)
    distance = distances.by_name(config.distance, config.l1)
    local, clip = local_training.repeated(problem), views.through(config.view, problem.defended).clip
    step = matching.simulation(session.loaded.model, config.precision, local, clip)

    @jax.jit
    def score(trainable, frozen, observed, ids, attention):
        return distance(step(trainable, frozen, ids, attention, labels, None), observed)

    return lambda: score(session.trainable, session.frozen, observed, *batch.batch[:2]).block_until_ready()
