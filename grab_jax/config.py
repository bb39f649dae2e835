"""Every setting of a run: one tree of frozen dataclasses, the single source of truth for flags and reports.

A field named `name` or `on` gives its group's flag (`--attack`, `--model`, `--utility`); any other field gives
`--<group>_<field>`. The text of each flag's help is the field's metadata.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from grab_jax import local_training
from grab_jax.attack_config import AttackConfig
from grab_jax.client_config import ClientConfig, DefenseConfig
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
class KnownConfig:
    """What the attacker is told."""

    labels: bool = setting(True, "the attacker knows the labels; otherwise it optimises soft labels")
    lengths: bool = setting(True, "the attacker knows each sentence's length; otherwise only the longest of the batch")
    size: bool = setting(
        True,
        "the attacker knows how many sentences a batch holds; otherwise it is told neither their labels nor their "
        "lengths, and span decoding counts them",
    )
    rate: bool = setting(True, "the attacker knows the dropout rate; otherwise span decoding reads it off the update")
    lr: bool = setting(True, "FedAvg: the attacker knows the learning rate")
    steps: bool = setting(True, "FedAvg: the attacker knows epochs and local batch size")
    optimizer: bool = setting(True, "FedAvg: the attacker knows the optimizer, its momentum and weight decay")


@dataclass(frozen=True)
class RunConfig:
    """Where and how the run happens: none of it changes a result beyond rounding."""

    dir: str | None = setting(None, "run folder; default: runs/<attack>-<model>-<data>-<hash of the settings>")
    tensorboard: bool = setting(False, "write curves of loss and leakage for TensorBoard, in <run folder>/tensorboard")
    wandb: str | None = setting(None, "send them to this project of Weights & Biases; default: send nothing")
    group: int = setting(8, "client batches of one length bucket attacked in one compiled program")
    memory_gb: float | None = setting(None, "device memory to plan for; default: what the device reports")
    checkpoint_minutes: float = setting(5.0, "save an unfinished attack this often (and after every round)")
    progress: Literal["auto", "bar", "lines", "off"] = setting("auto", "bar on a terminal, lines otherwise")
    distributed: Literal["auto", "on", "off"] = setting(
        "auto",
        "share the work with the other processes of a Slurm step, Open MPI's mpirun, TPU slice or "
        "JAX_PROCESS_ID of JAX_NUM_PROCESSES; on: refuse to run where there are none; off: do all of it",
    )

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


PRIORS = {"builtin:bert-mini": "builtin:bert-mini-prior", "builtin:gpt2-mini": "builtin:gpt2-mini"}
"""The bundled language model over the tokenizer of a bundled model (--attack_prior=builtin)."""


@dataclass(frozen=True)
class UtilityConfig:
    """What the same client and defence cost in accuracy (`utility`)."""

    on: bool = setting(False, "also train the model under the same client and defence; report held-out accuracy")
    rounds: int = setting(50, "rounds of training")
    clients: int = setting(
        4, "updates a round that the server takes together, each of a batch of --batch_size sentences"
    )
    optimizer: Literal["adam", "sgd"] = setting("adam", "the server's, applied to the mean of the clients' updates")
    lr: float = setting(1e-3, "the server's learning rate")
    held_out: float = setting(0.2, "share of the sentences that is only evaluated")

    def __post_init__(self):
        for name in ("rounds", "clients"):
            require(getattr(self, name) >= 1, f"utility_{name}", getattr(self, name), "1 or more")
        require(self.lr > 0, "utility_lr", self.lr, "a positive number")
        require(0 < self.held_out < 1, "utility_held_out", self.held_out, "a share in (0, 1)")


@dataclass(frozen=True)
class Config:
    """A whole run."""

    mode: Literal["simulate", "report", "status"] = setting(
        "simulate", "run an attack; or rebuild the report of --run_dir; or say how far what is in --run_dir is"
    )
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    num_batches: int = setting(8, "client batches to attack")
    batch_size: int = setting(1, "sentences per client batch")
    client: ClientConfig = ClientConfig()
    defense: DefenseConfig = DefenseConfig()
    known: KnownConfig = KnownConfig()
    attack: AttackConfig = AttackConfig()
    seed: int = setting(0, "seed of everything random")
    utility: UtilityConfig = UtilityConfig()
    run: RunConfig = RunConfig()
    report: ReportConfig = ReportConfig()
    dry_run: bool = setting(False, "print the plan (sites, sizes, memory, time, compilations) and stop")

    def __post_init__(self):
        if self.attack.prior == "builtin":
            object.__setattr__(self, "attack", dataclasses.replace(self.attack, prior=_bundled_prior(self.model.name)))
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
        self._check_size()
        self._check_count()
        self._check_local()
        if self.attack.prior != "none" and not (self.attack.searches and self.attack.moves):
            raise InputError(
                f"--attack_prior={self.attack.prior} judges moves of words, and --attack={self.attack.name} makes "
                "none; use --attack=lamp, or give --attack_moves"
            )
        require(self.num_batches >= 1, "num_batches", self.num_batches, "1 or more")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        require(0 <= self.seed < 2**32, "seed", self.seed, "an integer in [0, 2^32)")

    def _check_size(self) -> None:
        """A batch of unknown size is for span decoding, and mini-batches do not say how large it is."""
        if self.known.size:
            return
        if self.attack.name != "span":
            raise InputError(
                f"--noknown_size needs --attack=span, which counts the sentences: --attack={self.attack.name} must be "
                "told how many to look for"
            )
        if self.client.local_batch and self.known.steps:
            raise InputError(
                f"--noknown_size with --client_local_batch={self.client.local_batch} needs --noknown_steps: the number "
                "of local steps follows from the number of sentences"
            )

    def _check_count(self) -> None:
        """Clients that are averaged have equal shares, and defenses whose mean an attack can follow."""
        if self.client.count == 1:
            return
        if self.batch_size % self.client.count:
            raise InputError(
                f"--client_count={self.client.count} does not divide --batch_size={self.batch_size}: clients have "
                "equal shares of a batch's sentences"
            )
        said = self.defense
        alone = {
            "client_wire=int8": self.client.wire == "int8",
            "defense_noise_on=normalised": said.noise > 0 and said.noise_on == "normalised",
            f"defense_prune={said.prune:g}": said.prune, "defense_sign": said.sign,
            f"defense_quantise={said.quantise}": said.quantise,
            "client_optimizer=adamw": self._sends_signs(),
        }  # fmt: skip
        if used := [name for name, value in alone.items() if value]:
            raise InputError(
                f"--client_count={self.client.count} averages the clients' updates, and no attack here follows the "
                f"mean of what --{used[0]} leaves of each; use --client_count=1 or leave it out"
            )

    def _sends_signs(self) -> bool:
        """Whether a search would compare the signs of what one step of AdamW leaves."""
        local = self.told_local
        return local is not None and self.attack.searches and local.signs_alone(self.batch_size)

    def _check_local(self) -> None:
        local, size = self.client.local, self.client.local_batch
        if local is None:
            return
        if self.defense.clip is not None:
            raise InputError(
                f"--defense_clip={self.defense.clip:g} rescales every example's gradient, which "
                "--client_algorithm=fedavg does not send; leave one of them out"
            )
        if size and self.batch_size // self.client.count % size:
            shared = f" / --client_count={self.client.count}" if self.client.count > 1 else ""
            raise InputError(
                f"--client_local_batch={size} does not divide --batch_size={self.batch_size}{shared}: local steps have "
                "equal numbers of sentences"
            )
        untold = [name for name in ("lr", "steps", "optimizer") if not getattr(self.known, name)]
        if untold and self.attack.searches and self.attack.distance not in ("cosine", "normalised"):
            raise InputError(
                f"--noknown_{untold[0]} leaves the size of the gradient open, which "
                f"--attack_distance={self.attack.distance} compares; use --attack_distance=cosine or normalised"
            )
        if self.attack.init == "span" and not local.one_gradient(self.batch_size):
            raise InputError(
                "--attack_init=span needs one local step of SGD: after several, span decoding proves nothing to hold; "
                "use --attack=span,grab"
            )

    @property
    def told_local(self) -> local_training.Local | None:
        """What the attacker knows of the local training."""
        if (local := self.client.local) is None:
            return None
        hidden = {} if self.known.lr else {"lr": None}
        hidden |= {} if self.known.steps else {"epochs": None, "batch": None}
        hidden |= {} if self.known.optimizer else {"optimizer": None, "momentum": None, "weight_decay": None}
        return dataclasses.replace(local, **hidden)


def _bundled_prior(model: str) -> str:
    if model not in PRIORS:
        raise InputError(
            f"--attack_prior=builtin judges for {' and '.join(PRIORS)}, not for --model={model}; train a prior for its "
            "tokenizer with python -m grab_jax.train_prior"
        )
    return PRIORS[model]


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


PLACE_ONLY = ("mode", "utility", "run", "report", "dry_run")
"""Top-level fields that change where or how a run happens or what is measured beside it, not what an attack finds."""


def identity(config: Config) -> dict[str, Any]:
    """The settings that determine a result, as plain data: two runs with equal identity may share a folder."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in PLACE_ONLY}
