"""Can span decoding certify what is not there? Decoys: updates that no attack can read, or only in part; and controls.

    python experiments/span_decoys.py --problems=20 --out=runs/decoys.jsonl

Problems take turns through `KINDS`; those of one kind alternate between clients with and without dropout (those of a
wrong rate all have it) and go through `--sizes`. A certified sentence is false if it is none of the client's, one to
one; a certified row (its certificate is above the level of acceptance) if its token is not at its position in the
client's batch. Prints one line of a Markdown table per kind. `--out` gets one line per problem, and the same command
given again continues there.

The two controls say whether the count works: of *untouched* updates everything is certified and true, and *renamed
words* are a lie that no certificate can see, since any words of these embeddings would give the same update.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import common
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jaxtyping import Float

from grab_jax import about, folder, models, simulate, tuning
from grab_jax.attacks import span
from grab_jax.models import first_attention
from grab_jax.span import subspace
from grab_jax.types import Problem, Result, Update

MODEL = flags.DEFINE_string("model", "builtin:bert-mini", "model, as for grab_jax.main")
DATA = flags.DEFINE_string("data", "builtin", "sentences, as for grab_jax.main")
PROBLEMS = flags.DEFINE_integer("problems", 20, "decoys and controls", lower_bound=1)
SIZES = flags.DEFINE_list("sizes", ["1", "2", "4"], "sentences per client batch, in turns")
DROPOUT = flags.DEFINE_float(
    "dropout", 0.1, "rate of the clients that train with dropout", lower_bound=0.01, upper_bound=0.9
)
SHUFFLE = flags.DEFINE_integer("shuffle", 0, "seed that draws the sentences")
SEED = flags.DEFINE_integer("seed", 0, "seed of dropout, decoys and search")
OUT = flags.DEFINE_string("out", None, "file of results, one line of JSON per problem; default: none")
COLUMNS = (
    "kind", "problems", "ranks", "rows found", "rows certified", "of them false", "sentences certified",
    "of them false", "s / problem",
)  # fmt: skip
WRONG_RATES = (0.02, 0.2, 0.3)


class Case(NamedTuple):
    """What problem `index` is: `size` sentences from `start` on."""

    index: int
    kind: str
    start: int
    size: int
    dropout: bool


class Decoy(NamedTuple):
    """A problem and what a certificate may truthfully claim of it: sentences, and (position, token) pairs."""

    problem: Problem
    sentences: list[tuple[int, ...]]
    pairs: set[tuple[int, int]]


class Honest(NamedTuple):
    """The client that a decoy is made from."""

    truth: simulate.Simulated
    clients: common.Clients
    generator: np.random.Generator
    case: Case

    @property
    def problem(self) -> Problem:
        """What its server would see."""
        return self.truth.problem


# --- what is done to an update or to what the attacker believes ---------------------------------------------------


def untouched(honest: Honest) -> Decoy:
    """Everything is there (a control)."""
    return true_of(honest, honest.problem)


def renamed_words(honest: Honest) -> Decoy:
    """The attacker's word table holds the right rows for other words; special tokens keep theirs (a control)."""
    return true_of(honest, with_words(honest.problem, renamed(honest.clients)))


def random_update(honest: Honest) -> Decoy:
    """Random inputs and cotangents, of the same rank."""
    inputs = honest.generator.standard_normal((rank(honest.problem), honest.problem.model.width))
    return nothing_of(honest, inputs)


def shuffled_coordinates(honest: Honest) -> Decoy:
    """Inputs of random tokens, under masks, whose coordinates are in another order: right in every size."""
    generator, first, count = honest.generator, common.described(honest.problem), rank(honest.problem)
    tokens = generator.integers(len(first.words), size=count)
    positions = generator.integers(honest.truth.batch.batch.ids.shape[1], size=count)
    kept = generator.random((count, len(first.words[0]))) >= first.rate
    inputs = common.layer_inputs(first, tokens, positions, kept)
    return nothing_of(honest, inputs[:, generator.permutation(inputs.shape[1])])


