"""The settings of the attacks, and what each attack has where one is not given."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from grab_jax import distances, matching, views
from grab_jax.setting import own, require, setting

Attack = Literal["grab", "dlg", "tag", "lamp", "span", "dager"]

_GRAB = {
    "rounds": 5, "steps": 2000, "candidates": 2000, "permutations": 2000, "start_norm": "vocabulary", "lr": 0.01,
    "decay": 0.89, "weight_decay": 0.01, "masks": "learn", "distance": "l2+l1", "keep": "last", "vocabulary": "all",
    "norm_weight": 0.0, "moves": 0, "prior_weight": 0.2, "sweeps": 5,
}  # fmt: skip
_TAG = {
    "rounds": 1, "steps": 2500, "candidates": 0, "permutations": 0, "start_norm": "none", "lr": 0.1, "decay": 1.0,
    "weight_decay": 0.0, "masks": "off", "distance": "squared+l1", "keep": "best", "vocabulary": "words",
    "norm_weight": 0.0, "moves": 0, "prior_weight": 0.2, "sweeps": 0,
}  # fmt: skip
_LAMP = {
    "steps": 2000, "candidates": 500, "permutations": 500, "start_norm": "vocabulary", "lr": 0.01, "decay": 0.89,
    "distance": "cosine", "norm_weight": 1.0, "moves": 200,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "grab": _GRAB,
    "dlg": _TAG | {"distance": "squared"},
    "tag": _TAG,
    "lamp": _TAG | _LAMP,
    "span": _GRAB,
    "dager": _GRAB,
}
"""What a setting of each attack is where it is not given, as the papers have it (span decoding and DAGER use none)."""

FOR_ONE = {"init": ("grab", "none"), "prior": ("lamp", "none")}
"""Settings that, where several attacks are run, are meant for one of them, and what the others take instead."""

LAMP_SQUARED = {"norm_weight": 25.0, "prior_weight": 60.0}
"""LAMP's weights under a distance that is not a cosine, whose values are of another size (its L2+L1 variant)."""


