"""An attack on a CPU with the rounding that `--attack_precision=bfloat16` has on a GPU or TPU.

    python experiments/as_bfloat16.py --flagfile=experiments/quickstart.flags --run_dir=runs/bfloat16

A CPU computes such products in float32. Here both factors of each, and of each in their derivatives, are rounded to
bfloat16 first and the sum is left in float32, as the accelerators' hardware does; a derivative's result is rounded too,
so the effect is if anything too large. Flags are those of `python -m grab_jax.main`. Compare its report with that of
the same flags under `--attack_precision=float32`.
"""

from __future__ import annotations

import sys

import jax
from jax import lax
from jax.extend.core.primitives import dot_general_p

from grab_jax import main

LOW = lax.DotAlgorithmPreset.BF16_BF16_F32


def rounded(x: jax.Array) -> jax.Array:
    """To bfloat16's 8 bits of mantissa."""
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def emulate() -> None:
    """From now on the products of that precision round their factors."""
    bind = dot_general_p.bind

    def bind_rounded(x, y, *, precision, **settings):
        if precision == LOW:
            x, y = rounded(x), rounded(y)
        return bind(x, y, precision=precision, **settings)

    dot_general_p.bind = bind_rounded


if __name__ == "__main__":
    emulate()
    sys.argv[1:1] = ["--attack_precision=bfloat16"]
    main.entry()
