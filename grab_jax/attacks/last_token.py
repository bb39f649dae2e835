"""The last token of every sentence under a next-token loss, from the gradient of the tied head where it is shared.

Such a token is fed to no layer that has a gradient: only the head's target rows know it. All other tokens come from
the rows that span decoding found, M of them, which is the number of predictions.

* With dropout, `span.targets` proves how often a token is a target at least. What this exceeds the known targets by
  are last tokens. Which sentence each of them ends stays open, unless it is the only one or they are all the same:
  the hidden states that a model without dropout would have tell it in half of the cases only.
* Without dropout the whole update is computed again from the completed sentences: if it is the one observed, they
  are the client's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy.optimize import linear_sum_assignment

from grab_jax import client, masks, tuning
from grab_jax.models import tied_head
from grab_jax.span import targets
from grab_jax.span.assemble import Sentence
from grab_jax.span.decode import ACCEPT
from grab_jax.span.rows import Row
from grab_jax.types import Masks, Problem

ROUNDS = 6
"""Rounds in which the last tokens and the gradient that they send to the inputs settle."""
SHOWN = 0.5
"""Expected number of unexplained targets from which a token is shown without a proof."""
UNSURE = 0.9
"""Confidence of a token that is not proven."""
SPARE = 32
"""Dimensions that the rows must leave free: then no row is there by chance."""
SAME = 0.01
"""Largest distance of the recomputed update, in units of what one wrong target changes."""


class Last(NamedTuple):
    """A sentence's last token; `confidence` in [0, 1], 1 if it is proven."""

    token: int
    confidence: float

    @property
    def proven(self) -> bool:
        """Whether it is certain."""
        return self.confidence == 1.0


class Read(NamedTuple):
    """Each sentence's last token, None where it is unknown; `somewhere` are tokens proven to end sentences unknown."""

    last: list[Last | None]
    somewhere: list[int]


class Known(NamedTuple):
    """A batch without its last tokens: arrays `[b, t]` with room for them, and the number of predictions M."""

    ids: np.ndarray
    lengths: np.ndarray
    masks: Masks | None
    predictions: int

    @property
    def real(self) -> np.ndarray:
        """Where a token is known."""
        return np.arange(self.ids.shape[1])[None] < self.lengths[:, None]


def shared(problem: Problem) -> bool:
    """Whether the update holds the gradient of the head (tied: the word table's)."""
    return problem.model.task == "causal_lm" and problem.model.word_table in problem.observed


def read(problem: Problem, rank: int, rows: Sequence[Row], sentences: Sequence[Sentence], sure: Sequence[bool]) -> Read:
    """The last tokens of a batch, none where not all other tokens are certain.

    Args:
      rank: of the first attention layer's gradient.
      rows: input rows found.
      sentences: of these rows.
      sure: which of the sentences are proven.
    """
    none: list[Last | None] = [None] * len(sentences)
    if not _complete(problem, rank, rows, sentences, sure):
        return Read(none, [])
    known, found = _known(problem, rows, sentences), Read(none, [])
    if known.ids.shape[1] > problem.model.max_length:
        return Read(none, [])
    for _ in range(ROUNDS):
        before, found = found, _round(problem, known, found.last)
        if before.last == found.last:
            break
    if problem.dropout:
        return _unambiguous(found)
    proven = None not in found.last and _is_observed(problem, known, found.last)
    return Read([one._replace(confidence=1.0) for one in found.last], []) if proven else Read(none, [])


def _complete(problem: Problem, rank: int, rows: Sequence[Row], sentences: Sequence[Sentence], sure) -> bool:
    """Whether the rows are all there are; without dropout the recomputed update will tell.

    A sentence of one row attends to nothing else, so no equation can prove it.
    """
    places = [[rows[i].position for i in sentence.rows] for sentence in sentences]
    if not sentences or any(found != list(range(len(found))) for found in places):
        return False
    if not problem.dropout:
        return True
    proven = all(ok or len(found) == 1 for ok, found in zip(sure, places, strict=True))
    certain = len(rows) == sum(map(len, places)) == rank and all(row.certificate > ACCEPT for row in rows)
    return proven and certain and rank + SPARE <= problem.model.width


