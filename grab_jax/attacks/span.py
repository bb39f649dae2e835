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

from grab_jax import local_training
from grab_jax.attack_config import AttackConfig
from grab_jax.attacks import last_token, observed_span, span_evaluation, span_lora, span_lora_trained, span_training
from grab_jax.attacks.span_evaluation import Found
from grab_jax.attacks.state import OnSegment, Progress
from grab_jax.local_training import Local
from grab_jax.models import first_attention
from grab_jax.span import completion, subspace
from grab_jax.span.assemble import WHOLE, Sentence
from grab_jax.span.decode import ACCEPT
from grab_jax.span.inputs import FirstAttention
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
    first = first_attention.describe(model, {**problem.frozen, **local_training.mean_weights(problem)})
    if not problem.dropout:
        first = first._replace(rate=0.0)
    if factors := span_lora.factors(problem):
        return _from_adapters(problem, first, factors, seed, notify)
    if reason := absent(problem):
        return subspace.spectrum([np.zeros((model.width, 1))]), Found([], [], untestable=reason)
    gradients, said = _completed(problem, first_attention.gradients(model, problem.observed), notify)
    found = observed_span.spectrum(problem, gradients=gradients)
    said += precision(found, problem, first_attention.paths(model))
    if reason := not_testable(found, model.width, local=problem.local):
        solved = Found([], [], untestable=reason)
    elif problem.dropout:
        rows_to_sentences = partial(span_training.assembled, problem, first, gradients, found)
        solved = span_training.solve(problem, first, found, rows_to_sentences, seed=seed, notify=notify)
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


def _from_adapters(
    problem: Problem, first: FirstAttention, factors: span_lora.Factors, seed: int, notify: Notify
) -> tuple[subspace.Spectrum, Found]:
    """From the gradients of A, which hold the inputs; or from those of B, where these explain more."""
    adapters = span_lora_trained.adapters(problem, factors.layers)
    other = span_lora.reason(problem, factors)
    reason = span_lora_trained.reason(problem, adapters) if adapters.room else other
    if adapters.room and not reason:
        solved = span_lora_trained.solve(problem, first, adapters, seed=seed, notify=notify)
        said = precision(adapters.space, problem, [f"{layer}/lora_a" for layer in adapters.layers])
        solved = solved._replace(notes=(*said, *solved.notes))
        if any(certified(sentence, solved.rows, problem) for sentence in solved.sentences) or other:
            return adapters.space, solved
    else:
        solved = Found([], [], untestable=f"not testable by span decoding: {reason}")
        if other:
            return (adapters.space if adapters.room else factors.widest), solved
    projected = span_lora.solve(problem, first, factors, notify)
    if solved.untestable or _explains(projected) > _explains(solved):
        return factors.widest, projected
    return adapters.space, solved


def _explains(found: Found) -> tuple[int, int]:
    return len(found.used), len(found.rows)


def _completed(problem: Problem, gradients: list[np.ndarray], notify: Notify) -> tuple[list[np.ndarray], list[str]]:
    """The gradients with what pruning left out, and what a person should know of it."""
    stacked = np.concatenate(gradients, axis=1)
    blocks = observed_span.blocks_rounding(problem, first_attention.paths(problem.model))
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
        why = "LoRA shares the gradients of low-rank factors, and not the first attention layer's kernels"
        why = why if span_lora.adapted(problem.model, problem.observed) else "no adapter in the first attention layer"
    return f"not testable by {method}: {why}"


def precision(found: subspace.Spectrum, problem: Problem, paths: Sequence[str]) -> list[str]:
    """What was read off the update of its noise, and what is known of it."""
    if found.sigma:
        return [
            f"the gradient carries noise; read off its singular values, its standard deviation is {found.sigma:.2g}"
        ]
    said = [] if found.wire == "float32" else [f"the gradient was rounded to {found.wire}"]
    if observed_span.blocks_rounding(problem, paths) is not None:
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


def certified(sentence: Sentence, rows: Sequence[Row], problem: Problem) -> bool:
    """Whether a sentence is proven: its equations hold, every position is there once, and its ends are right."""
    members_ = [rows[i] for i in sentence.rows]
    if sentence.residual > sentence.limit or [row.position for row in members_] != list(range(len(members_))):
        return False
    vocabulary = problem.vocabulary
    starts = vocabulary.cls is None or members_[0].token == vocabulary.cls
    return starts and (vocabulary.sep is None or members_[-1].token == vocabulary.sep)


def result(problem: Problem, spectrum: subspace.Spectrum, found: Found) -> Result:
    """Sentences in the order found, with what proves them; a blank one where there is a reason for none."""
    if found.untestable:
        return _nothing(problem, spectrum, found.untestable, found.notes)
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
        masks={"embeddings": kept} if problem.dropout and found.own_masks else None,
        labels=None,
        trace=[],
        notes=_notes(problem, spectrum.rank, found),
        evidence=_evidence(spectrum, problem) | _proofs(problem, found),
    )


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
