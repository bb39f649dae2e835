"""Span decoding: the whole batch from the first attention layer's gradient, with a certificate for every sentence.

Needs a FedSGD gradient of the query, key and value kernels, the weights, the embedding tables and whether dropout was
on (its rate may be unknown); neither labels nor lengths nor the batch size. Without dropout the second layer's
gradient helps where it is shared. It works while the batch holds fewer tokens than the model is wide. Under a
next-token loss a sentence's last token has no gradient (`evidence["open_end"]`) but the head's: every sentence lacks
it, unless `attacks.last_token` reads it there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Key

from grab_jax.attack_config import AttackConfig
from grab_jax.attacks import last_token, span_evaluation, span_lora
from grab_jax.attacks.span_evaluation import Found
from grab_jax.attacks.state import OnSegment, Progress
from grab_jax.local_training import Local
from grab_jax.models import first_attention
from grab_jax.span import assemble, completion, rate, subspace
from grab_jax.span.assemble import WHOLE, Sentence
from grab_jax.span.decode import ACCEPT, decode
from grab_jax.span.inputs import FirstAttention, normalise
from grab_jax.span.noise import spacing
from grab_jax.span.rows import Row
from grab_jax.types import Problem, Result

Notify = Callable[[int, int], None]


def attack(
    keys: Key[Array, " k"],
    problems: Sequence[Problem],
    config: AttackConfig,
    *,
    state: None = None,
    on_segment: OnSegment | None = None,
) -> list[Result]:
    """Decode client batches one by one; nothing of `config` matters.

    Args:
      keys: one typed key per client batch, for the random starts of the searches.
      problems: client batches.
      on_segment: called with None and the progress.
    """
    del config, state
    notify = shown(on_segment)
    return [recover(problem, seed_of(key), notify) for key, problem in zip(keys, problems, strict=True)]


def seed_of(key: Key[Array, ""]) -> int:
    """The seed of a client batch's searches."""
    return int(jax.random.bits(key, dtype=np.uint32))


def shown(on_segment: OnSegment | None) -> Notify:
    """Rows found and rank as progress, without a state to resume from."""

    def notify(found: int, rank: int) -> None:
        if on_segment is not None:
            on_segment(None, Progress(0, "rows", found, rank, np.full(1, np.nan), None))

    return notify


def recover(problem: Problem, seed: int, notify: Notify = lambda *_: None) -> Result:
    """One client batch."""
    return result(problem, *decoded(problem, seed, notify))


def decoded(problem: Problem, seed: int, notify: Notify = lambda *_: None) -> tuple[subspace.Spectrum, Found]:
    """What a client batch's update holds: its spectrum, then rows and sentences, none where it is not testable."""
    model = problem.model
    first = first_attention.describe(model, {**problem.frozen, **problem.trainable})
    if not problem.dropout:
        first = first._replace(rate=0.0)
    if adapters := span_lora.factors(problem):
        solved = (
            Found([], []) if span_lora.reason(problem, adapters) else span_lora.solve(problem, first, adapters, notify)
        )
        return max(adapters.spectra, key=lambda space: space.rank), solved
    if absent(problem):
        return subspace.spectrum([np.zeros((model.width, 1))]), Found([], [])
    gradients, said = _completed(problem, first_attention.gradients(model, problem.observed), notify)
    found = span_evaluation.spectrum(problem, gradients=gradients)
    said += precision(found, problem)
    if not_testable(found, model.width, local=problem.local):
        solved = Found([], [])
    elif problem.dropout:
        solved = _with_dropout(problem, first, gradients, found, seed, notify)
    else:
        solved = span_evaluation.solve(problem, first, found, gradients, whole=WHOLE, seed=seed, notify=notify)
    # Clipped examples weigh less in the head's gradient, by factors that are not known; of clients with different
    # numbers of tokens each weighs the same; and a change of weights has another sign and size than a gradient.
    weighed = problem.defended.clip is None and problem.clients == 1 and problem.local is None
    if not said and weighed and last_token.shared(problem):
        sure = [certified(sentence, solved.rows, problem) for sentence in solved.sentences]
        ends = last_token.read(problem, found.rank, solved.rows, solved.sentences, sure)
        solved = solved._replace(ends=ends)
    return found, solved._replace(notes=(*said, *solved.notes))


def _completed(problem: Problem, gradients: list[np.ndarray], notify: Notify) -> tuple[list[np.ndarray], list[str]]:
    """The gradients with what pruning left out, and what a person should know of it."""
    stacked = np.concatenate(gradients, axis=1)
    blocks = span_evaluation.blocks_rounding(problem, first_attention.paths(problem.model))
    vanish = blocks is not None or (problem.local is not None and not problem.defended.pruned)
    vanish |= problem.averaged_wire != "float32"
    if vanish or any(spacing(gradient) for gradient in gradients):
        return gradients, []  # small entries, or changes below the weights' rounding, are zero
    there = completion.left_in(stacked) if np.isfinite(stacked).all() else None
    if there is None:
        return gradients, []
    share = f"{100 * (1 - there.mean()):.0f} % of the gradient's entries are missing"
    filled = completion.complete(stacked, there, notify=lambda rank: notify(0, rank))
    if filled is None:
        return gradients, [f"{share}, and the others do not determine them"]
    return np.split(filled.gradient, 3, axis=1), [
        f"{share}; the others determine them, since its rank is {filled.rank}"
    ]


