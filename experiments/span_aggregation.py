"""Several clients under secure aggregation: the server sees only the sum of their updates, and reads all of them.

    python experiments/span_aggregation.py --clients=3 --size=1

To span decoding a sum of updates is one update of a larger batch: `--clients` simulated clients with `--size` sentences
each take a FedSGD step, their updates are added, and the sum alone is decoded. Prints every client's sentences with
whether they came back word for word and proven.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import common
import jax
import numpy as np
from absl import app, flags
from jaxtyping import Array

from grab_jax import data
from grab_jax.attacks import span
from grab_jax.types import Result

MODEL = flags.DEFINE_string("model", "builtin:bert-mini", "model, as for grab_jax.main")
DATA = flags.DEFINE_string("data", "builtin", "sentences, as for grab_jax.main")
CLIENTS = flags.DEFINE_integer("clients", 3, "clients whose updates are added", lower_bound=1)
SIZE = flags.DEFINE_integer("size", 1, "sentences of each client", lower_bound=1)
DROPOUT = flags.DEFINE_float("dropout", 0.1, "the clients' dropout rate", lower_bound=0.0, upper_bound=0.9)
SHUFFLE = flags.DEFINE_integer("shuffle", 0, "seed that draws the sentences")
SEED = flags.DEFINE_integer("seed", 0, "seed of dropout and search")


def added(updates: Sequence[Mapping[str, Array]]) -> Mapping[str, Array]:
    """The sum of updates: all that secure aggregation shows."""
    return jax.tree.map(lambda *parts: sum(parts), *updates)


def proven(result: Result) -> list[tuple[int, ...]]:
    """The certified sentences of a result, as token ids."""
    sure = [one["certified"] for one in result.evidence["sentences"]]
    rows = zip(np.asarray(result.ids), np.asarray(result.confidence), strict=True)
    return [tuple(ids[known > 0].tolist()) for (ids, known), ok in zip(rows, sure, strict=False) if ok]


def main(_argv: list[str]) -> None:
    """Simulate, add, decode, print."""
    jax.config.update("jax_default_matmul_precision", "highest")
    clients = common.load(common.Setting(MODEL.value, DATA.value, SHUFFLE.value, DROPOUT.value, SEED.value))
    truths = [clients.simulate(i, i * SIZE.value, SIZE.value, DROPOUT.value > 0) for i in range(CLIENTS.value)]
    total = truths[0].problem._replace(observed=added([dict(truth.problem.observed) for truth in truths]))
    result = span.recover(total, SEED.value)
    found, right = proven(result), 0
    for i, truth in enumerate(truths):
        ids, attention, _ = map(np.asarray, truth.batch.batch)
        for row, real in zip(ids, attention, strict=True):
            tokens = tuple(row[real].tolist())
            known = tokens in found
            right += known
            if known:
                found.remove(tokens)
            print(f"client {i + 1}: {'proven ' if known else 'missing'} {data.decode(clients.tokenizer, row)[0]}")
    print(f"{right} of {CLIENTS.value * SIZE.value} sentences proven from the sum alone; {len(found)} proven wrongly")
    print(*result.notes, sep="\n")


if __name__ == "__main__":
    app.run(main)
