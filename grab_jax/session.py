"""What a run works on: model, weights, client batches and the order of the work, made from a configuration."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Key

from grab_jax import about, data, local_training, models, plan, privacy, sharding, simulate, trackers, tuning
from grab_jax.attacks import prior
from grab_jax.client_config import ClientConfig
from grab_jax.config import Config, identity
from grab_jax.models import lora, peft
from grab_jax.types import InputError

CLIENT, ATTACK, HEAD = 0, 1, 2
"""Purposes of the keys split from `--seed`."""


class Session(NamedTuple):
    """What a run works on; `batches` ends with the control batch where one is needed."""

    config: Config
    loaded: models.Loaded
    trainable: dict[str, Array]
    frozen: dict[str, Array]
    tokenizer: Any
    batches: list[data.ClientBatch]
    controls: frozenset[int]
    ids: list[str]
    notes: list[str]
    plan: plan.Plan
    privacy: dict[str, Any] | None = None


def prepare(config: Config, world: sharding.World = sharding.ALONE) -> Session:
    """Load model and data, form batches and the plan; matrix products are exact float32 from here on, on any device.

    Args:
      world: who shares the client batches; the plan has the groups of this process.
    """
    trackers.check(config)
    jax.config.update("jax_default_matmul_precision", "highest")
    head = keys(config)[HEAD]
    notes: list[str] = []
    loaded = models.load(
        config.model.name,
        task=config.model.task,
        revision=config.model.revision,
        dropout=config.client.dropout or None,
        num_labels=config.model.num_labels,
        key=jax.random.clone(head),
    )
    if config.client.lora:
        loaded = _with_adapters(config, loaded, jax.random.fold_in(head, 1))
    tokenizer = data.load_tokenizer(loaded.folder)
    batches, controls, said = _batches(config, loaded.model, tokenizer)
    params = jax.device_put(loaded.params)
    frozen_ = lora.is_frozen if config.client.lora else tuning.freezes(loaded.model, config.client.frozen)
    trainable, frozen = tuning.split(params, frozen_)
    work = plan.make(config, loaded.model, trainable, batches, world)
    notes += [*loaded.notes, *said]
    if config.attack.searches:
        notes += local_training.notes(config.told_local)
    if config.client.dropout == 0 and config.attack.masks == "learn" and config.attack.searches:
        notes.append("the client uses no dropout, so there are no masks to learn")
    notes += _prior(config, loaded.model, tokenizer, batches)
    if config.attack.masks == "true" or config.attack.tokens == "true":
        notes.append("control run: the attacker is given a truth it would not have; this is not an attack")
    adapter = [peft.digest(config.client.lora_from)] if config.client.lora_from else []
    ids = [_identifier(config, batch, adapter) for batch in batches]
    session = Session(config, loaded, trainable, frozen, tokenizer, batches, controls, ids, notes, work)
    accounted = _accounted(session)
    return session._replace(privacy=accounted, notes=[*notes, *privacy.notes(accounted)])


def form(config: Config, trainable: Mapping[str, Array]) -> tuple[Any, ...]:
    """What an attack's compiled programs know of the client: how it trains, its defense, the tensors it sends."""
    dense = bool(config.defense.noise or config.defense.noise_multiplier)
    tensors = tuple((path, value.shape) for path, value in trainable.items())
    return config.told_local, simulate.defended(config), dense, config.defense.quantise, config.client.wire, tensors


def _accounted(session: Session) -> dict[str, Any] | None:
    """Epsilon as declared and as measured on the clients to attack."""
    weights = session.loaded.model, session.trainable, session.frozen
    attacked = [batch for i, batch in enumerate(session.batches) if i not in session.controls]
    clients = [simulate.measure(keys(session.config)[CLIENT], *weights, b, session.config) for b in attacked]
    found = privacy.together([one for one in clients if one is not None])
    return privacy.account(session.config.defense, session.config.batch_size, found, session.config.client.count)


def _with_adapters(config: Config, loaded: models.Loaded, key: Key[Array, ""]) -> models.Loaded:
    """The model with LoRA adapters: new ones, or those of a PEFT folder."""
    said = config.client
    model, params = lora.add(key, loaded.model, loaded.params, adapters(said))
    if said.lora_from:
        params = peft.read(said.lora_from, model, params)
    return dataclasses.replace(loaded, model=model, params=params)