def other_weights(honest: Honest) -> Decoy:
    """The attacker's attention weights are of another initialisation: rows are there, sentences cannot be proven."""
    problem = honest.problem
    return true_of(honest, problem._replace(trainable=with_other_attention(problem.trainable, honest.clients)))


def other_embeddings(honest: Honest) -> Decoy:
    """The attacker's word table is another of the same statistics, coordinate by coordinate."""
    return true_of(honest, with_words(honest.problem, mixed_up(honest.clients)))._replace(sentences=[], pairs=set())


def wrong_rate(honest: Honest) -> Decoy:
    """The attacker assumes another dropout rate: rows are found at a wrong scale, or not at all."""
    rate = float(honest.generator.choice(WRONG_RATES))
    return true_of(honest, honest.problem._replace(model=at_rate(honest.problem.model, rate)))


def wrong_mode(honest: Honest) -> Decoy:
    """The attacker assumes dropout where there is none, and none where there is."""
    return true_of(honest, honest.problem._replace(dropout=not honest.problem.dropout))


def inputs_projected_out(honest: Honest) -> Decoy:
    """The gradient's columns lose all that lies along some of the inputs, and with it every other row a little."""
    away = np.linalg.qr(some_inputs(honest)[0].T)[0]
    changed = [g - away @ (away.T @ g) for g in gradients(honest.problem)]
    return true_of(honest, with_gradients(honest.problem, changed))


def inputs_deleted(honest: Honest) -> Decoy:
    """Some of the inputs have no gradient: the other rows are there, and sentences are incomplete."""
    gone, left = some_inputs(honest)
    inputs = np.concatenate([gone, left])
    changed = [left.T @ np.linalg.lstsq(inputs.T, g, rcond=None)[0][len(gone) :] for g in gradients(honest.problem)]
    return true_of(honest, with_gradients(honest.problem, changed))


def two_clients(honest: Honest) -> Decoy:
    """The update is the sum of two clients' updates, one of them with other attention weights."""
    clients, case = honest.clients, honest.case
    params = tuning.unflatten(with_other_attention(tuning.flatten(clients.loaded.params), clients))
    other = clients.simulate(~case.index % 2**32, case.start + case.size, case.size, case.dropout, params)
    both = zip(gradients(honest.problem), gradients(other.problem), strict=True)
    own, more = true_of(honest, honest.problem), true_of(honest._replace(truth=other), other.problem)
    problem = with_gradients(honest.problem, [a / np.linalg.norm(a) + b / np.linalg.norm(b) for a, b in both])
    return Decoy(problem, own.sentences + more.sentences, own.pairs | more.pairs)


CONTROLS = (untouched, renamed_words)
DECOYS = (
    random_update, shuffled_coordinates, other_weights, other_embeddings, wrong_rate, wrong_mode,
    inputs_projected_out, inputs_deleted, two_clients,
)  # fmt: skip
KINDS: dict[str, Callable[[Honest], Decoy]] = {make.__name__.replace("_", " "): make for make in (*DECOYS, *CONTROLS)}


# --- their parts --------------------------------------------------------------------------------------------------


def true_of(honest: Honest, problem: Problem) -> Decoy:
    """A problem of which all that the client has may be claimed."""
    ids, attention, _ = honest.truth.batch.batch
    sentences = [tuple(np.asarray(row)[np.asarray(real)].tolist()) for row, real in zip(ids, attention, strict=True)]
    return Decoy(problem, sentences, common.fed(honest.truth).pairs)


def nothing_of(honest: Honest, inputs: Float[np.ndarray, "r d"]) -> Decoy:
    """The problem of inputs that are no token's, with random cotangents: nothing may be claimed."""
    width = honest.problem.model.width
    changed = [inputs.T @ honest.generator.standard_normal((len(inputs), width)) for _ in range(3)]
    return Decoy(with_gradients(honest.problem, changed), [], set())


def gradients(problem: Problem) -> list[Float[np.ndarray, "d o"]]:
    """Those of the first query, key and value kernels."""
    return first_attention.gradients(problem.model, problem.observed)


