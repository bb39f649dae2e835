"""The records every part of grab_jax passes around, and the axis letters of their shapes.

Axis letters in jaxtyping signatures, fixed for the whole package:

====  ==========================================================
`b`   sentences of one client batch
`t`   tokens of a (padded) sentence
`d`   width of the model
`h`   attention heads
`v`   vocabulary
`c`   classes
`n`   candidates or restarts
`k`   independent client batches attacked together (one *bucket*)
====  ==========================================================

Words: an *update* is what a client sends, *observed* is the update the server saw, a *candidate* is what the attacker
varies, an *objective* maps a candidate to a scalar, a *score* maps tokens to a scalar (lower is better).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float, Int

Params = Mapping[str, Any]
"""Nested dict of model parameters; Flax kernels are `[in, out]`."""

Update = Mapping[str, Array]
"""Flat dict: `"/"`-joined parameter path -> gradient or weight delta of that tensor."""

Masks = Mapping[str, Array]
"""Dropout masks by site name, each with a leading sentence axis `b`; 0/1 for a client, [0, 1] for an attacker."""


class Batch(NamedTuple):
    """A tokenised client batch, right-padded.

    `attention` is True on real tokens; `labels` are class indices in `[0, c)`.
    """

    ids: Int[Array, "b t"]
    attention: Bool[Array, "b t"]
    labels: Int[Array, " b"]


class Candidate(NamedTuple):
    """What the attacker varies in the continuous phase.

    `embeds` are word embeddings before position and type embeddings are added; `masks` relaxed dropout masks in
    [0, 1], or None for evaluation mode; `labels` class probabilities (used as they are, not normalised), or None
    where the true labels are known.
    """

    embeds: Float[Array, "b t d"]
    masks: Masks | None
    labels: Float[Array, "b c"] | None


class Known(NamedTuple):
    """What the attacker has been told about one client batch.

    `attention` is the client's attention mask where sentence lengths are known, otherwise True up to the longest
    sentence for every row. `pinned` marks positions whose token the attacker knows ([CLS], [SEP], padding), `ids`
    holds those tokens; elsewhere a token to start from, or -1. `free` marks the positions to search. `labels` are the
    true labels as class probabilities (one-hot), or None. `masks` are the client's dropout masks as far as they are
    known, by site, NaN where they are not: all of them in a *control* run, those of proven rows after a hand-over
    (`attacks.handover`), else None. The control that tells the tokens pins every position.
    """

    attention: Bool[Array, "b t"]
    ids: Int[Array, "b t"]
    pinned: Bool[Array, "b t"]
    free: Bool[Array, "b t"]
    labels: Float[Array, "b c"] | None
    masks: Masks | None


class Vocabulary(NamedTuple):
    """The tokenizer facts an attack needs, without the tokenizer.

    `special` lists every special token id; `pad`, `cls`, `sep` are ids, `cls` and `sep` None where a sentence has
    none (GPT-2).
    """

    pad: int
    cls: int | None
    sep: int | None
    special: frozenset[int]


class Defended(NamedTuple):
    """What a client does to its update before sending it, as far as it changes what a candidate must match.

    `clip`: examples are rescaled to this norm; `normalised`: each tensor is divided by its norm (then comes noise);
    `pruned`: entries that are zero were not sent; `signs`: only signs are sent.
    """

    clip: float | None = None
    normalised: bool = False
    pruned: bool = False
    signs: bool = False


class Problem(NamedTuple):
    """The threat model: everything an attack may use, and nothing else.

    `model` is a `grab_jax.models.Model`; `trainable` and `frozen` split its parameters (`tuning.split`): the server
    sees the gradient of `trainable` only. `observed` is that update. `dropout` tells whether the client trained with
    dropout masks, `lengths` whether `known` holds every sentence's length, `rate` whether the server knows the dropout
    rate. `local` is None for one gradient; otherwise `observed` is the change of the weights, and `local` what is known
    of the training in between (`local_training.Local`). `defended` is the client's defense, which an attack may follow
    or not. `observed` is the mean over `clients` clients, which share the sentences equally, and `averaged_wire` the
    precision in which each of several sent its own; float32 for one client, whose precision shows in the update.
    """

    model: Any
    trainable: Mapping[str, Array]
    frozen: Mapping[str, Array]
    observed: Update
    known: Known
    vocabulary: Vocabulary
    dropout: bool
    lengths: bool
    rate: bool = True
    local: Any = None
    defended: Defended = Defended()
    clients: int = 1
    averaged_wire: str = "float32"


class Result(NamedTuple):
    """What an attack returns for one client batch.

    `ids` is the reconstruction; `confidence` in [0, 1] per position; `loss` the final matching distance; `masks`
    the learned dropout masks (some sites suffice) or None; `trace` a list of dicts (round, phase, step, loss) in order
    of time; `notes` sentences for the reader of the report; `evidence` what proves the reconstruction, or says that it
    could not be tested (`attacks.span`), as plain data.
    """

    ids: Int[Array, "b t"]
    confidence: Float[Array, "b t"]
    loss: float
    masks: Masks | None
    labels: Int[Array, " b"] | None
    trace: list[dict[str, Any]]
    notes: list[str]
    evidence: dict[str, Any] | None = None


class InputError(ValueError):
    """Bad input from a user. The message is one sentence: what came, what was expected, what to do."""
