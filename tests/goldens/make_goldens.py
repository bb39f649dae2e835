"""Make the goldens from Hugging Face PyTorch in float64: `python tests/goldens/make_goldens.py`.

Dropout takes given masks: `torch.nn.functional.dropout` is replaced by a function that pops the next mask of a queue
(replacing `nn.Dropout` modules would miss the attention probabilities). Each call checks the shape and the rate of
its site, and the queue must end empty, so the order of sites is Hugging Face's own.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
from goldens import golden

CLASSES = {
    ("bert", "classification"): transformers.BertForSequenceClassification,
    ("bert", "masked_lm"): transformers.BertForMaskedLM,
    ("roberta", "classification"): transformers.RobertaForSequenceClassification,
    ("gpt2", "classification"): transformers.GPT2ForSequenceClassification,
    ("gpt2", "causal_lm"): transformers.GPT2LMHeadModel,
}
LENGTHS = (9, 6, 4)


def model_of(config: Any, task: str, seed: int) -> Any:
    """A random model in which no tensor is at its initial value: all biases and norm scales are perturbed."""
    torch.manual_seed(seed)
    model = CLASSES[config.model_type, task]._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, value in model.named_parameters():
            scale = 0.1 if name.endswith("bias") else 0.2
            value.copy_(scale * torch.randn(value.shape) + (value.mean().round() if value.ndim == 1 else 0))
    return model


def batch(config: Any, task: str, seed: int, lengths: tuple[int, ...] = LENGTHS) -> dict[str, np.ndarray]:
    """Right-padded sentences. Language-model labels stand where the logits do, -100 where there is none."""
    rng = np.random.default_rng(seed)
    attention = np.arange(max(lengths)) < np.array(lengths)[:, None]
    tokens = rng.integers(5, config.vocab_size - 5, attention.shape)
    ids = np.where(attention, tokens, config.pad_token_id).astype(np.int32)
    if task == "classification":
        labels = rng.integers(0, config.num_labels, len(lengths))
    elif task == "masked_lm":
        chosen = attention & (rng.random(ids.shape) < 0.5)
        labels = np.where(chosen, rng.integers(5, config.vocab_size - 5, ids.shape), -100)
    else:
        following = np.roll(np.where(attention, ids, -100), -1, axis=1)
        labels = np.concatenate([following[:, :-1], np.full((len(ids), 1), -100)], axis=1)
    return {"ids": ids, "attention": attention, "labels": labels.astype(np.int32)}


def sites_of(config: Any, task: str) -> dict[str, tuple[str, float]]:
    """Mask axes and rate of each site, in the order in which Hugging Face calls them."""
    if config.model_type == "gpt2":
        hidden, attention, residual = config.embd_pdrop, config.attn_pdrop, config.resid_pdrop
    else:
        hidden, attention = config.hidden_dropout_prob, config.attention_probs_dropout_prob
        residual = hidden
    found = {"embeddings": ("btd", hidden)}
    for i in range(config.num_hidden_layers):
        found[f"layer_{i}.attention"] = ("bhtt", attention)
        found[f"layer_{i}.attention_output"] = ("btd", residual)
        found[f"layer_{i}.ffn_output"] = ("btd", residual)
    if task == "classification" and config.model_type != "gpt2":
        rate = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        heads = {"bert": ["classifier"], "roberta": ["classifier_in", "classifier_out"]}[config.model_type]
        found |= {name: ("bd", rate) for name in heads}
    return found


def masks_of(config: Any, task: str, shape: tuple[int, int], seed: int) -> dict[str, np.ndarray]:
    """0/1 masks for every site."""
    rng = np.random.default_rng(seed)
    size = {"b": shape[0], "t": shape[1], "d": config.hidden_size, "h": config.num_attention_heads}
    return {
        name: (rng.random([size[axis] for axis in axes]) >= rate).astype(np.uint8)
        for name, (axes, rate) in sites_of(config, task).items()
    }


@contextlib.contextmanager
def given_masks(masks: dict[str, np.ndarray], rates: dict[str, float]) -> Iterator[None]:
    """Every dropout call inside takes the next mask; all masks must be used."""
    queue = list(masks)

    def dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        assert training, "dropout in evaluation mode"
        assert not inplace
        name = queue.pop(0)
        assert tuple(x.shape) == masks[name].shape, (name, x.shape)
        assert p == rates[name], (name, p)
        return x * torch.from_numpy(masks[name]).to(x.dtype) / (1 - p)

    original = torch.nn.functional.dropout
    torch.nn.functional.dropout = dropout
    try:
        yield
    finally:
        torch.nn.functional.dropout = original
    assert not queue, f"masks not used: {queue}"


def run(
    model: Any,
    task: str,
    ids: np.ndarray,
    attention: np.ndarray,
    labels: np.ndarray,
    masks: dict | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits, and the gradient of the mean cross-entropy by parameter name; `masks=None` is evaluation mode."""
    model.train(masks is not None)
    model.zero_grad()
    rates = {name: rate for name, (_, rate) in sites_of(model.config, task).items()}
    with contextlib.nullcontext() if masks is None else given_masks(masks, rates):
        given = torch.from_numpy(ids).long(), torch.from_numpy(attention).long()
        logits = model(input_ids=given[0], attention_mask=given[1]).logits
    target = torch.from_numpy(labels).long().flatten()
    torch.nn.functional.cross_entropy(logits.flatten(0, -2), target, ignore_index=-100).backward()
    return logits.detach().numpy(), {name: p.grad.numpy().copy() for name, p in model.named_parameters()}


def rounded(x: np.ndarray) -> np.ndarray:
    """Float64 to 32 of its 52 fraction bits (relative error 1e-10), so that it compresses."""
    bits = np.ascontiguousarray(x, np.float64).view(np.uint64)
    return ((bits + np.uint64(1 << 19)) & ~np.uint64((1 << 20) - 1)).view(np.float64)


def make(family: str, task: str, seed: int) -> None:
    """Write one golden folder."""
    config = golden.config(family)
    model = model_of(config, task, seed)
    folder = golden.HERE / f"{family}-{task}"
    model.save_pretrained(folder)
    data = batch(config, task, seed)
    masks = masks_of(config, task, data["ids"].shape, seed)
    data |= {f"mask/{name}": mask for name, mask in masks.items()}
    data["sites"] = np.array(list(masks))
    data["rates"] = np.array([rate for _, rate in sites_of(config, task).values()])
    for mode, given in (("eval", None), ("masked", masks)):
        logits, grads = run(model.double(), task, data["ids"], data["attention"], data["labels"], given)
        data[f"{mode}/logits"] = logits
        data |= {f"{mode}/grad/{name}": rounded(grad) for name, grad in grads.items()}
    np.savez_compressed(folder / "golden.npz", **data)


if __name__ == "__main__":
    for number, (family, task) in enumerate(golden.KINDS):
        make(family, task, seed=number)