def rank(problem: Problem) -> int:
    """Of these gradients, and at least 1."""
    return max(subspace.spectrum(gradients(problem)).rank, 1)


def with_gradients(problem: Problem, changed: Sequence[Float[np.ndarray, "d o"]]) -> Problem:
    """The problem with other gradients of the first query, key and value kernels."""
    paths = first_attention.paths(problem.model)
    parts = changed if len(paths) == len(changed) else [np.concatenate(changed, axis=1)]
    new: Update = {path: jnp.asarray(part, jnp.float32) for path, part in zip(paths, parts, strict=True)}
    return problem._replace(observed={**problem.observed, **new})


def some_inputs(honest: Honest) -> tuple[Float[np.ndarray, "k d"], Float[np.ndarray, "n d"]]:
    """One to a third of the batch's distinct layer inputs, and the others."""
    inputs = honest.generator.permutation(np.unique(common.fed(honest.truth).inputs, axis=0))
    k = int(honest.generator.integers(1, max(2, len(inputs) // 3 + 1)))
    return inputs[:k], inputs[k:]


def with_words(problem: Problem, words) -> Problem:
    """The problem with another word table."""
    return problem._replace(frozen={**problem.frozen, problem.model.word_table: words})


def with_other_attention(params: tuning.Flat, clients: common.Clients) -> tuning.Flat:
    """Parameters with every attention layer of another initialisation."""
    other = initialised(clients)
    return {path: other[path] if "/attention/" in path or "/attn/" in path else value for path, value in params.items()}


@cache
def initialised(clients: common.Clients) -> tuning.Flat:
    """Another initialisation of the model."""
    return tuning.flatten(jax.jit(clients.loaded.model.init)(jax.random.key(clients.setting.seed + 1)))


@cache
def mixed_up(clients: common.Clients):
    """The word table with every coordinate shuffled among the words on its own."""
    words, generator = _words(clients), np.random.default_rng(clients.setting.seed)
    return jnp.asarray(generator.permuted(words, axis=0))


@cache
def renamed(clients: common.Clients):
    """The word table with its rows shuffled among the words, special tokens apart."""
    words, generator = _words(clients), np.random.default_rng(clients.setting.seed)
    usual = np.setdiff1d(np.arange(len(words)), list(clients.tokenizer.all_special_ids))
    words[usual] = words[generator.permutation(usual)]
    return jnp.asarray(words)


def _words(clients: common.Clients) -> Float[np.ndarray, "v d"]:
    return np.array(tuning.flatten(clients.loaded.params)[clients.loaded.model.word_table])


@cache
def at_rate(model: models.Model, rate: float) -> models.Model:
    """The model with another dropout rate."""
    return models.build(model.config, model.task, dropout=rate)


# --- problems and what is claimed of them -------------------------------------------------------------------------


def cases(count: int, sizes: Sequence[int]) -> list[Case]:
    """Kinds change first, then dropout, then sizes; every case has sentences of its own, enough for two clients."""
    turns = [index // len(KINDS) for index in range(count)]
    taken = [sizes[turn // 2 % len(sizes)] for turn in turns]
    starts = [0, *itertools.accumulate(2 * size for size in taken)]
    kinds = [list(KINDS)[index % len(KINDS)] for index in range(count)]
    dropout = [turn % 2 == 0 or KINDS[kind] is wrong_rate for turn, kind in zip(turns, kinds, strict=True)]
    return [Case(i, kinds[i], starts[i], taken[i], dropout[i]) for i in range(count)]


def decoy(one: Case, clients: common.Clients) -> Decoy:
    """The problem of a case."""
    truth = clients.simulate(one.index, one.start, one.size, one.dropout)
    generator = np.random.default_rng([clients.setting.seed, one.index])
    return KINDS[one.kind](Honest(truth, clients, generator, one))


def claimed(result: Result, pad: int) -> list[tuple[int, ...]]:
    """The certified sentences."""
    rows = zip(np.asarray(result.ids), np.asarray(result.confidence), result.evidence["sentences"], strict=False)
    length = lambda ids, sure: np.flatnonzero((ids != pad) | (sure > 0)).max(initial=-1) + 1  # noqa: E731
    return [tuple(ids[: length(ids, sure)].tolist()) for ids, sure, told in rows if told["certified"]]


def judged(one: Decoy, result: Result) -> dict[str, Any]:
    """What was claimed, and which of it is false."""
    sentences = claimed(result, one.problem.vocabulary.pad)
    rows = [row for row in result.evidence["rows"] if row["certificate"] > span.ACCEPT]
    return {
        "rank": result.evidence["rank"],
        "rows": len(result.evidence["rows"]),
        "rows_certified": len(rows),
        "rows_false": [row for row in rows if (row["position"], row["token"]) not in one.pairs],
        "sentences_certified": len(sentences),
        "sentences_false": list((Counter(sentences) - Counter(one.sentences)).elements()),
    }


def solved(one: Case, clients: common.Clients) -> dict[str, Any]:
    """Attack one problem; the record of what came of it."""
    made = decoy(one, clients)
    begin = time.perf_counter()
    result = span.recover(made.problem, one.index)
    seconds = time.perf_counter() - begin
    return {**one._asdict(), **judged(made, result), "seconds": seconds}


def identifier(one: Case, setting: common.Setting, code: str) -> str:
    """Of a result: all that decides it."""
    text = json.dumps([one._asdict(), setting._asdict(), code], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def run(setting: common.Setting, every: Sequence[Case], out: Path | None) -> list[dict[str, Any]]:
    """Records of all cases; those that `out` holds are not attacked again."""
    done, found, clients, code = folder.records(out) if out else {}, [], common.load(setting), about.code_version()
    for one in every:
        name = identifier(one, setting, code)
        if name not in done:
            done[name] = {"id": name, **solved(one, clients)}
            if out:
                folder.add(out, done[name])
        found.append(done[name])
        false = sum(len(r["rows_false"]) + len(r["sentences_false"]) for r in found if not control(r["kind"]))
        print(f"\r{len(found)} of {len(every)} problems, {false} false certificates", end="", file=sys.stderr)
    print(file=sys.stderr)
    return found


def control(kind: str) -> bool:
    """Whether a kind is no decoy."""
    return KINDS[kind] in CONTROLS


def line(name: str, records: Sequence[dict[str, Any]]) -> str:
    """One line of the table."""
    total = lambda key: sum(record[key] for record in records)  # noqa: E731
    false = lambda key: sum(len(record[key]) for record in records)  # noqa: E731
    return common.line(
        name, len(records), total("rank"), total("rows"), total("rows_certified"), false("rows_false"),
        total("sentences_certified"), false("sentences_false"), f"{total('seconds') / len(records):.1f}",
    )  # fmt: skip


def table(records: Sequence[dict[str, Any]]) -> str:
    """A line for each kind, one for all decoys, then the controls."""
    kinds = {kind: [record for record in records if record["kind"] == kind] for kind in KINDS}
    kinds = {kind: own for kind, own in kinds.items() if own}
    decoys = [record for record in records if not control(record["kind"])]
    lines = [line(kind, own) for kind, own in kinds.items() if not control(kind)]
    lines += [line("**all decoys**", decoys)] if decoys else []
    lines += [line(f"control: {kind}", own) for kind, own in kinds.items() if control(kind)]
    return "\n".join([common.header(*COLUMNS), *lines])


def main(_argv: list[str]) -> None:
    """Attack the decoys and print the table."""
    jax.config.update("jax_default_matmul_precision", "highest")
    setting = common.Setting(MODEL.value, DATA.value, SHUFFLE.value, DROPOUT.value, SEED.value)
    out = Path(OUT.value) if OUT.value else None
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
    print(table(run(setting, cases(PROBLEMS.value, list(map(int, SIZES.value))), out)))


if __name__ == "__main__":
    app.run(main)