def absent(problem: Problem, method: str = "span decoding", kernels: first_attention.Kernels = "all") -> str | None:
    """Why an update without the first attention layer's kernels tells nothing, or None."""
    if set(first_attention.paths(problem.model, 0, kernels)) <= problem.observed.keys():
        return None
    why = "the update does not hold the first attention layer's kernels"
    if any(path.endswith("/lora_b") for path in problem.observed):
        why = "LoRA shares the gradients of low-rank factors, which hold projections of the layer's inputs only"
    return f"not testable by {method}: {why}"


def precision(found: subspace.Spectrum, problem: Problem) -> list[str]:
    """What was read off the update of its noise, and what is known of it."""
    if found.sigma:
        return [
            f"the gradient carries noise; read off its singular values, its standard deviation is {found.sigma:.2g}"
        ]
    said = [] if found.wire == "float32" else [f"the gradient was rounded to {found.wire}"]
    if span_evaluation.blocks_rounding(problem, first_attention.paths(problem.model)) is not None:
        said.append("the gradient was rounded to int8")
    if problem.local is not None:
        said.append("the change of the weights carries their rounding, which counts as noise")
    return said


def not_testable(
    found: subspace.Spectrum, width: int, method: str = "span decoding", local: Local | None = None
) -> str | None:
    """Why this update tells nothing to a method that needs its row space, or None."""
    if local is not None and local.optimizer == "adamw":
        return f"not testable by {method}: AdamW rescales every entry of a step, so the change has no row space"
    if found.wire == subspace.SIGNS:
        return f"not testable by {method}: the gradient's entries are of one size, and signs alone have no low rank"
    if found.rank >= width and found.missing > completion.PRUNED:
        share = f"{100 * found.missing:.0f} % of its entries are missing or rounded to zero"
        return f"not testable by {method}: the first attention layer's gradient has no low rank, as {share}"
    if found.rank >= width:
        untold = local is not None and local.optimizer is None
        other = ", or an optimizer, which was not told, that rescales every entry" if untold else ""
        return f"not testable by {method}: {found.rank} tokens or more >= width {width}{other}"
    if found.rank == 0:
        what = "all noise" if found.sigma else "zero or not finite"
        return f"not testable by {method}: the first attention layer's gradient is {what}"
    return None


def _with_dropout(
    problem: Problem, first: FirstAttention, gradients, space: subspace.Spectrum, seed: int, notify: Notify
) -> Found:
    """Rows, then sentences; a rate that is not told is read off the rows and the sentences' equations."""
    search = partial(decode, basis=space.basis, blur=space.blur, seed=seed, notify=notify)
    if problem.rate:
        rows = search(first)
        return Found(rows, _assembled(problem, first, gradients, space, rows).sentences if rows else [])
    first = first._replace(rate=rate.WIDEST)
    rows = search(first)
    if not rows:
        return Found([], [])
    rescaled = lambda p: [row._replace(values=row.values * (1 - rate.WIDEST) / (1 - p)) for row in rows]  # noqa: E731
    assembled = lambda p: _assembled(problem, first, gradients, space, rescaled(p))  # noqa: E731
    kept = np.stack([row.kept for row in rows])
    if first.later is None:
        read = rate.fit(kept, lambda p: assembled(p).singular, sum(row.position == 0 for row in rows))
    else:  # the norm after dropout undoes the scale
        read = rate.dropped_share(kept)[0]
    notes = (f"the dropout rate was not told; read off the update it is {read:.4f}",)
    return Found(rescaled(read), assembled(read).sentences, notes=notes)


def _assembled(
    problem: Problem, first: FirstAttention, gradients, space: subspace.Spectrum, rows: list[Row]
) -> assemble.Assembly:
    inputs = np.stack([row.values for row in rows])
    inputs = inputs if first.later is None else normalise(first.later, inputs)
    heads, noise = problem.model.config.num_attention_heads, np.split(space.deviations, 3)[:2]
    projected = assemble.projections(inputs, gradients, first.query, first.key, heads)
    if space.sigma:  # tensors to which noise was added may have been brought to one size before
        scale = assemble.key_scale(projected)
        projected, noise = (
            projected._replace(key_cotangent=scale * projected.key_cotangent),
            (noise[0], scale * noise[1]),
        )
    matrix = assemble.equations(projected).reshape(len(rows), -1)
    found = assemble.assemble(matrix, np.array([row.position for row in rows]))
    bounded = [assemble.bounded(s, matrix, projected, inputs, tuple(noise)) for s in found.sentences]
    return found._replace(sentences=bounded)


