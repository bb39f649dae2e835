"""Models: pure functions over plain parameter dicts; Flax stays inside this package.

>>> loaded = models.load("builtin:bert-mini", dropout=0.1)
>>> logits = loaded.model.apply(loaded.params, ids, attention, masks=None)
"""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from grab_jax.models import bert, gpt2, taps
from grab_jax.models.layers import Site, Sites, adapter_masks
from grab_jax.types import InputError, Masks, Params

__all__ = ["ARCHITECTURES", "Model", "Site", "Task", "build", "load", "save"]

Task = Literal["classification", "masked_lm", "causal_lm"]

ARCHITECTURES = {
    ("bert", "classification"): (bert.BertClassifier, bert.sites),
    ("bert", "masked_lm"): (bert.BertMaskedLM, bert.sites),
    ("roberta", "classification"): (bert.RobertaClassifier, bert.sites),
    ("gpt2", "classification"): (gpt2.GPT2Classifier, gpt2.sites),
    ("gpt2", "causal_lm"): (gpt2.GPT2LM, gpt2.sites),
}

_RATES = {
    "bert": ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
    "roberta": ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
    "gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
}
_TABLES = {
    "bert": ("bert/embeddings/word_embeddings/embedding", "bert/embeddings/position_embeddings/embedding"),
    "roberta": (
        "roberta/embeddings/word_embeddings/embedding",
        "roberta/embeddings/position_embeddings/embedding",
    ),
    "gpt2": ("transformer/wte/embedding", "transformer/wpe/embedding"),
}


@dataclass(frozen=True, eq=False)
class Model:
    """A model as functions of its parameters; compiled programs belong to one such object (see `load`).

    `config` is the Hugging Face config; `sites` the dropout sites in call order; `word_table` and `position_table`
    the `"/"`-joined paths of the embedding tables.
    """

    config: Any
    task: Task
    module: Any
    sites: Sites
    word_table: str
    position_table: str

    @property
    def family(self) -> str:
        """`bert`, `roberta` or `gpt2`."""
        return self.config.model_type

    @property
    def width(self) -> int:
        """Hidden size d."""
        return self.config.hidden_size

    @property
    def num_labels(self) -> int:
        """Classes c."""
        return self.config.num_labels

    @property
    def max_length(self) -> int:
        """Longest sentence in tokens; RoBERTa loses `pad_token_id + 1` positions to its offset."""
        offset = self.config.pad_token_id + 1 if self.family == "roberta" else 0
        return self.config.max_position_embeddings - offset

    def init(self, key: Key[Array, ""]) -> Params:
        """Random parameters (normal of the original scale, zero biases)."""
        ids = jnp.zeros((1, 2), jnp.int32)
        return self.module.init(key, ids, jnp.ones((1, 2), bool))["params"]

    def apply(
        self,
        params: Params,
        inputs: Int[Array, "b t"] | Float[Array, "b t d"],
        attention: Bool[Array, "b t"],
        masks: Masks | None = None,
    ) -> Float[Array, ...]:
        """Logits: `[b c]` for classification, `[b t v]` for language models.

        `inputs` are token ids or word embeddings; `masks=None` is evaluation mode.
        """
        variables = {"params": params, "adapters": adapter_masks(masks, self.sites)}
        return self.module.apply(variables, inputs, attention, masks)

    def apply_tapped(
        self,
        params: Params,
        perturbations: Params,
        inputs: Int[Array, "b t"] | Float[Array, "b t d"],
        attention: Bool[Array, "b t"],
        masks: Masks | None = None,
    ) -> tuple[Float[Array, ...], Params]:
        """Logits and every layer's tapped input; the gradient with respect to `perturbations` is its cotangent."""
        variables = {"params": params, "perturbations": perturbations, "adapters": adapter_masks(masks, self.sites)}
        logits, state = self.module.apply(variables, inputs, attention, masks, mutable=["taps"])
        return logits, state["taps"]

    def zero_perturbations(
        self, params: Params, inputs: Int[Array, "b t"] | Float[Array, "b t d"], attention: Bool[Array, "b t"]
    ) -> Params:
        """Zeros of every tapped output's shape."""
        shapes = jax.eval_shape(
            lambda: self.module.apply({"params": params}, inputs, attention, mutable=["perturbations"])[1]
        )
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes["perturbations"])

    def factored_gradient(self, loss, params: Params, wanted, inputs, attention, masks: Masks | None):
        """See `taps.factored_gradient`."""
        return taps.factored_gradient(self, loss, params, wanted, inputs, attention, masks)


