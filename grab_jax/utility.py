"""What a setting costs: the model trained federatedly under the same client and defence, and its held-out accuracy.

Every round some clients send what `simulate` lets leave them, the server averages it and takes one step of its
optimiser (FedOpt, Reddi et al., ICLR 2021, arXiv 2003.00295; with plain SGD this is FedSGD). Changes of the weights are
added to them instead (FedAvg), unless the defence took their size. The attack has no part in it: cells of a sweep that
differ in nothing else share one training.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Key

from grab_jax import about, data, metrics, models, simulate, tuning
from grab_jax import folder as folders
from grab_jax.client_config import ACCOUNTING
from grab_jax.config import Config
from grab_jax.models import peft
from grab_jax.types import Batch, InputError

FILE = "utility.json"
MOST_HELD_OUT, ROWS = 1000, 64
"""Sentences the model is judged on at most, and of one evaluation step."""
PURPOSE = 2**31
"""Folded into the seed's key: apart from the attacked clients and the attack."""

Flat = Mapping[str, Array]


def settings(config: Config) -> dict[str, Any]:
    """What decides the result: two configs with equal settings share one training, whatever epsilon they count."""
    named = ("model", "data", "batch_size", "client", "defense", "seed", "utility")
    values = dataclasses.asdict(config)
    values["defense"] = {name: value for name, value in values["defense"].items() if name not in ACCOUNTING}
    adapter = {"adapter": peft.digest(config.client.lora_from)} if config.client.lora_from else {}
    return json.loads(json.dumps({"code": about.code_version(), **{name: values[name] for name in named}, **adapter}))


def known(config: Config, folder: Path) -> tuple[dict[str, Any], Path] | None:
    """The result in a run folder, or in one beside it, where the settings are the same, and this folder."""
    wanted = settings(config)
    for path in (folder / FILE, *sorted(folder.parent.glob(f"*/{FILE}"))):
        if path.is_file() and (found := folders.read_json(path)).get("settings") == wanted:
            return found, path.parent
    return None


def due(config: Config, folder: Path) -> bool:
    """Whether it is asked for, and the folder does not hold it under these settings."""
    if not config.utility.on:
        return False
    path = folder / FILE
    return not path.is_file() or folders.read_json(path).get("settings") != settings(config)


def measure(
    config: Config, loaded: models.Loaded, trainable: Flat, frozen: Flat, tokenizer: Any
) -> tuple[dict[str, Any], Flat]:
    """Train and evaluate.

    Returns: the result and the trained weights. The result holds `accuracy` on held-out sentences in percent with its
    95 % interval (Wilson) `accuracy_low` and `accuracy_high`; `accuracy_before` training; `majority`, the share of the
    commonest label among them; the counts.

    Raises:
      InputError: no labels, a language model, or too few sentences.
    """
    begin, model = time.monotonic(), loaded.model
    train, held_out = _split(config, model)
    encode = _encoder(config, model, tokenizer, [*train, *held_out])
    judge = _judge(model, frozen, [encode(held_out[i : i + ROWS], i) for i in range(0, len(held_out), ROWS)])
    before, trained = judge(trainable), trainable
    optimizer = _optimizer(config)
    step = jax.jit(lambda state, weights, update: _apply(optimizer, state, weights, update))
    state = optimizer.init(dict(trainable))
    key = jax.random.fold_in(jax.random.key(config.seed), PURPOSE)
    for turn, groups in enumerate(_rounds(config, len(train))):
        clients = [encode([train[i] for i in group], turn * len(groups) + n) for n, group in enumerate(groups)]
        update = _mean(_sent(jax.random.fold_in(key, turn), config, loaded, trained, frozen, clients, tokenizer))
        state, trained = step(state, trained, update)
    hits = judge(trained)
    low, high = metrics.share_interval(hits, len(held_out))
    labels = np.bincount([s.label for s in held_out])
    percent = lambda count: 100.0 * float(count) / len(held_out)  # noqa: E731
    found = {
        "settings": settings(config),
        "accuracy": percent(hits),
        "accuracy_low": low,
        "accuracy_high": high,
        "accuracy_before": percent(before),
        "majority": percent(labels.max()),
        "held_out": len(held_out),
        "trained_on": len(train),
        "seconds": time.monotonic() - begin,
    }
    return found, trained


