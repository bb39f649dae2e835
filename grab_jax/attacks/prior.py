"""A language model that judges token rows: LAMP's prior (arXiv 2202.08827, section 4.1).

Any causal model over the target's vocabulary will do; `python -m grab_jax.train_prior` trains a small one.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grab_jax import losses, models
from grab_jax.types import InputError, Params, Vocabulary


class Prior(NamedTuple):
    """A causal language model and its parameters; `folder` holds its tokenizer."""

    model: models.Model
    params: Params
    folder: str


@lru_cache(maxsize=4)
def load(name: str, words: int, length: int) -> Prior | None:
    """The prior of `--attack_prior`; None for `none`.

    Args:
      name: `none`, a folder, a hub id, or `builtin:NAME`.
      words: rows of the target's word table.
      length: longest row of tokens that is judged.

    Raises:
      InputError: no such model, no causal one, or one of another vocabulary or for shorter rows; one sentence.
    """
    if name == "none":
        return None
    try:
        found = models.load(name, task="causal_lm")
    except InputError as error:
        raise InputError(f"--attack_prior={name} is no causal language model that can be used: {error}") from error
    check_words(name, found.model.config.vocab_size, words)
    room = found.model.max_length - 1  # a start token may come first
    if length > room:
        raise InputError(
            f"--attack_prior={name} judges rows of at most {room} tokens, the data has one of {length}; lower "
            "--data_max_length, or train a prior with more --positions"
        )
    return Prior(found.model, found.params, found.folder)


def check_words(name: str, prior: int, target: int) -> None:
    """Refuse a prior with another number of tokens.

    Raises:
      InputError: they differ.
    """
    if prior != target:
        raise InputError(
            f"--attack_prior={name} has another vocabulary than the model ({prior} tokens, not {target}); train one "
            "for it with python -m grab_jax.train_prior"
        )


def loss(model: models.Model, params: Params, ids: Int[Array, "b t"], vocabulary: Vocabulary) -> Float[Array, ""]:
    """Mean cross entropy (nats) of each token given those before it, padding left out.

    Where the vocabulary wraps no sentence in special tokens, the model's own start token comes first.
    """
    real = (ids != vocabulary.pad).at[:, 0].set(True)
    if vocabulary.cls is None:
        first = jnp.full((len(ids), 1), model.config.bos_token_id, ids.dtype)
        ids, real = jnp.concatenate([first, ids], 1), jnp.concatenate([jnp.ones_like(real[:, :1]), real], 1)
    return losses.next_token(model.apply(params, ids, real), ids, real)
