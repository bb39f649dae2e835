"""Every setting of a run: one tree of frozen dataclasses, the single source of truth for flags and reports.

A field named `name` gives its group's flag (`--attack`, `--model`, `--data`); any other field gives
`--<group>_<field>`. The text of each flag's help is the field's metadata.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from grab_jax import defenses, distances, matching, views
from grab_jax.types import InputError


def setting(default: Any, text: str) -> Any:
    """A dataclass field with a default and a help text."""
    return field(default=default, metadata={"help": text})


def own(text: str) -> Any:
    """A field of the attack whose default, None, stands for the attack's own (`OWN`)."""
    return field(default=None, metadata={"help": text, "own": True})


def _require(ok: bool, flag: str, value: Any, expected: str) -> None:
    if not ok:
        raise InputError(f"--{flag}={value}: expected {expected}")


@dataclass(frozen=True)
class ModelConfig:
    """Which model the client trains."""

    name: str = setting("builtin:bert-mini", "builtin:bert-mini, builtin:gpt2-mini, a Hugging Face folder, or a hub id")
    revision: str | None = setting(None, "branch, tag or commit on the hub")
    num_labels: int | None = setting(None, "classes of the head; default: the checkpoint's")
    task: Literal["classification", "causal_lm"] = setting(
        "classification", "what the client trains: sequence classification, or next-token prediction (GPT-2)"
    )


@dataclass(frozen=True)
class DataConfig:
    """Whose sentences."""

    name: str = setting(
        "builtin",
        "builtin, cola, sst2, rotten_tomatoes, a hub id, or a .jsonl, .csv or .txt file (text, label)",
    )
    split: str = setting("train", "split of a hub data set")
    shuffle: int | None = setting(
        None, "shuffle all sentences with this seed; default: the source's own (sampled) order"
    )
    start: int = setting(0, "skip this many sentences of the (sampled) order")
    max_length: int = setting(128, "longest sentence in tokens; longer ones are cut, with a warning")

    def __post_init__(self):
        _require(self.shuffle is None or self.shuffle >= 0, "data_shuffle", self.shuffle, "a seed of 0 or more")
        _require(self.start >= 0, "data_start", self.start, "0 or more")
        _require(self.max_length >= 4, "data_max_length", self.max_length, "at least 4 tokens")


@dataclass(frozen=True)
class ClientConfig:
    """What the simulated client does."""

    dropout: float = setting(0.1, "dropout rate at every site of the client's model; 0 = evaluation mode")
    frozen: Literal["embeddings", "none"] = setting(
        "embeddings", "freeze word and position embeddings, or train everything"
    )

    wire: defenses.Wire = setting("float32", "precision in which the update is sent")

    def __post_init__(self):
        _require(0 <= self.dropout < 1, "client_dropout", self.dropout, "a rate in [0, 1)")


@dataclass(frozen=True)
class DefenseConfig:
    """What the client does to its update before sending it, in this order."""

    noise: float = setting(0.0, "standard deviation of Gaussian noise on every entry; 0 = none")
    noise_on: Literal["normalised", "raw"] = setting(
        "normalised", "add the noise after dividing each tensor by its norm, or to the gradient as it is"
    )
    prune: float = setting(0.0, "share of each tensor's entries that is set to zero")
    prune_by: Literal["random", "magnitude"] = setting("random", "prune random entries, or the smallest ones")

    def __post_init__(self):
        _require(0 <= self.noise < float("inf"), "defense_noise", self.noise, "a number of 0 or more")
        _require(0 <= self.prune < 1, "defense_prune", self.prune, "a share in [0, 1)")


