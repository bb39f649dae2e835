"""Span decoding of a client in evaluation mode: no dropout, so equal (position, token) pairs of a batch are one row.

Which rows: members of the first layer's span, by `span.pursuit` where they are linearly dependent. Which sentences:
assembled by the first layer's equations; then, where the second layer's gradient is shared, proven and searched there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from grab_jax import local_training, tuning
from grab_jax.attacks import observed_span
from grab_jax.attacks.last_token import Read
from grab_jax.models import first_attention
from grab_jax.span import assemble, attended, context, members, subspace
from grab_jax.span.assemble import UNPROVEN, Sentence
from grab_jax.span.inputs import FirstAttention
from grab_jax.span.merged import assemble_merged
from grab_jax.span.rows import Row
from grab_jax.types import Problem, Vocabulary

SPARE = 32
"""Dimensions that the second layer's gradient must leave free: then no wrong sentence lies in its span by chance."""
BLURRED = 0.03
"""Noise of the second layer's span (root mean square) from which it judges no more: see `context.OUTSIDE`."""
LOOSER = ((1e-3, 5e-3), (1e-2, 5e-2), (5e-2, 0.2))
"""Residuals of null vectors and of whole sentences, looser by turns, where the update is noisy or weights moved."""
ATTENDING = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1)
"""Shares of a query's cotangent up to which a key has no part in it, looser by turns, where noise blurs these."""
BUDGET = 3_000_000
"""Tokens of all sentences tried for one client batch where noise may keep its sentences from being found."""
UNSURE = 0.9
"""Certificates of rows that others could replace stay below this."""

Sentences = dict[tuple[int, ...], context.Judged]
"""The tokens of sentences found, their residuals, and the limits of these."""
UNKNOWN = context.Judged(1.0, UNPROVEN)
"""Of a sentence of which no residual was measured."""


class Found(NamedTuple):
    """Rows, sentences of them, whether the second layer judged these, and what a person should know.

    `ends` are the sentences' last tokens under a next-token loss, None where the update does not hold them. With
    `own_masks` the rows' masks are those of the embeddings' dropout, and of no other one. `untestable` says why
    nothing could be found.
    """

    rows: list[Row]
    sentences: list[Sentence]
    contextual: bool = False
    notes: tuple[str, ...] = ()
    ends: Read | None = None
    own_masks: bool = True
    untestable: str | None = None

    @property
    def used(self) -> set[int]:
        """Rows that belong to a sentence."""
        return {i for sentence in self.sentences for i in sentence.rows}


def solve(
    problem: Problem,
    first: FirstAttention,
    space: subspace.Spectrum,
    gradients: Sequence[Float[np.ndarray, "d o"]],
    *,
    whole: float,
    seed: int,
    notify: Callable[[int, int], None],
) -> Found:
    """Decode a batch.

    Args:
      space: span of `gradients`, those of the first layer's kernels.
      whole: largest residual of a proven sentence.
    """
    near = members.members(
        first, space.basis, gradients, bounds=space.bounds, sent=sent(problem), seed=seed, notify=notify
    )
    likely = members.independent(near, space.basis)
    if not likely:
        return Found([], [])
    second = judge(problem, len(likely))
    inexact = bool(space.noise) or local_training.several(problem)
    inexact |= second is not None and bool(np.any(second.bounds))  # the layers' tensors may differ in precision
    # Under noise the equations of a wrong sentence may hold as well as those of the right one.
    proof = UNPROVEN if inexact else whole
    assembled = partial(_assembled, problem, first, gradients, likely, rescaled=bool(space.sigma), proof=proof)
    attending = partial(_attending, problem, first, gradients, likely)
    # The search by the second layer does better than a patient assembly.
    found, confirmed, complete, notes = assembled(patience=4 if second is None else 0), {}, False, ()
    if second is not None:
        ends = {"cls": problem.vocabulary.cls, "sep": problem.vocabulary.sep}
        budget = BUDGET if inexact else context.BUDGET
        search = context.Search(second, whole=whole, seed=seed, budget=budget, notify=notify, **ends)
        checked = {ids: context.Judged(search.check(ids), UNPROVEN) for ids in found}
        confirmed = _confirmed(search, near, likely, inexact)
        complete = search.complete and all(seen.limit != UNPROVEN for seen in confirmed.values())
        # A weak token may hide a true sentence from the second layer: shown, and not certified.
        found = confirmed if complete else {**checked, **confirmed}
        notes = ("the search for sentences stopped at its budget",) if search.spent and not complete else ()
    if inexact and not complete and confirmed:
        found = _with_others(found, max(attending(), key=_explained))
    elif inexact and not complete:
        found = _loosened(problem.vocabulary, likely, found, assembled, attending())
    return Found(*_listed(near, likely, found, complete), second is not None, notes)


