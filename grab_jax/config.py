"""Every setting of a run: one tree of frozen dataclasses, the single source of truth for flags and reports.

A field named `name` gives its group's flag (`--attack`, `--model`, `--data`); any other field gives
`--<group>_<field>`. The text of each flag's help is the field's metadata.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from grab_jax import defenses
from grab_jax.attack_config import AttackConfig
from grab_jax.setting import require, setting
from grab_jax.types import InputError


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
        require(self.shuffle is None or self.shuffle >= 0, "data_shuffle", self.shuffle, "a seed of 0 or more")
        require(self.start >= 0, "data_start", self.start, "0 or more")
        require(self.max_length >= 4, "data_max_length", self.max_length, "at least 4 tokens")


@dataclass(frozen=True)
class ClientConfig:
    """What the simulated client does."""

    dropout: float = setting(0.1, "dropout rate at every site of the client's model; 0 = evaluation mode")
    frozen: Literal["embeddings", "none"] = setting(
        "embeddings", "freeze word and position embeddings, or train everything"
    )

    wire: defenses.Wire = setting("float32", "precision in which the update is sent")

    def __post_init__(self):
        require(0 <= self.dropout < 1, "client_dropout", self.dropout, "a rate in [0, 1)")


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
        require(0 <= self.noise < float("inf"), "defense_noise", self.noise, "a number of 0 or more")
        require(0 <= self.prune < 1, "defense_prune", self.prune, "a share in [0, 1)")


@dataclass(frozen=True)
class KnownConfig:
    """What the attacker is told."""

    labels: bool = setting(True, "the attacker knows the labels; otherwise it optimises soft labels")
    lengths: bool = setting(True, "the attacker knows each sentence's length; otherwise only the longest of the batch")
    rate: bool = setting(True, "the attacker knows the dropout rate; otherwise span decoding reads it off the update")


@dataclass(frozen=True)
class RunConfig:
    """Where and how the run happens: none of it changes a result beyond rounding."""

    dir: str | None = setting(None, "run folder; default: runs/<attack>-<model>-<data>-<hash of the settings>")
    group: int = setting(8, "client batches of one length bucket attacked in one compiled program")
    memory_gb: float | None = setting(None, "device memory to plan for; default: what the device reports")
    checkpoint_minutes: float = setting(5.0, "save an unfinished attack this often (and after every round)")
    progress: Literal["auto", "bar", "lines", "off"] = setting("auto", "bar on a terminal, lines otherwise")

    def __post_init__(self):
        require(self.group >= 1, "run_group", self.group, "1 or more")
        require(self.memory_gb is None or self.memory_gb > 0, "run_memory_gb", self.memory_gb, "a positive number")
        require(self.checkpoint_minutes >= 0, "run_checkpoint_minutes", self.checkpoint_minutes, "0 or more")


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
        require(self.num_batches >= 1, "num_batches", self.num_batches, "1 or more")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        require(0 <= self.seed < 2**32, "seed", self.seed, "an integer in [0, 2^32)")


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
        require(0 < self.held_out < 1, "held_out", self.held_out, "a share in (0, 1)")
        for name in ("steps", "batch", "layers", "width", "heads", "save_every"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        require(4 <= self.length <= self.positions, "length", self.length, "at least 4, and at most --positions")
        require(self.width % self.heads == 0, "width", self.width, f"a multiple of --heads={self.heads}")
        require(self.lr > 0, "lr", self.lr, "a positive number")
        require(0 <= self.seed < 2**32, "seed", self.seed, "an integer in [0, 2^32)")


PLACE_ONLY = ("mode", "run", "report", "dry_run")
"""Top-level fields that change where or how a run happens, not its result."""


def identity(config: Config) -> dict[str, Any]:
    """The settings that determine a result, as plain data: two runs with equal identity may share a folder."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in PLACE_ONLY}
