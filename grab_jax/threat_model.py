"""A run's threat model in words: what the client does, what the attacker is told and what it makes of it."""

from __future__ import annotations

from typing import Any

from grab_jax import simulate, views
from grab_jax.config import Config
from grab_jax.types import Defended


def setting(config: Config, model: Any) -> list[str]:
    """Sentences on the client: its work, its mode, what is trained, its defense."""
    dropout = f"dropout {config.client.dropout:g} on" if config.client.dropout else "dropout off (evaluation mode)"
    task = "next-token prediction" if config.model.task == "causal_lm" else "sequence classification"
    frozen = "word and position embeddings frozen" if config.client.frozen == "embeddings" else "everything trained"
    if config.client.lora:
        head = "" if config.model.task == "causal_lm" else " and the classification head"
        frozen = f"LoRA, only adapters{head} trained ({_adapters(config)})"
    return [
        f"{_work(config)} of {task} with {config.model.name} ({model.family}, width {model.width}, "
        f"{model.config.num_hidden_layers} layers), {_count(config.batch_size, 'sentence')} per client batch.",
        *_averaged(config),
        f"Client in {'training' if config.client.dropout else 'evaluation'} mode: {dropout}; {frozen}.",
        *_defended(config),
    ]


def _averaged(config: Config) -> list[str]:
    """One sentence on clients whose mean alone is seen."""
    count = config.client.count
    if count == 1:
        return []
    own = _count(config.batch_size // count, "sentence")
    return [
        f"A client batch is that of {count} clients with {own} each, whose updates are averaged before they are seen."
    ]


def _adapters(config: Config) -> str:
    said = config.client
    if said.lora_from:
        return f"going on from {said.lora_from}"
    where = said.lora_targets or "the usual layers"
    dropped = f", dropout {said.lora_dropout:g}" if said.dropout else ""  # evaluation mode switches it off
    return f"rank {said.lora_rank}, alpha {said.lora_alpha:g}, on {where}{dropped}"


def _work(config: Config) -> str:
    """What the client computes before it sends."""
    if (local := config.client.local) is None:
        return "One FedSGD step"
    how = f"SGD, momentum {local.momentum:g}" if local.optimizer == "sgd" else f"AdamW, decay {local.weight_decay:g}"
    steps = _count(local.steps(config.batch_size), "local step")
    return f"FedAvg: {steps} ({_count(local.epochs, 'epoch')}; {how}; learning rate {local.lr:g})"


def _told_local(config: Config) -> list[str]:
    """One sentence on what the attacker knows of the local training and what it makes of it, if there is any."""
    if (local := config.told_local) is None:
        return []
    missing = {"learning rate": local.lr, "number of steps": local.epochs, "optimizer": local.optimizer}
    untold = [name for name, value in missing.items() if value is None]
    if untold:
        return [
            f"It is not told the client's {' or '.join(untold)}, and takes the change of the weights for a gradient."
        ]
    if local.one_gradient(config.batch_size):
        return ["It knows the learning rate, so that the change of the weights after one step tells the gradient."]
    if config.attack.searches and local.signs_alone(config.batch_size):
        if config.attack.view == "auto":
            return ["One step of AdamW leaves little more than the gradient's signs, which it compares."]
        return ["It takes the change of the weights after one step of AdamW for a gradient, whose size is lost."]
    if config.attack.searches:
        return ["It knows the client's optimizer, learning rate and steps, and repeats the local training."]
    return ["It takes the change of the weights for a sum of gradients."]


def _defended(config: Config) -> list[str]:
    """One sentence on what is done to the update, if anything is."""
    said, parts = config.defense, []
    if said.clip is not None:
        parts.append(f"every example's gradient is rescaled to a norm of at most {said.clip:g}")
    if said.noise_multiplier:
        deviation = said.noise_multiplier * said.clip
        parts.append(f"Gaussian noise of standard deviation {deviation:g} is added to every entry of their sum")
    if said.noise:
        on = "each tensor is divided by its norm, then " if said.noise_on == "normalised" else ""
        parts.append(f"{on}Gaussian noise of standard deviation {said.noise:g} is added to every entry")
    if said.prune:
        which = "random" if said.prune_by == "random" else "the smallest"
        parts.append(f"{which} {100 * said.prune:g} % of each tensor's entries are set to zero")
    if said.sign:
        parts.append("only the sign of every entry is sent")
    if said.quantise:
        how = "at random to one of the two" if said.quantise_by == "stochastic" else "to the"
        parts.append(f"entries are rounded {how} nearest of {2**said.quantise - 1} levels a tensor")
    if config.client.wire != "float32":
        parts.append(f"it is sent in {config.client.wire}")
    return [f"Before the update leaves the client: {'; '.join(parts)}."] if parts else []


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def assumptions(config: Config, model: Any) -> list[str]:
    """Sentences on the attacker: what it sees, what it is told, and what it makes of that."""
    exact = "" if _defended(config) else "exact float32 "
    what = "gradient" if config.client.local is None else "change of the weights"
    whose = "one client's" if config.client.count == 1 else f"the mean of {config.client.count} clients'"
    sent = "as it is sent" if config.client.count == 1 else "and no client's own"
    server = f"Honest-but-curious server: it sees {whose} {exact}{what} {sent}, and the weights it sent."
    local = _told_local(config)
    if config.attack.name == "span":
        return [server, *local, *_told_span(config, model)]
    if config.attack.name == "dager":
        return [server, *local, *_told_dager(config, model)]
    return [server, *local, *_told_search(config), *([_begun(config, model)] if config.attack.init == "span" else [])]


def _begun(config: Config, model: Any) -> str:
    return (
        "It first decodes the first attention layer's gradient (span decoding), holds the tokens and masks that this "
        f"proves, and searches the rest; a batch of as many tokens as {_room(config, model)} it searches knowing "
        "nothing."
    )


def _room(config: Config, model: Any) -> str:
    """What a batch's tokens must stay below, for their inputs to show in the first attention layer's gradients."""
    if not config.client.lora:
        return f"the model is wide ({model.width})"
    if _adapters_count(config):
        alone = config.client.dropout and config.client.lora_dropout
        return "an adapter has ranks" if alone else "the first attention layer's adapters have ranks together"
    return "the adapters' rank" + (f" ({config.client.lora_rank})" if config.client.lora_rank else "")


def _adapters_count(config: Config) -> bool:
    """Whether LoRA's B is not zero in every step, so that the gradient of A holds the inputs themselves."""
    local = config.client.local
    return bool(config.client.lora_from) or bool(local and local.steps(config.batch_size) > 1)


def _told_span(config: Config, model: Any) -> list[str]:
    """Span decoding takes of `--known_*` the dropout rate only, and no setting of another attack."""
    rate, lora = config.client.dropout, config.client.lora
    if lora and not _adapters_count(config):
        used = "the gradients of the first attention layer's adapters only (of their B), with A"
        told = "It needs a client without dropout" + (", which this one is not." if rate else ".")
    elif rate:
        used = "the first attention layer's query, key and value gradients only, with the weights of that layer"
        told = f"It knows the dropout rate ({rate:g})" if config.known.rate else "It is not told the dropout rate"
        told += ", and decodes the masks."
    else:
        used = "at most the first two attention layers' query, key and value gradients, with these layers' weights"
        told = "It knows that the client trains without dropout."
    if lora and _adapters_count(config):
        used = "the gradients of the first attention layer's adapters only, with the weights of that layer"
        if not config.client.lora_from:
            used += " (as far as what local steps add to A shows above its rounding)"
    return [
        f"It uses {used} and the word and position embeddings.{_told_head(config)}",
        "It is not told the labels, the sentences' lengths or the batch size, whatever --known_labels and "
        "--known_lengths say.",
        told,
        f"The batch holds fewer tokens than {_room(config, model)}; any other batch is not testable.",
    ]


def _told_head(config: Config) -> str:
    """A further sentence where the last tokens of sentences are read off the output layer."""
    trained = config.client.frozen == "none" and config.defense.clip is None
    trained &= config.client.count == 1 and config.client.local is None
    if config.model.task != "causal_lm" or not trained:
        return ""
    return " For the last token of every sentence it uses the gradient of the tied output layer and all weights."


def _told_dager(config: Config, model: Any) -> list[str]:
    """DAGER takes nothing of `--known_*`."""
    ends = "It takes the client for one that trains without dropout" + (
        ", which it does not." if config.client.dropout else "."
    )
    return [
        "It uses the first two attention layers' gradients, the ranks of the first ten's, the weights and the word and "
        "position embeddings.",
        "It is not told the labels or the sentences' lengths, whatever --known_labels and --known_lengths say. It "
        "knows the batch size, and returns as many sentences where not all are found.",
        ends,
        f"The batch holds fewer tokens than the model is wide ({model.width}); any other batch is not testable.",
    ]


def _told_search(config: Config) -> list[str]:
    mode = {
        "learn": "It knows the dropout rate and sites and learns the masks.",
        "off": "It ignores dropout (evaluation mode).",
        "random": "Its model is in training mode too, with dropout masks of its own, drawn once.",
        "true": "Control: it is given the client's true dropout masks.",
    }
    said = [
        "The attacker knows the batch size, the architecture and which parameters are frozen.",
        "It is told every label." if config.known.labels else "It is not told the labels.",
        "It is told every sentence's length."
        if config.known.lengths
        else "It is told only the longest length of the batch.",
    ]
    if config.client.dropout:
        said.append(mode[config.attack.masks])
    said += _adapted(config)
    if config.attack.tokens == "true":
        said.append("Control: it is given the true tokens.")
    if config.attack.prior != "none":
        said.append(f"It has a language model for the model's tokenizer, {config.attack.prior}, to judge word order.")
    return said


def _adapted(config: Config) -> list[str]:
    """One sentence on what a search knows of the defense, if there is one to follow."""
    client = simulate.defended(config)
    if client == Defended() and config.attack.view in ("auto", "all"):
        return []
    if config.attack.view == "all":
        return ["It knows nothing of the defense and matches as if there were none (--attack_view=all)."]
    found, parts = views.through(config.attack.view, client), []
    if found.clip is not None:
        parts.append("clips every example of a candidate as the client does")
    if found.normalised:
        parts.append("divides each tensor of a candidate's gradient by its norm")
    if found.signs:
        parts.append("counts an entry only where its sign is wrong")
    elif found.pruned:
        parts.append("compares the entries that were sent only")
    told = "It knows the defense and adapts" if config.attack.view == "auto" else "It adapts"
    return [f"{told}: it {' and '.join(parts)} (--attack_view={config.attack.view})."]