def sent(problem: Problem) -> FirstAttention | None:
    """The first attention layer at one end of several local steps, which moved it from or to the mean weights."""
    if not local_training.several(problem) or problem.defended.normalised:
        return None
    end = problem.trainable if local_training.middle(problem) else local_training.weights_after(problem, 1.0)
    return first_attention.describe(problem.model, {**problem.frozen, **end})


def judge(problem: Problem, rows: int) -> context.Second | None:
    """The second attention layer as a judge of whole sentences; None where it cannot be one.

    It needs a gradient of every token, which a classifier's last layer lacks, and dimensions to spare.
    """
    model, vocabulary = problem.model, problem.vocabulary
    if model.config.num_hidden_layers < 3 or vocabulary.cls is None or vocabulary.sep is None:
        return None
    if not set(first_attention.paths(model, 1)) <= problem.observed.keys():
        return None
    if local_training.middle(problem) is None:  # steps moved the layer's inputs, to where is not told
        return None
    found = observed_span.spectrum(problem, 1)
    if not rows <= found.rank <= model.width - SPARE or np.sqrt((found.bounds**2).mean()) > BLURRED:
        return None
    return second_layer(problem)._replace(basis=found.basis, bounds=found.bounds)


def second_layer(problem: Problem) -> context.Second:
    """The second attention layer's inputs of given sentences, with an empty span."""
    model, params = problem.model, tuning.merge(local_training.mean_weights(problem), problem.frozen)
    inputs = lambda ids, real: first_attention.inputs(model, params, ids, real, layer=1)  # noqa: E731
    return context.Second(inputs, np.zeros((model.width, 0)))


def _assembled(
    problem: Problem,
    first: FirstAttention,
    gradients,
    likely: Sequence[members.Member],
    *,
    rescaled: bool,
    proof: float,
    **limits,
) -> Sentences:
    """Sentences whose equations hold within the limits of `assemble_merged`, with their residuals.

    `rescaled` allows for tensors that were brought to one size each, before noise was added to them. Residuals up to
    `proof` prove.
    """
    inputs = np.stack([member.values for member in likely])
    heads = problem.model.config.num_attention_heads
    projected = assemble.projections(inputs, gradients, first.query, first.key, heads)
    if rescaled:
        scale = assemble.key_scale(projected)
        projected = projected._replace(key_cotangent=scale * projected.key_cotangent)
    positions = np.array([member.position for member in likely])
    tokens = np.array([member.token for member in likely])
    ends = {"cls": problem.vocabulary.cls, "sep": problem.vocabulary.sep}
    sentences = assemble_merged(projected, positions, tokens, **limits, **ends)
    judged = [context.Judged(sentence.residual, proof) for sentence in sentences]
    return {tuple(likely[i].token for i in s.rows): seen for s, seen in zip(sentences, judged, strict=True)}


def _loosened(
    vocabulary: Vocabulary,
    likely: Sequence[members.Member],
    found: Sentences,
    assembled: Callable[..., Sentences],
    attending: Sequence[Sentences],
) -> Sentences:
    """Sentences whose equations hold but for noise, or for what moved between steps, until all rows belong to one.

    Else those of `attending`. None of them is proven: looser equations hold for wrong ones, too.
    """
    pairs = {member[:2] for member in likely}
    for null, whole in LOOSER:
        if _explained(found) == len(pairs):
            return found
        found = max(found, assembled(patience=4, null=null, whole=whole), key=_explained)
    alone = dict.fromkeys(only_sentence(pairs, vocabulary), UNKNOWN)
    return max(found, alone, *attending, key=_explained)