def _split(config: Config, model: models.Model) -> tuple[list[data.Sentence], list[data.Sentence]]:
    """Training and held-out sentences: shuffled once, the same for every seed of a run."""
    if model.task != "classification":
        raise InputError("--utility trains classifiers; leave it out with --model_task=causal_lm")
    found = data.sentences(config.data)
    if any(s.label is None for s in found):
        raise InputError(f"--utility needs labels, and --data={config.data.name} has sentences without one")
    order = np.random.default_rng(0).permutation(len(found))
    count = min(MOST_HELD_OUT, round(config.utility.held_out * len(found)))
    train = [found[i] for i in order[count:]]
    if not count or len(train) < config.batch_size:
        raise InputError(
            f"--utility has {len(train)} sentences to train on and {count} held out of --data={config.data.name}; it "
            f"needs one at least, and a batch of {config.batch_size} to train on"
        )
    return train, [found[i] for i in order[:count]]


def _encoder(config: Config, model: models.Model, tokenizer: Any, found: Sequence[data.Sentence]):
    """Sentences -> a client batch, all padded to one length, so that one program serves them."""
    longest = min(config.data.max_length, model.max_length)
    width = min(longest, data.bucket(max(len(tokenizer(s.text, verbose=False)["input_ids"]) for s in found)))

    def encode(group: Sequence[data.Sentence], index: int) -> data.ClientBatch:
        batch = data.encode(group, tokenizer, index, longest, model.num_labels)
        ids, attention, labels = (np.asarray(part) for part in batch.batch)
        wide = ((0, 0), (0, width - ids.shape[1]))
        ids, attention = np.pad(ids, wide, constant_values=tokenizer.pad_token_id), np.pad(attention, wide)
        return batch._replace(batch=Batch(jnp.asarray(ids), jnp.asarray(attention), jnp.asarray(labels)))

    return encode


def _judge(model: models.Model, frozen: Flat, batches: Sequence[data.ClientBatch]):
    """Weights -> how many held-out sentences they classify right, in evaluation mode."""

    @jax.jit
    def right(trainable, ids, attention, labels):
        logits = model.apply(tuning.merge(trainable, frozen), ids, attention)
        return (logits.argmax(-1) == labels).sum()

    return lambda trainable: sum(int(right(dict(trainable), *batch.batch)) for batch in batches)


def _optimizer(config: Config) -> optax.GradientTransformation:
    """The server's step on what it is sent: a gradient, or under FedAvg a change of the weights, its direction.

    Such a change is the negative of a gradient to the optimiser; it is added as it is where it kept its size, which
    signs and normalised tensors do not.
    """
    chosen = {"adam": optax.adam, "sgd": optax.sgd}[config.utility.optimizer](config.utility.lr)
    if config.client.local is None:
        return chosen
    defended = simulate.defended(config)
    return optax.chain(optax.scale(-1.0), chosen if defended.signs or defended.normalised else optax.sgd(1.0))


def _apply(optimizer: optax.GradientTransformation, state: Any, weights: Flat, update: Flat):
    changes, state = optimizer.update(update, state, weights)
    return state, optax.apply_updates(weights, changes)


def _rounds(config: Config, count: int):
    """Rows of every client of every round: passes over the training sentences, each shuffled."""
    size, rng = config.batch_size, np.random.default_rng(config.seed)
    waiting: list[int] = []
    for _ in range(config.utility.rounds):
        while len(waiting) < size * config.utility.clients:
            waiting += rng.permutation(count).tolist()
        yield [[waiting.pop(0) for _ in range(size)] for _ in range(config.utility.clients)]


def _sent(
    key: Key[Array, ""], config: Config, loaded: models.Loaded, trainable: Flat, frozen: Flat, clients, tokenizer: Any
) -> list[Flat]:
    """What each client sends: dropout, defences and precision as in the run."""
    words = data.vocabulary(tokenizer)
    one = lambda batch: simulate.simulate(key, loaded.model, trainable, frozen, batch, words, config)  # noqa: E731
    return [one(batch).problem.observed for batch in clients]


def _mean(updates: Sequence[Flat]) -> dict[str, Array]:
    return {path: sum(update[path] for update in updates) / len(updates) for path in updates[0]}
