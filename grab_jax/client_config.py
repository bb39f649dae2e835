"""The settings of the simulated client: what it trains, how, and what it does to its update before it is seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from grab_jax import defenses, local_training
from grab_jax.setting import require, setting
from grab_jax.types import InputError


@dataclass(frozen=True)
class ClientConfig:
    """What the simulated client does."""

    dropout: float = setting(0.1, "dropout rate at every site of the client's model; 0 = evaluation mode")
    frozen: Literal["embeddings", "none"] = setting(
        "embeddings", "freeze word and position embeddings, or train everything"
    )
    count: int = setting(
        1,
        "clients whose updates are averaged before the server sees them (secure aggregation), a number it knows; the "
        "sentences of a batch are shared out equally, in order",
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
        require(self.count >= 1, "client_count", self.count, "1 or more")
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
            self.epochs, self.local_batch, self.optimizer, self.lr, self.momentum, self.weight_decay, self.count
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
