"""Span decoding of a LoRA client whose adapters count already: then the gradient of A holds the inputs themselves.

    dL/dA = X^T (dY B^T),    dL/dB = (X A)^T dY    (times the adapter's scale)

B is zero in the first step only. From then on, in a later round of the federation or after a further local step, the
columns of A's gradients span the first attention layer's inputs as a kernel's would, in all dimensions of the model,
masks included, while the batch has fewer tokens than the adapters together have ranks. Rows are found as without LoRA.
Sentences: with the rows known and no more of them than one adapter has ranks, B's gradient gives the cotangents dY.
Where queries and keys have adapters, these prove sentences (`span.assemble`); queries alone tell them apart
(`span.attended`); and a batch of one sentence, with one row for each position, needs neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float

from grab_jax import local_training
from grab_jax.attacks import observed_span, span_evaluation, span_training
from grab_jax.attacks.span_evaluation import SPARE, Found, only_sentence
from grab_jax.models.layers import ADAPTER
from grab_jax.span import assemble, attended, members, subspace
from grab_jax.span.assemble import UNPROVEN, Assembly, Projections, Sentence
from grab_jax.span.completion import PRUNED
from grab_jax.span.decode import ACCEPT
from grab_jax.span.inputs import FirstAttention
from grab_jax.span.merged import assemble_merged
from grab_jax.span.rows import Row
from grab_jax.types import Problem

ZERO = 1e-6
"""Relative size below which a singular value of B is rounding."""
HIDDEN = 0.2
"""Noise of the span's weakest direction from which no row is found in it (new adapters after two local steps: 2.7)."""


class Adapters(NamedTuple):
    """The adapters of the first attention layer, and the span of their inputs.

    `layers` are those whose inputs are the same rows, `room` how many dimensions the gradients of their A can hold,
    `dropout` the rate at which the adapters themselves drop their inputs.
    """

    layers: list[str]
    space: subspace.Spectrum
    room: int
    dropout: float


def adapters(problem: Problem, layers: Sequence[str]) -> Adapters:
    """The span that the gradients of A hold; of one layer alone where each drops inputs of its own.

    Args:
      layers: paths of the first attention layer's linear layers that have adapters.
    """
    shared, dropout = _alike(problem.model, layers) if problem.dropout else (list(layers), 0.0)
    paths = [f"{layer}/lora_a" for layer in shared]
    gradients = [np.asarray(problem.observed[path], np.float64) for path in paths]
    space = observed_span.spectrum(problem, gradients=gradients, paths=paths, drifting=False)
    moving = local_training.several(problem)
    held = room(problem.model, problem.trainable, layers, dropout=problem.dropout, moving=moving)
    return Adapters(shared, space, held, dropout)


def room(model: Any, trainable: Mapping[str, Array], layers: Sequence[str], *, dropout: bool, moving: bool) -> int:
    """How many dimensions the gradients of A hold: the ranks of B. 0 while B is zero.

    Args:
      layers: as `adapters` has them.
      dropout: whether the client trains with dropout.
      moving: whether there are further steps after the first, in which no B is zero.
    """
    shared = _alike(model, layers)[0] if dropout else layers
    b = [np.asarray(trainable[f"{layer}/lora_b"], np.float64) for layer in shared]
    ranks = [len(one) if moving else int(np.linalg.matrix_rank(one, tol=ZERO * np.abs(one).max())) for one in b]
    return min(model.width, sum(ranks))


def _alike(model: Any, layers: Sequence[str]) -> tuple[list[str], float]:
    """Layers with the same rows as inputs under dropout, and the rate at which adapters themselves drop theirs."""
    sites = [model.sites.get(f"{layer}/{ADAPTER}") for layer in layers]
    dropout = max((site.rate for site in sites if site is not None), default=0.0)
    return list(layers[:1] if dropout else layers), dropout


