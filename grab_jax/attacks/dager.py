"""DAGER (Petrov et al., NeurIPS 2024, arXiv 2405.15586): exact inversion of a client in evaluation mode.

Of every vocabulary row at every position those are kept whose layer input lies in the span of the first attention
layer's gradient; of these, sentences are put together whose second-layer inputs lie in the span of that layer's. Needs
a FedSGD gradient of both layers' projections, the weights and, for what does not fit, the batch size; neither labels
nor lengths. Dropout ends it: no vocabulary row is what a layer was fed. Span decoding (`attacks.span`) goes on there.

Differences from the paper, on purpose: what counts as inside the span follows from the spectrum, row by row (the
paper's fixed distances: `near=1e-5`, `whole=1e-3`), and sentences that fill the second layer's span up to rounding are
marked as proven, which the paper does not claim. BERT's second token type is not tried: clients send single sentences.
Under a next-token loss a sentence's last token has no gradient and stays invisible.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Key

from grab_jax import local_training
from grab_jax.attack_config import AttackConfig
from grab_jax.attacks import observed_span, span, span_evaluation
from grab_jax.attacks.span_evaluation import SPARE, UNSURE, Found
from grab_jax.attacks.state import OnSegment
from grab_jax.config import Config
from grab_jax.models import first_attention
from grab_jax.span import enumeration, members, subspace
from grab_jax.span.assemble import WHOLE, Sentence
from grab_jax.span.members import Member
from grab_jax.span.rows import Row
from grab_jax.types import Problem, Result

BLOCKS = 10
"""Layers whose gradients tell the rank: equal rows of a batch are one in the first layer and differ further up."""
ROUNDING = 2e-6, 1e-5
"""Distance from the first and second layer's span that float32 explains, beside what the spectrum's noise allows.

Embeddings are looked up, and normalised in float64; the second layer's inputs went through a block in float32: right
ones were away by 1e-6 to 6e-6 (MiniLM, GPT-2 small and mini).
"""


class Spans(NamedTuple):
    """Spectra of the first two layers, and the rank: the number of tokens where it is below the width."""

    first: subspace.Spectrum
    second: subspace.Spectrum | None
    rank: int

    def basis(self, layer: subspace.Spectrum, spare: int) -> tuple[Float[np.ndarray, "d r"], Float[np.ndarray, " r"]]:
        """A layer's span at that rank, with `spare` dimensions free at least, and how far noise moves its vectors."""
        return layer.widened(min(self.rank, max(1, len(layer.values) - spare)))


def attack(
    keys: Key[Array, " k"],
    problems: Sequence[Problem],
    config: AttackConfig,
    *,
    state: None = None,
    on_segment: OnSegment | None = None,
) -> list[Result]:
    """Attack client batches one by one.

    Args:
      keys: one per client batch; nothing is random here.
      problems: client batches.
      config: settings, of which those called `dager_...` matter.
      on_segment: called with None and the progress.
    """
    del keys, state
    return [recover(problem, config, span.shown(on_segment)) for problem in problems]


def hopeless(config: Config) -> str | None:
    """Why settings leave it no chance, or None."""
    if config.client.dropout:
        return "the client uses dropout, under which no vocabulary row is what a layer was fed"
    return None


def recover(problem: Problem, config: AttackConfig, notify: span.Notify = lambda *_: None) -> Result:
    """One client batch."""
    if reason := span.absent(problem, "DAGER", config.dager_kernels):
        nothing = subspace.spectrum([np.zeros((problem.model.width, 1))])
        return span.result(problem, nothing, Found([], [], untestable=reason))
    spans = measure(problem, config)
    if reason := not_testable(problem, spans):
        return span.result(problem, spans.first, Found([], [], untestable=reason))
    near = survivors(problem, config, spans, notify)
    if problem.dropout:
        inside, of = len(near.get(0, ())), problem.model.config.vocab_size
        reason = (
            "not testable by DAGER: dropout zeroes and rescales entries of the input embeddings, so no vocabulary row "
            f"lies in the gradient's span ({inside} of {of} tokens do at position 0)"
        )
        return span.result(problem, spans.first, Found([], [], untestable=reason))
    return span.result(problem, spans.first, assembled(problem, config, spans, near, notify))


def measure(problem: Problem, config: AttackConfig) -> Spans:
    """Spectra, and the largest numerical rank of the first 10 layers' gradients."""
    model, found = problem.model, []
    for layer in range(min(BLOCKS, model.config.num_hidden_layers)):
        if not set(first_attention.paths(model, layer, config.dager_kernels)) <= problem.observed.keys():
            break
        found.append(observed_span.spectrum(problem, layer, config.dager_kernels, vectors=layer < 2))
    return Spans(found[0], found[1] if len(found) > 1 else None, max(one.rank for one in found))


def not_testable(problem: Problem, spans: Spans) -> str | None:
    """Why this update tells nothing here, or None."""
    model, rank = problem.model, spans.rank if spans.first.rank else 0
    if reason := span.not_testable(spans.first._replace(rank=rank), model.width, "DAGER", problem.local):
        return reason
    # A classifier's last layer has a gradient of the one token's query that it reads.
    if spans.second is None or model.config.num_hidden_layers < 2 + (model.task == "classification"):
        return "not testable by DAGER: it needs the gradient of a second attention layer that holds every token"
    return None