@dataclass(frozen=True)
class AttackConfig:
    """The attack; span decoding has no settings, DAGER's begin with `dager_`.

    A field that is left out takes the attack's own default (`OWN`), at once: the fields always hold the values used.
    `dataclasses.replace` keeps them, also where it changes the name.
    """

    name: Attack = setting(
        "grab",
        "grab: gradient matching with learned dropout masks; dlg, tag: plain gradient matching; lamp: with moves of "
        "words, judged also by a language model; span: exact decoding of the first layer's gradient; dager: without "
        "dropout, tokens by the first layer's span, sentences by the second's; several, separated by commas, run one "
        "after another and are compared on one page; auto: what the problem allows, the strongest evidence first",
    )
    init: Literal["none", "span"] = setting(
        "none",
        "where grab begins: knowing nothing, or with the tokens and masks that span decoding proves held fixed",
    )
    rounds: int | None = own("hybrid rounds (continuous, then discrete)")
    steps: int | None = own("continuous steps per round")
    restarts: int = setting(1, "independent continuous runs per round; the best goes on")
    candidates: int | None = own("random candidates scored before the first round; 0 takes one draw")
    permutations: int | None = own("permutations scored before each continuous and each discrete phase")
    start_norm: Literal["vocabulary", "none"] | None = own(
        "rescale random candidates, N(0, 1), to the mean norm of the vocabulary's embeddings, or leave them"
    )
    lr: float | None = own("initial Adam learning rate of embeddings, masks and soft labels")
    schedule: Literal["step", "linear"] = setting("step", "step decay, or linear decay to 0 (large models)")
    decay: float | None = own("factor of the step schedule; 1 = constant")
    decay_every: int = setting(50, "steps between two decays")
    weight_decay: float | None = own("AdamW weight decay; 0 = Adam")
    clip: float | None = setting(None, "rescale the embeddings' gradient above this norm (large models: 0.5)")
    masks: Literal["learn", "off", "random", "true"] | None = own(
        "dropout masks: learn them, ignore dropout where none are known, draw some and keep them, or use the client's "
        "true ones (a control, not an attack)",
    )
    mask_start: float = setting(0.0, "start of mask learning: 0 = a 0/1 draw (Grab), 1 = the keep rate everywhere")
    score_masks: Literal["learned", "off"] = setting(
        "learned",
        "masks under which tokens are scored: the learned ones, which stay at their positions (Grab), or none",
    )
    tokens: Literal["search", "true"] = setting(
        "search",
        "search for the tokens, or be given the true ones and learn masks only (a control, not an attack)",
    )
    distance: distances.Name | None = own(
        "distance between updates; squared = sum of squared l2 (DLG, and TAG with +l1), normalised = per-tensor "
        "normalised l2+l1"
    )
    l1: float = setting(0.01, "weight of the L1 term")
    norm_weight: float | None = own(
        "weight of (mean norm of the embeddings - mean norm of the vocabulary's)^2 in the loss (LAMP)"
    )
    precision: matching.Precision = setting(
        "float32", "matrix products of the attacker's model; bfloat16 adds up in float32, and a CPU ignores it"
    )
    view: views.Name = setting(
        "auto",
        "what is matched: auto follows the client's defense (an adaptive attacker); all entries as if there were none; "
        "tensors over their norms; entries that a pruning client sent; or signs (a hinge under l2 and l2+l1)",
    )
    layers: str = setting("", "match only tensors whose path contains a match of this regular expression; empty = all")
    keep: Literal["last", "best"] | None = own("the continuous iterate that becomes tokens: last, or of lowest loss")
    vocabulary: Literal["all", "words"] | None = own(
        "tokens that embeddings may become: all, or no special ones (where lengths are not told, padding and "
        "separator stay)"
    )
    moves: int | None = own("rearrangements of a sentence's words scored at each of LAMP's discrete steps; 0 = none")
    moves_every: int = setting(75, "continuous steps between two of LAMP's discrete steps")
    moves_after: float = setting(0.1, "share of the continuous steps before the first of LAMP's discrete steps")
    prior: str = setting(
        "none",
        "language model that judges moves: none, builtin (the bundled one for a builtin: model), or a causal one over "
        "the same tokenizer (a folder, such as grab_jax.train_prior makes, or a hub id)",
    )
    prior_weight: float | None = own(
        "weight of the language model's loss (nats a token) beside the matching loss; lamp with another distance than "
        f"cosine takes {LAMP_SQUARED['prior_weight']:g}, and {LAMP_SQUARED['norm_weight']:g} for --attack_norm_weight"
    )
    beam: int = setting(4, "beam width, and number of solutions improved")
    sweeps: int | None = own("beam sweeps per round; 0 skips the discrete phase")
    chunk: int | None = setting(None, "candidates scored at once; default: from the memory estimate")
    together: int | None = setting(None, "restarts descended at once on a device; default: from the memory estimate")
    dager_kernels: Literal["query", "all"] = setting(
        "query",
        "gradients whose span is tested: the query kernel's (DAGER), or query, key and value; GPT-2's are fused",
    )
    dager_near: float | None = setting(
        None, "distance of a token from the first layer's span (DAGER: 1e-5); default: from the singular values"
    )
    dager_whole: float | None = setting(
        None, "distance of a sentence's tokens from the second's (DAGER: 1e-3); default: from the singular values"
    )
    dager_spare: int = setting(
        20, "dimensions that the spans leave free at least; with fewer their weakest are cut off"
    )
    dager_budget: int = setting(
        100_000, "sentences tried of one length (DAGER: 10000000, hours on a CPU); above it the likeliest tokens only"
    )

    def __post_init__(self):
        self._fill()
        for name in ("rounds", "steps", "restarts", "decay_every", "beam", "moves_every"):
            require(getattr(self, name) >= 1, f"attack_{name}", getattr(self, name), "1 or more")
        for name in (
            "candidates", "permutations", "sweeps", "l1", "weight_decay", "norm_weight", "moves", "prior_weight",
        ):  # fmt: skip
            require(getattr(self, name) >= 0, f"attack_{name}", getattr(self, name), "0 or more")
        for name in ("lr", "decay"):
            require(getattr(self, name) > 0, f"attack_{name}", getattr(self, name), "a positive number")
        require(self.clip is None or self.clip > 0, "attack_clip", self.clip, "a positive norm")
        for name in ("dager_near", "dager_whole"):
            value = getattr(self, name)
            require(value is None or 0 < value < 1, f"attack_{name}", value, "a distance between 0 and 1")
        for name in ("dager_budget", "dager_spare"):
            require(getattr(self, name) >= 1, f"attack_{name}", getattr(self, name), "1 or more")
        for name in ("chunk", "together"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"attack_{name}", value, "1 or more")
        for name in ("mask_start", "moves_after"):
            require(0 <= getattr(self, name) <= 1, f"attack_{name}", getattr(self, name), "a number in [0, 1]")

    def _fill(self) -> None:
        """Put the attack's own values where none are given."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        chosen = OWN[self.name] | given
        if self.name == "lamp" and chosen["distance"] != "cosine":
            chosen |= LAMP_SQUARED | given
        for name, value in chosen.items():
            object.__setattr__(self, name, value)

    @property
    def searches(self) -> bool:
        """Whether the attack is a search by gradient matching."""
        return self.name not in ("span", "dager")


def default(flag_field: dataclasses.Field) -> str:
    """What stands for the default of a setting in its help: of an attack's own ones, every attack's."""
    values: dict[Any, list[str]] = {}
    for attack, settings in OWN.items():
        if attack not in ("span", "dager"):
            values.setdefault(settings[flag_field.name], []).append(attack)
    return "; ".join(f"{value} ({', '.join(attacks)})" for value, attacks in values.items())