def adapters(said: ClientConfig) -> lora.Lora:
    """The adapters' settings: as told, or those of a PEFT folder."""
    if said.lora_from:
        return peft.read_config(said.lora_from)
    targets = tuple(filter(None, said.lora_targets.split(",")))
    return lora.Lora(said.lora_rank, said.lora_alpha, targets, said.lora_dropout)


def _prior(config: Config, model: Any, tokenizer: Any, batches: Sequence[data.ClientBatch]) -> list[str]:
    """A note on the language model that judges moves; one of another vocabulary is refused now, not in the attack."""
    attack, longest = config.attack, max(batch.batch.ids.shape[1] for batch in batches)
    if not (attack.searches and attack.moves):
        return []
    judge = prior.load(attack.prior, model.config.vocab_size, longest)
    if judge is None:
        return ["no language model judges the moves of words (--attack_prior), only the matching loss"]
    theirs, ours = data.load_tokenizer(judge.folder).get_vocab(), tokenizer.get_vocab()
    other = next((token for token, number in ours.items() if theirs.get(token) != number), None)
    if other is not None:
        raise InputError(
            f"--attack_prior={attack.prior} has another vocabulary than the model: {other!r} is token {ours[other]} "
            f"here, {theirs.get(other)} there; train one for it with python -m grab_jax.train_prior"
        )
    return []


def keys(config: Config) -> Key[Array, " 3"]:
    """The keys of `CLIENT`, `ATTACK` and `HEAD`, from the seed."""
    return jax.random.split(jax.random.key(config.seed), 3)


def _batches(config: Config, model: Any, tokenizer: Any) -> tuple[list[data.ClientBatch], frozenset[int], list[str]]:
    """The batches to attack, and one control batch of unrelated text where a single batch leaves no baseline."""
    found = data.sentences(config.data)
    longest = min(config.data.max_length, model.max_length)
    shape = {"batch_size": config.batch_size, "longest": longest, "num_labels": model.num_labels}
    batches = data.batches(found, tokenizer, count=config.num_batches, **shape)
    highest = max(int(batch.batch.ids.max()) for batch in batches)
    if highest >= model.config.vocab_size:
        raise InputError(
            f"the tokenizer gives token id {highest}, but the model {config.model.name} has {model.config.vocab_size} "
            "word embeddings; give the folder its own tokenizer"
        )
    notes = []
    cut = sum(sum(batch.truncated) for batch in batches)
    if cut:
        notes.append(f"warning: {cut} sentence(s) longer than {longest} tokens were cut")
    if any(s.label is None for batch in batches for s in batch.sentences):
        notes.append("the data has no labels: every unlabelled sentence was given label 0")
    if config.num_batches > 1:
        return batches, frozenset(), notes
    other = _unrelated(found, config, len(batches[0].batch.ids[0]), tokenizer)
    control = data.encode(other, tokenizer, 1, longest, model.num_labels)
    return [*batches, control], frozenset({1}), notes


def _unrelated(found: Sequence[data.Sentence], config: Config, width: int, tokenizer: Any) -> list[data.Sentence]:
    """Bundled sentences that are not attacked, of the batch's bucket where possible."""
    attacked = {sentence.text for sentence in found[: config.batch_size]}
    bundled = data.sentences(dataclasses.replace(config.data, name="builtin", start=0))
    others = [s._replace(row=-1 - s.row) for s in reversed(bundled) if s.text not in attacked]
    fits = lambda s: data.bucket(len(tokenizer(s.text)["input_ids"])) == width  # noqa: E731
    most = min(config.batch_size, len(others)) // config.client.count * config.client.count
    return sorted(others, key=lambda s: not fits(s))[:most]


def _identifier(config: Config, batch: data.ClientBatch, adapter: list[str]) -> str:
    rows = [(s.text, s.label, s.row) for s in batch.sentences]
    text = json.dumps([identity(config), about.code_version(), batch.index, rows, *adapter], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def simulated(session: Session, index: int) -> simulate.Simulated:
    """Run the client of one batch."""
    return simulate.simulate(
        keys(session.config)[CLIENT], session.loaded.model, session.trainable, session.frozen,
        session.batches[index], data.vocabulary(session.tokenizer), session.config,
    )  # fmt: skip