@dataclass(frozen=True)
class Loaded:
    """A model with its parameters; `folder` holds the tokenizer, `notes` say what was initialised or left out."""

    model: Model
    params: Params
    folder: str
    notes: tuple[str, ...]


def build(config: Any, task: Task = "classification", *, dropout: float | None = None) -> Model:
    """The model of a Hugging Face config.

    Args:
      config: a `transformers` config of type bert, roberta or gpt2.
      task: what the head computes.
      dropout: one rate in [0, 1) for all sites; None keeps the config's own rates.

    Raises:
      InputError: unsupported architecture, task or activation; names the supported ones.
    """
    found = ARCHITECTURES.get((config.model_type, task))
    if found is None:
        supported = ", ".join(f"{family} ({kind})" for family, kind in ARCHITECTURES)
        raise InputError(f"architecture {config.model_type!r} for {task} is not supported; supported: {supported}")
    config = copy.deepcopy(config)
    if dropout is not None:
        if not 0 <= dropout < 1:
            raise InputError(f"dropout rate {dropout} is not in [0, 1); give a rate such as 0.1")
        for name in _RATES[config.model_type]:
            setattr(config, name, dropout)
    _check_variant(config, task)
    module, sites = found[0], found[1](config, task)
    return Model(config, task, module(config, sites), sites, *_TABLES[config.model_type])


_LOADED: weakref.WeakValueDictionary[tuple, Model] = weakref.WeakValueDictionary()


def _shared(config: Any, task: Task, dropout: float | None) -> Model:
    """The model of a config; equal ones are one object while it lives, so that what was compiled for it is found."""
    key = (type(config), config.to_json_string(use_diff=False), task, dropout)
    model = _LOADED.get(key) or build(config, task, dropout=dropout)
    return _LOADED.setdefault(key, model)


def _check_variant(config: Any, task: Task) -> None:
    """Refuse what the ports would compute wrongly."""
    from grab_jax.models.layers import ACTIVATIONS

    name = config.activation_function if config.model_type == "gpt2" else config.hidden_act
    if name not in ACTIVATIONS:
        raise InputError(f"activation {name!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    if getattr(config, "position_embedding_type", "absolute") not in ("absolute", None):
        raise InputError(f"position embeddings {config.position_embedding_type!r} are not supported, only 'absolute'")
    for flag in ("is_decoder", "add_cross_attention"):
        if getattr(config, flag, False):
            raise InputError(f"{config.model_type} with {flag}=true is not supported; set it to false in config.json")
    if task != "classification" and not config.tie_word_embeddings:
        raise InputError(f"{config.model_type} for {task} with tie_word_embeddings=false is not supported")
    if config.hidden_size % config.num_attention_heads:
        raise InputError(
            f"hidden size {config.hidden_size} is not a multiple of {config.num_attention_heads} attention heads; "
            "correct config.json"
        )


def load(
    name: str,
    *,
    task: Task = "classification",
    revision: str | None = None,
    dropout: float | None = None,
    num_labels: int | None = None,
    key: Key[Array, ""] | None = None,
) -> Loaded:
    """Load a model from `builtin:NAME`, a Hugging Face folder, or a hub id.

    Loaded again with the same settings it is the same `Model`, so that nothing is compiled twice.

    Args:
      name: `builtin:bert-mini`, `builtin:gpt2-mini`, a folder with `config.json` and weights, or a hub id (cache and
        `HF_HUB_OFFLINE` are respected).
      task: what the head computes.
      revision: branch, tag or commit on the hub.
      dropout: one rate for all sites; None keeps the config's.
      num_labels: classes of the head; None keeps the config's.
      key: initialises a head the checkpoint does not have; the default is `jax.random.key(0)`.

    Raises:
      InputError: in one sentence, for a model that is not there, unsupported, or whose tensors do not fit.
    """
    from grab_jax.models import convert

    folder = convert.resolve(name, revision)
    config = convert.read_config(folder)
    if num_labels is not None:
        config.num_labels = num_labels
    model = _shared(config, task, dropout)
    params, notes = convert.read_params(folder, model, jax.random.key(0) if key is None else key)
    return Loaded(model, params, str(folder), tuple(notes))


def save(folder: str, model: Model, params: Params, *, half: bool = False) -> None:
    """Write `config.json` and `model.safetensors` so that Hugging Face transformers loads the folder.

    `half=True` stores float16.
    """
    from grab_jax.models import convert

    convert.write(folder, model, params, half=half)