def _unambiguous(found: Read) -> Read:
    """Without the tokens whose sentence is a guess."""
    count, tokens = len(found.last), {None if one is None else one.token for one in found.last}
    if len(tokens) > 1:
        return Read([None] * count, found.somewhere)
    if len(found.somewhere) == count:
        return Read([one._replace(confidence=1.0) for one in found.last], [])
    return found._replace(somewhere=[])


def _known(problem: Problem, rows: Sequence[Row], sentences: Sequence[Sentence]) -> Known:
    lengths = np.array([len(sentence.rows) for sentence in sentences])
    shape = (len(sentences), max(lengths.max() + 1, problem.known.ids.shape[1]))
    ids, kept = np.zeros(shape, np.int32), np.full((*shape, problem.model.width), np.nan, np.float32)
    for s, sentence in enumerate(sentences):
        for row in (rows[i] for i in sentence.rows):
            ids[s, row.position], kept[s, row.position] = row.token, row.kept
    told = masks.complete({"embeddings": jnp.asarray(kept)}, problem.model.sites, *shape) if problem.dropout else None
    return Known(ids, lengths, told, int(lengths.sum()))


def _round(problem: Problem, known: Known, last: Sequence[Last | None]) -> Read:
    """Last tokens by what the head's gradient holds besides the known targets, given what was taken for them."""
    params = {**problem.frozen, **problem.trainable}
    passes = _passes(problem, params, known, last)
    head, exact = _head(problem, known, passes.words)
    scale, shift = (np.asarray(x, np.float64) for x in tied_head.final_norm(params))
    found = targets.balance(head, scale, shift, known.predictions)
    predicted = known.real[:, :-1]
    mass = np.asarray(jnp.einsum("btv,bt->v", jnp.exp(passes.log_probabilities), predicted), np.float64)
    explained = np.bincount(known.ids[:, 1:][known.real[:, 1:]], minlength=len(head))
    proven = np.where(exact, targets.at_least(found) - explained, 0).clip(0).astype(int)
    expected = np.where(found.noise < SHOWN, found.values + mass - explained, 0.0)
    if proven.sum() > len(known.ids):  # the head's gradient contradicts the rows
        return Read([None] * len(known.ids), [])
    among = (exact,) if problem.dropout else (exact, ~exact)
    tokens = _chosen(proven, expected, among, len(known.ids))
    sure = np.repeat(np.arange(len(head)), proven).tolist()
    return Read(_placed(known, passes, head, tokens), sure)


def _chosen(
    proven: Int[np.ndarray, " v"],
    expected: Float[np.ndarray, " v"],
    among: Sequence[Bool[np.ndarray, " v"]],
    count: int,
) -> list[int]:
    """The proven tokens, then the likeliest others, of the first kind before the next; `count` in all at most."""
    left = expected - proven
    tokens = np.repeat(np.arange(len(proven)), proven).tolist()
    for kind in among:
        while len(tokens) < count and left[kind].max(initial=0.0) > SHOWN:
            tokens.append(int(np.where(kind, left, 0.0).argmax()))
            left[tokens[-1]] -= 1
    return tokens[:count]


def _passes(problem: Problem, params: Mapping[str, Array], known: Known, last: Sequence[Last | None]):
    """The model on what is known, with the masks as far as they are."""
    ids, real = _completed(known, last)
    return tied_head.passes(problem.model, tuning.unflatten(params), ids, real | known.real, real[:, 1:], known.masks)


