"""Span decoding of a LoRA client in evaluation mode from the gradient of B alone: A's is zero in the first step.

That gradient is `(X A)^T dY`: it holds the first attention layer's inputs X through their projections `A^T x` only,
and these span N of the rank's r dimensions while the batch has N < r tokens. Every input is orthogonal to what A makes
of the r - N others: 2 (r - N) linear conditions with adapters of query and value, which no other token meets by chance.
Some rows meet them and are not in the batch, as without adapters (`span.members`). With the rows known the gradient
gives their queries' cotangents, and these tell the sentences apart (`span.attended`), which false rows would blur.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from grab_jax import local_training
from grab_jax.attacks.observed_span import blocks_rounding
from grab_jax.attacks.span_evaluation import UNSURE, Found, only_sentence
from grab_jax.models import first_attention
from grab_jax.span import attended, members, pursuit, subspace
from grab_jax.span.assemble import UNPROVEN, Sentence
from grab_jax.span.completion import PRUNED
from grab_jax.span.inputs import FirstAttention
from grab_jax.span.members import Member
from grab_jax.span.rows import Row
from grab_jax.types import Problem

NEAR = 1e-3
"""Relative residual of a true row at most: measured up to 1.4e-4, and from 0.019 for the nearest other token."""
INDEPENDENT = 2e-4
"""Relative size of what raises the rank of rows already chosen."""
CONDITIONS = 8
"""Fewest linear conditions that tell tokens apart."""
SWAPS = 3
"""Rows that are exchanged for others at most, until all of them form sentences."""


class Factors(NamedTuple):
    """The adapters of the first attention layer: A, B's gradient and its spectrum, one of each per adapted kernel."""

    layers: list[str]
    a: list[Float[np.ndarray, "d r"]]
    gradients: list[Float[np.ndarray, "r o"]]
    spectra: list[subspace.Spectrum]

    @property
    def rank(self) -> int:
        """Token rows of the batch, as far as the adapters' rank shows them."""
        return self.widest.rank

    @property
    def widest(self) -> subspace.Spectrum:
        """The spectrum of the largest rank."""
        return max(self.spectra, key=lambda found: found.rank)

    @property
    def coordinates(self) -> list[Float[np.ndarray, "d n"]]:
        """What takes an input to its coordinates in the span, per kernel."""
        return [a @ found.basis for a, found in zip(self.a, self.spectra, strict=True)]

    def forbidden(self) -> Float[np.ndarray, "d c"]:
        """Orthonormal directions that no input has a part in."""
        others = [a @ found.rest for a, found in zip(self.a, self.spectra, strict=True)]
        return np.linalg.qr(np.concatenate(others, axis=1))[0]


def adapted(model: Any, paths: Container[str]) -> list[str]:
    """The first attention layer's linear layers with an adapter among these parameters."""
    layers = [path.removesuffix("/kernel") for path in first_attention.paths(model)]
    return [layer for layer in layers if f"{layer}/lora_b" in paths]


def factors(problem: Problem) -> Factors | None:
    """The first attention layer's adapters; None where there are none."""
    layers = adapted(problem.model, problem.observed)
    if not layers:
        return None
    a = [np.asarray(problem.trainable[f"{layer}/lora_a"], np.float64) for layer in layers]
    b = [np.asarray(problem.observed[f"{layer}/lora_b"], np.float64) for layer in layers]
    told = {"averaged": problem.averaged_wire, "drifting": local_training.several(problem)}  # A moves between steps
    return Factors(layers, a, b, [subspace.spectrum([gradient], **told) for gradient in b])


def reason(problem: Problem, found: Factors) -> str | None:
    """Why these factors tell nothing, or None."""
    if problem.dropout:
        return (
            "the adapters' B is zero, as in the first round only, and under dropout every projection has a mask of its "
            "own, which the few numbers of B's gradient do not determine; --client_lora_from audits a later round"
        )
    if problem.local is not None and problem.local.optimizer != "sgd":
        return "the adapters' gradients are read from steps of SGD only, and the optimizer is or may be another one"
    if found.rank == 0:
        return "the gradient of the first attention layer's adapters is zero or not finite"
    if any(one.wire == subspace.SIGNS for one in found.spectra):
        return "the entries of the adapters' gradients are of one size, and signs alone have no low rank"
    rank = found.a[0].shape[1]
    if sum(rank - one.rank for one in found.spectra) >= CONDITIONS:
        return None
    blur, missing = _blur(problem, found), max(one.missing for one in found.spectra)
    if missing > PRUNED and not blur.endswith(("levels", "int8")):  # which round small entries to zero
        share = f"{100 * missing:.0f} % of the entries are missing or rounded to zero"
        return f"{share}, so the adapters' gradients have no low rank"
    return (
        f"adapters of rank {rank} hold the batch's tokens only while these are fewer, and here tokens, or "
        f"{blur}, take {found.rank} of its dimensions"
    )


def _blur(problem: Problem, found: Factors) -> str:
    """What may take dimensions as tokens do: few singular values do not tell noise from them, but rounding shows."""
    paths = [path for path in problem.observed if path.endswith("/lora_b")]
    if any(blocks_rounding(problem, [path]) is not None for path in paths):
        return "rounding to int8"
    coarse = sorted({one.wire for one in found.spectra} - {"float32"})
    return f"rounding to {coarse[0]}" if coarse else "noise"