def survivors(problem: Problem, config: AttackConfig, spans: Spans, notify: span.Notify) -> dict[int, list[Member]]:
    """Tokens of the vocabulary in the first layer's span, the nearest first, up to the first position without any."""
    weights = {**problem.frozen, **local_training.mean_weights(problem)}
    first = first_attention.describe(problem.model, weights)._replace(rate=0.0)
    basis, bounds = spans.basis(spans.first, config.dager_spare)
    least, bounds = _threshold(config.dager_near, ROUNDING[0], bounds)
    near: dict[int, list[Member]] = {}
    for position in range(len(first.places)):
        found = members.at_position(first, basis, position, least + bounds.max(initial=0.0))
        inside = [member for member in found if member.away <= least + _allowed(member, basis, bounds)]
        if not inside:
            break
        near[position] = sorted(inside, key=lambda member: member.away)
        notify(min(spans.rank, sum(map(len, near.values()))), spans.rank)
    return near


def _threshold(told: float | None, rounding: float, bounds: Float[np.ndarray, " r"]):
    """A distance for all rows if one is told, else rounding and what noise allows a row."""
    return (rounding, bounds) if told is None else (told, np.zeros_like(bounds))


def _allowed(member: Member, basis: Float[np.ndarray, "d r"], bounds: Float[np.ndarray, " r"]) -> float:
    return float(np.linalg.norm(member.values @ basis * bounds) / np.linalg.norm(member.values))


def assembled(
    problem: Problem, config: AttackConfig, spans: Spans, near: Mapping[int, Sequence[Member]], notify: span.Notify
) -> Found:
    """Sentences in the second layer's span; up to the batch size, the nearest others."""
    basis, bounds = spans.basis(spans.second, config.dager_spare)
    least, bounds = _threshold(config.dager_whole, ROUNDING[1], bounds)
    count, total = sum(map(len, near.values())), spans.second.rank
    tick = lambda: notify(min(count, spans.rank - 1), spans.rank)  # noqa: E731
    second = span_evaluation.second_layer(problem)._replace(basis=basis, bounds=bounds)
    judge = enumeration.Judge(second, least, tick)
    choices = {position: [member.token for member in members_] for position, members_ in near.items()}
    size, vocabulary = problem.known.ids.shape[0], problem.vocabulary
    limits = {"kept": size, "budget": config.dager_budget}
    if vocabulary.cls is None:
        found = enumeration.grow(judge, choices, total, **limits)
    else:
        found = enumeration.combine(judge, choices, total, ends=(vocabulary.cls, vocabulary.sep), **limits)
    others = dict(list(found.best.items())[: max(0, size - len(found.found))])
    # A causal prefix is in the span as well: only all inputs together tell that no sentence goes on.
    whole = vocabulary.cls is not None or found.tokens == total
    exact = not (spans.first.noise or spans.second.noise) and total + SPARE <= problem.model.width
    rows, sentences = _listed(problem, near, found.found, others, WHOLE if whole and exact else 0.0)
    return Found(rows, sentences, True, tuple(_notes(problem, config, spans, near, found, len(others))))


def _listed(problem: Problem, near: Mapping[int, Sequence[Member]], found: Mapping, others: Mapping, proof: float):
    """Rows and sentences as lists; of the rows in no sentence as many as the model is wide."""
    rows = {(m.position, m.token): m for m in chain.from_iterable(near.values())}
    judged = [*((ids, away, proof) for ids, away in found.items()), *((ids, away, 0.0) for ids, away in others.items())]
    used = dict.fromkeys(pair for ids, _, _ in judged for pair in enumerate(ids))
    sure = {pair for ids, away, limit in judged if away.max() < limit for pair in enumerate(ids)}
    rest = sorted((m for pair, m in rows.items() if pair not in used), key=lambda m: m.away)[: problem.model.width]
    listed = [rows[pair] for pair in used] + rest
    number = {member[:2]: i for i, member in enumerate(listed)}
    sentences = [
        Sentence(tuple(number[p] for p in enumerate(ids)), float(away.max()), limit) for ids, away, limit in judged
    ]
    return [_row(member, member[:2] in sure) for member in listed], sentences


def _row(member: Member, sure: bool) -> Row:
    certificate = 1.0 - member.away if sure else UNSURE * (1.0 - min(1.0, member.away))
    return Row(member.position, member.token, member.values, np.ones(len(member.values), bool), certificate)


def _notes(problem: Problem, config: AttackConfig, spans: Spans, near, found: enumeration.Enumerated, others: int):
    """What a person should know."""
    yield from span.precision(spans.first, problem, first_attention.paths(problem.model))
    most = problem.model.width - config.dager_spare
    if spans.rank > most:
        cut = f"of {spans.rank} dimensions the spans keep {most}"
        yield f"{cut} (--attack_dager_spare={config.dager_spare}): rows may be missed"
    if not near:
        yield "no token of the vocabulary lies in the span at the first position"
    if found.cut:
        yield f"more than --attack_dager_budget={config.dager_budget} sentences were possible; not all were tried"
    if others:
        yield f"{others} of the sentences are best efforts: not all of their tokens lie in the second layer's span"
    if (rest := spans.second.rank - found.tokens) > 0:
        yield f"{rest} of {spans.second.rank} inputs of the second layer belong to no sentence found"