def _completed(known: Known, last: Sequence[Last | None]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens with the last ones, and where they are real."""
    ids, real = known.ids.copy(), known.real
    for s, one in enumerate(last):
        if one is not None:
            ids[s, known.lengths[s]], real[s, known.lengths[s]] = one.token, True
    return ids, real


def _head(problem: Problem, known: Known, words: Float[Array, "b t d"]) -> tuple[np.ndarray, np.ndarray]:
    """The head's part of the word table's gradient, and for which tokens it is exact.

    The other part is what the inputs receive. Where one token stands in all sentences at a position, that is the
    position table's gradient; elsewhere it is computed, which is exact only without dropout.
    """
    model, real = problem.model, known.real
    head = np.asarray(problem.observed[model.word_table], np.float64).copy()
    exact = np.ones(len(head), bool)
    places = problem.observed.get(model.position_table)
    for position in range(int(known.lengths.max())):
        here = known.ids[real[:, position], position]
        if places is not None and (here == here[0]).all():
            head[here[0]] -= np.asarray(places[position], np.float64)
            continue
        own = np.asarray(words[:, position], np.float64)[real[:, position]] / known.predictions
        np.subtract.at(head, here, own)
        exact[here] = False
    return head, exact


def _placed(known: Known, passes, head: np.ndarray, tokens: Sequence[int]) -> list[Last | None]:
    """Each token at the sentence whose last hidden state its target row points to most."""
    out: list[Last | None] = [None] * len(known.ids)
    if not tokens:
        return out
    different, which = np.unique(tokens, return_inverse=True)
    hidden = np.asarray(passes.hidden, np.float64)
    predicted = known.real[:, :-1]
    probable = np.exp(np.asarray(passes.log_probabilities[..., different], np.float64)) * predicted[..., None]
    is_known = (known.ids[:, 1:, None] == different[None, None]) & known.real[:, 1:, None]
    unexplained = np.einsum("btv,btd->vd", probable - is_known, hidden[:, :-1]) - known.predictions * head[different]
    ends = hidden[np.arange(len(hidden)), known.lengths - 1]
    scores = ends @ unexplained[which].T - (ends**2).sum(1, keepdims=True) / 2
    for s, k in zip(*linear_sum_assignment(-scores), strict=True):
        out[s] = Last(int(tokens[k]), UNSURE)
    return out


def _is_observed(problem: Problem, known: Known, last: Sequence[Last]) -> bool:
    """Whether the completed sentences' update is the one observed, in evaluation mode."""
    ids, real = _completed(known, last)
    away = float(_distance(problem.model, problem.trainable, problem.frozen, problem.observed, ids, real))
    hidden = np.asarray(_passes(problem, {**problem.frozen, **problem.trainable}, known, last).hidden)
    ends = hidden[np.arange(len(hidden)), known.lengths - 1]
    return bool(away < SAME * np.sqrt(2) * np.linalg.norm(ends, axis=1).min() / known.predictions)


@partial(jax.jit, static_argnames=("model",))
def _distance(model: Any, trainable, frozen, observed, ids, real) -> Float[Array, ""]:
    labels = jnp.zeros((len(ids), model.num_labels))
    update = client.fedsgd(model)(trainable, frozen, ids, real, labels)
    return jnp.sqrt(sum(((update[path] - observed[path]) ** 2).sum() for path in update))


def notes(found: Read | None) -> list[str]:
    """What a person should know of the last tokens of a batch; `found` None where the update has no head."""
    if found is None:
        return ["no target follows a sentence's last token, so it has no gradient and is missing from every sentence"]
    out, last = [], found.last
    told = [one for one in last if one is not None]
    sure = sum(one.proven for one in told)
    if told:
        kinds = [f"{n} {kind}" for n, kind in ((sure, "proven"), (len(told) - sure, "likely, not proven")) if n]
        out.append(
            f"the last token of {len(told)} of {len(last)} sentences is read off the head's gradient: "
            + ", ".join(kinds)
        )
    if len(told) < len(last):
        missing = (
            "the last token is missing from every sentence" if not told else f"{len(last) - len(told)} are missing"
        )
        out.append(f"{missing}: only the head's gradient knows it, which does not tell it of every sentence")
    if found.somewhere:
        ids = ", ".join(map(str, found.somewhere))
        out.append(
            f"{len(found.somewhere)} last tokens are proven to be those with ids {ids}, but not of which sentences"
        )
    return out
