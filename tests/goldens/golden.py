"""Tiny configs, and the goldens made from them by `make_goldens.py`; no torch here.

One golden is a Hugging Face folder `<family>-<task>/` (config and float32 weights) with `golden.npz` beside them:
`ids`, `attention`, `labels`, `sites` (dropout sites in the order Hugging Face calls them) with their `rates`,
`mask/SITE`, and for each mode (`eval`, `masked`) `MODE/logits` and `MODE/grad/HF_NAME`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import BertConfig, GPT2Config, RobertaConfig

HERE = Path(__file__).parent
KINDS = (
    ("bert", "classification"),
    ("bert", "masked_lm"),
    ("roberta", "classification"),
    ("gpt2", "classification"),
    ("gpt2", "causal_lm"),
)
MODES = ("eval", "masked")


def config(family: str, **changes: Any) -> Any:
    """A 2-layer, 32-wide, 4-head Hugging Face config with different dropout rates everywhere."""
    encoder = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 28,
        "max_position_embeddings": 24, "type_vocab_size": 2, "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.2, "classifier_dropout": 0.3,
    }  # fmt: skip
    decoder = {
        "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 28, "n_positions": 24, "embd_pdrop": 0.1,
        "attn_pdrop": 0.2, "resid_pdrop": 0.3, "bos_token_id": 59, "eos_token_id": 59, "pad_token_id": 59,
    }  # fmt: skip
    cls, values = {
        "bert": (BertConfig, encoder | {"pad_token_id": 0}),
        "roberta": (RobertaConfig, encoder | {"pad_token_id": 1}),
        "gpt2": (GPT2Config, decoder),
    }[family]
    return cls(**({"vocab_size": 60, "num_labels": 3} | values | changes))


class Golden(NamedTuple):
    """Inputs and what PyTorch makes of them, as float64; `grads` by mode and Hugging Face name."""

    family: str
    task: str
    folder: Path
    ids: np.ndarray
    attention: np.ndarray
    labels: np.ndarray
    rates: dict[str, float]
    masks: dict[str, np.ndarray]
    logits: dict[str, np.ndarray]
    grads: dict[str, dict[str, np.ndarray]]


def read(family: str, task: str) -> Golden:
    """The golden of one architecture."""
    folder = HERE / f"{family}-{task}"
    with np.load(folder / "golden.npz") as file:
        data = dict(file)
    under = lambda prefix: {k.removeprefix(prefix): v for k, v in data.items() if k.startswith(prefix)}  # noqa: E731
    return Golden(
        family, task, folder, data["ids"], data["attention"], data["labels"],
        rates=dict(zip(data["sites"].tolist(), data["rates"].tolist(), strict=True)),
        masks=under("mask/"),
        logits={mode: data[f"{mode}/logits"] for mode in MODES},
        grads={mode: under(f"{mode}/grad/") for mode in MODES},
    )  # fmt: skip


def hf_name(path: str) -> str:
    """`bert/encoder/layer_0/output/dense/kernel` -> `bert.encoder.layer.0.output.dense.weight`."""
    name = re.sub(r"(layer|h)_(\d+)", r"\1.\2", path).replace("/", ".")
    return re.sub(r"(kernel|scale|embedding)$", "weight", name)


def from_hf(family: str, path: str, tensors: dict[str, np.ndarray]) -> np.ndarray:
    """The tensor of our `path`, in our layout: kernels `[in, out]`, as only GPT-2's Conv1D has them on disk."""
    value = tensors[hf_name(path)]
    conv = family == "gpt2" and not path.startswith("score")
    return value.T if path.endswith("/kernel") and not conv else value


def error(found: Any, expected: Any) -> float:
    """Relative norm error."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