def reason(problem: Problem, found: Adapters) -> str | None:
    """Why these gradients tell nothing, or None; B is not zero in every step."""
    space = found.space
    if problem.local is not None and problem.local.optimizer == "adamw":
        return "AdamW rescales every entry of a step, so the change of the adapters has no row space"
    if found.dropout and problem.model.family == "gpt2":
        return "the adapters drop inputs that the layer norm has mixed already"
    if space.wire == subspace.SIGNS:
        return "the entries of the adapters' gradients are of one size, and signs alone have no low rank"
    if space.rank == 0:
        what = "all noise or rounding" if space.sigma or problem.local is not None else "zero or not finite"
        return f"the gradient of the first attention layer's adapters' A is {what}"
    if space.rank < found.room and space.noise > HIDDEN:
        return "rounding, or noise, hides the gradient of the first attention layer's adapters' A"
    if space.rank < found.room:
        return None
    if space.missing > PRUNED:
        share = f"{100 * space.missing:.0f} % of the entries are missing or rounded to zero"
        return f"{share}, so the gradients of the adapters' A have no low rank"
    untold = problem.local is not None and problem.local.optimizer is None
    causes = ["noise", *([f"rounding to {space.wire}"] if space.wire != "float32" else [])]
    causes += ["an optimizer, which was not told,"] * untold
    return (
        f"the gradients of the adapters' A hold up to {found.room} tokens, the rank of their B, and here tokens, or "
        f"{' or '.join(causes)}, take all of it"
    )


def solve(
    problem: Problem, first: FirstAttention, found: Adapters, *, seed: int, notify: Callable[[int, int], None]
) -> Found:
    """Rows as a kernel's gradient gives them, and their sentences."""
    notes = (f"read from the gradients of the adapters' A, which span {found.space.rank} of {found.room} dimensions",)
    if not problem.dropout:
        rows = _without_dropout(first, found, problem, seed, notify)
        sentences = _sentences(problem, first, found, rows).sentences if rows else []
        return Found(rows, sentences, notes=notes)
    # The two dropouts of an adapter's input are one, of what both keep.
    first = first._replace(rate=1 - (1 - first.rate) * (1 - found.dropout))
    assembled = lambda rows: _sentences(problem, first, found, rows)  # noqa: E731
    solved = span_training.solve(problem, first, found.space, assembled, seed=seed, notify=notify)
    return solved._replace(notes=(*notes, *solved.notes), own_masks=not found.dropout)


def _without_dropout(first: FirstAttention, found: Adapters, problem: Problem, seed: int, notify) -> list[Row]:
    gradients = [np.asarray(problem.observed[f"{layer}/lora_a"], np.float64) for layer in found.layers]
    space = found.space
    sent = span_evaluation.sent(problem)
    near = members.members(first, space.basis, gradients, bounds=space.bounds, sent=sent, seed=seed, notify=notify)
    return [span_evaluation.row(m, m.sure) for m in members.independent(near, space.basis)]


def _sentences(problem: Problem, first: FirstAttention, found: Adapters, rows: list[Row]) -> Assembly:
    """By the strongest of the three ways that the update allows, as long as none explains more rows."""
    inputs = span_training.inputs_of(first, rows) if problem.dropout else np.stack([row.values for row in rows])
    cotangents = {} if found.dropout else _cotangents(problem, found, inputs)
    exact = not found.space.noise and not local_training.several(problem)
    ways, singular = [], np.zeros(0)
    if cotangents.keys() >= {"query", "key"}:
        equations = _by_equations(problem, _projected(problem, first, inputs, cotangents), inputs, rows, exact)
        ways.append([s for s in equations.sentences if _whole(problem, s.rows, rows)])
        singular = equations.singular
    ways.append(_alone(problem, found, rows, exact))
    if "query" in cotangents:
        ways.append(_attended(problem, first, inputs, cotangents["query"], rows))
    return Assembly(max(ways, key=lambda way: len({i for sentence in way for i in sentence.rows})), singular)


