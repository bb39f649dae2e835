"""`--dry_run`: what a run would do, with sizes, memory and a time estimate, before it does it."""

from __future__ import annotations

import jax

from grab_jax import about, client, distances, plan, run
from grab_jax.config import Config


def describe(config: Config) -> str:
    """The plan in words, one topic a line; one candidate score is timed for the estimate."""
    jax.config.update("jax_default_matmul_precision", "highest")
    session = run.prepare(config)
    model, work, attack = session.loaded.model, session.plan, config.attack
    shared = sum(int(v.size) for v in session.trainable.values())
    shapes = ", ".join(f"{len(g.members)} x {list(g.shape)}" for g in work.groups)
    topics = {
        "attack": f"{attack.name}: {attack.rounds} rounds x {attack.steps} steps, {attack.restarts} restart(s), "
        f"masks {attack.masks}",
        "model": f"{config.model.name}: {model.family}, width {model.width}, {model.config.num_hidden_layers} layers, "
        f"{len(model.sites)} dropout sites",
        "update": f"{len(session.trainable)} tensors, {shared / 1e6:.1f} M parameters shared",
        "batches": f"{len(session.batches)} in {len(work.groups)} group(s): {shapes} [sentences, tokens]",
        "memory": f"about {work.bytes / 2**30:.2f} of {work.memory / 2**30:.1f} GiB; "
        f"{work.chunk} candidates scored at once",
        "compilations": f"about {work.compilations}",
        "work": f"at most {work.steps} continuous steps and about {work.scores} candidate scores",
        "time": f"about {_clock(plan.seconds(work, _score_once(session)))} without compilation, {about.device()}",
    }
    notes = [f"note         {note}" for note in session.notes]
    return "\n".join([f"{topic:12s} {text}" for topic, text in topics.items()] + notes)


def _clock(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _score_once(session: run.Session):
    """One first-order evaluation at the largest shape, as the attack would do it."""
    batch = max(session.batches, key=lambda b: b.batch.ids.size)
    observed = run.simulated(session, batch.index).problem.observed
    labels = jax.nn.one_hot(batch.batch.labels, session.loaded.model.num_labels)
    distance = distances.by_name(session.config.attack.distance, session.config.attack.l1)
    step = client.fedsgd(session.loaded.model, factored=True)

    @jax.jit
    def score(trainable, frozen, observed, ids, attention):
        return distance(step(trainable, frozen, ids, attention, labels, None), observed)

    return lambda: score(session.trainable, session.frozen, observed, *batch.batch[:2]).block_until_ready()
