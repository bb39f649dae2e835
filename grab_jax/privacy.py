"""Epsilon of what clients send: of clip norm and noise as declared, and as they turned out.

(epsilon, delta)-differential privacy of one example, added or removed (Abadi et al. 2016, arXiv 1607.00133), by
dp-accounting.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from grab_jax.client_config import DefenseConfig
from grab_jax.types import Update

CLOSE = 0.05
"""Relative difference of two epsilons that counts as a mismatch."""


def epsilon(multiplier: float, *, sampling: float = 1.0, steps: int = 1, delta: float = 1e-5) -> float:
    """The epsilon of Gaussian noise on a sum of clipped updates, step after step; 0 or more, inf without noise.

    The smaller of two bounds: Renyi accounting with Poisson sampling (Mironov et al. 2019, arXiv 1908.10530), whose
    orders end above what tiny noise needs; and the exact epsilon without sampling (Balle & Wang 2018, arXiv 1805.06530:
    many steps are one of a multiplier smaller by the root of their number).

    Args:
      multiplier: standard deviation of the noise over the clip norm, 0 or more.
      sampling: probability, in (0, 1], of each example of the data to be in a step's batch.
      steps: how often a batch is drawn and its sum is sent.
      delta: in (0, 1).
    """
    import dp_accounting  # takes a second, and few runs need it
    from dp_accounting import gaussian_mechanism, rdp

    if multiplier == 0:
        return math.inf
    try:
        exact = float(gaussian_mechanism.get_epsilon_gaussian(multiplier / math.sqrt(steps), delta))
    except RuntimeError:  # its bisection does not reach what hardly any noise needs
        return math.inf
    step = dp_accounting.PoissonSampledDpEvent(sampling, dp_accounting.GaussianDpEvent(multiplier))
    renyi = rdp.RdpAccountant().compose(step, steps).get_epsilon(delta)
    return min(exact, float(renyi)) if math.isfinite(renyi) else exact


class Measured(NamedTuple):
    """The largest norm of one example's share of an update, and the standard deviation of an entry's noise."""

    clip: float
    deviation: float

    @property
    def multiplier(self) -> float:
        """Noise over clip; inf where there was nothing to hide."""
        return self.deviation / self.clip if self.clip else math.inf


def measured(shares: Mapping[str, Float[Array, "b ..."]], sent: Update) -> Measured:
    """Clip and noise of an update that is the sum of its examples' shares and noise."""
    squares = sum((share.reshape(len(share), -1) ** 2).sum(1) for share in shares.values())
    added = [sent[path] - share.sum(0) for path, share in shares.items()]
    mean_square = sum(float((one**2).sum()) for one in added) / sum(one.size for one in added)
    return Measured(float(jnp.sqrt(squares.max())), math.sqrt(mean_square))


def together(found: Sequence[Measured]) -> Measured | None:
    """Of several updates: the largest clip and the mean square of the noise, NaN if one is; None for none."""
    if not found:
        return None
    return Measured(
        float(np.max([one.clip for one in found])), math.sqrt(sum(one.deviation**2 for one in found) / len(found))
    )


def declared(said: DefenseConfig, examples: int) -> float | None:
    """The noise multiplier that the settings promise for batches of so many examples.

    None without a clip norm, and where noise is on normalised tensors only, whose norms are no setting.
    """
    if said.clip is None or (said.noise and said.noise_on == "normalised" and not said.noise_multiplier):
        return None
    raw = said.noise * examples / said.clip if said.noise_on == "raw" else 0.0
    return math.hypot(said.noise_multiplier, raw)


def account(said: DefenseConfig, examples: int, found: Measured | None, clients: int = 1) -> dict[str, Any] | None:
    """Both epsilons and what they follow from, as plain data for `run.json`; None without noise, clip and claim.

    `examples` is the number in a batch, which `clients` share: each adds noise of its own, and of their mean the noise
    multiplier is larger by the root of their number. `unmeasured` says why there is no measured epsilon.
    """
    promised, noisy = declared(said, examples // clients), said.noise > 0 or said.noise_multiplier > 0
    promised = promised and promised * math.sqrt(clients)
    if promised is None and found is None and said.epsilon_nominal is None and not noisy:
        return None
    unmeasured = _unmeasured(said, examples, found)
    found = None if unmeasured else found
    spent = {"sampling": said.dp_sampling, "steps": said.dp_steps, "delta": said.dp_delta}
    of = lambda multiplier: None if multiplier is None else epsilon(multiplier, **spent)  # noqa: E731
    return {
        **spent,
        "clip": said.clip,
        "bounded": said.clip is not None or said.noise_on == "normalised",
        "noise_multiplier": promised,
        "epsilon": of(promised),
        "unmeasured": unmeasured,
        "nominal": of(promised) if said.epsilon_nominal is None else said.epsilon_nominal,
        "measured": None
        if found is None
        else {**found._asdict(), "noise_multiplier": found.multiplier, "epsilon": of(found.multiplier)},
    }


def _unmeasured(said: DefenseConfig, examples: int, found: Measured | None) -> str | None:
    """Why clip and noise of the clients tell no epsilon, or None."""
    if found is not None:
        finite = math.isfinite(found.clip) and math.isfinite(found.deviation)
        return None if finite else "a sentence's gradient or its noise is not finite"
    if said.clip is None and not said.noise:
        return "nothing bounds one sentence's share and hides it"
    if examples > 1 and said.noise and said.noise_on == "normalised":
        return "tensors are divided by norms that several sentences share"
    return "local training leaves no share of the update that is one sentence's"


def notes(accounted: Mapping[str, Any] | None) -> list[str]:
    """What a person should know of it, the nominal epsilon beside the measured one."""
    if accounted is None:
        return []
    nominal, found = accounted["nominal"], accounted["measured"]
    spent = f"delta {accounted['delta']:g}, sampling rate {accounted['sampling']:g}, {accounted['steps']} step(s)"
    if found is None:
        told = "" if nominal is None else f", so the nominal {_number(nominal)} cannot be checked"
        return [f"privacy: epsilon cannot be measured{told}: {accounted['unmeasured']}"]
    said = (
        f"privacy: epsilon {_number(found['epsilon'])} from what was measured (one sentence's share has a norm of at "
        f"most {found['clip']:.3g}, the noise a standard deviation of {found['deviation']:.3g} an entry)"
    )
    beside = "no nominal one" if nominal is None else f"nominal {_number(nominal)}"
    return [f"{said}; {beside}; {spent}", *_mismatch(accounted)]


def _mismatch(accounted: Mapping[str, Any]) -> list[str]:
    nominal, reached, said = accounted["nominal"], accounted["measured"]["epsilon"], []
    if not accounted["bounded"]:
        said.append("no clip norm bounds a sentence's share: the measured epsilon is that of these sentences only")
    if nominal is None or reached == nominal:
        return said
    if reached > nominal * (1 + CLOSE):
        said.append(
            f"warning: the measured epsilon {_number(reached)} is larger than the nominal {_number(nominal)}: the "
            "update is less private than claimed"
        )
    if reached < nominal * (1 - CLOSE):
        said.append(
            f"warning: the measured epsilon {_number(reached)} is smaller than the nominal {_number(nominal)}: these "
            "sentences' gradients stay below the clip norm, or there is more noise than claimed"
        )
    return said


def _number(value: float) -> str:
    return "infinite" if math.isinf(value) else f"{value:.3g}"