def _explained(found: Sentences) -> int:
    """How many rows belong to sentences."""
    return len({pair for ids in found for pair in enumerate(ids)})


def _attending(problem: Problem, first: FirstAttention, gradients, likely: Sequence[members.Member]) -> list[Sentences]:
    """Sentences by what the queries of single rows attend to, under looser and looser limits."""
    inputs, positions = np.stack([member.values for member in likely]), np.array([member.position for member in likely])
    heads = problem.model.config.num_attention_heads
    projected = assemble.projections(inputs, gradients, first.query, first.key, heads)
    told = attended.shares(projected.query_cotangent, projected.key)
    tried = [attended.sentences(told, positions, nothing) for nothing in ATTENDING]
    ids = lambda rows: only_sentence({likely[i][:2] for i in rows}, problem.vocabulary)  # noqa: E731
    return [{one: UNKNOWN for rows, _ in groups for one in ids(rows)} for groups in tried]


def only_sentence(pairs: set[tuple[int, int]], vocabulary: Vocabulary) -> list[tuple[int, ...]]:
    """The sentence that rows `(position, token)` are if every position has one token, whatever equations say."""
    ids = tuple(token for _, token in sorted(pairs))
    ends = (vocabulary.cls, ids[0]), (vocabulary.sep, ids[-1])
    whole = sorted(position for position, _ in pairs) == list(range(len(pairs)))
    return [ids] if whole and all(end in (None, token) for end, token in ends) else []


def _with_others(found: Sentences, others: Sentences) -> Sentences:
    """`found`, and of `others` the sentences with a row that none of it has."""
    held = {pair for ids in found for pair in enumerate(ids)}
    return {**{ids: seen for ids, seen in others.items() if not held.issuperset(enumerate(ids))}, **found}


def _confirmed(
    search: context.Search, near: Sequence[members.Member], likely: Sequence[members.Member], inexact: bool
) -> Sentences:
    """Sentences by the second layer; not proven where noise would hide another one."""
    _search(search, near, likely)
    if not inexact:
        return search.found
    choices = _choices(near)
    return {
        ids: seen if search.distinct(ids, choices) else seen._replace(limit=UNPROVEN)
        for ids, seen in search.found.items()
    }


def _search(search: context.Search, near: Sequence[members.Member], likely: Sequence[members.Member]) -> None:
    """Among the likely rows first, then among all in the span and all near it, as long as that finds sentences."""
    chosen = {member[:2] for member in likely}
    narrow = _choices(m for m in near if m.share or m[:2] in chosen)
    inside, wide = _choices(m for m in near if m.within(members.NEAR)), _choices(near)
    search.draw(narrow)
    while not search.complete and (search.draw(narrow) or search.widen(inside) or search.widen(wide)):
        pass


def _choices(near: Iterable[members.Member]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for member in near:
        found.setdefault(member.position, []).append(member.token)
    return found


def _listed(near, likely, found: Sentences, complete: bool):
    """Rows and sentences as lists: the rows of sentences, then, unless these are all, the other likely ones."""
    used = {pair for ids in found for pair in enumerate(ids)}
    sure = {pair for ids, seen in found.items() if seen.residual <= seen.limit for pair in enumerate(ids)}
    rows = [row(m, m.sure or m[:2] in sure) for m in near if m[:2] in used]
    rows += [row(m, m.sure) for m in likely if m[:2] not in used and not complete]
    number = {row[:2]: i for i, row in enumerate(rows)}
    return rows, [Sentence(tuple(number[pair] for pair in enumerate(ids)), *seen) for ids, seen in found.items()]


def row(member: members.Member, sure: bool) -> Row:
    """A member as a row. Its certificate is how little of it lies outside the span, if no others can replace it."""
    certificate = 1.0 - member.away if sure else UNSURE * member.share
    return Row(member.position, member.token, member.values, np.ones(len(member.values), bool), certificate)
