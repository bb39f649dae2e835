"""Train a small causal language model over a model's tokenizer, for `--attack_prior` (LAMP judges word order with it).

    python -m grab_jax.train_prior --data=public.txt --model=builtin:bert-mini --out=runs/prior

Public text of the kind that is attacked serves best; text that is attacked would make the measurement void. The folder
loads with Hugging Face transformers as a GPT-2. An interrupted training continues when the same command is given again.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from grab_jax import command, data, flags, folder, interrupts, models
from grab_jax.attacks import prior
from grab_jax.checkpoint import Checkpoints
from grab_jax.config import DataConfig, TrainPriorConfig
from grab_jax.models import convert
from grab_jax.progress import Display
from grab_jax.types import InputError, Params, Vocabulary

Rows = Int[np.ndarray, "n t"]
SETTINGS, STATE = "prior.json", "state"
WARM_UP = 0.05
SCORED = 64
"""Rows scored at once."""


class State(NamedTuple):
    """What a checkpoint holds; `loss` is a running mean."""

    params: Params
    optimizer: Any
    step: Int[np.ndarray, ""]
    loss: Float[np.ndarray, ""]


def train(config: TrainPriorConfig) -> float:
    """Write the folder `config.out` and return the perplexity on held-out sentences.

    Raises:
      InputError: bad input, in one sentence.
    """
    for name, meaning in (("data", "the text to train on"), ("out", "the folder to write")):
        if not getattr(config, name):
            raise InputError(f"--{name} must be given: {meaning}")
    out = Path(config.out).expanduser()
    _open(out, config)
    source = convert.resolve(config.model)
    tokenizer, words = data.load_tokenizer(str(source)), convert.read_config(source).vocab_size
    vocabulary, model = data.vocabulary(tokenizer), _model(config, tokenizer, words)
    rows, held_out = split(encode(sentences(config.data), tokenizer, config.length), config.held_out, config.seed)
    if max(int(part.max()) for part in (rows, held_out)) >= words:
        raise InputError(f"the tokenizer of {config.model} gives token ids past its {words} word embeddings")
    display = Display("auto", out / "log.txt")
    try:
        display.say(f"{len(rows)} rows to train on, {len(held_out)} held out, {words} tokens")
        with interrupts.deferred():
            params = _descend(config, model, vocabulary, rows, out / STATE, display)
        perplexity = math.exp(score(model, params, held_out, vocabulary))
        display.say(f"held-out perplexity {perplexity:.1f} ({len(held_out)} rows)")
    finally:
        display.close()
    models.save(str(out), model, params, half=True)
    tokenizer.save_pretrained(out)
    folder.write_json(out / SETTINGS, _described(config) | {"perplexity": perplexity, "held_out_rows": len(held_out)})
    shutil.rmtree(out / STATE, ignore_errors=True)
    return perplexity


def _open(out: Path, config: TrainPriorConfig) -> None:
    """A new folder, or the unfinished one of the same settings."""
    if (out / SETTINGS).is_file():
        old = json.loads((out / SETTINGS).read_text())
        changed = [name for name, value in _described(config).items() if old.get(name) != value]
        if changed or "perplexity" in old:
            why = f"has other settings ({', '.join(changed)})" if changed else "is finished"
            raise InputError(f"--out={config.out} holds a prior that {why}; give another folder, or delete it")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out={config.out} exists and holds no prior; give an empty or new folder")
    out.mkdir(parents=True, exist_ok=True)
    folder.write_json(out / SETTINGS, _described(config))


def _described(config: TrainPriorConfig) -> dict[str, Any]:
    """The settings that determine the weights."""
    return {name: value for name, value in vars(config).items() if name not in ("out", "save_every")}


def _model(config: TrainPriorConfig, tokenizer: Any, words: int) -> models.Model:
    special = {
        "bos_token_id": tokenizer.cls_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
        "eos_token_id": tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    sizes = (config.width, config.layers, config.heads, config.positions)
    return models.build(convert.gpt2_config(words, *sizes, **special), "causal_lm", dropout=0.0)


# --- text -------------------------------------------------------------------------------------------------


def sentences(sources: str) -> list[str]:
    """Different sentences of data names or files separated by commas; paragraphs are cut at full stops."""
    texts = [s.text for name in sources.split(",") for s in data.sentences(DataConfig(name=name.strip()))]
    parts = (part for text in texts for part in re.split(r'(?<=[.!?])\s+(?=[A-Z"])', " ".join(text.split())))
    return list(dict.fromkeys(part for part in parts if part))


def encode(found: list[str], tokenizer: Any, length: int) -> Rows:
    """Padded rows of tokens as the client has them; longer sentences give several."""
    special = tokenizer("")["input_ids"]
    size = length - len(special)
    pieces = tokenizer(found, add_special_tokens=False, verbose=False)["input_ids"]
    cut = [ids[i : i + size] for ids in pieces for i in range(0, len(ids), size)]
    wrap = (lambda ids: [special[0], *ids, special[-1]]) if len(special) == 2 else (lambda ids: ids)
    rows = np.full((len(cut), length), tokenizer.pad_token_id, np.int32)
    for row, ids in zip(rows, map(wrap, cut), strict=True):
        row[: len(ids)] = ids
    return rows


def split(rows: Rows, share: float, seed: int) -> tuple[Int[np.ndarray, "m t"], Int[np.ndarray, "k t"]]:
    """Rows to train on and rows held out.

    Raises:
      InputError: too few for both.
    """
    order = np.random.default_rng(seed).permutation(len(rows))
    count = max(1, round(share * len(rows)))
    if count >= len(rows):
        raise InputError(f"--data gives {len(rows)} row(s), too few to hold some out; give more text")
    return rows[order[count:]], rows[order[:count]]


# --- training ---------------------------------------------------------------------------------------------


def _descend(config: TrainPriorConfig, model, vocabulary: Vocabulary, rows: Rows, saved: Path, display: Display):
    """AdamW on random batches; batch i depends on the seed and i only, so that a resumed training is the same."""
    rate = optax.warmup_cosine_decay_schedule(0.0, config.lr, math.ceil(WARM_UP * config.steps), config.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.01))
    step = _step(model, optimizer, vocabulary)
    params = jax.jit(model.init)(jax.random.key(config.seed))
    state, keeper = State(params, optimizer.init(params), np.zeros((), np.int32), np.zeros(())), Checkpoints(saved)
    try:
        state = _restored(keeper, state, display)
        said = time.monotonic()
        while state.step < config.steps:
            chosen = np.random.default_rng([config.seed, int(state.step)]).integers(0, len(rows), config.batch)
            params, moments, loss = step(state.params, state.optimizer, jnp.asarray(rows[chosen]))
            done = int(state.step) + 1
            mean = state.loss + (np.float64(loss) - state.loss) * max(0.02, 1 / done)
            state = State(params, moments, np.asarray(done, np.int32), np.asarray(mean))
            if time.monotonic() - said > 10 or done in (1, config.steps):
                display.say(f"step {done}/{config.steps}: loss {float(mean):.3f} nats a token")
                said = time.monotonic()
            if done % config.save_every == 0:
                keeper.save(state)
            interrupts.check()
    except KeyboardInterrupt:
        keeper.save(state)
        raise
    finally:
        keeper.close()
    return state.params


def _restored(keeper: Checkpoints, blank: State, display: Display) -> State:
    found = keeper.restore(blank)
    if found is None:
        return blank
    display.say(f"continuing from step {int(found.step)}")
    return State(*found)


def _step(model: models.Model, optimizer: optax.GradientTransformation, vocabulary: Vocabulary) -> Callable[..., Any]:
    @jax.jit
    def step(params: Params, moments: Any, ids: Int[Array, "b t"]):
        loss, gradient = jax.value_and_grad(lambda params: prior.loss(model, params, ids, vocabulary))(params)
        change, moments = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, change), moments, loss

    return step


def score(model: models.Model, params: Params, rows: Rows, vocabulary: Vocabulary) -> float:
    """Mean cross entropy of rows in nats a token."""
    one = jax.jit(lambda ids: jax.vmap(lambda row: prior.loss(model, params, row[None], vocabulary))(ids))
    whole = np.pad(rows, ((0, -len(rows) % SCORED), (0, 0)), mode="edge")
    losses = np.concatenate([np.asarray(one(whole[i : i + SCORED])) for i in range(0, len(whole), SCORED)])
    weights = (rows != vocabulary.pad).sum(1) - (vocabulary.cls is not None)
    return float((losses[: len(rows)] * weights).sum() / weights.sum())


# --- command line -----------------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    """Train what the flags say; 0 when done, 2 for bad input, 130 when interrupted."""
    return command.guarded(argv, lambda: print(f"{train(flags.parsed(kind=TrainPriorConfig)):.1f}"))


if __name__ == "__main__":
    command.entry(main, TrainPriorConfig())
