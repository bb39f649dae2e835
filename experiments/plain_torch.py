"""Gradient matching written plainly in PyTorch, as the attacks' published code has it: what benchmarks compare with."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from transformers import BertConfig, BertForSequenceClassification


class Rival(NamedTuple):
    """Calls for one sentence: a step of descent (double backward to its embeddings), and the score of a candidate."""

    step: Callable[[], None]
    score: Callable[[], None]


def rival(config: BertConfig, ids: Int[np.ndarray, "b t"]) -> Rival:
    """Mean cosine distance to the gradient of all but the word and position tables; random weights, evaluation mode."""
    torch.manual_seed(0)
    network = BertForSequenceClassification._from_config(config, attn_implementation="eager").eval()
    tables = ("word_embeddings", "position_embeddings")
    weights = [value for name, value in network.named_parameters() if not any(table in name for table in tables)]
    words, labels = network.get_input_embeddings().weight.detach(), torch.zeros(len(ids), dtype=torch.long)
    start = words[torch.tensor(ids)]

    def gradient(embeds, graph):
        return torch.autograd.grad(network(inputs_embeds=embeds, labels=labels).loss, weights, create_graph=graph)

    observed = [value.detach() for value in gradient(start, False)]

    def distance(ours):
        return sum(1 - (a * b).sum() / (a.norm() * b.norm() + 1e-12) for a, b in zip(ours, observed, strict=True))

    def near():
        return start + 0.01 * torch.randn_like(start)

    def step():
        embeds = near().requires_grad_()
        distance(gradient(embeds, True)).backward(inputs=[embeds])

    return Rival(step, lambda: float(distance(gradient(near(), False))))
