"""The span of an attention layer's inputs, as an update shows it: above what its precision and its rounding hide."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np
from jaxtyping import Float

from grab_jax import defenses, local_training
from grab_jax.models import first_attention
from grab_jax.span import noise, subspace
from grab_jax.types import Problem


def spectrum(
    problem: Problem,
    layer: int = 0,
    kernels: first_attention.Kernels = "all",
    *,
    vectors: bool = True,
    gradients: Sequence[Float[np.ndarray, "d o"]] | None = None,
    paths: Sequence[str] | None = None,
    drifting: bool | None = None,
) -> subspace.Spectrum:
    """Span of an attention layer's gradients, by default as observed, above the rounding of weights and of int8.

    Args:
      gradients: what spans the layer's inputs, of the tensors `paths`; by default those of its kernels.
      drifting: see `subspace.spectrum`; by default whether there are several steps, and no dropout.
    """
    if gradients is None:
        gradients = first_attention.gradients(problem.model, problem.observed, layer, kernels)
    if paths is None:
        paths = first_attention.paths(problem.model, layer, kernels)
    causes = [local_training.weight_rounding(problem, paths), blocks_rounding(problem, paths)]
    rounded = reduce(np.hypot, [cause for cause in causes if cause is not None] or [None])
    if drifting is None:
        drifting = not problem.dropout and local_training.several(problem)
    return subspace.spectrum(
        gradients, vectors=vectors, rounded=rounded, drifting=drifting, averaged=problem.averaged_wire
    )


def blocks_rounding(problem: Problem, paths: Sequence[str]) -> Float[np.ndarray, "d m"] | None:
    """Standard deviations of the rounding of tensors sent in int8, side by side; None if they were not."""
    steps = [noise.block_steps(np.asarray(problem.observed[path], np.float64), defenses.BLOCK) for path in paths]
    return None if any(step is None for step in steps) else np.concatenate(steps, axis=1) / np.sqrt(12)
