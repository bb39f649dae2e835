"""The table of span decoding: exact recovery per setting, each cell a resumable run of its own.

    python experiments/span_table.py --cell=bundled=builtin:0.1:1:8 --cell=bundled=builtin:0.1:4:8

A cell is `NAME=DATA:DROPOUT:BATCH_SIZE:SENTENCES`; give `--cell` once for each. Sentences are drawn from the data with
`--shuffle`, dropout and search with `--seed`. Prints one line of a Markdown table per cell as it finishes.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from pathlib import Path

import common
import numpy as np
from absl import app, flags, logging

from grab_jax import evidence, report, run
from grab_jax.attack_config import AttackConfig
from grab_jax.config import (
    ClientConfig,
    Config,
    DataConfig,
    DefenseConfig,
    KnownConfig,
    ModelConfig,
    RunConfig,
)

MODEL = flags.DEFINE_string("model", "builtin:bert-mini", "model, as for grab_jax.main")
FOLDER = flags.DEFINE_string("folder", "runs/span_table", "a run folder is made here for every cell")
CELLS = flags.DEFINE_multi_string("cell", None, "NAME=DATA:DROPOUT:BATCH_SIZE:SENTENCES", required=True)
SHUFFLE = flags.DEFINE_integer("shuffle", 0, "seed that draws the sentences")
TASK = flags.DEFINE_enum("task", "classification", ["classification", "causal_lm"], "what the client trains")
RATE = flags.DEFINE_bool("known_rate", True, "whether the server knows the dropout rate")
WIRE = flags.DEFINE_enum("wire", "float32", ["float32", "bfloat16", "float16"], "precision of the updates")
NOISE = flags.DEFINE_float("noise", 0.0, "standard deviation of the noise on the updates' normalised tensors")
PRUNE = flags.DEFINE_float("prune", 0.0, "share of the updates' entries set to zero at random")
SEED = flags.DEFINE_integer("seed", 0, "seed of dropout, head and search")
COLUMNS = (
    "data", "dropout", "B", "sentences", "mean tokens", "rows found", "exact", "certified", "wrong", "s / batch",
)  # fmt: skip


def config(cell: str) -> Config:
    """The run of one cell."""
    name, settings = cell.split("=", 1)
    data, dropout, size, sentences = settings.rsplit(":", 3)
    folder = f"{FOLDER.value}/{name}-p{dropout}-b{size}-seed{SEED.value}" + "-unknown" * (not RATE.value) + defended()
    return Config(
        model=ModelConfig(name=MODEL.value, task=TASK.value),
        data=DataConfig(name=data, shuffle=SHUFFLE.value),
        num_batches=int(sentences) // int(size),
        batch_size=int(size),
        client=ClientConfig(dropout=float(dropout), wire=WIRE.value),
        defense=DefenseConfig(noise=NOISE.value, prune=PRUNE.value),
        known=KnownConfig(rate=RATE.value),
        attack=AttackConfig(name="span"),
        seed=SEED.value,
        run=RunConfig(dir=folder, progress="off"),
    )


def defended() -> str:
    """What is done to the updates, as the end of a name."""
    said = {"wire": WIRE.value != "float32" and WIRE.value, "noise": NOISE.value, "prune": PRUNE.value}
    return "".join(f"-{name}{value:g}" if name != "wire" else f"-{value}" for name, value in said.items() if value)


def line(cell: str, folder: Path) -> str:
    """One line of the table, from the run's records."""
    name, settings = cell.split("=", 1)
    _, dropout, size, _ = settings.rsplit(":", 3)
    _, records = report.read(folder)
    records = [record for record in records if not record["control"]]
    n = sum(len(record["sentences"]) for record in records)
    exact = 100 * sum(map(recovered, records)) / n
    proven, wrong = (sum(map(sum, map(count, records))) for count in (evidence.proven, evidence.contradicted))
    found = sum(len(evidence.of(record)["rows"]) for record in records)
    rank = sum(evidence.of(record)["rank"] for record in records)
    seconds = np.mean([record["seconds"]["attack"] for record in records])
    name += defended()
    return common.line(name, dropout, size, n, f"{rank / len(records):.0f}", f"{found}/{rank}", f"{exact:.1f} %",
                       proven, wrong, f"{seconds:.1f}")  # fmt: skip


def recovered(record: dict) -> int:
    """Sentences found word for word, each prediction counted once; without the last token where nothing tells it."""
    told = slice(-1) if evidence.of(record).get("open_end") else slice(None)
    truth = Counter(tuple(sentence["tokens"][told]) for sentence in record["sentences"])
    return (truth & Counter(tuple(prediction["tokens"]) for prediction in record["predictions"])).total()


def main(_argv: list[str]) -> None:
    """Run or resume every cell and print the table."""
    print(common.header(*COLUMNS))
    logging.set_verbosity(logging.WARNING)
    for cell in CELLS.value:
        with contextlib.redirect_stdout(sys.stderr):
            folder = run.run(config(cell))
        print(line(cell, folder), flush=True)


if __name__ == "__main__":
    app.run(main)