def solve(
    problem: Problem, first: FirstAttention, found: Factors, notify: Callable[[int, int], None] = lambda *_: None
) -> Found:
    """Rows that meet all conditions, and their sentences; no sentence is proven.

    Where the rows are not told apart but have one token at each position, they are taken for one sentence.
    """
    forbidden = found.forbidden()
    near = _weighed(_near(first, forbidden, found.rank, notify), found)
    chosen, groups = _told_apart(problem, first, found, near)
    rows = [Row(m.position, m.token, m.values, np.ones(len(m.values), bool), _certificate(m)) for m in chosen]
    notes = (f"read from LoRA factors, through {forbidden.shape[1]} linear conditions on every token's input",)
    return Found(rows, [Sentence(ids, outside, UNPROVEN) for ids, outside in groups], notes=notes)


def _certificate(member: Member) -> float:
    return 1.0 - member.away if member.sure else UNSURE * (1.0 - member.away)


def _near(first: FirstAttention, forbidden, rank: int, notify: Callable[[int, int], None]) -> list[Member]:
    """All rows that meet the conditions; a position without any ends the scan."""
    allowed = np.linalg.qr(forbidden, mode="complete")[0][:, forbidden.shape[1] :]
    near: list[Member] = []
    for position in range(len(first.places)):
        here = members.at_position(first, allowed, position, NEAR)
        near += here
        notify(min(len(near), rank), rank)
        if not here:
            break
    return near


def _weighed(near: list[Member], found: Factors) -> list[Member]:
    """The rows with their part of the gradients, the largest first; `sure` where no others can replace them."""
    if not near:
        return near
    inputs = np.stack([m.values for m in near])
    rows, *others = [inputs @ coordinates for coordinates in found.coordinates]
    inside = [space.basis.T @ g for space, g in zip(found.spectra, found.gradients, strict=True)]
    # Every kernel has coordinates of its own: those of the others are taken to the first one's.
    moved = [np.linalg.lstsq(np.linalg.lstsq(rows, x, rcond=None)[0].T, g, rcond=None)[0]
             for x, g in zip(others, inside[1:], strict=True)]  # fmt: skip
    shares, sizes = pursuit.solutions(rows, [inside[0], *moved])
    told = zip(near, shares, sizes, members.irreplaceable(rows), strict=True)
    weighed = [m._replace(share=float(s), size=float(z), sure=bool(c)) for m, s, z, c in told]
    return sorted(weighed, key=lambda m: -m.size)


Groups = list[tuple[tuple[int, ...], float]]
"""Sentences as rows in order of position, and what their queries attend to outside of them."""


def _told_apart(
    problem: Problem, first: FirstAttention, found: Factors, near: Sequence[Member]
) -> tuple[list[Member], Groups]:
    """As many independent rows as the gradient has, and their sentences; all rows where they are no sentences."""
    by_place = sorted(near, key=lambda m: m[:2])
    likely = members.independent(near, found.coordinates[0], INDEPENDENT) if near else []
    best, groups = likely, _sentences(problem, first, found, likely)
    for _ in range(SWAPS):
        if len(_used(groups)) == len(best):
            break
        others = [m for m in near if not any(m is one for one in best)]
        swapped = [sorted([*best[:i], other, *best[i + 1 :]], key=lambda m: m[:2])
                   for i in range(len(best)) for other in others]  # fmt: skip
        tried = [(one, _sentences(problem, first, found, one)) for one in swapped]
        better = max(tried, key=lambda pair: len(_used(pair[1])), default=(best, groups))
        if len(_used(better[1])) <= len(_used(groups)):
            break
        best, groups = better
    if groups:
        return best, groups
    only = only_sentence({m[:2] for m in by_place}, problem.vocabulary) if by_place else []
    return by_place, [(tuple(range(len(by_place))), 1.0)] if only else []


def _used(groups: Groups) -> set[int]:
    return {i for rows, _ in groups for i in rows}


def _sentences(problem: Problem, first: FirstAttention, found: Factors, chosen: Sequence[Member]) -> Groups:
    """Sentences of rows that explain the gradient, with the right ends; none where queries have no adapter."""
    layer, *_ = (path.removesuffix("/kernel") for path in first_attention.paths(problem.model))
    if layer not in found.layers or len(chosen) != found.rank:
        return []
    inputs, which = np.stack([m.values for m in chosen]), found.layers.index(layer)
    gradient = found.gradients[which][:, : problem.model.width]  # GPT-2 has queries, keys and values side by side
    cotangent = np.linalg.lstsq((inputs @ found.a[which]).T, gradient, rcond=None)[0]
    split = lambda x: x.reshape(len(inputs), problem.model.config.num_attention_heads, -1)  # noqa: E731
    kernel, bias = (np.asarray(part, np.float64) for part in first.key)
    told = attended.shares(split(cotangent), split(inputs @ kernel + bias))
    groups = attended.sentences(told, np.array([m.position for m in chosen]))
    return [g for g in groups if only_sentence({chosen[i][:2] for i in g[0]}, problem.vocabulary)]