def _whole(problem: Problem, members_: Sequence[int], rows: list[Row]) -> bool:
    """Whether rows are a sentence from its first position to its end."""
    return bool(only_sentence({(rows[i].position, rows[i].token) for i in members_}, problem.vocabulary))


def _attended(
    problem: Problem, first: FirstAttention, inputs: Float[np.ndarray, "n d"], cotangent, rows: list[Row]
) -> list[Sentence]:
    """Sentences by what their queries attend to; none is proven."""
    split = lambda x: x.reshape(len(rows), problem.model.config.num_attention_heads, -1)  # noqa: E731
    kernel, bias = (np.asarray(part, np.float64) for part in first.key)
    told = attended.shares(split(cotangent), split(inputs @ kernel + bias))
    groups = attended.sentences(told, np.array([row.position for row in rows]))
    return [Sentence(ids, outside, UNPROVEN) for ids, outside in groups if _whole(problem, ids, rows)]


def _cotangents(
    problem: Problem, found: Adapters, inputs: Float[np.ndarray, "n d"]
) -> dict[str, Float[np.ndarray, "n d"]]:
    """The cotangents of query, key and value as far as these have adapters of as many ranks as there are rows."""
    known = {}
    for layer in found.layers:
        a, gradient = (
            np.asarray(side[f"{layer}/lora_{name}"], np.float64)
            for side, name in ((problem.trainable, "a"), (problem.observed, "b"))
        )
        if len(inputs) > a.shape[1]:
            continue
        cotangent = np.linalg.lstsq((inputs @ a).T, gradient, rcond=None)[0]
        if problem.model.family == "gpt2":
            known |= dict(zip(("query", "key", "value"), np.split(cotangent, 3, axis=1), strict=True))
        else:
            known[layer.split("/")[-1]] = cotangent
    return known


def _projected(problem: Problem, first: FirstAttention, inputs, cotangents) -> Projections:
    gradients = [inputs.T @ cotangents[name] for name in ("query", "key")]
    return assemble.projections(inputs, gradients, first.query, first.key, problem.model.config.num_attention_heads)


def _by_equations(
    problem: Problem, projected: Projections, inputs: Float[np.ndarray, "n d"], rows: list[Row], exact: bool
) -> Assembly:
    """Sentences whose equations hold, proven where neither noise nor steps between them blur these."""
    positions = np.array([row.position for row in rows])
    matrix = assemble.equations(projected).reshape(len(rows), -1)
    if problem.dropout:
        found = assemble.assemble(matrix, positions)
    else:
        tokens = np.array([row.token for row in rows])
        ends = {"cls": problem.vocabulary.cls, "sep": problem.vocabulary.sep}
        found = Assembly(assemble_merged(projected, positions, tokens, **ends), np.zeros(0))
    if not exact:
        return found._replace(sentences=[s._replace(limit=UNPROVEN) for s in found.sentences])
    none = (np.zeros(problem.model.width),) * 2
    return found._replace(sentences=[assemble.bounded(s, matrix, projected, inputs, none) for s in found.sentences])


def _alone(problem: Problem, found: Adapters, rows: list[Row], exact: bool) -> list[Sentence]:
    """The one sentence of the batch, where its rows are all there are and every position has one token.

    It is proven where its rows are, each once, and dimensions to spare keep false ones from passing by chance: another
    sentence would have a row of its own at position 0, or without dropout at the first position where it differs.
    """
    first_of = {(row.position, row.token): i for i, row in reversed(list(enumerate(rows)))}
    if len(rows) < found.space.rank or not only_sentence(set(first_of), problem.vocabulary):
        return []
    proven = exact and len(first_of) == len(rows) and all(row.certificate > ACCEPT for row in rows)
    proven &= found.space.rank + SPARE <= problem.model.width
    ordered = tuple(first_of[pair] for pair in sorted(first_of))
    return [Sentence(ordered, 0.0 if proven else 1.0, assemble.WHOLE if proven else UNPROVEN)]
