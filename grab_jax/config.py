"""Every setting of a run: one tree of frozen dataclasses, the single source of truth for flags and reports.

A field named `name` or `on` gives its group's flag (`--attack`, `--model`, `--utility`); any other field gives
`--<group>_<field>`. The text of each flag's help is the field's metadata.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from grab_jax import defenses, local_training
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
    algorithm: Literal["fedsgd", "fedavg"] = setting(
        "fedsgd", "send one gradient, or the change of the weights after local training"
    )
    epochs: int = setting(1, "FedAvg: passes over the client's sentences, each under dropout masks of its own")
    local_batch: int = setting(0, "FedAvg: sentences of a local step, in the order of the data; 0 = all")
    optimizer: local_training.Optimizer = setting("sgd", "FedAvg: the client's optimizer")
    lr: float = setting(0.01, "FedAvg: the client's learning rate")
    momentum: float = setting(0.0, "FedAvg: momentum of SGD")
    weight_decay: float = setting(0.0, "FedAvg: weight decay of AdamW")

    lora_rank: int = setting(0, "LoRA: rank of the adapters; 0 = none. Adapters and the head are all that is trained")
    lora_alpha: float = setting(16.0, "LoRA: alpha; adapters count alpha / rank")
    lora_targets: str = setting(
        "", "LoRA: layers with an adapter, separated by commas; default: query,value, for GPT-2 c_attn"
    )
    lora_dropout: float = setting(0.0, "LoRA: dropout rate of the adapters' inputs; off in evaluation mode")
    lora_from: str | None = setting(None, "LoRA: folder of a PEFT adapter that the client goes on training")

    def __post_init__(self):
        require(0 <= self.dropout < 1, "client_dropout", self.dropout, "a rate in [0, 1)")
        require(self.lora_rank >= 0, "client_lora_rank", self.lora_rank, "0 or more")
        require(0 < self.lora_alpha < float("inf"), "client_lora_alpha", self.lora_alpha, "a positive number")
        require(0 <= self.lora_dropout < 1, "client_lora_dropout", self.lora_dropout, "a rate in [0, 1)")
        if (self.lora_rank or self.lora_from) and self.frozen == "none":
            raise InputError("--client_frozen=none contradicts LoRA, which trains adapters and the head only")
        if self.lora_rank and self.lora_from:
            raise InputError(f"--client_lora_rank={self.lora_rank} and --client_lora_from: an adapter has its own rank")
        require(self.epochs >= 1, "client_epochs", self.epochs, "1 or more")
        require(self.local_batch >= 0, "client_local_batch", self.local_batch, "0 or more")
        require(0 < self.lr < float("inf"), "client_lr", self.lr, "a positive number")
        require(0 <= self.momentum < 1, "client_momentum", self.momentum, "a number in [0, 1)")
        require(0 <= self.weight_decay < float("inf"), "client_weight_decay", self.weight_decay, "0 or more")
        for name in ("epochs", "local_batch", "optimizer", "lr", "momentum", "weight_decay"):
            self._refuse_unused(
                name, self.algorithm == "fedavg", "--client_algorithm=fedavg: FedSGD sends one gradient"
            )
        self._refuse_unused("momentum", self.optimizer == "sgd", "--client_optimizer=sgd: AdamW has none")
        self._refuse_unused("weight_decay", self.optimizer == "adamw", "--client_optimizer=adamw: SGD has none")
        for name in ("lora_alpha", "lora_targets", "lora_dropout"):
            self._refuse_unused(name, self.lora_rank > 0, "--client_lora_rank: it describes new adapters")

    def _refuse_unused(self, name: str, used: bool, needed: str) -> None:
        """Refuse a setting that was given and would be ignored."""
        value = getattr(self, name)
        if not used and value != type(self).__dataclass_fields__[name].default:
            raise InputError(f"--client_{name}={value} needs {needed}; leave it out")

    @property
    def lora(self) -> bool:
        """Whether adapters are trained."""
        return bool(self.lora_rank or self.lora_from)

    @property
    def local(self) -> local_training.Local | None:
        """The local training; None under FedSGD."""
        if self.algorithm == "fedsgd":
            return None
        return local_training.Local(
            self.epochs, self.local_batch, self.optimizer, self.lr, self.momentum, self.weight_decay
        )


@dataclass(frozen=True)
class DefenseConfig:
    """What the client does to its update before sending it, in this order."""

    clip: float | None = setting(
        None, "DP-SGD: rescale every example's own gradient to at most this norm, all tensors together; default: not"
    )
    noise_multiplier: float = setting(
        0.0, "DP-SGD: Gaussian noise on the sum of the clipped gradients, in units of --defense_clip; 0 = none"
    )
    noise: float = setting(0.0, "standard deviation of Gaussian noise on every entry; 0 = none")
    noise_on: Literal["normalised", "raw"] = setting(
        "normalised", "add the noise after dividing each tensor by its norm, or to the gradient as it is"
    )
    prune: float = setting(0.0, "share of each tensor's entries that is set to zero")
    prune_by: Literal["random", "magnitude"] = setting("random", "prune random entries, or the smallest ones")
    sign: bool = setting(False, "send only the sign of every entry")
    quantise: int = setting(
        0, "bits of an entry, rounded to evenly spaced levels up to its tensor's largest entry; 0 = all"
    )
    quantise_by: defenses.Rounding = setting(
        "stochastic", "round up or down at random, to the entry itself on average, or to the nearest level"
    )

    dp_sampling: float = setting(
        1.0, "for epsilon: probability of an example of the client's data to be in one step's batch"
    )
    dp_steps: int = setting(1, "for epsilon: steps in which the client's data are used")
    dp_delta: float = setting(1e-5, "for epsilon: the delta that goes with it")
    epsilon_nominal: float | None = setting(
        None, "the epsilon that is claimed, shown beside the measured one; default: that of clip and noise multiplier"
    )

    def __post_init__(self):
        require(0 < self.dp_sampling <= 1, "defense_dp_sampling", self.dp_sampling, "a probability in (0, 1]")
        require(self.dp_steps >= 1, "defense_dp_steps", self.dp_steps, "1 or more")
        require(0 < self.dp_delta < 1, "defense_dp_delta", self.dp_delta, "a probability in (0, 1)")
        nominal = self.epsilon_nominal
        require(nominal is None or nominal > 0, "defense_epsilon_nominal", nominal, "a positive number")
        require(self.clip is None or 0 < self.clip < float("inf"), "defense_clip", self.clip, "a positive norm")
        require(
            0 <= self.noise_multiplier < float("inf"), "defense_noise_multiplier", self.noise_multiplier,
            "a number of 0 or more",
        )  # fmt: skip
        if self.noise_multiplier and self.clip is None:
            raise InputError(
                f"--defense_noise_multiplier={self.noise_multiplier:g} is in units of --defense_clip, which is not "
                "given; give the clip norm, or --defense_noise with --defense_noise_on=raw"
            )
        require(self.quantise == 0 or 2 <= self.quantise <= 16, "defense_quantise", self.quantise, "0, or 2 to 16 bits")
        require(0 <= self.noise < float("inf"), "defense_noise", self.noise, "a number of 0 or more")
        require(0 <= self.prune < 1, "defense_prune", self.prune, "a share in [0, 1)")


ACCOUNTING = ("dp_sampling", "dp_steps", "dp_delta", "epsilon_nominal")
"""Fields of `DefenseConfig` that only say what epsilon is counted: they change no update."""


@dataclass(frozen=True)
class KnownConfig:
    """What the attacker is told."""

    labels: bool = setting(True, "the attacker knows the labels; otherwise it optimises soft labels")
    lengths: bool = setting(True, "the attacker knows each sentence's length; otherwise only the longest of the batch")
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
    clients: int = setting(4, "clients a round, each with a batch of --batch_size sentences")
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
        self._check_local()
        if self.attack.prior != "none" and not (self.attack.searches and self.attack.moves):
            raise InputError(
                f"--attack_prior={self.attack.prior} judges moves of words, and --attack={self.attack.name} makes "
                "none; use --attack=lamp, or give --attack_moves"
            )
        require(self.num_batches >= 1, "num_batches", self.num_batches, "1 or more")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        require(0 <= self.seed < 2**32, "seed", self.seed, "an integer in [0, 2^32)")

    def _check_local(self) -> None:
        local, size = self.client.local, self.client.local_batch
        if local is None:
            return
        if self.defense.clip is not None:
            raise InputError(
                f"--defense_clip={self.defense.clip:g} rescales every example's gradient, which "
                "--client_algorithm=fedavg does not send; leave one of them out"
            )
        if size and self.batch_size % size:
            raise InputError(
                f"--client_local_batch={size} does not divide --batch_size={self.batch_size}: local steps have equal "
                "numbers of sentences"
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
