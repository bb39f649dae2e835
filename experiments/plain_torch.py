"""Gradient matching written plainly in PyTorch, as the attacks' published code has it: what benchmarks compare with.

It runs in a process of its own, where neither library sees the other's threads and memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from transformers import BertConfig


class Rival(NamedTuple):
    """Calls for one sentence: a step of descent (double backward to its embeddings), and the score of a candidate."""

    step: Callable[[], None]
    score: Callable[[], None]


def started(config: BertConfig, ids: Int[np.ndarray, "b t"]) -> Rival:
    """A process with the rival in it; it ends with this one."""
    process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(line: str) -> None:
        print(line, file=process.stdin, flush=True)
        if not process.stdout.readline():
            raise RuntimeError(f"PyTorch's process ended with {process.wait()}")

    ask(json.dumps({"config": config.to_dict(), "ids": ids.tolist()}))
    return Rival(lambda: ask("step"), lambda: ask("score"))


def rival(config: BertConfig, ids: Int[np.ndarray, "b t"]) -> Rival:
    """Mean cosine distance to the gradient of all but the word and position tables; random weights, evaluation mode."""
    import torch
    from transformers import BertForSequenceClassification

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


def _serve() -> None:
    """The first line describes model and sentence; every further one names a call. Each is answered when it is done."""
    setting = json.loads(sys.stdin.readline())
    calls = rival(BertConfig(**setting["config"]), np.array(setting["ids"]))
    print("ready", flush=True)
    for line in sys.stdin:
        getattr(calls, line.strip())()
        print("done", flush=True)


if __name__ == "__main__":
    _serve()