@dataclass(frozen=True)
class KnownConfig:
    """What the attacker is told."""

    labels: bool = setting(True, "the attacker knows the labels; otherwise it optimises soft labels")
    lengths: bool = setting(True, "the attacker knows each sentence's length; otherwise only the longest of the batch")
    rate: bool = setting(True, "the attacker knows the dropout rate; otherwise span decoding reads it off the update")


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
    masks: Literal["learn", "off", "true"] | None = own(
        "dropout masks: learn them, ignore dropout where none are known, or use the client's true ones (a control, not "
        "an attack)",
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
        "all", "what is matched: all entries, those a pruning client sent, or the signs (a hinge under l2 and l2+l1)"
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
        "language model that judges moves: none, or a causal one over the same tokenizer (a folder, such as "
        "grab_jax.train_prior makes, a hub id, or builtin:gpt2-mini for itself)",
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
            _require(getattr(self, name) >= 1, f"attack_{name}", getattr(self, name), "1 or more")
        for name in (
            "candidates", "permutations", "sweeps", "l1", "weight_decay", "norm_weight", "moves", "prior_weight",
        ):  # fmt: skip
            _require(getattr(self, name) >= 0, f"attack_{name}", getattr(self, name), "0 or more")
        for name in ("lr", "decay"):
            _require(getattr(self, name) > 0, f"attack_{name}", getattr(self, name), "a positive number")
        _require(self.clip is None or self.clip > 0, "attack_clip", self.clip, "a positive norm")
        for name in ("dager_near", "dager_whole"):
            value = getattr(self, name)
            _require(value is None or 0 < value < 1, f"attack_{name}", value, "a distance between 0 and 1")
        for name in ("dager_budget", "dager_spare"):
            _require(getattr(self, name) >= 1, f"attack_{name}", getattr(self, name), "1 or more")
        for name in ("chunk", "together"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"attack_{name}", value, "1 or more")
        for name in ("mask_start", "moves_after"):
            _require(0 <= getattr(self, name) <= 1, f"attack_{name}", getattr(self, name), "a number in [0, 1]")

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


@dataclass(frozen=True)
class RunConfig:
    """Where and how the run happens: none of it changes a result beyond rounding."""

    dir: str | None = setting(None, "run folder; default: runs/<attack>-<model>-<data>-<hash of the settings>")
    group: int = setting(8, "client batches of one length bucket attacked in one compiled program")
    memory_gb: float | None = setting(None, "device memory to plan for; default: what the device reports")
    checkpoint_minutes: float = setting(5.0, "save an unfinished attack this often (and after every round)")
    progress: Literal["auto", "bar", "lines", "off"] = setting("auto", "bar on a terminal, lines otherwise")

    def __post_init__(self):
        _require(self.group >= 1, "run_group", self.group, "1 or more")
        _require(self.memory_gb is None or self.memory_gb > 0, "run_memory_gb", self.memory_gb, "a positive number")
        _require(self.checkpoint_minutes >= 0, "run_checkpoint_minutes", self.checkpoint_minutes, "0 or more")


@dataclass(frozen=True)
class ReportConfig:
    """How results are shown."""

    redact: bool = setting(True, "hide names, numbers and mail addresses in report.html and on the terminal")
    beside: str | None = setting(
        None, "folders of other runs on the same sentences, comma-separated, shown beside this one"
    )

    @property
    def others(self) -> list[str]:
        """The folders of `beside`."""
        return [folder for folder in (self.beside or "").split(",") if folder]


@dataclass(frozen=True)
class Config:
    """A whole run."""

    mode: Literal["simulate", "report"] = setting("simulate", "run an attack, or rebuild the report of --run_dir")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    num_batches: int = setting(8, "client batches to attack")
    batch_size: int = setting(1, "sentences per client batch")
    client: ClientConfig = ClientConfig()
    defense: DefenseConfig = DefenseConfig()
    known: KnownConfig = KnownConfig()
    attack: AttackConfig = AttackConfig()
    seed: int = setting(0, "seed of everything random")
    run: RunConfig = RunConfig()
    report: ReportConfig = ReportConfig()
    dry_run: bool = setting(False, "print the plan (sites, sizes, memory, time, compilations) and stop")

    def __post_init__(self):
        if self.model.task == "causal_lm" and self.attack.searches:
            raise InputError(
                f"--attack={self.attack.name} needs --model_task=classification: its candidates are embeddings without "
                "a next token; use --attack=span"
            )
        if self.attack.init == "span" and self.attack.name != "grab":
            raise InputError(f"--attack_init=span is a start for --attack=grab, not for --attack={self.attack.name}")
        if self.attack.init == "span" and "true" in (self.attack.masks, self.attack.tokens):
            raise InputError(
                "--attack_init=span cannot start a control, which is given the true masks or tokens; leave out "
                "--attack_masks=true and --attack_tokens=true"
            )
        if not self.known.rate and self.attack.searches and self.attack.masks != "off":
            raise InputError(
                f"--noknown_rate needs --attack=span or --attack_masks=off: {self.attack.name}'s mask learning starts "
                "from the dropout rate"
            )
        if self.attack.prior != "none" and not (self.attack.searches and self.attack.moves):
            raise InputError(
                f"--attack_prior={self.attack.prior} judges moves of words, and --attack={self.attack.name} makes "
                "none; use --attack=lamp, or give --attack_moves"
            )
        _require(self.num_batches >= 1, "num_batches", self.num_batches, "1 or more")
        _require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        _require(0 <= self.seed < 2**32, "seed", self.seed, "an integer in [0, 2^32)")


@dataclass(frozen=True)
class TrainPriorConfig:
    """A small causal language model over a model's tokenizer: what LAMP judges word order with (`train_prior`)."""

    data: str = setting("", "text to train on: data names or files as --data of grab_jax.main, separated by commas")
    model: str = setting("builtin:bert-mini", "whose tokenizer: the attacked model, as --model of grab_jax.main")
    out: str = setting("", "folder to write; the same command given again continues an interrupted training")
    held_out: float = setting(0.02, "share of the sentences that is only scored")
    steps: int = setting(2000, "training steps")
    batch: int = setting(32, "sentences a step")
    length: int = setting(32, "longest row in tokens; longer sentences are cut into several")
    positions: int = setting(128, "longest row in tokens that the model can judge")
    layers: int = setting(2, "layers")
    width: int = setting(128, "hidden size")
    heads: int = setting(4, "attention heads")
    lr: float = setting(2e-3, "highest AdamW learning rate: linear warm-up, then cosine to zero")
    save_every: int = setting(200, "steps between checkpoints")
    seed: int = setting(0, "seed of everything random")

    def __post_init__(self):
        _require(0 < self.held_out < 1, "held_out", self.held_out, "a share in (0, 1)")
        for name in ("steps", "batch", "layers", "width", "heads", "save_every"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        _require(4 <= self.length <= self.positions, "length", self.length, "at least 4, and at most --positions")
        _require(self.width % self.heads == 0, "width", self.width, f"a multiple of --heads={self.heads}")
        _require(self.lr > 0, "lr", self.lr, "a positive number")
        _require(0 <= self.seed < 2**32, "seed", self.seed, "an integer in [0, 2^32)")


PLACE_ONLY = ("mode", "run", "report", "dry_run")
"""Top-level fields that change where or how a run happens, not its result."""


def identity(config: Config) -> dict[str, Any]:
    """The settings that determine a result, as plain data: two runs with equal identity may share a folder."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in PLACE_ONLY}