def certified(sentence: Sentence, rows: Sequence[Row], problem: Problem) -> bool:
    """Whether a sentence is proven: its equations hold, every position is there once, and its ends are right."""
    members_ = [rows[i] for i in sentence.rows]
    if sentence.residual > sentence.limit or [row.position for row in members_] != list(range(len(members_))):
        return False
    vocabulary = problem.vocabulary
    starts = vocabulary.cls is None or members_[0].token == vocabulary.cls
    return starts and (vocabulary.sep is None or members_[-1].token == vocabulary.sep)


def result(problem: Problem, spectrum: subspace.Spectrum, found: Found, reason: str | None = None) -> Result:
    """Sentences in the order found, with what proves them; a blank one where there is a reason for none."""
    if reason := reason or _untestable(problem, spectrum):
        return _nothing(problem, spectrum, reason, found.notes)
    rows, sentences = found.rows, found.sentences
    count = max(len(sentences), 1)
    ends = found.ends.last if found.ends else [None] * len(sentences)
    length = max([row.position + 1 + (found.ends is not None) for row in rows] + [problem.known.ids.shape[1]])
    ids = np.full((count, length), problem.vocabulary.pad, np.int32)
    sure = np.zeros((count, length))
    kept = np.ones((count, length, problem.model.width), np.float32)
    for s, (sentence, end) in enumerate(zip(sentences, ends, strict=True)):
        if end is not None:
            ids[s, len(sentence.rows)], sure[s, len(sentence.rows)] = end
        for row in (rows[i] for i in sentence.rows):
            ids[s, row.position], sure[s, row.position] = row.token, row.certificate
            kept[s, row.position] = row.kept
    return Result(
        ids=ids,
        confidence=np.clip(sure, 0, 1),
        loss=max((s.residual for s in sentences), default=float("nan")),
        masks={"embeddings": kept} if problem.dropout else None,
        labels=None,
        trace=[],
        notes=_notes(problem, spectrum.rank, found),
        evidence=_evidence(spectrum, problem) | _proofs(problem, found),
    )


def _untestable(problem: Problem, spectrum: subspace.Spectrum) -> str | None:
    """Why the update tells nothing, or None."""
    if adapters := span_lora.factors(problem):
        why = span_lora.reason(problem, adapters)
        return why and f"not testable by span decoding: {why}"
    return absent(problem) or not_testable(spectrum, problem.model.width, local=problem.local)


def _proofs(problem: Problem, found: Found) -> dict[str, Any]:
    """What proves which sentence and which row, as plain data."""
    used = found.used
    return {
        "contextual": found.contextual,
        "sentences": [_proof(problem, found, s) for s in range(len(found.sentences))],
        "rows": [
            {"position": row.position, "token": row.token, "certificate": row.certificate, "used": i in used}
            for i, row in enumerate(found.rows)
        ],
    }


def _proof(problem: Problem, found: Found, s: int) -> dict[str, Any]:
    """What proves a sentence; under a next-token loss whether that holds for its last token, too."""
    sentence = found.sentences[s]
    proof = {"certified": bool(certified(sentence, found.rows, problem)), "residual": sentence.residual}
    if problem.model.task != "causal_lm":
        return proof
    end = found.ends.last[s] if found.ends else None
    return proof | {"last": "unknown" if end is None else "proven" if end.proven else "likely"}


def _notes(problem: Problem, rank: int, found: Found) -> list[str]:
    notes, used = list(found.notes), found.used
    if problem.model.task == "causal_lm":
        notes += last_token.notes(found.ends)
    if len(found.rows) < rank:
        notes.append(f"{rank - len(found.rows)} of {rank} input rows were not found")
    loose = sum(i not in used and row.certificate > ACCEPT for i, row in enumerate(found.rows))
    if loose:
        notes.append(f"{loose} input rows found belong to no sentence found")
    return notes


def _nothing(problem: Problem, found: subspace.Spectrum, reason: str, said: Sequence[str]) -> Result:
    pad = np.full((1, 1), problem.vocabulary.pad, np.int32)
    evidence = _evidence(found, problem) | {"sentences": [], "rows": [], "not_testable": reason}
    return Result(pad, np.zeros((1, 1)), float("nan"), None, None, [], [reason, *said], evidence)


def _evidence(found: subspace.Spectrum, problem: Problem) -> dict[str, Any]:
    return {
        "width": problem.model.width,
        "open_end": problem.model.task == "causal_lm",
        "rank": found.rank,
        "gap_rank": found.gap_rank,
        "floor": found.floor,
        "wire": found.wire,
        "sigma": found.sigma,
        "noise": found.noise,
        "spectrum": [float(v) for v in found.values],
    }
